// SPDX-License-Identifier: MIT
// The operators on logits that are given: a block for each row, and a thread for each of its columns.
// A row is read once by the forward and by the backward, twice by the threshold; nothing is
// multiplied.
//
// The cosine of a column is its logit times tau. A column of -Inf is left out, but for the target's,
// whose loss is +Inf. A target that is no column of the row makes NaN of all that is the row's: the
// host does not wait for the device to look at it.
#include "bins.cuh"
#include "row.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)

template <class real> struct logits_row {
    const void *data;
    hex_dtype_t dtype;
    int64_t at, step, columns, target; // target -1: it is none
    real tau;

    __device__ __forceinline__ void start(const hex_problem_t &p, int64_t i)
    {
        const hex_rows_t &x = p.input[0];
        data = x.data, dtype = x.dtype, step = x.col, columns = p.D;
        at = row_start(x, i);
        const int64_t t = p.ids[0].data[i * p.ids[0].stride];
        target = t >= 0 && t < columns ? t : -1;
        tau = (real)read_vector(p.tau, 0);
    }
    __device__ __forceinline__ real logit(int64_t j) const
    {
        return (real)read_number(data, dtype, at + j * step);
    }
    __device__ __forceinline__ bool is_negative(int64_t j, real v) const
    {
        return j != target && v != (real)-INFINITY; // a NaN is one
    }
    // The logit of the target; NaN if that is none.
    __device__ __forceinline__ real positive() const
    {
        return target < 0 ? (real)NAN : logit(target);
    }
};

// ---- forward ----

template <class real>
static __global__ void __launch_bounds__(THREADS, 2)
    forward_logits(hex_problem_t p, hex_run r, double *rows, void *loss, real *stats)
{
    HEX_SHARED_MEMORY(shared);
    hex_sums<double, true> *parts = (hex_sums<double, true> *)shared;
    const int64_t at = blockIdx.x, anchors = r.parts.rows;
    const real scale = (real)HEX_LOG2E, beta = (real)p.beta, eps = row_eps<real>(p, at);
    logits_row<real> row;
    row.start(p, p.first + at);
    hex_sums<real, true> s;
    s.clear(sizeof(real) == 8 ? (real)-DBL_MAX : (real)-FLT_MAX); // some mask with just that
#pragma unroll 1
    for (int64_t j = threadIdx.x; j < row.columns; j += THREADS) {
        const real v = row.logit(j);
        if (row.is_negative(j, v))
            s.add_negative(v, v * row.tau, eps, scale, beta);
    }
    for (int k = 16; k > 0; k >>= 1)
        s.merge(shuffled(s, k), scale, beta);
    if ((threadIdx.x & 31) == 0)
        parts[threadIdx.x >> 5] = in_double(s);
    __syncthreads();
    if (threadIdx.x == 0) {
        hex_sums<double, true> all = parts[0];
        for (int k = 1; k < WARPS; k++)
            all.merge(parts[k], (double)scale, p.beta);
        const hex_row of = {all.v[SUM_NEGATIVES], (double)row.positive()};
        rows[at] = finish_row(p, at, of, eps, all, (double)scale, stats, anchors);
        if (row.target < 0) { // the statistics of no row are numbers then
            rows[at] = (double)NAN;
            for (int k = 0; k < HEX_STATS_SEVERAL; k++)
                stats[k * anchors + at] = (real)NAN;
        }
    }
    add_up_rows<real>(p, r, rows, loss, (double *)shared, (unsigned *)(parts + WARPS));
}

// ---- threshold and bounds ----

template <class real>
static __global__ void __launch_bounds__(THREADS, 2)
    choose_logits(hex_problem_t p, hex_run r, hex_row_choice choice)
{
    HEX_SHARED_MEMORY(shared);
    uint32_t *counts = (uint32_t *)shared;
    double *scratch = (double *)(counts + HEX_BINS);
    logits_row<real> row;
    row.start(p, p.first + blockIdx.x);
    hex_row_bins bins;
    bins.start(choice.of);
    if (row.target < 0)
        bins.finite = (double)NAN;
    if (p.self_column)
        bins.add_apart(1);
    for (int pass = 0; pass < (choice.low ? 1 : 2); pass++) {
        counts[threadIdx.x] = 0; // a thread for each bin
        __syncthreads();
#pragma unroll 1
        for (int64_t j = threadIdx.x; j < row.columns; j += THREADS) {
            const real v = row.logit(j);
            const bool negative = row.is_negative(j, v);
            if (!negative && j != row.target)
                continue;
            // Of +Inf there is no cosine; -Inf, of the target, is as far as can be, and so is a
            // product that leaves the range.
            const real c = v * row.tau;
            const double x = v == (real)INFINITY ? (double)NAN
                             : c < -2            ? -2.
                             : c > 2             ? 2.
                                                 : (double)c;
            const int at = bins.add(x, pass, negative);
            if (at >= 0)
                atomicAdd(counts + at, 1u);
        }
        __syncthreads();
        bins.pick(counts, pass, choice.of.quantile); // each warp the same
        __syncthreads();
    }
    static_assert(THREADS == HEX_BINS, "a thread for each bin");
    bins.finish<real>(r, choice, scratch, (unsigned *)(scratch + 3 * WARPS));
}

// ---- backward ----

// A row's entries, and dL/dtau by one block more.
template <class real>
static __global__ void __launch_bounds__(THREADS, 2)
    logits_gradient(hex_problem_t p, hex_gradient_t g)
{
    HEX_SHARED_MEMORY(shared);
    const int64_t anchors = anchors_of(p), place = blockIdx.x;
    const double mean = p.reduction == HEX_MEAN ? (double)anchors : 1;
    const real *stats = (const real *)g.stats;
    if (place == p.count) {
        double sum = 0;
        for (int64_t i = threadIdx.x; i < anchors; i += THREADS)
            sum += read_vector(g.grad, i) * (double)stats[HEX_STAT_DTAU * anchors + i];
        sum = block_sum(sum, (double *)shared);
        if (threadIdx.x == 0 && g.dtau)
            write_number(g.dtau, p.tau.dtype, 0, anchors ? sum / mean : 0);
        return;
    }
    const int64_t i = p.first + place;
    const double go = read_vector(g.grad, i) / mean;
    auto stat = [&](int k, double by) { return (real)((double)stats[k * anchors + i] * by); };
    hex_row_coefficients<real> k = {};
    k.eps = stat(HEX_STAT_EPS, 1), k.shift = stat(HEX_STAT_SHIFT, 1);
    k.rest = stat(HEX_STAT_REST, go), k.hard_e = stat(HEX_STAT_HARD_E, go);
    k.hard = stat(HEX_STAT_HARD, go), k.positive = stat(HEX_STAT_POSITIVE, go);
    const real scale = (real)HEX_LOG2E, beta = (real)p.beta;
    logits_row<real> row;
    row.start(p, i);
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < row.columns; j += THREADS) {
        const real v = row.logit(j);
        const bool known = v - v == 0 || v == (real)-INFINITY; // a NaN of the loss is one here
        const real entry = j == row.target ? (known ? k.positive : (real)NAN)
                           : row.is_negative(j, v)
                               ? k.entry(v, false, v * row.tau > k.eps, scale, beta)
                               : 0;
        write_number(g.dz[0], p.input[0].dtype, place * row.columns + j, (double)entry);
    }
}

// ---- launching ----

template <class real>
static const char *forward(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                           void *stats)
{
    const int bytes = (WARPS * SUMS_OF_SETS + 1) * (int)sizeof(double);
    HEX_LAUNCH(forward_logits<real>, dim3((unsigned)r.parts.rows), dim3(THREADS), bytes, r.stream,
               p, r, rows, loss, (real *)stats);
    return hex_launched("forward of logits");
}

const char *hex_logits_forward(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                               void *stats)
{
    return p.compute_f64 ? forward<double>(p, r, rows, loss, stats)
                         : forward<float>(p, r, rows, loss, stats);
}

static const char *choose(const hex_problem_t &p, const hex_run &r, const hex_row_choice &choice)
{
    const int bytes = HEX_BINS * 4 + (3 * WARPS + 1) * (int)sizeof(double);
    const dim3 blocks((unsigned)r.parts.rows);
    if (p.compute_f64)
        HEX_LAUNCH(choose_logits<double>, blocks, dim3(THREADS), bytes, r.stream, p, r, choice);
    else
        HEX_LAUNCH(choose_logits<float>, blocks, dim3(THREADS), bytes, r.stream, p, r, choice);
    return hex_launched("quantiles of logits");
}

const char *hex_logits_threshold(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                                 double *rows)
{
    return choose(p, r, {choice, rows, NULL, NULL});
}

const char *hex_logits_range(const hex_problem_t &p, const hex_run &r, void *low, void *high)
{
    return choose(p, r, {{}, NULL, low, high});
}

const char *hex_logits_backward(const hex_problem_t &p, cudaStream_t stream,
                                const hex_gradient_t &g)
{
    const dim3 blocks((unsigned)((g.dz[0] ? p.count : 0) + 1));
    hex_problem_t of = p;
    of.count = g.dz[0] ? p.count : 0; // then dL/dtau alone
    const int bytes = WARPS * (int)sizeof(double);
    if (p.compute_f64)
        HEX_LAUNCH(logits_gradient<double>, blocks, dim3(THREADS), bytes, stream, of, g);
    else
        HEX_LAUNCH(logits_gradient<float>, blocks, dim3(THREADS), bytes, stream, of, g);
    return hex_launched("gradient of logits");
}
