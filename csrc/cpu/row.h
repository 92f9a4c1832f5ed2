/* SPDX-License-Identifier: MIT */
/* One row, the mathematics: its loss and its statistics, of which row_gradient.h makes the gradient.
 * Notation and formulas: ../hex.h. No threads, no allocation.
 *
 * Exponentials are taken of (v - shift) / t <= 0 with shift the largest value of the row that counts,
 * or 1 (may_have_one_shift), in the compute type; positives, where they are several, have a shift of
 * their own, so that neither underflows beside the other. The row's scalars are then put on one scale
 * in double. Sums run in the compute type over SLICE elements and in double beyond, so their error
 * does not grow with the number of candidates.
 *
 * Most rows have one positive and all of their entries are negatives, compared with eps themselves.
 * For these `classed` is false, a constant that the compiler folds; there is no second formula. Of
 * logits the classes are told from the values, by `logits`, another such constant. */
#ifndef HEX_ROW_H
#define HEX_ROW_H

#include "../glibc.h"
#include "product.h"

#define SLICE 512

/* The class of an entry. */
#define LEFT_OUT ((real)0)
#define POSITIVE ((real)1)
#define NEGATIVE ((real)2)

typedef struct {
    real *v; /* its values: cosines, or logits */
    real *s; /* what is compared with eps: v itself, the guide's cosines, or 1 in a group */
    const real *kind; /* the class of each entry; NULL: all are negatives, and s is v */
    int64_t n;
    bool apart; /* its one positive is none of the entries, */
    double cp;  /* but this */
    /* Of logits, which are only read: v times tau is compared with eps, the target is the positive,
     * -Inf elsewhere is left out, and s is room for a row and one number more. */
    bool logits;
    int64_t target;
    real tau;
} row_t;

static inline bool has_classes(const row_t *r) { return r->kind || r->logits; }

/* What is known of a row's sets. */
typedef struct {
    double positives, negatives, sum; /* |P|, |H| + |G|, sum_P v */
    double largest, shift; /* of the positives, and what their exponentials are taken by */
    double rest, finite;   /* the largest of G; 0, or NaN if any entry is NaN or infinite */
    bool hard;             /* whether H holds any */
} sets_t;

/* ---- sums ---- */

/* b = e^beta, where e = 2^t. The usual powers 0 and 1 cost no second exponential. */
static inline real weight(hex_power_t power, real t, real e, real beta)
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
        largest = larger(kept, largest);
    }
    return vec_largest(largest);
}

/* Entries j on, at most `left`: values, what is compared with eps, and who is a positive and who a
 * negative. */
typedef struct {
    vec_t value, score;
    mask_t is_p, is_n;
} entries_t;

INLINE entries_t read_entries(const row_t *r, int64_t j, int64_t left, bool logits)
{
    if (!logits) {
        const vec_t class = read_vec(r->kind + j, left, LEFT_OUT);
        return (entries_t){read_vec(r->v + j, left, 0), read_vec(r->s + j, left, 0),
                           class == POSITIVE, class == NEGATIVE};
    }
    const vec_t x = read_vec(r->v + j, left, -(real)INFINITY);
    const mask_t in = ~(x == -(real)INFINITY);
    entries_t of = {x, x * r->tau, in ^ in, in};
    if ((uint64_t)(r->target - j) < LANES) {
        vec_t at = {0};
        at[r->target - j] = 1;
        of.is_p = at == 1;
        of.is_n &= ~of.is_p;
    }
    return of;
}

/* The sets of a row with classes. *hard: the largest of H; *unknown: > 0 if a negative has a value and
 * a score of NaN, or if a logit is +Inf, of which there is no cosine. */
INLINE sets_t any_sets(const row_t *r, real eps, double *hard, double *unknown, bool logits)
{
    const int64_t n = r->n;
    COUNT(WORK_COMPARED, n);
    const vec_t none = -(real)INFINITY - (vec_t){0}, one = 1 - (vec_t){0};
    vec_t top_p = none, top_h = none, top_g = none;
    vec_t in_h = {0};
    sets_t of = {0};
    *unknown = 0;
    for (int64_t from = 0; from < n; from += SLICE) {
        const int64_t to = n - from < SLICE ? n : from + SLICE;
        vec_t count_p = {0}, count_n = {0}, finite = {0}, lost = {0};
        double sum = 0;
        for (int64_t j = from; j < to; j += LANES) {
            const entries_t at = read_entries(r, j, to - j, logits);
            const vec_t x = at.value, score = at.score;
            const mask_t is_p = at.is_p, is_n = at.is_n, is_h = is_n & (score > eps);
            const vec_t of_p = pick(is_p, x, none), of_h = pick(is_h, x, none),
                        of_g = pick(is_n & ~is_h, x, none);
            top_p = larger(of_p, top_p);
            top_h = larger(of_h, top_h);
            in_h += where(is_h, one);
            top_g = larger(of_g, top_g);
            count_p += where(is_p, one);
            count_n += where(is_n, one);
            finite += where(is_p | is_n, x * 0);
            if (!logits) /* whose scores are NaN where they are */
                lost += where(is_n & (score != score) & (x == x), one);
        }
        const real positives = vec_sum(count_p);
        if (positives > 0) /* most slices have none */
            for (int64_t j = from; j < to; j++)
                sum += (logits ? j == r->target : r->kind[j] == POSITIVE) ? (double)r->v[j] : 0;
        of.positives += (double)positives, of.negatives += (double)vec_sum(count_n);
        of.sum += sum, of.finite += (double)vec_sum(finite);
        *unknown += (double)vec_sum(lost);
    }
    of.largest = (double)vec_largest(top_p);
    *hard = (double)vec_largest(top_h);
    of.rest = (double)vec_largest(top_g);
    of.hard = vec_sum(in_h) > 0;
    if (logits && (*hard == INFINITY || of.rest == INFINITY || vec_largest(top_p) == INFINITY))
        *unknown = 1;
    if (r->apart)
        of.positives = 1, of.sum = of.largest = r->cp, of.finite += r->cp * 0;
    /* A logit of -Inf: its exponential is 0, and differences are taken from another number. */
    of.shift = of.sum == -INFINITY ? 0 : of.largest;
    return of;
}

static sets_t row_sets(const row_t *r, real eps, double *hard, double *unknown)
{
    return r->logits ? any_sets(r, eps, hard, unknown, true)
                     : any_sets(r, eps, hard, unknown, false);
}

/* With x = v - shift: over G of e, x e; over H the count, b, b e, x b, x b e; over P, with their own
 * shift, of e, x, x e. */
typedef struct {
    double rest, rest_x, count, b, be, bx, bex, e, x, ex;
} sums_t;

enum {
    ADD_REST,
    ADD_REST_X,
    ADD_COUNT,
    ADD_B,
    ADD_BE,
    ADD_BX,
    ADD_BEX,
    ADD_E,
    ADD_X,
    ADD_EX,
    ADDENDS
};

/* What is done about H in a vector of entries: none of the row is in it; or most vectors have none,
 * and a branch is foreseen; or one in a few has some, and to foresee wrongly costs more than sums of
 * zeros. */
typedef enum { HARD_NONE, HARD_RARE, HARD_SOME } hard_t;

/* Adds the entries from j on, `left` of them but no more than a vector. Few vectors have a
 * positive. */
INLINE void add_vector(const row_t *r, int64_t j, int64_t left, real shift, real positive, real eps,
                       real scale, real beta, hex_power_t power, hard_t how, bool classed,
                       bool logits, vec_t *sum)
{
    COUNT(WORK_EXPONENTIALS, left);
    const vec_t zero = {0}, one = 1 - zero;
    entries_t at;
    if (classed)
        at = read_entries(r, j, left, logits);
    else
        at.value = at.score = read_vec(r->v + j, left, -(real)INFINITY),
        at.is_n = lanes_below(left);
    const vec_t value = at.value, score = at.score;
    const mask_t is_p = classed ? at.is_p : zero != zero, is_n = at.is_n;
    const mask_t hard = is_n & (score > eps), in = classed ? is_p | is_n : is_n;
    const vec_t largest = shift - zero,
                by = classed ? pick(is_p, positive - zero, largest) : largest;
    /* what is left out may be infinite, and 0 times that is not 0 */
    const vec_t x = where(in, value - by), t = x * scale, e = exp2_below(t);
    const vec_t rest = where(is_n & ~hard, e);
    sum[ADD_REST] += rest;
    sum[ADD_REST_X] += x * rest;
    if (how == HARD_SOME || (how == HARD_RARE && any(hard))) {
        const vec_t weight = power == POWER_0 ? one : power == POWER_1 ? e : exp2_below(beta * t);
        COUNT(WORK_EXPONENTIALS, power == POWER_ANY ? left : 0);
        const vec_t b = where(hard, weight);
        sum[ADD_COUNT] += where(hard, one);
        sum[ADD_B] += b;
        sum[ADD_BE] += b * e;
        sum[ADD_BX] += x * b;
        sum[ADD_BEX] += x * b * e;
    }
    if (classed && any(is_p)) {
        const vec_t p = where(is_p, e);
        sum[ADD_E] += p;
        sum[ADD_X] += where(is_p, x);
        sum[ADD_EX] += x * p;
    }
}

INLINE void add_sums(const row_t *r, real shift, real positive, real eps, real scale, real beta,
                     hex_power_t power, hard_t how, bool classed, bool logits, sums_t *out)
{
    const int64_t n = r->n;
    for (int64_t from = 0; from < n; from += SLICE) {
        const int64_t to = n - from < SLICE ? n : from + SLICE;
        vec_t sum[ADDENDS] = {{0}};
        int64_t j = from;
        for (; j + LANES <= to; j += LANES)
            add_vector(r, j, LANES, shift, positive, eps, scale, beta, power, how, classed, logits,
                       sum);
        if (j < to)
            add_vector(r, j, to - j, shift, positive, eps, scale, beta, power, how, classed, logits,
                       sum);
        out->rest += (double)vec_sum(sum[ADD_REST]);
        out->rest_x += (double)vec_sum(sum[ADD_REST_X]);
        out->count += (double)vec_sum(sum[ADD_COUNT]);
        out->b += (double)vec_sum(sum[ADD_B]);
        out->be += (double)vec_sum(sum[ADD_BE]);
        out->bx += (double)vec_sum(sum[ADD_BX]);
        out->bex += (double)vec_sum(sum[ADD_BEX]);
        if (classed) {
            out->e += (double)vec_sum(sum[ADD_E]);
            out->x += (double)vec_sum(sum[ADD_X]);
            out->ex += (double)vec_sum(sum[ADD_EX]);
        }
    }
}

INLINE sums_t row_sums(const row_t *r, double shift, double positive, real eps, real scale,
                       double beta, hard_t how, bool classed, bool logits)
{
    sums_t s = {0};
    const real by = (real)shift, by_p = (real)positive;
    if (how == HARD_NONE)
        add_sums(r, by, by_p, eps, scale, 0, POWER_0, how, classed, logits, &s);
    else
        switch (power_of(beta)) {
        case POWER_0:
            add_sums(r, by, by_p, eps, scale, 0, POWER_0, how, classed, logits, &s);
            break;
        case POWER_1:
            add_sums(r, by, by_p, eps, scale, 1, POWER_1, how, classed, logits, &s);
            break;
        default:
            add_sums(r, by, by_p, eps, scale, (real)beta, POWER_ANY, how, classed, logits, &s);
        }
    if (classed && r->apart)
        s.e = 1;
    return s;
}

static sums_t plain_sums(const real *c, int64_t n, double shift, real eps, real scale, double beta)
{
    const row_t r = {.v = (real *)c, .n = n, .apart = true}; /* it is only read */
    return row_sums(&r, shift, 0, eps, scale, beta, HARD_RARE, false, false);
}

/* hard: whether the row has any of H. */
static sums_t classed_sums(const row_t *r, double shift, double positive, real eps, real scale,
                           double beta, bool hard)
{
    if (hard)
        return r->logits ? row_sums(r, shift, positive, eps, scale, beta, HARD_SOME, true, true)
                         : row_sums(r, shift, positive, eps, scale, beta, HARD_SOME, true, false);
    return r->logits ? row_sums(r, shift, positive, eps, scale, beta, HARD_NONE, true, true)
                     : row_sums(r, shift, positive, eps, scale, beta, HARD_NONE, true, false);
}

/* Whether a sum of n exponentials is so small that those below 2^EXP2_LOWEST, which are taken for it,
 * are more of it than rounding. */
static inline bool is_lost(double sum, double n)
{
    return !(sum > n * ldexp(1, (int)EXP2_LOWEST + (sizeof(real) > 4 ? 53 : 24)));
}

/* ---- the loss ---- */

/* What eps is for a row: groups give H, as scores of 0 and 1; logits are any numbers. */
static inline real row_eps(const hex_problem_t *p, double eps)
{
    if (p->mode == HEX_LOGITS && is_out_of_reach(eps))
        return sizeof(real) > 4 ? (real)DBL_MAX : (real)FLT_MAX;
    return p->by_group ? (real)0.5 : round_down(eps);
}

/* Whether no exponential of (c - 1) / tau, or product of two, is near the bounds of exp2. Then 1, the
 * largest cosine there can be, may be the shift of every row without classes, and one exponential
 * serves both rows of a pair. Row by row, one of few candidates keeps its own: a loss near 0 is more
 * exact. */
static bool may_have_one_shift(const hex_problem_t *p)
{
    const double tau =
        read_vector(p->tau, 0); /* from 1e30 on a hole of tiles.h would be infinite */
    return p->beta <= 1 && tau > 0 && tau < 1e30 && 2 * M_LOG2E / tau <= -(double)EXP2_LOWEST - 2;
}

#define ENOUGH 192 /* candidates */

static inline bool is_released(const hex_problem_t *p, real eps)
{
    return p->variant == HEX_RELEASED && (p->by_group || eps != (real)INFINITY);
}

/* Whether the denominator has no term of H. */
static inline bool leaves_out(const hex_problem_t *p, real eps)
{
    return p->variant == HEX_EXCLUDED || is_released(p, eps);
}

/* Prepares the statistics of a row; false if it has none: its loss is NaN then. */
static bool row_begin(real eps, double tau, double *out)
{
    const bool valid = tau > 0 && eps == eps;
    for (int k = 0; k < HEX_STATS_SEVERAL; k++)
        out[k] = valid ? 0 : NAN;
    out[HEX_STAT_EPS] = (double)eps;
    return valid;
}

/* Of a row that has nothing to attract or to repel: 0; or NaN, if any entry is NaN or infinite, with
 * a gradient of NaN. */
static double idle_row(double finite, double *out)
{
    if (finite != 0)
        for (int k = HEX_STAT_REST; k < HEX_STATS_SEVERAL; k++)
            if (k != HEX_STAT_COUNT && k != HEX_STAT_SHARE)
                out[k] = NAN;
    return finite;
}

/* The released form: H is left out, L = log sum_G - l_p + N exp(-1/tau), the constant beside the
 * logarithm. Positives inside it: log sum_P exp(l) for l_p; outside: the mean of theirs. */
INLINE double released_row(const hex_problem_t *p, const sums_t *s, const sets_t *of, double shift,
                           double centre, double t, double tau, bool classed, double *out)
{
    const bool inside = classed && p->positives == HEX_INSIDE;
    const double constant = of->negatives * exp(-1 / tau);
    out[HEX_STAT_REST] = 1 / (t * s->rest);
    if (inside)
        out[HEX_STAT_POS_E] = -1 / (t * s->e);
    else
        out[HEX_STAT_POSITIVE] = -1 / t / (classed ? of->positives : 1);
    if (classed && p->mode == HEX_LOGITS)
        out[HEX_STAT_DTAU] = constant / (tau * tau);
    else
        out[HEX_STAT_DTAU] =
            (centre - shift - s->rest_x / s->rest + (inside ? s->ex / s->e : 0) + constant) /
            (tau * tau);
    return (shift - centre) / t + log(s->rest) - (inside ? log(s->e) : 0) + constant;
}

/* A row's statistics but for its eps, from its sums by `shift`. again: the row, where the sums may be
 * made again by another shift, or NULL. Returns the loss. */
INLINE double row_scalars(const hex_problem_t *p, sums_t s, const sets_t *of, const row_t *again,
                          double shift, real eps, double tau, bool classed, double *out)
{
    const bool released = is_released(p, eps), inside = classed && p->positives == HEX_INSIDE;
    const bool logits = classed && p->mode == HEX_LOGITS, decoupled = p->decoupled;
    const double nP = classed ? of->positives : 1, negatives = of->negatives, t = logits ? 1 : tau;
    /* how many Q is a sum of, and how many are repelled */
    const double near = leaves_out(p, eps) ? 0 : s.count, repelled = near + negatives - s.count;
    /* A positive logit of -Inf: L = log D - l_p is +Inf and has a gradient, that of log D and -1. */
    const bool lost = classed && of->sum == -INFINITY;

    out[HEX_STAT_COUNT] = s.count;
    if (!classed) {
        if (repelled == 0)
            return of->sum - of->sum;
    } else {
        if (nP == 0) /* nothing to attract */
            return idle_row(of->finite, out);
        out[HEX_STAT_POS_SHIFT] = of->shift;
        if (repelled == 0 && (released || decoupled || inside || nP == 1))
            return idle_row(of->finite, out);
    }
    out[HEX_STAT_SHIFT] = repelled > 0 ? shift : 0;
    const double centre = !classed ? of->sum : lost ? shift : inside ? of->shift : of->sum / nP;
    if (released) {
        const double loss = released_row(p, &s, of, shift, centre, t, tau, classed, out);
        return lost ? loss + INFINITY : loss;
    }

    /* m: the largest of d that the denominator has, of the floor's exponent, and of 0 where it has
     * the positives */
    const double lowest = logits ? -(1 / tau + centre) : -(1 + centre) / tau;
    const double below = classed ? (of->largest - centre) / t : 0;
    double above = repelled > 0 ? shift - centre : 0, m = below > 0 ? below : 0;
    m = decoupled || above / t > m ? above / t : m;
    if (classed && near > 0 && lowest > m)
        m = lowest;
    /* decoupled, m may lie far below 0; by an E of 1e260 q is at its floor as by a larger one */
    const double e0 = exp(-m < 600 ? -m : 600);
    const double unit_p = classed ? exp(below - m < 600 ? below - m : 600) : e0,
                 E = classed ? unit_p * s.e : e0;
    double unit = exp(above / t - m); /* e_j = unit * the summed exponential */

    /* Q = max(q, f),  q = N_h (r - tau_plus E / n_P) / (1 - tau_plus),  f = N_h exp(lowest - m) */
    double local = 0, r = 0, floor_ = 0;
    bool clamped = false;
    if (near > 0) {
        r = unit * s.be / s.b;
        local = near * (r - p->tau_plus * (classed ? E / nP : e0)) / (1 - p->tau_plus);
        floor_ = near * exp(lowest - m);
        clamped = local < floor_ || local <= 0; /* the floor may have underflowed */
        local = clamped ? floor_ : local;
    }
    if (clamped && s.count < negatives && again && is_lost(s.rest, negatives)) {
        /* The largest is in H and no longer counts. G lies too far below it for the first sums, so
         * it is summed again, by its own largest. */
        const real scale = (real)(M_LOG2E / t);
        shift = classed ? of->rest : (double)row_largest(again->v, again->n, eps);
        s = classed ? classed_sums(again, shift, of->shift, eps, scale, p->beta, true)
                    : plain_sums(again->v, again->n, shift, eps, scale, p->beta);
        out[HEX_STAT_SHIFT] = shift;
        above = shift - centre;
        unit = exp(above / t - m);
    }
    if (clamped && decoupled) { /* the largest is in H, and what is left may lie far below it */
        const bool some = s.count < negatives;
        m = some ? fmax(above / t, lowest) : lowest;
        unit = some ? exp(above / t - m) : 0;
        local = floor_ = near * exp(lowest - m);
    }

    /* S = Q + sum_G e,  D = E + S or, decoupled, S,  k = 1 / (t D);  debias: dq / de_0 of the
     * positives' share */
    const double rest = unit * s.rest, S = local + rest, D = decoupled ? S : E + S, k = 1 / (t * D);
    const bool debiased = near > 0 && !clamped;
    const double share = k * near * p->tau_plus * unit_p;
    const double debias = debiased ? share / (1 - p->tau_plus) / nP : 0;
    out[HEX_STAT_REST] = k * unit;
    out[HEX_STAT_SHARE] = local / D;
    /* -tau dL/dtau = sum_j (v_j - centre) dL/dv_j: only differences, but for the floor, which knows
     * the centre itself */
    double moment = k * unit * (s.rest_x + above * s.rest), W; /* L = log(1 + exp(m) W) */
    if (inside) { /* L = log D - log E; E itself may underflow, and below is 0 */
        out[HEX_STAT_POS_E] = -k * S / s.e - debias;
        moment += out[HEX_STAT_POS_E] * s.ex;
        W = S / s.e;
    } else { /* L = log D - mean_P l */
        const double mean = classed ? s.e / nP : 1;
        out[HEX_STAT_POSITIVE] = -k * S / nP;
        if (classed) {
            out[HEX_STAT_POS_MEAN] = mean;
            out[HEX_STAT_POS_E] = (decoupled ? 0 : k * unit_p) - debias;
            moment += out[HEX_STAT_POS_E] * (s.ex - mean * s.x);
        }
        W = S + (nP > 1 ? E - e0 : 0);
    }
    if (debiased) {
        const double h = k * near / ((1 - p->tau_plus) * s.b);
        const double hard_e = h * (1 + p->beta) * unit, hard = h * p->beta * r;
        out[HEX_STAT_HARD_E] = hard_e;
        out[HEX_STAT_HARD] = hard;
        if (!inside)
            out[HEX_STAT_POSITIVE] -= debias * (classed ? s.e / nP : 1);
        moment += hard_e * (s.bex + above * s.be) - hard * (s.bx + above * s.b);
    }
    const double at_floor = clamped ? k * floor_ : 0;
    if (logits) /* at constant logits */
        out[HEX_STAT_DTAU] = at_floor / (tau * tau);
    else
        out[HEX_STAT_DTAU] = (at_floor * (1 + centre) - moment) / tau;
    if (decoupled) /* as released_row */
        return m + log(S) - (inside ? log(s.e) : 0) + (lost ? INFINITY : 0);
    if (m <= 30 && !lost) /* with the logarithm x, L would lose |x| ulp where x is far below 0 */
        return log1p(W * exp(m));
    /* also far below 0: where all rows share the shift 1, no difference of the row's may be near m */
    const double x = m + log(W);
    if (lost)
        return x + INFINITY;                            /* or NaN */
    return x <= 0 ? log1p(exp(x)) : x + log1p(exp(-x)); /* softplus */
}

static double plain_scalars(const hex_problem_t *p, sums_t s, const sets_t *of, const row_t *again,
                            double shift, real eps, double tau, double *out)
{
    return row_scalars(p, s, of, again, shift, eps, tau, false, out);
}

static double classed_scalars(const hex_problem_t *p, sums_t s, const sets_t *of,
                              const row_t *again, double shift, real eps, double tau, double *out)
{
    return row_scalars(p, s, of, again, shift, eps, tau, true, out);
}

/* One row of the loss. Fills out[HEX_STATS_SEVERAL] and returns the loss. */
static double row_forward(const hex_problem_t *p, const row_t *r, double eps_given, double tau,
                          double *out)
{
    const real eps = row_eps(p, eps_given);
    if (!row_begin(eps, tau, out))
        return NAN;
    const bool apart = leaves_out(p, eps);
    const real scale = (real)(M_LOG2E / (p->mode == HEX_LOGITS ? 1 : tau));
    if (!has_classes(r)) {
        const sets_t of = {.positives = 1, .negatives = (double)r->n, .sum = r->cp};
        const bool one = r->n > ENOUGH && may_have_one_shift(p);
        const real shift = one ? 1 : row_largest(r->v, r->n, apart ? eps : (real)INFINITY);
        const sums_t s = plain_sums(r->v, r->n, (double)shift, eps, scale, p->beta);
        return plain_scalars(p, s, &of, one ? NULL : r, (double)shift, eps, tau, out);
    }
    double hard, unknown;
    const sets_t of = row_sets(r, eps, &hard, &unknown);
    if (unknown > 0) {
        row_begin(eps, NAN, out);
        return NAN;
    }
    /* where G is empty, -Inf is no shift of the positives' row, which may be summed all the same */
    const bool some = of.rest != -INFINITY;
    const double shift = (apart && some) || of.rest > hard ? of.rest : hard;
    const sums_t s = classed_sums(r, shift, of.shift, eps, scale, p->beta, of.hard);
    return classed_scalars(p, s, &of, r, shift, eps, tau, out);
}

#endif
