/* SPDX-License-Identifier: MIT */
/* Matrix products: one MR x NR register tile, and the loops over it that the loss is made of: cosines,
 * and the gradient's sum of rows by coefficients.
 *
 * Every element of a tile is a plain sequence of multiply-adds over k, in slices of DEPTH: so c_ij
 * and c_ji are the same bits, and no result depends on how rows are shared out among threads. */
#ifndef HEX_PRODUCT_H
#define HEX_PRODUCT_H

#include "dot_product.h"

/* c[0..MR)[0..NR) (+)= a[i * ai + k * ak] b[k * ldb + j], k in [0, depth). Always whole tiles: the
 * callers pad. */
INLINE void any_tile(int64_t depth, const real *a, int64_t ai, int64_t ak, const real *b,
                     int64_t ldb, real *c, int64_t ldc, bool add)
{
    COUNT(WORK_PRODUCTS, depth * MR * NR);
    vec_t sum[MR][2] = {{{0}}};
    for (int64_t k = 0; k < depth; k++) {
        const vec_t b0 = *(const vec_t *)(b + k * ldb), b1 = *(const vec_t *)(b + k * ldb + LANES);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
            const real x = a[i * ai + k * ak];
            sum[i][0] += x * b0;
            sum[i][1] += x * b1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
        vec_t *out = (vec_t *)(c + i * ldc);
        if (add)
            sum[i][0] += out[0], sum[i][1] += out[1];
        out[0] = sum[i][0];
        out[1] = sum[i][1];
    }
}

static void tile(int64_t depth, const real *a, int64_t lda, const real *b, int64_t ldb, real *c,
                 int64_t ldc, bool add)
{
    any_tile(depth, a, lda, 1, b, ldb, c, ldc, add);
}

/* Of a's transpose: a[k * lda + i]. */
static void tile_transposed(int64_t depth, const real *a, int64_t lda, const real *b, int64_t ldb,
                            real *c, int64_t ldc)
{
    any_tile(depth, a, 1, lda, b, ldb, c, ldc, true);
}

typedef struct {
    const unit_t *unit;
    panels_t *panels;
} panel_context_t;

static void panel_body(int64_t begin, int64_t end, void *context)
{
    const panel_context_t *c = context;
    const int64_t width = c->unit->width, stride = c->unit->stride;
    const int64_t n = c->panels->end - c->panels->begin;
    for (int64_t q = begin; q < end; q++) {
        const real *u = c->unit->u + (c->panels->begin + q * NR) * stride;
        real *out = c->panels->data + q * NR * width;
        const int64_t present = n - q * NR < NR ? n - q * NR : NR;
        if (has_dots(c->unit)) {
            dot_panel(c->unit, c->panels->begin + q * NR, present,
                      (uint32_t *)c->panels->data + q * NR * width / 2);
            continue;
        }
        for (int64_t k = 0; k < width; k += LANES)
            for (int64_t side = 0; side < NR; side += LANES) {
                vec_t square[LANES] = {{0}};
#pragma GCC unroll 16
                for (int64_t j = 0; j < LANES; j++)
                    if (side + j < present)
                        square[j] = *(const vec_t *)(u + (side + j) * stride + k);
                transpose(square);
#pragma GCC unroll 16
                for (int64_t j = 0; j < LANES; j++)
                    *(vec_t *)(out + (k + j) * NR + side) = square[j];
            }
    }
}

static const char *make_panels(const unit_t *unit, int64_t begin, int64_t end, panels_t *panels)
{
    if (panels->data && panels->begin == begin && panels->end == end)
        return NULL;
    release(panels->data);
    panels->begin = begin;
    panels->end = end;
    panels->data = allocate(round_up(end - begin, NR), unit->width,
                            has_dots(unit) ? sizeof(uint16_t) : sizeof(real));
    if (!panels->data)
        return HEX_NO_MEMORY;
    panels->factor = has_dots(unit) ? unit->dots.factor + begin : NULL;
    panel_context_t c = {unit, panels};
    return hex_parallel_for((end - begin + NR - 1) / NR, 2 * NR * unit->width, panel_body, &c)
               ? NULL
               : HEX_NO_THREADS;
}

/* Row i of strip d / NR: what a register tile reads of many rows is one stretch of memory. */
static const real *strip_of(const unit_t *unit, int64_t d, int64_t i)
{
    return unit->strips + d * unit->count + i * NR;
}

/* c[i * ldc + j] = u_(first + i) . u_(panels->begin + from + j) for i in [0, rows), j in [0,
 * columns). Writes whole tiles: c has round_up(rows, MR) rows and room for round_up(columns, NR)
 * columns. `from` is a multiple of NR. */
static void cosines(const unit_t *unit, int64_t first, int64_t rows, const panels_t *panels,
                    int64_t from, int64_t columns, real *c, int64_t ldc)
{
    const int64_t width = unit->width, stride = unit->stride;
    if (has_dots(unit)) {
        dot_cosines(unit, first, rows, panels, from, columns, c, ldc);
        return;
    }
    for (int64_t k = 0; k < width || k == 0; k += DEPTH) /* a slice of a panel stays in the cache */
        for (int64_t j = 0; j < columns; j += NR)
            for (int64_t i = 0; i < rows; i += MR)
                tile(width - k < DEPTH ? width - k : DEPTH, unit->u + (first + i) * stride + k,
                     stride, panels->data + (from + j) * width + k * NR, NR, c + i * ldc + j, ldc,
                     k > 0);
}

/* du[i * width + d] += sum_j v[i * ldv + j] u_(first + j)[d] for i in [0, rows), in whole tiles of
 * rows. */
static void accumulate(const unit_t *unit, int64_t first, int64_t columns, const real *v,
                       int64_t ldv, int64_t rows, real *du)
{
    const int64_t width = unit->width;
    if (has_dots(unit)) {
        dot_accumulate(unit, first, columns, v, ldv, rows, du);
        return;
    }
    for (int64_t j = 0; j < columns; j += DEPTH)
        for (int64_t d = 0; d < width; d += NR)
            for (int64_t i = 0; i < rows; i += MR)
                tile(columns - j < DEPTH ? columns - j : DEPTH, v + i * ldv + j, ldv,
                     strip_of(unit, d, first + j), NR, du + i * width + d, width, true);
}

/* du[j * width + d] += sum_i v[i * ldv + j] u_(first + i)[d] for j in [0, columns), i in [0, rows):
 * the same of v's transpose. `rows` is at most DEPTH. */
static void accumulate_transposed(const unit_t *unit, int64_t first, int64_t rows, const real *v,
                                  int64_t ldv, int64_t columns, real *du)
{
    const int64_t width = unit->width;
    if (has_dots(unit)) {
        dot_accumulate_transposed(unit, first, rows, v, ldv, columns, du);
        return;
    }
    for (int64_t d = 0; d < width; d += NR)
        for (int64_t j = 0; j < columns; j += MR)
            tile_transposed(rows, v + j, ldv, strip_of(unit, d, first), NR, du + j * width + d,
                            width);
}

#endif
