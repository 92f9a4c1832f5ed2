// SPDX-License-Identifier: MIT
// The same operators without tensor cores: a block for each row, a warp for each of its cosines.
// For float64, where exactness is wanted and not speed, and for per-anchor negatives, which are
// used once each, so that reading them is all the work.
//
// The row's columns are the unit rows [col0, col1) but those that sets.cuh leaves out, or, with
// per-anchor negatives, its own K rows of the input. `real` is the compute type.
#include "bins.cuh"
#include "row.cuh"
#include "sets.cuh"

#define WARPS 4
#define THREADS (32 * WARPS)

// CUDA blocks for an anchor's own negatives, a warp each.
static inline __host__ __device__ int64_t own_blocks(int64_t K) { return (K + WARPS - 1) / WARPS; }

// The vectors that a row meets, of the inputs or of a guide: unit rows, or its own of the input.
template <class real> struct vectors {
    const hex_unit *unit;
    const hex_rows_t *own; // NULL: unit rows
    int64_t i, K, first;   // the row; own negatives of each, and where those of the call begin
    int64_t width;

    __device__ real number(int64_t j, int64_t d) const
    {
        if (!own)
            return ((const real *)unit->plain)[j * unit->width + d];
        const bool cube = own->inner != own->rows; // a guide's are one after another
        const int64_t at = cube ? row_start(*own, j, i) : row_start(*own, i * K + j);
        return (real)(read_number(own->data, own->dtype, at + d * own->col) *
                      unit->own[(i - first) * K + j]);
    }
    // By a warp, the same on every lane.
    __device__ real cosine(int64_t j) const
    {
        const real *u = (const real *)unit->plain + i * unit->width;
        real sum = 0;
        for (int64_t d = (int)threadIdx.x & 31; d < width; d += 32)
            sum += u[d] * number(j, d);
        return warp_sum(sum);
    }
};

// The columns of row i, whatever the mode. It points to the kernel's arguments, which are grid
// constants: else each thread would have a copy of its own in memory.
template <class real> struct columns {
    const hex_problem_t *p;
    const hex_run *r;
    vectors<real> of, guide;
    int64_t i, col0, col1;

    __device__ void start(const hex_problem_t &problem, const hex_run &run, int64_t row)
    {
        p = &problem, r = &run, i = row;
        const bool paired = p->mode == HEX_PAIRED;
        of = {&r->unit, paired ? p->input + 2 : NULL, i, p->K, p->first, p->D};
        guide = {&r->guide, paired ? p->guide + 2 : NULL, i, p->K, p->first, p->G};
        col0 = 0, col1 = p->K;
        for (int k = 0; k < r->parts.count && !paired; k++)
            if (i >= r->parts.part[k].row0 && i < r->parts.part[k].row1)
                col0 = r->parts.part[k].col0, col1 = r->parts.part[k].col1;
    }
    // What column j is to the row, and what the row is to it.
    __device__ hex_kind_t kind(int64_t j) const
    {
        return p->mode == HEX_PAIRED ? own_kind_of(*p, i, j) : kind_of(*p, *r, i, j);
    }
    __device__ hex_kind_t kind_to(int64_t j) const
    {
        return p->mode == HEX_PAIRED ? LEFT_OUT : kind_of(*p, *r, j, i);
    }
    // What is compared with eps, of a column with this cosine.
    __device__ real score(int64_t j, real cosine) const
    {
        if (p->by_group) {
            const int64_t its = p->mode == HEX_PAIRED
                                    ? p->groups[2].data[(i * p->K + j) * p->groups[2].stride]
                                    : r->groups[j];
            return its == r->groups[i] ? 1 : 0;
        }
        return p->G > 0 ? guide.cosine(j) : cosine;
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

// 1 / |n|, and those of the guide
static __global__ void __launch_bounds__(THREADS, 1)
    own_norms(hex_problem_t p, double *own, double *guide)
{
    int64_t i, j, n;
    if (!own_place(p, &i, &j, &n))
        return;
    const length of = norm_of(p.input[2], row_start(p.input[2], j, i), p.D);
    const int lane = (int)threadIdx.x & 31;
    if (lane == 0)
        own[n] = of.scale * of.inverse;
    if (!guide)
        return;
    const length seen = norm_of(p.guide[2], row_start(p.guide[2], i * p.K + j), p.G);
    if (lane == 0)
        guide[n] = seen.scale * seen.inverse;
}

// The norms, where there are per-anchor negatives.
static const char *prepare(const hex_problem_t &p, const hex_run &r)
{
    const int64_t blocks = p.count * own_blocks(p.K);
    if (p.mode != HEX_PAIRED || blocks == 0)
        return NULL;
    HEX_LAUNCH(own_norms, dim3((unsigned)blocks), dim3(THREADS), 0, r.stream, p, r.unit.own,
               r.guide.own);
    return hex_launched("norms of the negatives");
}

// ---- forward ----

template <class real>
static __global__ void __launch_bounds__(THREADS, 1)
    forward_rows(const __grid_constant__ hex_problem_t p, const __grid_constant__ hex_run r,
                 double *rows, void *loss, real *stats)
{
    HEX_SHARED_MEMORY(shared);
    hex_sums<real, true> *parts = (hex_sums<real, true> *)shared, s;
    const int warp = (int)threadIdx.x >> 5;
    const int64_t at = blockIdx.x, i = nth_row(r.parts, at), anchors = r.parts.rows;
    const real scale = (real)(HEX_LOG2E / read_vector(p.tau, 0)), beta = (real)p.beta;
    const real eps = row_eps<real>(p, at);
    columns<real> c;
    c.start(p, r, i);
    s.clear();
    for (int64_t j = c.col0 + warp; j < c.col1; j += WARPS) {
        const hex_kind_t kind = c.kind(j);
        if (kind == LEFT_OUT)
            continue;
        const real x = c.of.cosine(j);
        if (kind == POSITIVE)
            s.add_positive(x, scale);
        else
            s.add_negative(x, c.score(j, x), eps, scale, beta);
    }
    if ((threadIdx.x & 31) == 0)
        parts[warp] = s;
    __syncthreads();
    if (threadIdx.x == 0) {
        hex_sums<double, true> all;
        all.clear();
        for (int k = 0; k < WARPS; k++)
            all.merge(in_double(parts[k]), (double)scale, p.beta);
        const hex_row row = {all.v[SUM_NEGATIVES],
                             p.several ? 0 : r.unit.positive[image_of(i, p.B)]};
        rows[at] = finish_row(p, at, row, eps, all, (double)scale, stats, anchors);
    }
    add_up_rows<real>(p, r, rows, loss, (double *)shared, (unsigned *)(parts + WARPS));
}

// ---- threshold and bounds ----

template <class real>
static __global__ void __launch_bounds__(THREADS, 1)
    choose_rows(const __grid_constant__ hex_problem_t p, const __grid_constant__ hex_run r,
                hex_row_choice choice)
{
    HEX_SHARED_MEMORY(shared);
    uint32_t *counts = (uint32_t *)shared;
    double *scratch = (double *)(counts + HEX_BINS);
    unsigned *flag = (unsigned *)(scratch + 3 * WARPS);
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    const int64_t i = nth_row(r.parts, blockIdx.x);
    const bool self = p.mode == HEX_NTXENT;
    columns<real> c;
    c.start(p, r, i);
    hex_row_bins row;
    row.start(choice.of);
    // An anchor's own cosine is 1, of a row of zeros 0; its only positive is as the inputs give it.
    if (self)
        row.add_apart(r.unit.inverse[i] * 0 + (r.unit.inverse[i] == 0 ? 0 : 1));
    if (!p.several)
        row.add_apart(r.unit.positive[image_of(i, p.B)]);
    for (int pass = 0; pass < (choice.low ? 1 : 2); pass++) {
        for (int k = (int)threadIdx.x; k < HEX_BINS; k += THREADS)
            counts[k] = 0;
        __syncthreads();
        for (int64_t j = c.col0 + warp; j < c.col1; j += WARPS) {
            const hex_kind_t kind = c.kind(j);
            if (kind == LEFT_OUT)
                continue;
            const double x = (double)c.of.cosine(j);
            const int at = row.add(x, pass, kind == NEGATIVE || !choice.of.negatives);
            if (lane == 0 && at >= 0)
                atomicAdd(counts + at, 1u);
        }
        __syncthreads();
        row.pick(counts, pass, choice.of.quantile); // each warp the same
        __syncthreads();
    }
    row.finish<real>(r, choice, scratch, flag);
}

// ---- backward ----

// What the anchor `of` gives to the entry of its column j, which is this kind to it.
template <class real>
static __device__ real entry_of(const hex_row_coefficients<real> &of, hex_kind_t kind, real x,
                                real score, real scale, real beta)
{
    return kind == LEFT_OUT ? 0 : of.entry(x, kind == POSITIVE, score > of.eps, scale, beta);
}

// du of unit row `o`, into partial: a stretch of THREADS columns at a time, first their weights,
// then each thread its own features.
template <class real>
static __global__ void __launch_bounds__(THREADS, 1)
    gather_rows(const __grid_constant__ hex_problem_t p, const __grid_constant__ hex_run r)
{
    HEX_SHARED_MEMORY(shared);
    real *w = (real *)shared;
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    const int64_t o = nth_row(r.parts, blockIdx.x), anchors = anchors_of(p);
    const real scale = (real)(HEX_LOG2E / read_vector(p.tau, 0)), beta = (real)p.beta;
    const real *k = (const real *)r.coefficients;
    real *du = (real *)r.partial + blockIdx.x * r.unit.width;
    columns<real> c;
    c.start(p, r, o);
    hex_row_coefficients<real> mine, theirs;
    mine.read(k + coefficient(0, o), 64);
    for (int64_t d = threadIdx.x; d < p.D; d += THREADS)
        du[d] = 0;
    for (int64_t from = c.col0; from < c.col1; from += THREADS) {
        const int64_t n = c.col1 - from < THREADS ? c.col1 - from : THREADS;
        for (int64_t j = warp; j < n; j += WARPS) {
            const int64_t t = from + j;
            const hex_kind_t to_row = o < anchors ? c.kind(t) : LEFT_OUT;
            const hex_kind_t to_column = t < anchors ? c.kind_to(t) : LEFT_OUT;
            real weight = 0;
            if (to_row != LEFT_OUT || to_column != LEFT_OUT) {
                const real x = c.of.cosine(t), score = c.score(t, x);
                weight = entry_of(mine, to_row, x, score, scale, beta);
                if (to_column != LEFT_OUT) {
                    theirs.read(k + coefficient(0, t), 64);
                    weight += entry_of(theirs, to_column, x, score, scale, beta);
                }
            }
            if (lane == 0)
                w[j] = weight;
        }
        __syncthreads();
        for (int64_t d = threadIdx.x; d < p.D; d += THREADS) {
            real sum = du[d];
            for (int64_t j = 0; j < n; j++)
                if (w[j] != 0) // or a NaN of a row that is left out would be one of the sum
                    sum += w[j] * c.of.number(from + j, d);
            du[d] = sum;
        }
        __syncthreads(); // w is free again
    }
}

// The gradient of the per-anchor negatives, a warp each: dn = g (u - c n) / |n|.
template <class real>
static __global__ void __launch_bounds__(THREADS, 1)
    own_gradients(const __grid_constant__ hex_problem_t p, const __grid_constant__ hex_run r,
                  void *dn)
{
    int64_t i, j, n;
    if (!own_place(p, &i, &j, &n))
        return;
    const real scale = (real)(HEX_LOG2E / read_vector(p.tau, 0));
    columns<real> c;
    c.start(p, r, i);
    hex_row_coefficients<real> mine;
    mine.read((const real *)r.coefficients + coefficient(0, i), 64);
    const real x = c.of.cosine(j), *u = (const real *)r.unit.plain + i * r.unit.width;
    const hex_kind_t kind = c.kind(j);
    const real g = entry_of(mine, kind, x, c.score(j, x), scale, (real)p.beta);
    const double inverse = kind == LEFT_OUT ? 0 : r.unit.own[n]; // it may hold any numbers
    for (int64_t d = (int)threadIdx.x & 31; d < p.D; d += 32)
        write_number(dn, p.input[2].dtype, n * p.D + d,
                     inverse == 0 ? 0
                                  : (double)g * inverse *
                                        ((double)u[d] - (double)x * (double)c.of.number(j, d)));
}

// ---- launching ----

template <class real>
static const char *forward(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                           void *stats)
{
    const int bytes = (WARPS * SUMS_OF_SETS + 1) * (int)sizeof(double);
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

static const char *choose(const hex_problem_t &p, const hex_run &r, const hex_row_choice &choice)
{
    const char *error = prepare(p, r);
    const int bytes = HEX_BINS * 4 + (3 * WARPS + 1) * (int)sizeof(double);
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
