/* SPDX-License-Identifier: MIT */
/* bfloat16 rows as dot_product.h multiplies them, beside the unit rows: used for float at a level
 * with DOTS.
 *
 * They are the input's own numbers times a power of two for each row: the rounding of a unit row
 * would cost the product its exactness. A pair of bfloat16 is one uint32_t, the first in the low
 * half. */
#ifndef HEX_DOT_ROWS_H
#define HEX_DOT_ROWS_H

#include "real.h"

typedef struct {
    int64_t stride, pair_stride;
    uint32_t *features; /* (count + MR, stride): pairs of features of a row */
    uint16_t *rows;     /* (.., pair_stride, 2): two rows by turns, see pair_place; or NULL */
    real *factor;       /* 1 / norm of each row, and zeros for a tile more */
    int64_t begin[2];   /* the first row of z1, and of the negatives, */
    int64_t gap[2];     /* and the places left free before it, 0 or 1 */
    int parts;          /* in which the gradient's coefficients are multiplied: see dot_product.h */
} dots_t;

/* Of this type, or rounded to it before they are normalised (unit.h). */
static bool is_narrow(const hex_problem_t *p, int input)
{
    const hex_dtype_t dtype = p->input[input].dtype;
    return dtype == HEX_BF16 || (dtype == HEX_F32 && p->allow_bf16);
}

static bool are_dots(const hex_problem_t *p)
{
    return DOTS && p->mode != HEX_PAIRED && is_narrow(p, 0) && is_narrow(p, 1) &&
           (p->mode != HEX_UNPAIRED || is_narrow(p, 2));
}

static bool allocate_dots(dots_t *x, int64_t count, int64_t width)
{
    x->stride = stride_of(width / 2);
    x->features = allocate(count + MR, x->stride, sizeof *x->features);
    x->factor = allocate(count + NR + MR, 1, sizeof *x->factor);
    if (!x->features || !x->factor)
        return false;
    memset(x->features + count * x->stride, 0, (size_t)(MR * x->stride) * sizeof *x->features);
    memset(x->factor + count, 0, (NR + MR) * sizeof *x->factor);
    return true;
}

static void free_dots(dots_t *x)
{
    release(x->features);
    release(x->rows);
    release(x->factor);
}

static void copy_dots(const dots_t *x, int64_t i, dots_t *to, int64_t k)
{
    memcpy(to->features + k * to->stride, x->features + i * x->stride,
           (size_t)x->stride * sizeof *x->features);
    to->factor[k] = x->factor[i];
}

/* Of row i, from its unit row and 1 / |z|: they give the input's bits back, for a unit row is
 * rounded by far less than half of their last place. The norm loses its power of two. */
static void make_dots(dots_t *x, int64_t i, const real *u, int64_t width, double inverse)
{
    int exponent;
    const double norm = inverse > 0 ? frexp(1 / inverse, &exponent) : inverse; /* or NaN, or 0 */
    uint32_t *out = x->features + i * x->stride;
    for (int64_t k = 0; k < width / 2; k++)
        out[k] = hex_float_to_bf16((real)(u[2 * k] * norm)) |
                 (uint32_t)hex_float_to_bf16((real)(u[2 * k + 1] * norm)) << 16;
    for (int64_t k = width / 2; k < x->stride; k++)
        out[k] = 0;
    x->factor[i] = (real)(norm > 0 ? 1 / norm : norm);
}

/* ---- pairs of rows, for the gradient ---- */

/* Where row i stands. Two rows at places 2 q and 2 q + 1 are a pair; every range of rows that is
 * met (met_by) begins with one and has no gap. */
static int64_t pair_place(const dots_t *x, int64_t i)
{
    return i + (i >= x->begin[0] ? x->gap[0] : 0) + (i >= x->begin[1] ? x->gap[1] : 0);
}

static const uint16_t *pair_of(const dots_t *x, int64_t i)
{
    return x->rows + pair_place(x, i) / 2 * 2 * x->pair_stride;
}

typedef struct {
    dots_t *x;
    int64_t width;
} pair_context_t;

static void pair_body(int64_t begin, int64_t end, void *context)
{
    const pair_context_t *c = context;
    for (int64_t i = begin; i < end; i++) {
        const uint32_t *z = c->x->features + i * c->x->stride;
        const int64_t place = pair_place(c->x, i);
        uint16_t *out = c->x->rows + place / 2 * 2 * c->x->pair_stride + place % 2;
        for (int64_t k = 0; k < c->width / 2; k++) {
            out[4 * k] = (uint16_t)z[k];
            out[4 * k + 2] = (uint16_t)(z[k] >> 16);
        }
    }
}

/* Places without a row, and what is behind the features, are 0. */
static const char *make_pairs(const hex_problem_t *p, dots_t *x, int64_t count, int64_t width)
{
    const int64_t pairs = count / 2 + 2;
    x->parts = p->several ? 2 : 1;
    x->begin[0] = p->B;
    x->begin[1] = p->B + p->M;
    x->gap[0] = p->mode != HEX_NTXENT ? p->B % 2 : 0; /* there z1 is met as z0 goes on */
    x->gap[1] =
        p->several ? 0 : (x->begin[1] + x->gap[0]) % 2; /* and here the negatives as z1 does */
    x->pair_stride = stride_of(width);
    x->rows = allocate(pairs, 2 * x->pair_stride, sizeof *x->rows);
    if (!x->rows)
        return HEX_NO_MEMORY;
    memset(x->rows, 0, (size_t)(pairs * 2 * x->pair_stride) * sizeof *x->rows);
    pair_context_t c = {x, width};
    return hex_parallel_for(count, 4 * width, pair_body, &c) ? NULL : HEX_NO_THREADS;
}

#endif
