// SPDX-License-Identifier: MIT
// One row, the mathematics: its sums, what becomes of them, and from that the entries of the
// gradient. The formulas are those of ../cpu/row.h.
//
// The sums over G, over H and over P each have a shift of their own, the largest value of the set,
// and are rescaled when a larger one comes. So one pass is right at every temperature; in particular
// a row whose local term is at its floor need not sum G again.
//
// Most rows have one positive, all of their entries are negatives, and eps is compared with the
// cosines themselves. For these SETS is false, a constant; there is no second formula.
#pragma once
#include "core.cuh"

// ---- the sums of a row ----

// With t = (v - largest) log2(e) / tau (of logits without tau), e = 2^t, b = 2^(beta t): over G of e
// and t e; over H the count, b, b e, t b and t b e; with SETS over P the count, e, t and t e, over
// all negatives their count, over all of these 0 v, and how many negatives have a score of NaN where
// the value is none.
enum {
    SUM_TOP,
    SUM_REST,
    SUM_REST_T,
    SUM_HARD_TOP,
    SUM_COUNT,
    SUM_B,
    SUM_BE,
    SUM_BT,
    SUM_BET,
    SUMS,
    SUM_POS_TOP = SUMS,
    SUM_POS_COUNT,
    SUM_POS_E,
    SUM_POS_T,
    SUM_POS_TE,
    SUM_NEGATIVES,
    SUM_FINITE,
    SUM_UNKNOWN,
    SUMS_OF_SETS
};

template <class real, bool SETS = false> struct hex_sums {
    real v[SETS ? SUMS_OF_SETS : SUMS];

    static __device__ __forceinline__ bool is_top(int k)
    {
        return k == SUM_TOP || k == SUM_HARD_TOP || (SETS && k == SUM_POS_TOP);
    }
    // lowest: that of all values, of cosines by default.
    __device__ __forceinline__ void clear(real lowest = HEX_LOWEST)
    {
#pragma unroll
        for (int k = 0; k < (SETS ? SUMS_OF_SETS : SUMS); k++)
            v[k] = is_top(k) ? lowest : 0;
    }

    __device__ __forceinline__ void raise_rest(real top, real scale)
    {
        const real d = below(top, v[SUM_TOP], scale), f = pow2(d);
        v[SUM_REST_T] = f * (v[SUM_REST_T] + d * v[SUM_REST]);
        v[SUM_REST] *= f;
        v[SUM_TOP] = top;
    }

    __device__ __forceinline__ void raise_hard(real top, real scale, real beta)
    {
        const real d = below(top, v[SUM_HARD_TOP], scale), fb = pow2(beta * d), fbe = fb * pow2(d);
        v[SUM_BT] = fb * (v[SUM_BT] + d * v[SUM_B]);
        v[SUM_BET] = fbe * (v[SUM_BET] + d * v[SUM_BE]);
        v[SUM_B] *= fb;
        v[SUM_BE] *= fbe;
        v[SUM_HARD_TOP] = top;
    }

    __device__ __forceinline__ void raise_positives(real top, real scale)
    {
        const real d = below(top, v[SUM_POS_TOP], scale), f = pow2(d);
        v[SUM_POS_TE] = f * (v[SUM_POS_TE] + d * v[SUM_POS_E]);
        v[SUM_POS_E] *= f;
        v[SUM_POS_T] += v[SUM_POS_COUNT] > 0 ? d * v[SUM_POS_COUNT] : 0;
        v[SUM_POS_TOP] = top;
    }

    __device__ __forceinline__ void add_rest(real c, real scale)
    {
        if (c > v[SUM_TOP])
            raise_rest(c, scale);
        const real t = below(v[SUM_TOP], c, scale), e = pow2(t);
        v[SUM_REST] += e;
        v[SUM_REST_T] += t * e;
    }

    __device__ __forceinline__ void add_hard(real c, real scale, real beta)
    {
        if (c > v[SUM_HARD_TOP])
            raise_hard(c, scale, beta);
        const real t = below(v[SUM_HARD_TOP], c, scale), b = pow2(beta * t), be = b * pow2(t);
        v[SUM_COUNT] += 1;
        v[SUM_B] += b;
        v[SUM_BE] += be;
        v[SUM_BT] += t * b;
        v[SUM_BET] += t * be;
    }

    // A negative with a score to be compared with eps.
    __device__ __forceinline__ void add_negative(real c, real score, real eps, real scale,
                                                 real beta)
    {
        v[SUM_NEGATIVES] += 1;
        v[SUM_FINITE] += c * 0;
        v[SUM_UNKNOWN] += score != score && c == c ? 1 : 0;
        if (score > eps)
            add_hard(c, scale, beta);
        else
            add_rest(c, scale);
    }

    __device__ __forceinline__ void add_positive(real c, real scale)
    {
        if (c > v[SUM_POS_TOP])
            raise_positives(c, scale);
        const real t = below(v[SUM_POS_TOP], c, scale), e = pow2(t);
        v[SUM_FINITE] += c * 0;
        v[SUM_POS_COUNT] += 1;
        v[SUM_POS_E] += e;
        v[SUM_POS_T] += t;
        v[SUM_POS_TE] += t * e;
    }

    __device__ __forceinline__ void merge(hex_sums o, real scale, real beta)
    {
        const real top = larger(v[SUM_TOP], o.v[SUM_TOP]);
        const real hard = larger(v[SUM_HARD_TOP], o.v[SUM_HARD_TOP]);
        raise_rest(top, scale), o.raise_rest(top, scale);
        raise_hard(hard, scale, beta), o.raise_hard(hard, scale, beta);
        if constexpr (SETS) {
            const real positive = larger(v[SUM_POS_TOP], o.v[SUM_POS_TOP]);
            raise_positives(positive, scale), o.raise_positives(positive, scale);
        }
#pragma unroll
        for (int k = 0; k < (SETS ? SUMS_OF_SETS : SUMS); k++)
            if (!is_top(k))
                v[k] += o.v[k];
    }

  private:
    // (c - top) scale <= 0; not as low as -Inf, of which 0 times would be NaN. A NaN stays.
    static __device__ __forceinline__ real below(real top, real c, real scale)
    {
        const real t = (c - top) * scale;
        return SETS && t < -1e30f ? -1e30f : t;
    }
};

// Between the lanes of a warp that are `lanes` apart.
template <class real, bool SETS>
SHARED_DEVICE hex_sums<real, SETS> shuffled(const hex_sums<real, SETS> &s, int lanes)
{
    hex_sums<real, SETS> other;
#pragma unroll
    for (int k = 0; k < (SETS ? SUMS_OF_SETS : SUMS); k++)
        other.v[k] = __shfl_xor_sync(~0u, s.v[k], lanes);
    return other;
}

template <class real, bool SETS>
SHARED_DEVICE hex_sums<double, SETS> in_double(const hex_sums<real, SETS> &s)
{
    hex_sums<double, SETS> wide;
#pragma unroll
    for (int k = 0; k < (SETS ? SUMS_OF_SETS : SUMS); k++)
        wide.v[k] = (double)s.v[k];
    return wide;
}

// ---- the loss ----

// What is known of a row beside its sums: how many negatives it has, and its positive, a cosine or a
// logit. Both are in the sums where positives are several.
struct hex_row {
    double negatives, positive;
};

// What eps is for the row in this place: groups give H, as scores of 0 and 1.
template <class real> SHARED_DEVICE real row_eps(const hex_problem_t &p, int64_t at)
{
    return p.by_group ? (real)0.5 : row_threshold<real>(p, at);
}

// The released form: H is left out, L = log sum_G - l_p + N exp(-1/tau), the constant beside the
// logarithm. Positives inside it: log sum_P exp(l) for l_p; outside: the mean of theirs.
template <bool SETS>
SHARED_DEVICE double released_row(const hex_problem_t &p, const hex_sums<double, SETS> &s,
                                  double positives, double negatives, double centre, double t,
                                  double tau, double scale, double *out)
{
    const bool inside = SETS && p.several && p.positives == HEX_INSIDE;
    const double constant = negatives * exp(-1 / tau), shift = s.v[SUM_TOP], rest = s.v[SUM_REST];
    out[HEX_STAT_SHIFT] = shift;
    out[HEX_STAT_REST] = 1 / (t * rest);
    double loss = (shift - centre) / t + log(rest) + constant, along = 0;
    if (inside) {
        if constexpr (SETS) {
            out[HEX_STAT_POS_E] = -1 / (t * s.v[SUM_POS_E]);
            along = s.v[SUM_POS_TE] / scale / s.v[SUM_POS_E];
            loss -= log(s.v[SUM_POS_E]);
        }
    } else
        out[HEX_STAT_POSITIVE] = -1 / t / positives;
    if (SETS && p.mode == HEX_LOGITS)
        out[HEX_STAT_DTAU] = constant / (tau * tau);
    else
        out[HEX_STAT_DTAU] =
            (centre - shift - s.v[SUM_REST_T] / scale / rest + along + constant) / (tau * tau);
    return loss;
}

// From the sums of a row to its loss, returned, and its statistics, out[HEX_STATS_SEVERAL]. scale is
// the log2(e) / tau that the sums were taken with.
template <bool SETS>
SHARED_DEVICE double row_loss(const hex_problem_t &p, const hex_row &row, double eps,
                              const hex_sums<double, SETS> &s, double scale, double *out)
{
    const double tau = read_vector(p.tau, 0), count = s.v[SUM_COUNT];
    const bool logits = SETS && p.mode == HEX_LOGITS, several = SETS && p.several && !logits;
    const bool inside = several && p.positives == HEX_INSIDE;
    const bool released = p.variant == HEX_RELEASED && (p.by_group || eps != (double)INFINITY);
    const bool decoupled = p.decoupled, leaves_out = released || p.variant == HEX_EXCLUDED;
    const double t = logits ? 1 : tau;
    double unknown = 0, finite = 0;
    // Of one positive: there is one, it is the largest, e = 1 and t = 0.
    double negatives = row.negatives, positives = 1, largest = row.positive;
    double pos_e = 1, pos_x = 0, pos_ex = 0;
    if constexpr (SETS) {
        unknown = s.v[SUM_UNKNOWN];
        if (logits && fmax(fmax(s.v[SUM_TOP], s.v[SUM_HARD_TOP]), largest) == (double)INFINITY)
            unknown = 1; // a logit of +Inf has no cosine
        finite = s.v[SUM_FINITE];
        if (!several)
            finite += row.positive * 0;
        else {
            negatives = s.v[SUM_NEGATIVES], positives = s.v[SUM_POS_COUNT];
            largest = s.v[SUM_POS_TOP], pos_e = s.v[SUM_POS_E];
            pos_x = s.v[SUM_POS_T] / scale, pos_ex = s.v[SUM_POS_TE] / scale;
        }
    }
    // A positive logit of -Inf: L = log D - l_p is +Inf and has a gradient, that of log D and -1.
    const bool lost = SETS && largest == -(double)INFINITY;
    pos_e = lost ? 0 : pos_e;
    const bool valid = tau > 0 && eps == eps && !(unknown > 0);
#pragma unroll
    for (int k = 0; k < HEX_STATS_SEVERAL; k++)
        out[k] = valid ? 0 : (double)NAN;
    out[HEX_STAT_EPS] = eps;
    if (!valid)
        return (double)NAN;
    out[HEX_STAT_COUNT] = count;
    // How many Q is a sum of, and how many are repelled.
    const double near = leaves_out ? 0 : count, repelled = near + negatives - count;
    // Nothing to attract, or nothing to repel.
    if (!SETS ? repelled == 0
              : positives == 0 ||
                    (repelled == 0 && (released || decoupled || inside || positives == 1))) {
        if (SETS && finite != 0) // with a gradient of NaN
#pragma unroll
            for (int k = HEX_STAT_REST; k < HEX_STATS_SEVERAL; k++)
                if (k != HEX_STAT_COUNT && k != HEX_STAT_SHARE)
                    out[k] = finite;
        return SETS ? finite : largest - largest;
    }
    const bool some = count < negatives;
    const double rest_top = s.v[SUM_TOP], hard_top = s.v[SUM_HARD_TOP];
    // Where eps decides on the cosines themselves, those of H are the largest; rest_top may be 1.
    const bool given = SETS && (p.by_group || p.G > 0);
    double shift = near > 0 && !(given && some && rest_top > hard_top) ? hard_top : rest_top;
    out[HEX_STAT_POS_SHIFT] = lost ? 0 : largest;
    const double centre = lost     ? repelled > 0 ? shift : 0
                          : inside ? largest
                                   : largest + pos_x / positives;
    if (released) {
        const double loss =
            released_row<SETS>(p, s, positives, negatives, centre, t, tau, scale, out);
        return lost ? loss + (double)INFINITY : loss;
    }

    // m: the largest of d that the denominator has, of the floor's exponent, and of 0 where it has
    // the positives
    const double lowest = logits ? -(1 / tau + centre) : -(1 + centre) / tau;
    const double below = SETS ? (largest - centre) / t : 0;
    double m = below > 0 ? below : 0;
    if (repelled > 0)
        m = decoupled ? (shift - centre) / t : fmax(m, (shift - centre) / t);
    if (SETS && near > 0)
        m = fmax(m, lowest);
    // decoupled, m may lie far below 0; by an E of 1e260 q is at its floor as by a larger one
    const double e0 = exp(fmin(-m, 600.0)), pos_unit = SETS ? exp(fmin(below - m, 600.0)) : e0;
    const double E = pos_unit * pos_e;
    double rest_unit = some ? exp((rest_top - centre) / t - m) : 0;
    const double hard_unit = near > 0 ? exp((hard_top - centre) / t - m) : 0;

    // Q = max(q, f),  q = N_h (r - tau_plus E / n_P) / (1 - tau_plus),  f = N_h exp(lowest - m)
    double local = 0, r = 0, floor_ = 0;
    bool clamped = false;
    if (near > 0) {
        r = hard_unit * s.v[SUM_BE] / s.v[SUM_B];
        local = near * (r - p.tau_plus * E / positives) / (1 - p.tau_plus);
        floor_ = near * exp(lowest - m);
        clamped = local < floor_ || local <= 0; // the floor may have underflowed
        local = clamped ? floor_ : local;
        if (clamped && some)
            shift = rest_top;
        if (clamped && decoupled) { // the largest is in H, and what is left may lie far below it
            const double top = (rest_top - centre) / t;
            m = some ? fmax(top, lowest) : lowest;
            rest_unit = some ? exp(top - m) : 0;
            local = floor_ = near * exp(lowest - m);
        }
    }

    // S = Q + sum_G e,  D = E + S or, decoupled, S,  k = 1 / (t D);  debias: dq / de_0 of the
    // positives' share
    const bool debiased = near > 0 && !clamped;
    const double S = local + rest_unit * s.v[SUM_REST], D = decoupled ? S : E + S, k = 1 / (t * D);
    const double debias =
        debiased ? k * near * p.tau_plus * pos_unit / (1 - p.tau_plus) / positives : 0;
    // Of a row whose floor alone is left the entries have no gradient, and no e that is in range.
    const bool spread = debiased || (repelled > 0 && some);
    out[HEX_STAT_SHIFT] = repelled > 0 ? shift : 0;
    out[HEX_STAT_REST] = spread ? k * exp((shift - centre) / t - m) : 0;
    out[HEX_STAT_SHARE] = local / D;
    // -tau dL/dtau = sum_j (v_j - centre) dL/dv_j: only differences, but for the floor, which knows
    // the centre itself
    double moment = k * rest_unit * (s.v[SUM_REST_T] / scale + (rest_top - centre) * s.v[SUM_REST]);
    double W;     // L = log(1 + exp(m) W)
    if (inside) { // L = log D - log E; E itself may underflow, and `below` is 0
        out[HEX_STAT_POS_E] = -k * S / pos_e - debias;
        moment += out[HEX_STAT_POS_E] * pos_ex;
        W = S / pos_e;
    } else { // L = log D - mean_P l
        const double mean = pos_e / positives;
        out[HEX_STAT_POSITIVE] = -k * S / positives;
        if (several) {
            out[HEX_STAT_POS_MEAN] = mean;
            out[HEX_STAT_POS_E] = (decoupled ? 0 : k * pos_unit) - debias;
            moment += out[HEX_STAT_POS_E] * (pos_ex - mean * pos_x);
        }
        W = S + (positives > 1 ? E - e0 : 0);
    }
    if (debiased) {
        // Relative to the row's shift; where H lies so far below it that b would leave the range, a
        // gradient of it is nothing beside that of G.
        const double f = pow2((hard_top - shift) * scale),
                     fb = exp2(p.beta * (hard_top - shift) * scale);
        const double above = hard_top - centre, h = k * near / ((1 - p.tau_plus) * s.v[SUM_B]);
        const double hard_e = h * (1 + p.beta) * hard_unit, hard = h * p.beta * r;
        const bool in_range = f * fb > 1e-35;
        out[HEX_STAT_HARD_E] = in_range ? hard_e / (f * fb) : 0;
        out[HEX_STAT_HARD] = in_range ? hard / fb : 0;
        if (!inside)
            out[HEX_STAT_POSITIVE] -= debias * pos_e / positives;
        moment += hard_e * (s.v[SUM_BET] / scale + above * s.v[SUM_BE]) -
                  hard * (s.v[SUM_BT] / scale + above * s.v[SUM_B]);
    }
    const double at_floor = clamped ? k * floor_ : 0;
    if (logits) // at constant logits
        out[HEX_STAT_DTAU] = at_floor / (tau * tau);
    else
        out[HEX_STAT_DTAU] = (at_floor * (1 + centre) - moment) / tau;
    if (decoupled) // as released_row
        return m + log(S) - (inside ? log(pos_e) : 0) + (lost ? (double)INFINITY : 0);
    if (m <= 30 && !lost) // with the logarithm x, L would lose |x| ulp where x is far below 0
        return log1p(W * exp(m));
    // also far below 0: where all rows share a shift, no difference of the row's may be near m
    const double x = m + log(W);
    if (lost)
        return x + (double)INFINITY; // or NaN
    return x <= 0 ? log1p(exp(x)) : x + log1p(exp(-x));
}

// The same; the statistics stand in place `at` of `rows`.
template <class real, bool SETS>
SHARED_DEVICE double finish_row(const hex_problem_t &p, int64_t at, const hex_row &row, real eps,
                                const hex_sums<double, SETS> &s, double scale, real *stats,
                                int64_t rows)
{
    double out[HEX_STATS_SEVERAL];
    const double loss = row_loss<SETS>(p, row, (double)eps, s, scale, out);
#pragma unroll
    for (int k = 0; k < HEX_STATS_SEVERAL; k++)
        if (k < HEX_STATS || (SETS && p.several))
            stats[k * rows + at] = (real)out[k];
    return loss;
}

// The end of a kernel with a block for each row, whose loss its first thread has put into `rows`: to
// `loss` as it is, or by the last block to arrive the sum or the mean of all.
template <class real>
SHARED_DEVICE void add_up_rows(const hex_problem_t &p, const hex_run &r, const double *rows,
                               void *loss, double *scratch, unsigned *flag)
{
    const int64_t at = blockIdx.x, anchors = r.parts.rows;
    if (p.reduction == HEX_NONE && threadIdx.x == 0)
        ((real *)loss)[at] = (real)rows[at];
    if (p.reduction == HEX_NONE || !last_to_arrive(r.tickets, anchors, flag))
        return;
    const double sum = block_sum_of(rows, anchors, scratch);
    if (threadIdx.x == 0)
        *(real *)loss = (real)(p.reduction == HEX_MEAN ? sum / (double)anchors : sum);
}

// ---- the gradient ----

// One row's part of a gradient entry, dL_i / dc_ij: see HEX_STAT_*.
template <class real>
SHARED_DEVICE real row_entry(real c, real eps, real shift, real rest, real hard_e, real hard,
                             real scale, real beta)
{
    const real x = (c - shift) * scale, t = x > 0 ? 0 : x, e = pow2(t); // a NaN stays
    return c > eps ? pow2(beta * t) * (hard_e * e - hard) : rest * e;
}

// The coefficients of one row.
template <class real> struct hex_row_coefficients {
    real eps, shift, rest, hard_e, hard, positive, pos_shift, pos_mean, pos_e;

    // From where a row's first stands; the next are `step` further on.
    __device__ __forceinline__ void read(const real *k, int step)
    {
        eps = k[K_EPS * step], shift = k[K_SHIFT * step], rest = k[K_REST * step];
        hard_e = k[K_HARD_E * step], hard = k[K_HARD * step];
        positive = k[K_POSITIVE * step], pos_shift = k[K_POS_SHIFT * step];
        pos_mean = k[K_POS_MEAN * step], pos_e = k[K_POS_E * step];
    }
    // dL / dc of a positive, or of a negative that is of H or not.
    __device__ __forceinline__ real entry(real c, bool is_positive, bool is_hard, real scale,
                                          real beta) const
    {
        const real x = (c - (is_positive ? pos_shift : shift)) * scale;
        const real t = x > 0 ? 0 : x, e = pow2(t); // a NaN stays
        const real b = beta == 1 ? e : beta == 0 ? 1 : pow2(beta * t);
        return is_positive ? pos_e * (e - pos_mean) + positive
               : is_hard   ? b * (hard_e * e - hard)
                           : rest * e;
    }
};
