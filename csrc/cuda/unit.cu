// SPDX-License-Identifier: MIT
// The first kernel of every call: u = z / |z| from any dtype and strides, as fp16 (high and low) or
// plain; for the forward the positives' cosines, from the inputs as they are; for the backward the
// coefficients of all rows and the parts of dL/dtau; and zeros where later kernels count. After it
// come the rows of a guide, which are like those of the inputs, and labels, laid out for sets.cuh.
//
// A row of zeros gives u = 0 and 1 / |z| = 0, a row with NaN or Inf NaN throughout. Rows of 1e-23
// or 1e20 keep their direction: the sums are in double, where the square of no float leaves the
// range; of other rows, the sum is of the row scaled by a power of two.
#include "fours.cuh"
#include "sets.cuh"

#define THREADS 128

// ---- what the kernels do besides ----

struct unit_work {
    int64_t pairs;  // images whose two views are read together: all, or none
    bool positives; // whether their cosines are wanted
    uint4 *zeros;
    int64_t zero_count;
    hex_gradient_t g;   // of the backward, as
    void *coefficients; // are; else NULL
    int64_t coefficient_blocks;
};

// By the blocks that are not of coefficients.
static __device__ void set_zeros(const unit_work &work, int64_t block)
{
    const int64_t threads = (gridDim.x - work.coefficient_blocks) * THREADS;
#pragma unroll 1 // or the compiler divides to find how often
    for (int64_t k = block * THREADS + threadIdx.x; k < work.zero_count; k += threads)
        work.zeros[k] = make_uint4(0, 0, 0, 0);
}

// The coefficients of unit row i, times its grad_output; of no row at all they are those of a row
// that is no anchor. Returns its part of dL/dtau, before the mean.
template <class real>
static __device__ double scale_coefficients(const hex_problem_t &p, const hex_gradient_t &g,
                                            int64_t i, real *out)
{
    const int64_t anchors = anchors_of(p);
    real k[K_ALL] = {};
    double along = 0;
    k[K_EPS] = (real)INFINITY;
    if (i < anchors) {
        const real *stats = (const real *)g.stats + i;
        const double grad = read_vector(g.grad, i);
        const double go = grad / (p.reduction == HEX_MEAN ? (double)anchors : 1.0);
        along = grad * (double)stats[HEX_STAT_DTAU * anchors];
        k[K_EPS] = stats[HEX_STAT_EPS * anchors];
        k[K_SHIFT] = stats[HEX_STAT_SHIFT * anchors];
        const int from[] = {HEX_STAT_REST, HEX_STAT_HARD_E, HEX_STAT_HARD, HEX_STAT_POSITIVE};
        const int to[] = {K_REST, K_HARD_E, K_HARD, K_POSITIVE};
#pragma unroll
        for (int n = 0; n < 4; n++)
            k[to[n]] = (real)(go * (double)stats[from[n] * anchors]);
        if (p.several) {
            k[K_POS_SHIFT] = stats[HEX_STAT_POS_SHIFT * anchors];
            k[K_POS_MEAN] = stats[HEX_STAT_POS_MEAN * anchors];
            k[K_POS_E] = (real)(go * (double)stats[HEX_STAT_POS_E * anchors]);
        }
        const double x = -HEX_LOG2E / read_vector(p.tau, 0) * (double)k[K_SHIFT];
        const double unit = exp2(x), hard_unit = exp2(p.beta * x);
        k[K_REST0] = (real)((double)k[K_REST] * unit);
        k[K_HARD_E0] = (real)((double)k[K_HARD_E] * hard_unit * unit);
        k[K_HARD0] = (real)((double)k[K_HARD] * hard_unit);
    }
#pragma unroll
    for (int n = 0; n < K_ALL; n++)
        out[coefficient(n, i)] = k[n];
    return along;
}

// The first blocks, a thread a row: reads and writes of neighbours stand together.
template <class real>
static __device__ void coefficient_block(const hex_problem_t &p, const hex_unit &u,
                                         const unit_work &work, double *scratch)
{
    static_assert(THREADS == HEX_SUMMED, "a block's sum is one number");
    const int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    double along = 0;
    if (i < padded(u.count))
        along = scale_coefficients(p, work.g, i, (real *)work.coefficients);
    along = block_sum(along, scratch);
    if (threadIdx.x == 0 && i < anchors_of(p))
        u.positive[blockIdx.x] = along;
}

// ---- rows that are read four features at a time ----

// A group of LANES lanes for each image's two views, then for each other row, then for the rows of
// zeros up to the end of the last 64. Lane l has features 4 (l + LANES q) to those + 3 of each.
// Every row is read once.
template <int LANES, int QUADS>
static __global__ void __launch_bounds__(THREADS, QUADS > 2 ? 4 : 8)
    unit_fours(hex_problem_t p, hex_unit u, unit_work work)
{
    HEX_SHARED_MEMORY(shared);
    const int64_t block = (int64_t)blockIdx.x - work.coefficient_blocks;
    if (block < 0) {
        coefficient_block<float>(p, u, work, (double *)shared);
        return;
    }
    const int lane = (int)threadIdx.x % LANES, D = (int)p.D, width = (int)u.width;
    const int64_t item = block * (THREADS / LANES) + threadIdx.x / LANES;
    const bool pair = item < work.pairs;
    const int64_t row[2] = {pair ? item : item + work.pairs, item + p.B};
    const bool full[2] = {row[0] < u.count, pair}; // all lanes go on: they add up together
    const hex_origin from = origin_of(p, full[0] ? row[0] : 0);
    const hex_rows_t &x = p.input[from.input], &y = p.input[1];
    const int64_t at[2] = {row_start(x, from.row), row_start(y, item)};
    uint4 raw[2][QUADS];
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const int d = 4 * (lane + LANES * q);
            const hex_rows_t &of = h ? y : x;
            raw[h][q] =
                full[h] && d < D ? load_four(of.data, of.dtype, at[h] + d) : make_uint4(0, 0, 0, 0);
        }
    set_zeros(work, block); // while the rows are on their way

    float v[2][QUADS][4];
    double sum[3] = {}; // |z0|^2, |z1|^2, z0 . z1
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        widen_four(v[0][q], raw[0][q], x.dtype);
        widen_four(v[1][q], raw[1][q], y.dtype);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const double a = (double)v[0][q][k], b = (double)v[1][q][k];
            sum[0] += a * a, sum[1] += b * b, sum[2] += a * b;
        }
    }
#pragma unroll
    for (int k = LANES / 2; k > 0; k >>= 1)
#pragma unroll
        for (int n = 0; n < 3; n++)
            sum[n] += __shfl_xor_sync(~0u, sum[n], k);

    double inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        inverse[h] = sum[h] == 0 ? 0 : sum[h] < (double)INFINITY ? rsqrt(sum[h]) : (double)NAN;
        if (h == 0 ? row[0] >= padded(u.count) : !pair)
            continue;
        const hex_inverse by = inverse_in_floats(inverse[h]);
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const int d = 4 * (lane + LANES * q);
            if (d >= width)
                continue;
            float z[4], low[4];
            uint32_t high[2];
#pragma unroll
            for (int k = 0; k < 4; k++)
                z[k] = v[h][q][k] * by.scale;
            uint16_t *to = u.tiles + place_of(u, row[h], d);
#pragma unroll
            for (int k = 0; k < 2; k++)
                high[k] = pack_f16(z[2 * k] * by.high, z[2 * k + 1] * by.high);
            *(uint2 *)to = make_uint2(high[0], high[1]);
            if (!u.split)
                continue;
#pragma unroll
            for (int k = 0; k < 4; k++) { // what is left is exact: the product is not rounded
                const float rounded = f16_to_float((uint16_t)(high[k / 2] >> 16 * (k & 1)));
                low[k] = fmaf(z[k], by.low, fmaf(z[k], by.high, -rounded));
            }
            *(uint2 *)(to + 4096) = make_uint2(pack_f16(low[0], low[1]), pack_f16(low[2], low[3]));
        }
        if (lane == 0 && full[h])
            u.inverse[row[h]] = inverse[h];
    }
    if (lane == 0 && pair && work.positives)
        u.positive[item] = sum[2] * inverse[0] * inverse[1];
}

// ---- and any others, a warp each ----

// A NaN inverse makes NaN of 0 as well; an inverse of 0 makes 0 of everything finite.
static __device__ double unit_number(const hex_rows_t &x, int64_t at, int64_t d, length n)
{
    return read_number(x.data, x.dtype, at + d * x.col) * n.scale * n.inverse;
}

static __global__ void __launch_bounds__(THREADS, 1)
    unit_rows(hex_problem_t p, hex_unit u, unit_work work)
{
    HEX_SHARED_MEMORY(shared);
    const int lane = (int)threadIdx.x & 31;
    const int64_t block = (int64_t)blockIdx.x - work.coefficient_blocks;
    if (block < 0) {
        if (p.compute_f64)
            coefficient_block<double>(p, u, work, (double *)shared);
        else
            coefficient_block<float>(p, u, work, (double *)shared);
        return;
    }
    set_zeros(work, block);
    const int64_t i = block * (THREADS / 32) + (threadIdx.x >> 5);
    if (i >= u.count) { // up to the end of the last 64 rows
        for (int64_t d = lane; u.tiles && d < u.width; d += 32) {
            u.tiles[place_of(u, i, d)] = 0;
            if (u.split)
                u.tiles[place_of(u, i, d) + 4096] = 0;
        }
        return;
    }
    const hex_origin from = origin_of(p, i);
    const hex_rows_t &x = p.input[from.input];
    const int64_t at = row_start(x, from.row);
    const length n = norm_of(x, at, p.D);
    for (int64_t d = lane; d < u.width; d += 32) {
        const double v = d < p.D ? unit_number(x, at, d, n) : 0;
        if (u.plain)
            write_number(u.plain, p.compute_f64 ? HEX_F64 : HEX_F32, i * u.width + d, v);
        else {
            const uint16_t high = float_to_f16((float)v);
            const int64_t to = place_of(u, i, d);
            u.tiles[to] = high;
            if (u.split)
                u.tiles[to + 4096] = float_to_f16((float)(v - (double)f16_to_float(high)));
        }
    }
    if (lane == 0)
        u.inverse[i] = n.scale * n.inverse;
    if (i < p.B && work.positives) {
        const hex_rows_t &y = p.input[1];
        const int64_t there = row_start(y, i);
        const length m = norm_of(y, there, p.D);
        double sum = 0;
        for (int64_t d = lane; d < p.D; d += 32)
            sum += unit_number(x, at, d, n) * unit_number(y, there, d, m);
        sum = warp_sum(sum);
        if (lane == 0)
            u.positive[i] = sum;
    }
}

// ---- labels ----

static __device__ int64_t label_of(const hex_ids_t (&labels)[3], hex_origin from)
{
    const hex_ids_t &its = from.input == 0 ? labels[0] : from.input == 1 ? labels[1] : labels[2];
    return its.data[from.row * its.stride];
}

// A thread for each unit row, up to the end of the last 64.
static __global__ void __launch_bounds__(THREADS, 8)
    code_rows(hex_problem_t p, int64_t count, int64_t *ids, int64_t *groups, int64_t *places)
{
    const int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x;
    if (i >= padded(count))
        return;
    const hex_origin from = origin_of(p, i);
    if (ids)
        ids[i] = i < count ? label_of(p.ids, from) : 0;
    if (groups)
        groups[i] = i < count ? label_of(p.groups, from) : 0;
    if (places) // of any rows in the mask, for a tile asks for all of its rows
        places[i] = place_in_mask(i % p.mask.rows, candidate_of(p, i) % p.mask.columns);
}

// ---- launching ----

// The rows of all inputs of a problem to u, with work besides.
static const char *launch(const hex_problem_t &p, const hex_unit &u, const unit_work &work,
                          cudaStream_t stream)
{
    const int64_t rows = padded(u.count);
    const int bytes = THREADS / 32 * (int)sizeof(double);
    auto run = [&](auto kernel, int64_t n, int lanes) {
        const int64_t a_block = THREADS / lanes;
        const int64_t blocks = work.coefficient_blocks + (n + a_block - 1) / a_block;
        HEX_LAUNCH(kernel, dim3((unsigned)blocks), dim3(THREADS), bytes, stream, p, u, work);
    };
    if (!u.tiles || !hex_in_fours(p))
        run(unit_rows, rows, 32);
    else if (p.D <= 128)
        run(unit_fours<16, 2>, rows - work.pairs, 16);
    else if (p.D <= 256)
        run(unit_fours<32, 2>, rows - work.pairs, 32);
    else
        run(unit_fours<32, 4>, rows - work.pairs, 32);
    return hex_launched("unit rows");
}

const char *hex_unit_rows(const hex_problem_t &p, const hex_run &r, int64_t zeros,
                          const hex_gradient_t *g)
{
    const int64_t rows = padded(r.unit.count);
    if (rows == 0) {
        cudaMemsetAsync(r.tickets, 0, zeros * sizeof *r.tickets, r.stream);
        return hex_launched("(memset)");
    }
    // Past the words to be zero there is room: all of the workspace is in units of 256 bytes.
    unit_work work = {
        p.several ? 0 : p.B, !p.several && !g, (uint4 *)r.tickets, (zeros + 3) / 4, {}, NULL, 0};
    if (g)
        work.g = *g, work.coefficients = r.coefficients,
        work.coefficient_blocks = (rows + THREADS - 1) / THREADS;
    const char *error = launch(p, r.unit, work, r.stream);
    if (!error && r.guide.width > 0) {
        hex_problem_t guide = p;
        guide.D = p.G;
        for (int k = 0; k < 3; k++)
            guide.input[k] = p.guide[k];
        error = launch(guide, r.guide, {0, false, NULL, 0, {}, NULL, 0}, r.stream);
    }
    if (error || !(r.ids || r.groups || r.places))
        return error;
    HEX_LAUNCH(code_rows, dim3((unsigned)((padded(r.unit.count) + THREADS - 1) / THREADS)),
               dim3(THREADS), 0, r.stream, p, r.unit.count, r.ids, r.groups, r.places);
    return hex_launched("labels");
}
