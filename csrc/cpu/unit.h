/* SPDX-License-Identifier: MIT */
/* Unit rows: from the inputs, in any dtype and strides, to packed rows of length one, and the way
 * back for the gradient.
 *
 *   u_i = z_i / |z_i|         dz_i = (du_i - (du_i . u_i) u_i) / |z_i|
 *
 * The norm is exact in direction and scale for every finite row: a float row is summed in double, a
 * double row whose squares leave the range is first scaled by a power of two. 1 / |z| is Inf for
 * doubles below 6e-309, and so is the gradient, which is out of range there. A row of zeros has
 * u = 0 and 1 / |z| = 0, so its cosines and its gradient are 0; a row with a NaN or an Inf becomes
 * NaN throughout, which every cosine with it then is. */
#ifndef HEX_UNIT_H
#define HEX_UNIT_H

#include "dot_rows.h"

/* Rows `stride` apart, of which `width` are D padded by NR; MR rows more (a tile may read past the
 * last one). The padding is 0. */
typedef struct {
    int64_t count, width, stride;
    real *u;
    real *strips;    /* the same cut into NR features each, see strip_of; or NULL */
    double *inverse; /* 1 / |z|, count of them; NULL in copies */
    dots_t dots;     /* none: features NULL */
} unit_t;

static bool has_dots(const unit_t *unit)
{
    return DOTS && unit->dots.features; /* false for the compiler in the other levels */
}

/* Room for rows of a width; with `dots`, for those of dot_rows.h too. */
static bool allocate_rows(unit_t *unit, int64_t count, int64_t width, bool dots)
{
    unit->count = count;
    unit->width = width;
    unit->stride = stride_of(width);
    unit->u = allocate(count + MR, unit->stride, sizeof(real));
    if (!unit->u)
        return false;
    memset(unit->u + count * unit->stride, 0, (size_t)(MR * unit->stride) * sizeof(real));
    return !dots || allocate_dots(&unit->dots, count, width);
}

/* Row i as row k of others. */
static void copy_row(const unit_t *unit, int64_t i, unit_t *to, int64_t k)
{
    memcpy(to->u + k * to->stride, unit->u + i * unit->stride, (size_t)unit->stride * sizeof(real));
    if (has_dots(unit))
        copy_dots(&unit->dots, i, &to->dots, k);
}

static void free_unit(unit_t *unit)
{
    release(unit->u);
    release(unit->strips);
    release(unit->inverse);
    free_dots(&unit->dots);
}

/* ---- the index space of ../hex.h ---- */

typedef struct {
    int64_t begin, end;
} range_t;

static range_t rows_of(const hex_problem_t *p, int input)
{
    const int64_t z1 = p->B, negatives = p->B + p->M;
    return input == 0   ? (range_t){0, z1}
           : input == 1 ? (range_t){z1, negatives}
                        : (range_t){negatives, negatives + (p->mode == HEX_UNPAIRED ? p->K : 0)};
}

/* Those of an input that belong to the block; paired negatives have no place in the index space. */
static range_t block_of(const hex_problem_t *p, int input)
{
    const range_t all = rows_of(p, input);
    const int64_t rows = input < 2 ? hex_block_rows(p, input) : all.end - all.begin;
    const int64_t begin = all.begin + (input < 2 && rows > 0 ? p->first : 0);
    return (range_t){begin, begin + rows};
}

/* The rows that the rows of an input meet: as their candidates, or as anchors whose candidates they
 * are. One positive that is no negative's neighbour, as in unpaired, is not met. */
static range_t met_by(const hex_problem_t *p, int input)
{
    switch (p->mode) {
    case HEX_NTXENT:
        return (range_t){0, p->B + p->M};
    case HEX_QUERY:
    case HEX_CROSS:
        return rows_of(p, 1 - input);
    case HEX_UNPAIRED:
        if (input == 0)
            return (range_t){p->several ? p->B : p->B + p->M, p->B + p->M + p->K};
        return input == 2 || p->several ? rows_of(p, 0) : (range_t){0, 0};
    default:
        return (range_t){0, 0};
    }
}

/* Of row i of z0 or z1, the other view of its image. */
static inline int64_t partner(const hex_problem_t *p, int64_t i)
{
    return i < p->B ? i + p->B : i - p->B;
}

/* ---- rows in and out ---- */

/* One row's elements in the compute type; unit stride apart, so that the loop is vectorised. */
#define LOAD(type, convert)                                                                        \
    {                                                                                              \
        const type *restrict s = (const type *)x->data + row_offset(x, r);                         \
        if (x->col == 1)                                                                           \
            for (int64_t k = 0; k < D; k++)                                                        \
                out[k] = (real)convert(s[k]);                                                      \
        else                                                                                       \
            for (int64_t k = 0; k < D; k++)                                                        \
                out[k] = (real)convert(s[k * x->col]);                                             \
        return;                                                                                    \
    }

static void load(const hex_rows_t *x, int64_t r, int64_t D, real *restrict out)
{
    switch (x->dtype) {
    case HEX_F32:
        LOAD(float, )
    case HEX_F64:
        LOAD(double, )
    case HEX_F16:
        LOAD(uint16_t, hex_f16_to_float)
    case HEX_BF16:
        LOAD(uint16_t, hex_bf16_to_float)
    }
}
#undef LOAD

static double sum_of_squares(const real *x, int64_t D)
{
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < D; k++)
        sum += (double)x[k] * (double)x[k];
    return sum;
}

/* Normalises x[0..D) in place and returns 1 / |x|. */
static double normalize(real *restrict x, int64_t D)
{
    COUNT(WORK_ROWS, 1);
    double scale = 1, sum = sum_of_squares(x, D);
    if (!(sum > 1e-200 && sum < 1e200)) { /* of finite floats, a row of zeros only */
        double largest = 0, finite = 0;
        for (int64_t k = 0; k < D; k++) {
            const double a = fabs((double)x[k]);
            largest = a > largest ? a : largest;
            finite += a * 0; /* NaN if any element is Inf or NaN */
        }
        if (finite != 0 || largest == 0) {
            for (int64_t k = 0; k < D; k++)
                x[k] = (real)finite;
            return finite; /* NaN or 0 */
        }
        int exponent;
        frexp(largest, &exponent);
        scale = ldexp(1, exponent > -1000 ? -exponent : 1000); /* largest scale < 1 */
        for (int64_t k = 0; k < D; k++)
            x[k] = (real)((double)x[k] * scale);
        sum = sum_of_squares(x, D);
    }
    const double inverse = 1 / sqrt(sum);
    for (int64_t k = 0; k < D; k++)
        x[k] = (real)((double)x[k] * inverse);
    return scale * inverse;
}

/* Which unit rows: all; those of the block alone, whose cosines are at hand; or all, and strips of
 * those that are no pairs of bfloat16. */
typedef enum { ALL_ROWS, ROWS_OF_BLOCK, ROWS_AND_STRIPS } wanted_t;

typedef struct {
    const hex_problem_t *p;
    const hex_rows_t *input; /* its own, or the guide's */
    int64_t D;
    bool own; /* the block's rows of z0 and z1 alone */
    unit_t *unit;
} unit_context_t;

/* The input that unit row i comes from, and its row there. */
static int source(const hex_problem_t *p, int64_t i, int64_t *row)
{
    const int input = i < p->B ? 0 : i < p->B + p->M ? 1 : 2;
    *row = i - rows_of(p, input).begin;
    return input;
}

static void unit_body(int64_t begin, int64_t end, void *context)
{
    const unit_context_t *c = context;
    const int64_t D = c->D, stride = c->unit->stride;
    for (int64_t i = begin; i < end; i++) {
        int64_t row;
        const int input = source(c->p, i, &row);
        const hex_rows_t *x = &c->input[input];
        if (c->own && (input == 2 || row < c->p->first || row >= c->p->first + c->p->count))
            continue;
        real *u = c->unit->u + i * stride;
        load(x, row, D, u);
        if (has_dots(c->unit) && x->dtype == HEX_F32)
            for (int64_t k = 0; k < D; k++)
                u[k] = (real)hex_bf16_to_float(hex_float_to_bf16((float)u[k]));
        c->unit->inverse[i] = normalize(u, D);
        for (int64_t k = D; k < stride; k++)
            u[k] = 0;
        for (int64_t d = 0; c->unit->strips && d < c->unit->width; d += NR)
            memcpy(c->unit->strips + d * c->unit->count + i * NR, u + d, NR * sizeof(real));
        if (has_dots(c->unit))
            make_dots(&c->unit->dots, i, u, c->unit->width, c->unit->inverse[i]);
    }
}

/* Unit rows of the problem, or of its guide, but negatives of each anchor's own, which are many and
 * used once each. */
static const char *make_unit(const hex_problem_t *p, const hex_rows_t input[3], int64_t D,
                             bool dots, wanted_t wanted, unit_t *unit)
{
    const int64_t count = rows_of(p, 2).end;
    unit->inverse = allocate(count, 1, sizeof(double));
    if (!unit->inverse || !allocate_rows(unit, count, round_up(D, NR), dots))
        return HEX_NO_MEMORY;
    if (wanted == ROWS_AND_STRIPS && !has_dots(unit)) {
        unit->strips = allocate(unit->count, unit->width, sizeof(real));
        if (!unit->strips)
            return HEX_NO_MEMORY;
    }
    unit_context_t c = {p, input, D, wanted == ROWS_OF_BLOCK, unit};
    return hex_parallel_for(unit->count, 8 * unit->width, unit_body, &c) ? NULL : HEX_NO_THREADS;
}

/* Sums in double: c_p and the projection are few, and their error enters every term of a row. */
static double dot_product(const real *restrict x, const real *restrict y, int64_t n)
{
    COUNT(WORK_DOTS, n);
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; k++)
        sum += (double)x[k] * (double)y[k];
    return sum;
}

/* dz = (du - along u) inverse, rounded once to the dtype of the input; exactly 0 for a row of
 * zeros. */
#define STORE(type, convert)                                                                       \
    {                                                                                              \
        type *restrict out = (type *)dz + row * D;                                                 \
        for (int64_t k = 0; k < D; k++)                                                            \
            out[k] = convert(inverse == 0 ? 0 : ((double)du[k] - along * (double)u[k]) * inverse); \
        return;                                                                                    \
    }

static void store(void *dz, hex_dtype_t dtype, int64_t row, int64_t D, const real *restrict du,
                  const real *restrict u, double along, double inverse)
{
    switch (dtype) {
    case HEX_F32:
        STORE(float, (float))
    case HEX_F64:
        STORE(double, )
    case HEX_F16:
        STORE(uint16_t, hex_float_to_f16)
    case HEX_BF16:
        STORE(uint16_t, hex_float_to_bf16)
    }
}
#undef STORE

/* Unit rows [begin, end) as panels of NR columns: panels[j / NR][k][j % NR], the missing columns of
 * the last one 0. */
typedef struct {
    int64_t begin, end;
    real *data;
    const real *factor; /* of the rows, if data is of pairs of bfloat16 */
} panels_t;

#endif
