/* SPDX-License-Identifier: MIT */
/* Row kernels: what is done with the cosines of one anchor. Notation and formulas: ../hex.h.
 *
 * Exponentials are taken of (c - shift) / tau <= 0 with shift the largest cosine of the row, in the
 * compute type; the row's scalars are then put on the scale of m = max(0, d_max) in double. Sums
 * run in the compute type over SLICE elements and in double beyond, so their error does not grow
 * with the number of negatives. */
#ifndef HEX_ROW_H
#define HEX_ROW_H

#include "product.h"

#define SLICE 512

/* b = e^beta, where e = 2^t. The usual powers 0 and 1 cost no second exponential. */
static inline real weight(hex_power power, real t, real e, real beta)
{
    return power == POWER_0 ? 1 : power == POWER_1 ? e : exp2_of(beta * t);
}

/* The largest c[j] <= limit, -Inf where there is none. NaNs are passed over here: the sums find
 * them. In vectors, as are the other extremes, for clang makes none of a reduction by max. */
static real row_largest(const real *restrict c, int64_t n, real limit)
{
    COUNT(WORK_COMPARED, n);
    const vec_t none = -(real)INFINITY - (vec_t){0};
    vec_t largest = none;
    for (int64_t j = 0; j < n; j += LANES) {
        const vec_t x = read_vec(c + j, n - j, -(real)INFINITY);
        const vec_t kept = pick(x <= limit, x, none);
        largest = pick(kept > largest, kept, largest);
    }
    return vec_largest(largest);
}

/* Sums over the row with x = c - shift: over G of e and x e; over H the count, b, b e, x b and x b
 * e. */
typedef struct {
    double rest, rest_x, count, b, be, bx, bex;
} sums_t;

INLINE void add_sums(const real *restrict c, int64_t n, real shift, real eps, real scale, real beta,
                     hex_power power, sums_t *s)
{
    for (int64_t from = 0; from < n; from += SLICE) {
        const int64_t to = n - from < SLICE ? n : from + SLICE;
        real rest = 0, rest_x = 0, count = 0, sb = 0, sbe = 0, sbx = 0, sbex = 0;
#pragma omp simd reduction(+ : rest, rest_x, count, sb, sbe, sbx, sbex)
        for (int64_t j = from; j < to; j++) {
            const real x = c[j] - shift, t = x * scale, e = exp2_of(t);
            const bool hard = c[j] > eps;
            const real g = hard ? 0 : e, b = hard ? weight(power, t, e, beta) : 0;
            rest += g;
            rest_x += x * g;
            count += hard ? (real)1 : (real)0;
            sb += b;
            sbe += b * e;
            sbx += x * b;
            sbex += x * b * e;
        }
        s->rest += (double)rest, s->rest_x += (double)rest_x, s->count += (double)count,
            s->b += (double)sb;
        s->be += (double)sbe, s->bx += (double)sbx, s->bex += (double)sbex;
    }
}

static sums_t row_sums(const real *c, int64_t n, real shift, real eps, real scale, double beta)
{
    sums_t s = {0};
    switch (power_of(beta)) {
    case POWER_0:
        add_sums(c, n, shift, eps, scale, 0, POWER_0, &s);
        break;
    case POWER_1:
        add_sums(c, n, shift, eps, scale, 1, POWER_1, &s);
        break;
    default:
        add_sums(c, n, shift, eps, scale, (real)beta, POWER_ANY, &s);
    }
    return s;
}

/* A row's statistics but for its eps, from its sums; c: the row again, its n negatives, where the
 * shift is its own, or NULL. Returns the loss. */
static double row_scalars(const hex_problem *p, sums_t s, const real *c, int64_t n, double cp,
                          double shift, real eps, double tau, double *out)
{
    const bool released = p->variant == HEX_RELEASED && eps != (real)INFINITY;
    out[HEX_STAT_COUNT] = s.count;
    if (s.count == (double)n && (released || n == 0)) /* nothing to repel; NaN if the positive is */
        return cp - cp;
    out[HEX_STAT_SHIFT] = shift;

    if (released) { /* L = -c_p/tau + log(sum_G exp(c/tau)) + n exp(-1/tau): H only left out */
        const double constant = (double)n * exp(-1 / tau);
        out[HEX_STAT_REST] = 1 / (tau * s.rest);
        out[HEX_STAT_POSITIVE] = -1 / tau;
        out[HEX_STAT_DTAU] = (cp - shift - s.rest_x / s.rest + constant) / (tau * tau);
        return (shift - cp) / tau + log(s.rest) + constant;
    }

    const double largest = (shift - cp) / tau, m = largest > 0 ? largest : 0;
    double unit = exp(largest - m); /* e_j = unit * the summed exponential */
    const double e0 = exp(-m);
    double local = 0, r = 0, floor_ = 0;
    bool clamped = false;
    if (s.count > 0) {
        r = unit * s.be / s.b;
        local = s.count * (r - p->tau_plus * e0) / (1 - p->tau_plus);
        floor_ = s.count * exp(-(1 + cp) / tau - m);
        clamped = local < floor_;
        local = clamped ? floor_ : local;
    }
    if (clamped && s.count < (double)n && c) {
        /* The largest is in H and no longer counts. G may lie too far below it for the first sums,
         * so it is summed again, by its own largest. */
        out[HEX_STAT_SHIFT] = shift = (double)row_largest(c, n, eps);
        s = row_sums(c, n, (real)shift, eps, (real)(M_LOG2E / tau), p->beta);
        unit = exp((shift - cp) / tau - m);
    }
    const double rest = unit * s.rest, above = shift - cp;
    const double S = local + rest, k = 1 / (tau * (e0 + S)), x = m + log(S);
    out[HEX_STAT_REST] = k * unit;
    out[HEX_STAT_POSITIVE] = -k * S;
    out[HEX_STAT_SHARE] = local / (e0 + S);
    /* -tau dL/dtau = sum_j (c_j - c_p) dL/dc_j: only differences, but for the floor, which knows
     * c_p itself */
    double moment = k * unit * (s.rest_x + above * s.rest);
    if (s.count > 0 && !clamped) {
        const double h = k * s.count / ((1 - p->tau_plus) * s.b);
        const double hard_e = h * (1 + p->beta) * unit, hard = h * p->beta * r;
        out[HEX_STAT_HARD_E] = hard_e;
        out[HEX_STAT_HARD] = hard;
        out[HEX_STAT_POSITIVE] -= k * s.count * p->tau_plus * e0 / (1 - p->tau_plus);
        moment += hard_e * (s.bex + above * s.be) - hard * (s.bx + above * s.b);
    }
    out[HEX_STAT_DTAU] = ((clamped ? k * floor_ * (1 + cp) : 0) - moment) / tau;
    return x <= 0 ? log1p(exp(x)) : x + log1p(exp(-x));
}

/* Prepares the statistics of a row; false if it has none: its loss is NaN then. */
static bool row_begin(real eps, double tau, double *out)
{
    const bool valid = tau > 0 && eps == eps;
    for (int k = 0; k < HEX_STATS; k++)
        out[k] = valid ? 0 : NAN;
    out[HEX_STAT_EPS] = (double)eps;
    return valid;
}

/* One row of the loss: c its n negatives, cp its positive. Fills out[HEX_STATS] and returns the
 * loss. */
static double row_forward(const hex_problem *p, const real *c, int64_t n, double cp,
                          double eps_given, double tau, double *out)
{
    const real eps = round_down(eps_given);
    if (!row_begin(eps, tau, out))
        return NAN;
    const bool released = p->variant == HEX_RELEASED && eps != (real)INFINITY;
    const real shift = row_largest(c, n, released ? eps : (real)INFINITY);
    const sums_t s = row_sums(c, n, shift, eps, (real)(M_LOG2E / tau), p->beta);
    return row_scalars(p, s, c, n, cp, (double)shift, eps, tau, out);
}

/* The coefficients of one row's gradient, times that row's grad_output: see HEX_STAT_*. */
typedef struct {
    const real *eps, *shift, *rest, *hard_e, *hard;
} coefficients_t;

INLINE real entry(real c, real eps, real shift, real rest, real hard_e, real hard, real scale,
                  real beta, hex_power power)
{
    const real t = (c - shift) * scale, e = exp2_of(t);
    return c > eps ? weight(power, t, e, beta) * (hard_e * e - hard) : rest * e;
}

/* c[j] becomes the coefficient of u_j in the gradient of u_i: dL_i/dc_ij where i is an anchor (row
 * terms, ri), plus dL_j/dc_ji where the others are (column terms, from rj on). */
INLINE void entries(real *restrict c, int64_t n, const coefficients_t *k, int64_t ri, int64_t rj,
                    real scale, real beta, hex_power power)
{
    if (ri >= 0) {
        const real eps = k->eps[ri], shift = k->shift[ri], rest = k->rest[ri];
        const real hard_e = k->hard_e[ri], hard = k->hard[ri];
        if (rj >= 0) {
            const real *restrict ej = k->eps + rj, *restrict sj = k->shift + rj,
                                 *restrict gj = k->rest + rj;
            const real *restrict hej = k->hard_e + rj, *restrict hj = k->hard + rj;
#pragma omp simd
            for (int64_t j = 0; j < n; j++)
                c[j] = entry(c[j], eps, shift, rest, hard_e, hard, scale, beta, power) +
                       entry(c[j], ej[j], sj[j], gj[j], hej[j], hj[j], scale, beta, power);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < n; j++)
                c[j] = entry(c[j], eps, shift, rest, hard_e, hard, scale, beta, power);
        }
    } else {
        const real *restrict ej = k->eps + rj, *restrict sj = k->shift + rj,
                             *restrict gj = k->rest + rj;
        const real *restrict hej = k->hard_e + rj, *restrict hj = k->hard + rj;
#pragma omp simd
        for (int64_t j = 0; j < n; j++)
            c[j] = entry(c[j], ej[j], sj[j], gj[j], hej[j], hj[j], scale, beta, power);
    }
}

static void row_entries(real *c, int64_t n, const coefficients_t *k, int64_t ri, int64_t rj,
                        real scale, double beta)
{
    switch (power_of(beta)) {
    case POWER_0:
        entries(c, n, k, ri, rj, scale, 0, POWER_0);
        break;
    case POWER_1:
        entries(c, n, k, ri, rj, scale, 1, POWER_1);
        break;
    default:
        entries(c, n, k, ri, rj, scale, (real)beta, POWER_ANY);
    }
}

/* ---- quantiles and bounds ---- */

/* Without what rounding took past 1; NaN stays. */
static inline real cosine(real c) { return c > 1 ? 1 : c < -1 ? -1 : c; }

/* The 'nearest' rank of a quantile among n, from below; halves to even. */
static inline int64_t rank(double quantile, int64_t n)
{
    return (int64_t)nearbyint(quantile * (double)(n - 1));
}

/* Least and largest of a row; NaN if it holds one or is empty. */
static void row_bounds(const real *restrict c, int64_t n, real *low, real *high)
{
    COUNT(WORK_COMPARED, n);
    vec_t least = (real)INFINITY - (vec_t){0}, largest = -least, sum = {0};
    for (int64_t j = 0; j < n; j += LANES) {
        const vec_t x = read_vec(c + j, n - j, c[0]);
        least = pick(x < least, x, least);
        largest = pick(x > largest, x, largest);
        sum += x * 0;
    }
    const bool finite = n && vec_sum(sum) == 0;
    *low = finite ? vec_least(least) : (real)NAN;
    *high = finite ? vec_largest(largest) : (real)NAN;
}

static inline int64_t count_up_to(const real *restrict c, int64_t n, real limit)
{
    COUNT(WORK_COMPARED, n);
    int64_t count = 0;
    for (int64_t from = 0; from < n; from += SLICE) {
        const int64_t to = n - from < SLICE ? n : from + SLICE;
        word slice = 0;
#pragma omp simd reduction(+ : slice)
        for (int64_t j = from; j < to; j++)
            slice += c[j] <= limit;
        count += (int64_t)slice;
    }
    return count;
}

/* The element of rank `rank` (0 the least) of c[0..n), exactly: the value is bisected and each step
 * counts the elements below, which is one compare and one add a vector. Two more passes end it as
 * soon as the element stands alone in the bracket, some ten steps for a batch of cosines; equal
 * elements end it when the bracket holds no other number. NaN if the row holds one. The numbers are
 * cosines: the difference of any two is finite. */
static real row_select(const real *restrict c, int64_t n, int64_t rank)
{
    COUNT(WORK_SELECTED, n);
    real low, high;
    row_bounds(c, n, &low, &high);
    if (low != low || rank == n - 1)
        return high;
    if (rank == 0 || low == high || count_up_to(c, n, low) > rank)
        return low;
    for (;;) { /* #(c <= low) <= rank < #(c <= high) */
        const real middle = low + (high - low) / 2;
        if (middle <= low || middle >= high)
            return high;
        const int64_t count = count_up_to(c, n, middle);
        if (count == rank + 1)
            return row_largest(c, n, middle);
        if (count == rank) { /* the least above */
            COUNT(WORK_COMPARED, n);
            const vec_t none = (real)INFINITY - (vec_t){0};
            vec_t least = none;
            for (int64_t j = 0; j < n; j += LANES) {
                const vec_t x = read_vec(c + j, n - j, (real)INFINITY);
                const vec_t above = pick(x > middle, x, none);
                least = pick(above < least, above, least);
            }
            return vec_least(least);
        }
        if (count > rank)
            high = middle;
        else
            low = middle;
    }
}

#endif
