/* SPDX-License-Identifier: MIT */
/* The gradient of one row's loss in each of its entries, from the statistics that row.h has left.
 * Specialised as there: without classes all entries are negatives, compared with eps themselves. No
 * threads, no allocation. */
#ifndef HEX_ROW_GRADIENT_H
#define HEX_ROW_GRADIENT_H

#include "row.h"

/* The statistics of every anchor, those that are coefficients times its grad_output. */
typedef struct {
    const real *k[HEX_STATS_SEVERAL];
    real scale; /* log2(e) / t */
    double beta;
    bool one_shift; /* 1, of every row */
} coefficients_t;

/* Those of one row. */
typedef struct {
    real eps, shift, rest, hard_e, hard, shift_p, mean, pos_e, positive;
} coefficient_t;

static inline coefficient_t coefficient_of(const coefficients_t *c, int64_t i, bool classed)
{
    const real *const *k = c->k;
    return (coefficient_t){k[HEX_STAT_EPS][i],
                           k[HEX_STAT_SHIFT][i],
                           k[HEX_STAT_REST][i],
                           k[HEX_STAT_HARD_E][i],
                           k[HEX_STAT_HARD][i],
                           classed ? k[HEX_STAT_POS_SHIFT][i] : 0,
                           classed ? k[HEX_STAT_POS_MEAN][i] : 0,
                           classed ? k[HEX_STAT_POS_E][i] : 0,
                           classed ? k[HEX_STAT_POSITIVE][i] : 0};
}

INLINE real negative_entry(real e, real b, real s, coefficient_t k)
{
    return s > k.eps ? b * (k.hard_e * e - k.hard) : k.rest * e;
}

/* dL_i / dv of an entry, with e = exp((v - shift) / t) and b = e^beta:
 *
 *     rest e                          on G(i)
 *     b (hard_e e - hard)             on H(i)
 *     pos_e (e - pos_mean) + positive on P(i), by their own shift
 */
INLINE real entry(real v, real s, real kind, coefficient_t k, real scale, real beta,
                  hex_power_t power, bool classed)
{
    const bool is_p = classed && kind == POSITIVE, in = !classed || kind != LEFT_OUT;
    const real x = in ? v - (is_p ? k.shift_p : k.shift) : 0;
    const real t = x * scale, e = exp2_of(t);
    const real negative = negative_entry(e, weight(power, t, e, beta), s, k);
    if (!classed)
        return negative;
    return in ? is_p ? k.pos_e * (e - k.mean) + k.positive : negative : 0;
}

/* What the rows of a slice of entries are to it. */
typedef struct {
    int64_t row,
        column; /* the anchor that all are entries of, and the first of the anchors that each
                            is an entry of; -1: it is no anchor's */
    const real *kind, *column_kind; /* their classes in either; NULL: all are negatives */
} terms_t;

/* v[j] becomes the coefficient of u_j in the gradient of the row's embedding: dL_i / dv_ij where it
 * is an anchor, plus dL_j / dv_ji where the others are. */
INLINE void any_entries(real *restrict v, const real *s, int64_t n, const coefficients_t *c,
                        terms_t of, real beta, hex_power_t power, bool rows, bool columns,
                        bool classed, bool one_shift)
{
    const int64_t at = columns ? of.column : 0;
    const real *restrict eps = c->k[HEX_STAT_EPS] + at, *restrict shift = c->k[HEX_STAT_SHIFT] + at,
                         *restrict rest = c->k[HEX_STAT_REST] + at;
    const real *restrict hard_e = c->k[HEX_STAT_HARD_E] + at, *restrict hard =
                                                                  c->k[HEX_STAT_HARD] + at;
    const real *restrict shift_p = classed ? c->k[HEX_STAT_POS_SHIFT] + at : NULL,
                         *restrict mean = classed ? c->k[HEX_STAT_POS_MEAN] + at : NULL,
                         *restrict pos_e = classed ? c->k[HEX_STAT_POS_E] + at : NULL,
                         *restrict positive = classed ? c->k[HEX_STAT_POSITIVE] + at : NULL;
    const real *kind = of.kind, *column_kind = of.column_kind;
    const real scale = c->scale;
    const coefficient_t own = rows ? coefficient_of(c, of.row, classed) : (coefficient_t){0};
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const real x = v[j], score = classed ? s[j] : x;
        real row_term = 0, column_term = 0;
        if (one_shift) {
            const coefficient_t k = {
                .eps = eps[j], .rest = rest[j], .hard_e = hard_e[j], .hard = hard[j]};
            const real t = (x - 1) * scale, e = exp2_of(t), b = weight(power, t, e, beta);
            v[j] = negative_entry(e, b, x, own) + negative_entry(e, b, x, k);
            continue;
        }
        if (rows)
            row_term = entry(x, score, classed ? kind[j] : 0, own, scale, beta, power, classed);
        if (columns) {
            const coefficient_t k = {eps[j],
                                     shift[j],
                                     rest[j],
                                     hard_e[j],
                                     hard[j],
                                     classed ? shift_p[j] : 0,
                                     classed ? mean[j] : 0,
                                     classed ? pos_e[j] : 0,
                                     classed ? positive[j] : 0};
            column_term =
                entry(x, score, classed ? column_kind[j] : 0, k, scale, beta, power, classed);
        }
        v[j] = rows && columns ? row_term + column_term : rows ? row_term : column_term;
    }
}

/* Of a row of logits: out[j] = dL_i / dv_ij; maybe v itself. */
INLINE void any_logits(const row_t *r, real *out, const coefficients_t *c, int64_t i, real beta,
                       hex_power_t power)
{
    const coefficient_t k = coefficient_of(c, i, true);
    const real *v = r->v, scale = c->scale, tau = r->tau;
    const real positive = entry(v[r->target], 0, POSITIVE, k, scale, beta, power, true);
#pragma omp simd
    for (int64_t j = 0; j < r->n; j++) {
        const real x = v[j];
        out[j] = entry(x, x * tau, x == -(real)INFINITY ? LEFT_OUT : NEGATIVE, k, scale, beta,
                       power, true);
    }
    out[r->target] = positive;
}

static void logits_entries(const row_t *r, real *out, const coefficients_t *c, int64_t i)
{
    switch (power_of(c->beta)) {
    case POWER_0:
        any_logits(r, out, c, i, 0, POWER_0);
        break;
    case POWER_1:
        any_logits(r, out, c, i, 1, POWER_1);
        break;
    default:
        any_logits(r, out, c, i, (real)c->beta, POWER_ANY);
    }
}

INLINE void choose_entries(real *v, const real *s, int64_t n, const coefficients_t *c, terms_t of,
                           real beta, hex_power_t power)
{
    const bool rows = of.row >= 0, columns = of.column >= 0;
    if (of.kind && rows && columns)
        any_entries(v, s, n, c, of, beta, power, true, true, true, false);
    else if (of.kind && rows)
        any_entries(v, s, n, c, of, beta, power, true, false, true, false);
    else if (of.kind)
        any_entries(v, s, n, c, of, beta, power, false, true, true, false);
    else if (rows && columns && c->one_shift)
        any_entries(v, s, n, c, of, beta, power, true, true, false, true);
    else if (rows && columns)
        any_entries(v, s, n, c, of, beta, power, true, true, false, false);
    else if (rows)
        any_entries(v, s, n, c, of, beta, power, true, false, false, false);
    else
        any_entries(v, s, n, c, of, beta, power, false, true, false, false);
}

static void row_entries(real *v, const real *s, int64_t n, const coefficients_t *c, terms_t of)
{
    switch (power_of(c->beta)) {
    case POWER_0:
        choose_entries(v, s, n, c, of, 0, POWER_0);
        break;
    case POWER_1:
        choose_entries(v, s, n, c, of, 1, POWER_1);
        break;
    default:
        choose_entries(v, s, n, c, of, (real)c->beta, POWER_ANY);
    }
}

#endif
