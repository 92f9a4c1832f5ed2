/* SPDX-License-Identifier: MIT */
/* bfloat16 rows, multiplied by an instruction for dot products of pairs of bfloat16, or by one for
 * tiles of them: the three products of product.h on the rows of dot_rows.h.
 *
 * With z_i the input's row times a power of two, which changes no digit, and f_i = 1 / |z_i|,
 *
 *     c_ij = (z_i . z_j) (f_i f_j)                 exact products, summed in float
 *     du_i = sum_j bf16(v_ij f_j) z_j
 *
 * The cosines are as exact as those of float rows. The gradient's coefficients are rounded to 8
 * bits, each by itself and to nearest: of a row's gradient, which is rounded to 8 bits in the end,
 * that is an error of the same size and no larger, for what is rounded off along u_i falls to the
 * projection, and the one positive's part does not come this way. Those of several positives do;
 * they are nearly equal, so their errors would add up, and the terms nearly cancel. Then what was
 * rounded off is multiplied as a second part. */
#ifndef HEX_DOT_PRODUCT_H
#define HEX_DOT_PRODUCT_H

#include "dots.h"
#include "unit.h"

#define DEPTH 256 /* bounds the rounding of long sums: each slice starts from zero */

/* Rows of v, or columns of its transpose, that are converted at a time. */
#define DOT_ROWS (2 * MR)
#define DOT_COLUMNS (4 * MR)

_Static_assert(DOT_COLUMNS % LANES == 0, "whole vectors of columns");

/* any_tile of pairs, `depth` of them; the sum times fi[i] fj[j] where they are given. */
static void dot_tile_by_vectors(int64_t depth, const uint32_t *a, int64_t ai, int64_t ak,
                                const uint32_t *b, int64_t ldb, real *c, int64_t ldc, bool add,
                                const real *fi, const real *fj)
{
    COUNT(WORK_PRODUCTS, 2 * depth * MR * NR);
    dot_sums sum[MR][2] = {{{0}}};
    for (int64_t k = 0; k < depth; k++) {
        const dot_pairs b0 = *(const dot_pairs *)(b + k * ldb),
                        b1 = *(const dot_pairs *)(b + k * ldb + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            const dot_pairs x = a[i * ai + k * ak] + (dot_pairs){0};
            sum[i][0] = dot(sum[i][0], x, b0);
            sum[i][1] = dot(sum[i][1], x, b1);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        dot_sums *out = (dot_sums *)(c + i * ldc);
        if (add)
            sum[i][0] += out[0], sum[i][1] += out[1];
        if (fi) {
            sum[i][0] *= (float)fi[i] * *(const dot_sums *)fj;
            sum[i][1] *= (float)fi[i] * *(const dot_sums *)(fj + LANES);
        }
        out[0] = sum[i][0];
        out[1] = sum[i][1];
    }
}

#ifdef LEVEL_HAS_TILES
/* Where the columns of a transposed v stand as rows. */
#define TURNED (DEPTH / 2 + LANES)

/* The same of whole tiles, with ak = 1, and what is left by vectors; so are sums of nothing. */
static void dot_tile(int64_t depth, const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb,
                     real *c, int64_t ldc, bool add, const real *fi, const real *fj)
{
    const int64_t whole = depth / TILE_PAIRS * TILE_PAIRS;
    COUNT(WORK_PRODUCTS, 2 * whole * MR * NR);
    if (whole > 0)
        tile_dots(whole, a, lda, b, ldb, c, ldc, add);
    if (depth > whole || whole == 0)
        dot_tile_by_vectors(depth - whole, a + whole, lda, 1, b + whole * ldb, ldb, c, ldc,
                            add || whole > 0, fi, fj);
    else if (fi)
        for (int i = 0; i < MR; i++) {
            vec_t *out = (vec_t *)(c + i * ldc);
            out[0] *= fi[i] * *(const vec_t *)fj;
            out[1] *= fi[i] * *(const vec_t *)(fj + LANES);
        }
}

/* a of (depth, DOT_COLUMNS) with its columns as rows, TURNED apart; there is room for whole vectors
 * in both. */
static void turn(const uint32_t *a, int64_t depth, uint32_t *turned)
{
    for (int64_t k = 0; k < depth; k += LANES)
        for (int64_t j = 0; j < DOT_COLUMNS; j += LANES) {
            vec_t square[LANES];
#pragma GCC unroll 16
            for (int64_t l = 0; l < LANES; l++)
                square[l] = *(const vec_t *)(a + (k + l) * DOT_COLUMNS + j);
            transpose(square);
#pragma GCC unroll 16
            for (int64_t l = 0; l < LANES; l++)
                *(vec_t *)(turned + (j + l) * TURNED + k) = square[l];
        }
}
#else
INLINE void begin_tiles(void) {}
INLINE void end_tiles(void) {}

static void dot_tile(int64_t depth, const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb,
                     real *c, int64_t ldc, bool add, const real *fi, const real *fj)
{
    dot_tile_by_vectors(depth, a, lda, 1, b, ldb, c, ldc, add, fi, fj);
}
#endif

/* A panel of the rows from `first` on, as pairs of features. */
static void dot_panel(const unit_t *unit, int64_t first, int64_t present, uint32_t *out)
{
    const int64_t depth = unit->width / 2, stride = unit->dots.stride;
    const uint32_t *rows = unit->dots.features + first * stride;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t j = 0; j < NR; j++)
            out[k * NR + j] = j < present ? rows[j * stride + k] : 0;
}

static void dot_cosines(const unit_t *unit, int64_t first, int64_t rows, const panels_t *panels,
                        int64_t from, int64_t columns, real *c, int64_t ldc)
{
    const int64_t width = unit->width / 2, stride = unit->dots.stride, slice = DEPTH / 2;
    const uint32_t *panel = (const uint32_t *)panels->data;
    begin_tiles();
    for (int64_t k = 0; k < width || k == 0; k += slice) {
        const bool last = k + slice >= width;
        for (int64_t j = 0; j < columns; j += NR)
            for (int64_t i = 0; i < rows; i += MR)
                dot_tile(last ? width - k : slice, unit->dots.features + (first + i) * stride + k,
                         stride, panel + (from + j) * width + k * NR, NR, c + i * ldc + j, ldc,
                         k > 0, last ? unit->dots.factor + first + i : NULL,
                         panels->factor + from + j);
    }
    end_tiles();
}

/* Of part 0 the numbers, of part 1 what narrow() rounds off of them. */
INLINE dot_sums part_of(dot_sums x, int part)
{
    if (part == 0)
        return x;
    const dot_pairs b = (dot_pairs)x;
    const dot_sums narrowed = (dot_sums)((b + 0x7fffu + (b >> 16 & 1u)) & 0xffff0000u);
    return x - narrowed;
}

/* v[0..n) times factor[0..n) as pairs of columns, zeros behind them in the last vector. */
INLINE void dot_row(const real *v, const real *factor, int64_t n, int part, uint32_t *out)
{
    for (int64_t j = 0; j < n; j += 2 * LANES) {
        real tail[2][2 * LANES] = {{0}};
        const real *x = v + j, *f = factor + j;
        if (n - j < 2 * LANES) {
            memcpy(tail[0], x, (size_t)(n - j) * sizeof(real));
            memcpy(tail[1], f, (size_t)(n - j) * sizeof(real));
            x = tail[0], f = tail[1];
        }
        *(dot_pairs *)(out + j / 2) =
            narrow(part_of(*(const dot_sums *)x * *(const dot_sums *)f, part),
                   part_of(*(const dot_sums *)(x + LANES) * *(const dot_sums *)(f + LANES), part));
    }
}

static void dot_accumulate_part(const unit_t *unit, int64_t first, int64_t columns, const real *v,
                                int64_t ldv, int64_t rows, int part, real *du)
{
    const int64_t width = unit->width;
    _Alignas(64) uint32_t a[DOT_ROWS * DEPTH / 2];
    begin_tiles();
    for (int64_t j = 0; j < columns; j += DEPTH) {
        const int64_t n = columns - j < DEPTH ? columns - j : DEPTH;
        const uint32_t *z = (const uint32_t *)pair_of(&unit->dots, first + j);
        for (int64_t i = 0; i < rows; i += DOT_ROWS) {
            const int64_t left = round_up(rows - i, MR), some = left < DOT_ROWS ? left : DOT_ROWS;
            for (int64_t r = 0; r < some; r++)
                dot_row(v + (i + r) * ldv + j, unit->dots.factor + first + j, n, part,
                        a + r * DEPTH / 2);
            for (int64_t d = 0; d < width; d += NR)
                for (int64_t r = 0; r < some; r += MR)
                    dot_tile((n + 1) / 2, a + r * DEPTH / 2, DEPTH / 2, z + d,
                             unit->dots.pair_stride, du + (i + r) * width + d, width, true, NULL,
                             NULL);
        }
    }
    end_tiles();
}

static void dot_accumulate(const unit_t *unit, int64_t first, int64_t columns, const real *v,
                           int64_t ldv, int64_t rows, real *du)
{
    for (int part = 0; part < unit->dots.parts; part++)
        dot_accumulate_part(unit, first, columns, v, ldv, rows, part, du);
}

static void dot_transposed_part(const unit_t *unit, int64_t first, int64_t rows, const real *v,
                                int64_t ldv, int64_t columns, int part, real *du)
{
    const int64_t width = unit->width;
    const real *factor = unit->dots.factor + first;
    const uint32_t *z = (const uint32_t *)pair_of(&unit->dots, first);
    const int64_t depth = (rows + 1) / 2;
    _Alignas(64) uint32_t a[DEPTH / 2 * DOT_COLUMNS];
#ifdef LEVEL_HAS_TILES
    _Alignas(64) uint32_t turned[DOT_COLUMNS * TURNED];
    const int64_t end = round_up(depth, LANES);
    memset(a + depth * DOT_COLUMNS, 0, (size_t)((end - depth) * DOT_COLUMNS) * sizeof *a);
#endif
    begin_tiles();
    for (int64_t j = 0; j < columns; j += DOT_COLUMNS) {
        for (int64_t i = 0; i < rows; i += 2)
            for (int64_t k = 0; k < DOT_COLUMNS; k += LANES) {
                const real *at = v + i * ldv + j + k;
                dot_sums x = *(const dot_sums *)at * (float)factor[i], y = {0};
                if (i + 1 < rows)
                    y = *(const dot_sums *)(at + ldv) * (float)factor[i + 1];
                *(dot_pairs *)(a + i / 2 * DOT_COLUMNS + k) =
                    interleave(narrow(part_of(x, part), part_of(y, part)));
            }
#ifdef LEVEL_HAS_TILES
        turn(a, depth, turned);
#endif
        for (int64_t d = 0; d < width; d += NR)
            for (int64_t k = 0; k < DOT_COLUMNS && j + k < columns; k += MR) {
                real *out = du + (j + k) * width + d;
#ifdef LEVEL_HAS_TILES
                dot_tile(depth, turned + k * TURNED, TURNED, z + d, unit->dots.pair_stride, out,
                         width, true, NULL, NULL);
#else
                dot_tile_by_vectors(depth, a + k, 1, DOT_COLUMNS, z + d, unit->dots.pair_stride,
                                    out, width, true, NULL, NULL);
#endif
            }
    }
    end_tiles();
}

static void dot_accumulate_transposed(const unit_t *unit, int64_t first, int64_t rows,
                                      const real *v, int64_t ldv, int64_t columns, real *du)
{
    for (int part = 0; part < unit->dots.parts; part++)
        dot_transposed_part(unit, first, rows, v, ldv, columns, part, du);
}

#undef DOT_ROWS
#undef DOT_COLUMNS

#endif
