/* SPDX-License-Identifier: MIT */
/* Row kernels where every entry has a class: what is done with the values of one anchor whose
 * positives may be several and whose H(i) may come from elsewhere. Formulas and the meaning of the
 * statistics: ../labelled.h.
 *
 * A row is three vectors: v its values (cosines, or logits), s its scores, hard where s > eps, and
 * kind. Positives and negatives are summed by their own largest value, as in row.h, so that
 * neither underflows beside the other; the scalars are put on one scale in double. */
#ifndef HEX_CLASS_ROW_H
#define HEX_CLASS_ROW_H

#include "row.h"

#define LEFT_OUT ((real)0)
#define POSITIVE ((real)1)
#define NEGATIVE ((real)2)

typedef struct {
    real positive, hard, rest;                /* the largest of P, H, G; -Inf where empty */
    double positives, negatives, sum, finite; /* |P|, |H| + |G|, sum_P v; 0, or NaN if any v is */
    double unknown;                           /* negatives with a v, whose s is NaN */
} peaks_t;

static peaks_t row_peaks(const real *restrict v, const real *restrict s, const real *restrict kind,
                         int64_t n, real eps)
{
    COUNT(WORK_COMPARED, n);
    const vec_t none = -(real)INFINITY - (vec_t){0}, one = 1 - (vec_t){0};
    vec_t positive = none, hard = none, rest = none;
    peaks_t p = {0};
    for (int64_t from = 0; from < n; from += SLICE) {
        const int64_t to = n - from < SLICE ? n : from + SLICE;
        vec_t count_p = {0}, count_n = {0}, finite = {0}, unknown = {0};
        double sum = 0;
        for (int64_t j = from; j < to; j += LANES) {
            const vec_t of = read_vec(kind + j, to - j, LEFT_OUT), x = read_vec(v + j, to - j, 0),
                        score = read_vec(s + j, to - j, 0);
            const mask_t is_p = of == POSITIVE, is_n = of == NEGATIVE, is_h = is_n & (score > eps);
            const vec_t of_p = pick(is_p, x, none), of_h = pick(is_h, x, none),
                        of_g = pick(is_n & ~is_h, x, none);
            positive = pick(of_p > positive, of_p, positive);
            hard = pick(of_h > hard, of_h, hard);
            rest = pick(of_g > rest, of_g, rest);
            count_p += where(is_p, one);
            count_n += where(is_n, one);
            finite += where(is_p | is_n, x * 0);
            unknown += where(is_n & (score != score) & (x == x), one);
        }
        const real positives = vec_sum(count_p);
        if (positives > 0) /* most slices have none */
            for (int64_t j = from; j < to; j++)
                sum += kind[j] == POSITIVE ? (double)v[j] : 0;
        p.positives += (double)positives, p.negatives += (double)vec_sum(count_n);
        p.sum += sum, p.finite += (double)vec_sum(finite);
        p.unknown += (double)vec_sum(unknown);
    }
    p.positive = vec_largest(positive);
    p.hard = vec_largest(hard);
    p.rest = vec_largest(rest);
    return p;
}

/* With x = v - shift: over G of e, x e; over H the count, b, b e, x b, x b e; over P of e, x, x e.
 */
typedef struct {
    double rest, rest_x, count, b, be, bx, bex, e, x, ex;
} class_sums_t;

INLINE void add_class_sums(const real *restrict v, const real *restrict s,
                           const real *restrict kind, int64_t n, real shift, real positive,
                           real eps, real scale, real beta, hex_power power, class_sums_t *out)
{
    for (int64_t from = 0; from < n; from += SLICE) {
        const int64_t to = n - from < SLICE ? n : from + SLICE;
        real rest = 0, rest_x = 0, count = 0, sb = 0, sbe = 0, sbx = 0, sbex = 0, pe = 0, px = 0,
             pex = 0;
#pragma omp simd reduction(+ : rest, rest_x, count, sb, sbe, sbx, sbex, pe, px, pex)
        for (int64_t j = from; j < to; j++) {
            const bool is_p = kind[j] == POSITIVE, is_n = kind[j] == NEGATIVE,
                       hard = is_n & (s[j] > eps), other = is_n & !hard;
            /* what is left out may be infinite, and 0 times that is not 0 */
            const real x = (is_p | is_n) ? v[j] - (is_p ? positive : shift) : 0;
            const real t = x * scale, e = exp2_of(t);
            const real b = hard ? weight(power, t, e, beta) : 0;
            const real g = other ? e : 0, p = is_p ? e : 0;
            rest += g;
            rest_x += x * g;
            count += hard ? (real)1 : (real)0;
            sb += b;
            sbe += b * e;
            sbx += x * b;
            sbex += x * b * e;
            pe += p;
            px += is_p ? x : 0;
            pex += x * p;
        }
        out->rest += (double)rest, out->rest_x += (double)rest_x, out->count += (double)count;
        out->b += (double)sb, out->be += (double)sbe, out->bx += (double)sbx;
        out->bex += (double)sbex, out->e += (double)pe, out->x += (double)px;
        out->ex += (double)pex;
    }
}

static class_sums_t row_class_sums(const real *v, const real *s, const real *kind, int64_t n,
                                   double shift, real positive, real eps, real scale, double beta)
{
    class_sums_t sums = {0};
    const real by = (real)shift;
    switch (power_of(beta)) {
    case POWER_0:
        add_class_sums(v, s, kind, n, by, positive, eps, scale, 0, POWER_0, &sums);
        break;
    case POWER_1:
        add_class_sums(v, s, kind, n, by, positive, eps, scale, 1, POWER_1, &sums);
        break;
    default:
        add_class_sums(v, s, kind, n, by, positive, eps, scale, (real)beta, POWER_ANY, &sums);
    }
    return sums;
}

/* -log(mean_P exp l) or its kin, log sum_G, and a constant beside the logarithm: H is left out. */
static double released_row(const hex_rule *rule, const peaks_t *peaks, const class_sums_t *s,
                           double centre, double t, double tau, double *out)
{
    const double shift = (double)peaks->rest, constant = peaks->negatives * exp(-1 / tau);
    double moment = (s->rest_x / s->rest + (shift - centre)) / t, log_p = 0;
    out[HEX_ROW_SHIFT] = shift;
    out[HEX_ROW_REST] = 1 / (t * s->rest);
    if (rule->positives == HEX_INSIDE) {
        out[HEX_ROW_POS_E] = -1 / (t * s->e);
        log_p = log(s->e);
        moment -= s->ex / s->e / t;
    } else
        out[HEX_ROW_POS] = 1 / (t * peaks->positives);
    out[HEX_ROW_DTAU] = (t == tau ? -moment / tau : 0) + constant / (tau * tau);
    return (shift - centre) / t + log(s->rest) - log_p + constant;
}

/* Of a row without a loss: it is NaN, and so is the gradient. */
static double no_row(double *out)
{
    for (int k = 1; k < HEX_ROW_STATS; k++)
        out[k] = NAN;
    return NAN;
}

/* Of a row that has nothing to attract or to repel: 0; or NaN, if any entry is NaN or infinite,
 * with a gradient of NaN. */
static double idle_row(const peaks_t *peaks, double *out)
{
    if (peaks->finite != 0)
        for (int k = HEX_ROW_REST; k <= HEX_ROW_DTAU; k++)
            out[k] = NAN;
    return peaks->finite;
}

/* One row of the loss. Fills out[HEX_ROW_STATS] and returns the loss. `logits`: v are logits, and
 * dL/dtau is at constant logits. */
static double class_forward(const hex_rule *rule, const real *v, const real *s, const real *kind,
                            int64_t n, double eps_given, double tau, bool logits, double *out)
{
    const real eps = rule->given ? (real)0.5 : round_down(eps_given);
    const double t = logits ? 1 : tau;
    const real scale = (real)(M_LOG2E / t);
    for (int k = 0; k < HEX_ROW_STATS; k++)
        out[k] = 0;
    out[HEX_ROW_EPS] = (double)eps;
    if (!(tau > 0) || eps != eps)
        return no_row(out);
    const bool released = rule->variant == HEX_RELEASED && (rule->given || eps != (real)INFINITY);
    const peaks_t peaks = row_peaks(v, s, kind, n, eps);
    if (peaks.unknown > 0)
        return no_row(out);
    const double nP = peaks.positives;
    /* A logit of -Inf. Its exponential is 0, L = log D - l_p is +Inf and has a gradient, that of D
     * and -1. Its differences are taken from other numbers than itself. */
    const bool lost = peaks.sum == -INFINITY;
    const real positive = lost ? 0 : peaks.positive;
    const bool inside = rule->positives == HEX_INSIDE;
    if (nP == 0) { /* nothing to attract */
        class_sums_t all = row_class_sums(v, s, kind, n, 0, 0, eps, scale, 0);
        out[HEX_ROW_COUNT] = all.count;
        return idle_row(&peaks, out);
    }
    double shift = (double)(released || peaks.rest > peaks.hard ? peaks.rest : peaks.hard);
    class_sums_t sums = row_class_sums(v, s, kind, n, shift, positive, eps, scale, rule->beta);
    out[HEX_ROW_COUNT] = sums.count;
    out[HEX_ROW_POS_SHIFT] = (double)positive;
    const double centre = lost ? shift : inside ? (double)positive : peaks.sum / nP;
    if (peaks.negatives == 0 ? (released || inside || nP == 1)
                             : released && sums.count == peaks.negatives)
        return idle_row(&peaks, out); /* nothing to repel */
    if (released) {
        const double loss = released_row(rule, &peaks, &sums, centre, t, tau, out);
        if (logits)
            out[HEX_ROW_DTAU] = peaks.negatives * exp(-1 / tau) / (tau * tau);
        return lost ? loss + INFINITY : loss;
    }

    const double lowest = -(1 / tau + centre / t); /* log of the floor, over N_h and the centre */
    const double below = ((double)peaks.positive - centre) / t;
    double m = below > 0 ? below : 0, above = 0;
    if (peaks.negatives > 0)
        above = shift - centre;
    m = above / t > m ? above / t : m;
    m = sums.count > 0 && lowest > m ? lowest : m;
    const double e0 = exp(-m), E = exp(below - m) * sums.e;
    double unit = exp(above / t - m), local = 0, r = 0, floor_ = 0;
    bool clamped = false;
    if (sums.count > 0) {
        r = unit * sums.be / sums.b;
        local = sums.count * (r - rule->tau_plus * E / nP) / (1 - rule->tau_plus);
        floor_ = sums.count * exp(lowest - m);
        clamped = local < floor_;
        local = clamped ? floor_ : local;
    }
    if (clamped && sums.count < peaks.negatives) { /* G by its own largest: see row.h */
        shift = (double)peaks.rest;
        sums = row_class_sums(v, s, kind, n, shift, positive, eps, scale, rule->beta);
        above = shift - centre;
        unit = exp(above / t - m);
    }
    const double S = local + unit * sums.rest, k = 1 / (t * (E + S));
    const double debias =
        sums.count > 0 && !clamped ? sums.count * rule->tau_plus / ((1 - rule->tau_plus) * nP) : 0;
    out[HEX_ROW_SHIFT] = peaks.negatives > 0 ? shift : 0;
    out[HEX_ROW_REST] = k * unit;
    out[HEX_ROW_SHARE] = local / (E + S);
    double moment = k * unit * (sums.rest_x + above * sums.rest), x;
    const double pe = k * exp(below - m);
    if (inside) {
        out[HEX_ROW_POS_E] = -k * S / sums.e - pe * debias;
        moment += out[HEX_ROW_POS_E] * sums.ex;
        x = log(S) - log(sums.e) + m; /* E itself may underflow; below is 0 */
    } else {
        const double mean = sums.e / nP;
        out[HEX_ROW_POS_E] = pe * (1 - debias);
        out[HEX_ROW_POS_MEAN] = mean;
        out[HEX_ROW_POS] = k * S / nP + pe * debias * mean;
        moment += out[HEX_ROW_POS_E] * (sums.ex - mean * sums.x);
        x = m + log(S + (nP > 1 ? E - e0 : 0));
    }
    if (sums.count > 0 && !clamped) {
        const double h = k * sums.count / ((1 - rule->tau_plus) * sums.b);
        const double hard_e = h * (1 + rule->beta) * unit, hard = h * rule->beta * r;
        out[HEX_ROW_HARD_E] = hard_e;
        out[HEX_ROW_HARD] = hard;
        moment += hard_e * (sums.bex + above * sums.be) - hard * (sums.bx + above * sums.b);
    }
    const double at_floor = clamped ? k * floor_ : 0;
    out[HEX_ROW_DTAU] = logits ? at_floor / (tau * tau) : (at_floor * (1 + centre) - moment) / tau;
    if (lost)
        return x + INFINITY; /* or NaN */
    return x <= 0 ? log1p(exp(x)) : x + log1p(exp(-x));
}

/* ---- the gradient ---- */

/* Rows EPS to POS of the statistics, those from REST on times the grad_output. */
typedef struct {
    const real *k[HEX_ROW_POS + 1];
    real scale;
    double beta;
} class_coefficients_t;

/* Fills `out` (HEX_ROW_POS + 1, rows) and the coefficients that point into it. */
static class_coefficients_t scale_rows(const hex_rule *rule, const hex_row_gradient *g,
                                       int64_t rows, bool logits, real *out)
{
    const real *stats = g->stats;
    double dtau = 0;
    bool local = false;
    for (int64_t i = 0; i < rows; i++) {
        double go = read_vector(g->grad, i);
        if (rule->reduction == HEX_MEAN)
            go /= (double)rows;
        for (int k = 0; k <= HEX_ROW_POS; k++) {
            const double s = (double)stats[k * rows + i];
            out[k * rows + i] = (real)(k < HEX_ROW_REST ? s : go * s);
        }
        local |= stats[HEX_ROW_HARD_E * rows + i] != 0;
        dtau += go * (double)stats[HEX_ROW_DTAU * rows + i];
    }
    if (g->dtau)
        *g->dtau = dtau;
    class_coefficients_t c = {.beta = local ? rule->beta : 0};
    c.scale = (real)(M_LOG2E / (logits ? 1 : read_vector(rule->tau, 0)));
    for (int k = 0; k <= HEX_ROW_POS; k++)
        c.k[k] = out + k * rows;
    return c;
}

/* out[j] (+)= the entry's gradient, with the coefficients of row i for all j (each = 0), or of row
 * i + j (each = 1). */
INLINE void class_entries(const real *restrict v, const real *restrict s, const real *restrict kind,
                          int64_t n, const class_coefficients_t *c, int64_t i, int each, bool add,
                          real beta, hex_power power, real *restrict out)
{
    const real *restrict eps = c->k[HEX_ROW_EPS] + i, *restrict shift = c->k[HEX_ROW_SHIFT] + i,
                         *restrict positive = c->k[HEX_ROW_POS_SHIFT] + i,
                         *restrict mean = c->k[HEX_ROW_POS_MEAN] + i;
    const real *restrict rest = c->k[HEX_ROW_REST] + i, *restrict hard_e = c->k[HEX_ROW_HARD_E] + i,
                         *restrict hard = c->k[HEX_ROW_HARD] + i,
                         *restrict pos_e = c->k[HEX_ROW_POS_E] + i,
                         *restrict pos = c->k[HEX_ROW_POS] + i;
    const real scale = c->scale;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        const int64_t r = each ? j : 0;
        /* all of it read whatever the class is: a load under a condition is not vectorised */
        const real value = v[j], own = eps[r], top = shift[r], top_p = positive[r], g = rest[r],
                   h_e = hard_e[r], h = hard[r], p_e = pos_e[r], m = mean[r], p = pos[r];
        const bool is_p = kind[j] == POSITIVE, in = kind[j] != LEFT_OUT;
        const real x = in ? value - (is_p ? top_p : top) : 0;
        const real t = x * scale, e = exp2_of(t), b = weight(power, t, e, beta);
        const real negative = s[j] > own ? b * (h_e * e - h) : g * e;
        const real entry = is_p ? p_e * (e - m) - p : negative;
        out[j] = (add ? out[j] : 0) + (in ? entry : 0);
    }
}

static void row_class_entries(const real *v, const real *s, const real *kind, int64_t n,
                              const class_coefficients_t *c, int64_t i, bool each, bool add,
                              real *out)
{
#define CASE(power, beta)                                                                          \
    if (each && add)                                                                               \
        class_entries(v, s, kind, n, c, i, 1, true, beta, power, out);                             \
    else if (each)                                                                                 \
        class_entries(v, s, kind, n, c, i, 1, false, beta, power, out);                            \
    else                                                                                           \
        class_entries(v, s, kind, n, c, i, 0, false, beta, power, out);                            \
    break;
    switch (power_of(c->beta)) {
    case POWER_0:
        CASE(POWER_0, 0)
    case POWER_1:
        CASE(POWER_1, 1)
    default:
        CASE(POWER_ANY, (real)c->beta)
    }
#undef CASE
}

/* ---- thresholds ---- */

/* Keeps of the row what its quantile is taken over, in place; the new length. *finite gets NaN if a
 * value that is seen, kept or not, is NaN or +Inf. */
static int64_t keep(real *v, const real *kind, int64_t n, bool over_negatives, double *finite)
{
    const real least = over_negatives ? NEGATIVE : POSITIVE; /* of what is kept: see the classes */
    int64_t kept = 0;
    for (int64_t from = 0; from < n; from += SLICE) {
        const int64_t size = n - from < SLICE ? n - from : SLICE;
        const real *of = kind + from;
        real seen = 0, wanted = 0;
#pragma omp simd reduction(+ : seen, wanted)
        for (int64_t j = 0; j < size; j++) {
            const real value = v[from + j];
            seen += of[j] == LEFT_OUT || value < (real)INFINITY ? 0 : (real)NAN;
            wanted += of[j] >= least ? (real)1 : (real)0;
        }
        *finite += (double)seen;
        if (wanted == (real)size) { /* as most slices are */
            memmove(v + kept, v + from, (size_t)size * sizeof(real));
            kept += size;
        } else
            for (int64_t j = 0; j < size; j++) { /* without a branch: kept <= from + j */
                v[kept] = v[from + j];
                kept += of[j] >= least;
            }
    }
    return kept;
}

static real quantile_of(const real *v, int64_t n, double quantile, double finite)
{
    if (finite != 0)
        return (real)NAN;
    return cosine(row_select(v, n, (int64_t)nearbyint(quantile * (double)(n - 1))));
}

/* The mean over the rows that have one (those without hold +Inf); one thread, in their order. */
static double mean_of_rows(const real *q, int64_t rows)
{
    double sum = 0, count = 0;
    for (int64_t i = 0; i < rows; i++) {
        const bool there = q[i] != (real)INFINITY;
        sum += there ? (double)q[i] : 0;
        count += there;
    }
    return sum / count; /* NaN where no row has any */
}

#endif
