// SPDX-License-Identifier: MIT
// The same operators without tensor cores: a block for each row, a warp for each of its cosines.
// For float64, where exactness is wanted and not speed, and for per-anchor negatives, which are
// used once each, so that reading them is all the work.
//
// The row's columns are the unit rows [col0, col1) but itself and its partner, or, with per-anchor
// negatives, its own K rows of the input. `real` is the compute type.
#include "core.cuh"

#define WARPS 4
#define THREADS (32 * WARPS)

// CUDA blocks for an anchor's own negatives, a warp each.
static inline __host__ __device__ int64_t own_blocks(int64_t K) { return (K + WARPS - 1) / WARPS; }

// The columns of row i, whatever the mode, and their cosines.
template <class real> struct columns {
    const hex_problem_t *p;
    const hex_unit *unit;
    const double *inverse; // of the per-anchor negatives
    const real *u;         // the row
    int64_t i, col0, col1;

    __device__ void start(const hex_problem_t &problem, const hex_run &r, int64_t row)
    {
        p = &problem, unit = &r.unit, i = row;
        inverse = r.unit.inverse + r.unit.count;
        u = (const real *)unit->plain + i * unit->width;
        col0 = 0, col1 = p->K;
        for (int k = 0; k < r.parts.count && p->mode != HEX_PAIRED; k++)
            if (i >= r.parts.part[k].row0 && i < r.parts.part[k].row1)
                col0 = r.parts.part[k].col0, col1 = r.parts.part[k].col1;
    }
    __device__ bool negative(int64_t j) const
    {
        return p->mode == HEX_PAIRED || (j != i && !(i < 2 * p->B && j == partner_of(i, p->B)));
    }
    __device__ real number(int64_t j, int64_t d) const
    {
        if (p->mode != HEX_PAIRED)
            return ((const real *)unit->plain)[j * unit->width + d];
        const hex_rows_t &x = p->input[2];
        const int64_t n = (i - p->first) * p->K + j;
        return (real)(read_number(x.data, x.dtype, row_start(x, j, i) + d * x.col) * inverse[n]);
    }
    // By a warp, the same on every lane.
    __device__ real cosine(int64_t j) const
    {
        real sum = 0;
        for (int64_t d = (int)threadIdx.x & 31; d < p->D; d += 32)
            sum += u[d] * number(j, d);
        return warp_sum(sum);
    }
};

// ---- the per-anchor negatives, a warp each ----

// Negative j of anchor i, and its place among those of the call; false past an anchor's last.
static __device__ bool own_place(const hex_problem_t &p, int64_t *i, int64_t *j, int64_t *n)
{
    const unsigned blocks = (unsigned)own_blocks(p.K); // a grid has less than 2^31
    *i = p.first + blockIdx.x / blocks;
    *j = blockIdx.x % blocks * (int64_t)WARPS + (threadIdx.x >> 5);
    *n = (*i - p.first) * p.K + *j;
    return *j < p.K;
}

// 1 / |n|
static __global__ void __launch_bounds__(THREADS, 1) own_norms(hex_problem_t p, hex_unit unit)
{
    int64_t i, j, n;
    if (!own_place(p, &i, &j, &n))
        return;
    const length of = norm_of(p.input[2], row_start(p.input[2], j, i), p.D);
    if ((threadIdx.x & 31) == 0)
        unit.inverse[unit.count + n] = of.scale * of.inverse;
}

// The norms, where there are per-anchor negatives.
static const char *prepare(const hex_problem_t &p, const hex_run &r)
{
    const int64_t blocks = p.count * own_blocks(p.K);
    if (p.mode != HEX_PAIRED || blocks == 0)
        return NULL;
    HEX_LAUNCH(own_norms, dim3((unsigned)blocks), dim3(THREADS), 0, r.stream, p, r.unit);
    return hex_launched("norms of the negatives");
}

// ---- forward ----

template <class real>
static __global__ void __launch_bounds__(THREADS, 1)
    forward_rows(hex_problem_t p, hex_run r, double *rows, void *loss, real *stats)
{
    HEX_SHARED_MEMORY(shared);
    hex_sums<real> *parts = (hex_sums<real> *)shared, s;
    const int warp = (int)threadIdx.x >> 5;
    const int64_t at = blockIdx.x, i = nth_row(r.parts, at), anchors = r.parts.rows;
    const real scale = (real)(HEX_LOG2E / read_vector(p.tau, 0)), beta = (real)p.beta;
    const real eps = row_threshold<real>(p, at);
    columns<real> c;
    c.start(p, r, i);
    s.clear();
    for (int64_t j = c.col0 + warp; j < c.col1; j += WARPS) {
        if (!c.negative(j))
            continue;
        const real x = c.cosine(j);
        if (x > eps)
            s.add_hard(x, scale, beta);
        else
            s.add_rest(x, scale);
    }
    if ((threadIdx.x & 31) == 0)
        parts[warp] = s;
    __syncthreads();
    if (threadIdx.x == 0) {
        hex_sums<double> all;
        all.clear();
        for (int k = 0; k < WARPS; k++) {
            hex_sums<double> other;
            for (int n = 0; n < SUMS; n++)
                other.v[n] = (double)parts[k].v[n];
            all.merge(other, (double)scale, p.beta);
        }
        rows[at] = finish_row(p, at, negatives_of_a_row(p), r.unit.positive[image_of(i, p.B)], eps,
                              all, (double)scale, stats, anchors);
        if (p.reduction == HEX_NONE)
            ((real *)loss)[at] = (real)rows[at];
    }
    if (p.reduction == HEX_NONE || !last_to_arrive(r.tickets, anchors, (unsigned *)(parts + WARPS)))
        return;
    const double sum = block_sum_of(rows, anchors, (double *)shared);
    if (threadIdx.x == 0)
        *(real *)loss = (real)(p.reduction == HEX_MEAN ? sum / (double)anchors : sum);
}

// ---- threshold and bounds ----

struct row_choice {
    hex_choice of;
    double *rows;
    void *low, *high; // instead of the quantile
};

template <class real>
static __global__ void __launch_bounds__(THREADS, 1)
    choose_rows(hex_problem_t p, hex_run r, row_choice choice)
{
    HEX_SHARED_MEMORY(shared);
    uint32_t *counts = (uint32_t *)shared;
    double *scratch = (double *)(counts + HEX_BINS);
    int *picked = (int *)(scratch + 3 * WARPS);
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    const int64_t at = blockIdx.x, i = nth_row(r.parts, at), anchors = r.parts.rows;
    const double self = r.unit.inverse[i] == 0 ? 0 : 1,
                 positive = r.unit.positive[image_of(i, p.B)];
    columns<real> c;
    c.start(p, r, i);
    double least = INFINITY, most = -INFINITY, finite = positive * 0;
    int coarse = 0, bin = 0;
    int64_t rank = choice.of.rank;
    for (int pass = 0; pass < (choice.low ? 1 : 2); pass++) {
        for (int k = (int)threadIdx.x; k < HEX_BINS; k += THREADS)
            counts[k] = 0;
        __syncthreads();
        for (int64_t j = c.col0 + warp; j < c.col1; j += WARPS) {
            if (!c.negative(j))
                continue;
            const double x = (double)c.cosine(j);
            least = fmin(least, x), most = fmax(most, x), finite += x * 0;
            const int in = bin_of((float)x);
            if (lane == 0 && (pass == 0 || in >> 8 == coarse))
                atomicAdd(counts + (pass == 0 ? in >> 8 : in & 255), 1u);
        }
        __syncthreads();
        int extra[2] = {-1, -1};
        if (!choice.of.negatives) {
            extra[0] = bin_of((float)positive);
            if (p.mode == HEX_NTXENT)
                extra[1] = bin_of((float)self);
        }
        for (int k = 0; k < 2; k++)
            extra[k] = extra[k] < 0              ? -1
                       : pass == 0               ? extra[k] >> 8
                       : extra[k] >> 8 == coarse ? extra[k] & 255
                                                 : -1;
        uint32_t mine[8];
        for (int k = 0; k < 8; k++)
            mine[k] = counts[8 * lane + k];
        bin = pick_bin(mine, extra[0], extra[1], &rank); // each warp the same
        if (pass == 0)
            coarse = bin;
        __syncthreads();
    }
    if (lane == 0)
        scratch[warp] = least, scratch[WARPS + warp] = most, scratch[2 * WARPS + warp] = finite;
    __syncthreads();
    for (int k = 0; k < WARPS; k++) {
        least = fmin(least, scratch[k]), most = fmax(most, scratch[WARPS + k]);
        finite += scratch[2 * WARPS + k];
    }
    if (choice.low) {
        least = fmin(least, positive), most = fmax(most, positive);
        if (p.mode == HEX_NTXENT)
            least = fmin(least, self), most = fmax(most, self);
        if (threadIdx.x == 0) {
            ((real *)choice.low)[at] = (real)(finite == 0 ? fmax(fmin(least, 1.0), -1.0) : NAN);
            ((real *)choice.high)[at] = (real)(finite == 0 ? fmax(fmin(most, 1.0), -1.0) : NAN);
        }
        return;
    }
    const double none = choice.of.each ? (double)INFINITY : (double)NAN; // of a row that is empty
    const double quantile = finite != 0           ? (double)NAN
                            : choice.of.rank >= 0 ? bin_middle(256 * coarse + bin)
                                                  : none;
    if (threadIdx.x == 0 && choice.of.each)
        ((real *)choice.of.each)[at] = (real)quantile;
    else if (threadIdx.x == 0)
        choice.rows[at] = quantile;
    if (choice.of.each || !last_to_arrive(r.tickets, anchors, (unsigned *)picked))
        return;
    const double sum = block_sum_of(choice.rows, anchors, (double *)shared);
    if (threadIdx.x == 0)
        settle(choice.of, sum / (double)anchors, anchors);
}

// ---- backward ----

// du of unit row `o`, into partial: a stretch of THREADS columns at a time, first their weights,
// then each thread its own features.
template <class real>
static __global__ void __launch_bounds__(THREADS, 1) gather_rows(hex_problem_t p, hex_run r)
{
    HEX_SHARED_MEMORY(shared);
    real *w = (real *)shared;
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    const int64_t o = nth_row(r.parts, blockIdx.x);
    const real scale = (real)(HEX_LOG2E / read_vector(p.tau, 0)), beta = (real)p.beta;
    const real *k = (const real *)r.coefficients;
    real *du = (real *)r.partial + blockIdx.x * r.unit.width;
    columns<real> c;
    c.start(p, r, o);
    auto entry = [&](real x, int64_t i) {
        return row_entry(x, k[coefficient(K_EPS, i)], k[coefficient(K_SHIFT, i)],
                         k[coefficient(K_REST, i)], k[coefficient(K_HARD_E, i)],
                         k[coefficient(K_HARD, i)], scale, beta);
    };
    for (int64_t d = threadIdx.x; d < p.D; d += THREADS)
        du[d] = 0;
    for (int64_t from = c.col0; from < c.col1; from += THREADS) {
        const int64_t n = c.col1 - from < THREADS ? c.col1 - from : THREADS;
        for (int64_t j = warp; j < n; j += WARPS) {
            const real x = c.negative(from + j) ? c.cosine(from + j) : 0;
            if (lane == 0)
                w[j] = !c.negative(from + j)  ? 0
                       : p.mode == HEX_PAIRED ? entry(x, o)
                                              : entry(x, o) + entry(x, from + j);
        }
        __syncthreads();
        for (int64_t d = threadIdx.x; d < p.D; d += THREADS) {
            real sum = du[d];
            for (int64_t j = 0; j < n; j++)
                sum += w[j] * c.number(from + j, d);
            du[d] = sum;
        }
        __syncthreads(); // w is free again
    }
}

// The gradient of the per-anchor negatives, a warp each: dn = g (u - c n) / |n|.
template <class real>
static __global__ void __launch_bounds__(THREADS, 1)
    own_gradients(hex_problem_t p, hex_run r, void *dn)
{
    int64_t i, j, n;
    if (!own_place(p, &i, &j, &n))
        return;
    const real *k = (const real *)r.coefficients;
    const real scale = (real)(HEX_LOG2E / read_vector(p.tau, 0));
    columns<real> c;
    c.start(p, r, i);
    const real x = c.cosine(j);
    const real g = row_entry(x, k[coefficient(K_EPS, i)], k[coefficient(K_SHIFT, i)],
                             k[coefficient(K_REST, i)], k[coefficient(K_HARD_E, i)],
                             k[coefficient(K_HARD, i)], scale, (real)p.beta);
    const double inverse = c.inverse[n];
    for (int64_t d = (int)threadIdx.x & 31; d < p.D; d += 32)
        write_number(dn, p.input[2].dtype, n * p.D + d,
                     inverse == 0 ? 0
                                  : (double)g * inverse *
                                        ((double)c.u[d] - (double)x * (double)c.number(j, d)));
}

// ---- launching ----

template <class real>
static const char *forward(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                           void *stats)
{
    const int bytes = (WARPS * SUMS + 1) * (int)sizeof(double);
    HEX_LAUNCH(forward_rows<real>, dim3((unsigned)r.parts.rows), dim3(THREADS), bytes, r.stream, p,
               r, rows, loss, (real *)stats);
    return hex_launched("forward rows");
}

const char *hex_plain_forward(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                              void *stats)
{
    const char *error = prepare(p, r);
    return error           ? error
           : p.compute_f64 ? forward<double>(p, r, rows, loss, stats)
                           : forward<float>(p, r, rows, loss, stats);
}

static const char *choose(const hex_problem_t &p, const hex_run &r, const row_choice &choice)
{
    const char *error = prepare(p, r);
    const int bytes = HEX_BINS * 4 + (3 * WARPS + 2) * (int)sizeof(double);
    if (error)
        return error;
    if (p.compute_f64)
        HEX_LAUNCH(choose_rows<double>, dim3((unsigned)r.parts.rows), dim3(THREADS), bytes,
                   r.stream, p, r, choice);
    else
        HEX_LAUNCH(choose_rows<float>, dim3((unsigned)r.parts.rows), dim3(THREADS), bytes, r.stream,
                   p, r, choice);
    return hex_launched("row quantiles");
}

const char *hex_plain_threshold(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                                double *rows)
{
    return choose(p, r, {choice, rows, NULL, NULL});
}

const char *hex_plain_range(const hex_problem_t &p, const hex_run &r, void *low, void *high)
{
    return choose(p, r, {{}, NULL, low, high});
}

template <class real>
static const char *gather(const hex_problem_t &p, const hex_run &r, const hex_gradient_t &g)
{
    if (r.parts.rows > 0) {
        HEX_LAUNCH(gather_rows<real>, dim3((unsigned)r.parts.rows), dim3(THREADS),
                   THREADS * (int)sizeof(real), r.stream, p, r);
        const char *error = hex_launched("backward rows");
        if (error)
            return error;
    }
    const int64_t blocks = p.count * own_blocks(p.K);
    if (p.mode != HEX_PAIRED || !g.dz[2] || blocks == 0)
        return NULL;
    HEX_LAUNCH(own_gradients<real>, dim3((unsigned)blocks), dim3(THREADS), 0, r.stream, p, r,
               g.dz[2]);
    return hex_launched("gradient of the negatives");
}

const char *hex_plain_gather(const hex_problem_t &p, const hex_run &r, const hex_gradient_t &g)
{
    const char *error = prepare(p, r);
    return error ? error : p.compute_f64 ? gather<double>(p, r, g) : gather<float>(p, r, g);
}
