// SPDX-License-Identifier: MIT
// The loss in one pass over the tiles. A thread holds 2 x 16 cosines of a tile. On the way through
// them it sets the members of H aside in shared memory, where they are few, and sums the rest
// without a branch; those set aside are added when there are some more of them. Only the tiles that
// hold a row itself, its positive or the end of the matrix look at indices.
//
// For tau >= 1/32 all rows take 1 as the shift of the sum over G: exponentials of cosines then stay
// in range, and there is no largest one to look for. Below, the largest so far is the shift.
//
// A row's sums over a slice of columns go to memory. The last block of its rows to arrive adds up
// the slices in their order, in double, ends the rows and adds up their loss; the last of all adds
// up those sums.
#include "tile.cuh"

#define LIST 24 // members of H that a thread can set aside of a row; a tile has at most 16
#define FEW 8   // as many may wait for the next tile
// In the place of what does not count: its exponential is 0, and its product with any scale finite.
#define NOTHING (-1e20f)
#define COLUMN (LIST + SUMS - SUM_HARD_TOP)

template <int WARPS> struct statistics {
    static constexpr int THREADS = 32 * WARPS;
    float top[2], rest[2], rest_t[2]; // SUM_TOP, SUM_REST and SUM_REST_T
    float *aside, *end[2]; // this thread's column of 2 x COLUMN x THREADS, where each list ends
    float eps[2], scale, beta;
    bool shared_shift;

    __device__ __forceinline__ float *list(int h) const { return aside + h * COLUMN * THREADS; }
    // Sum k over H of the thread's row h, for which there are no registers.
    __device__ __forceinline__ float &hard(int h, int k) const
    {
        return list(h)[(LIST + k - SUM_HARD_TOP) * THREADS];
    }
    __device__ __forceinline__ void start()
    {
        for (int h = 0; h < 2; h++) {
            end[h] = list(h);
            for (int k = SUM_HARD_TOP; k < SUMS; k++)
                hard(h, k) = k == SUM_HARD_TOP ? HEX_LOWEST : 0;
        }
    }

    __device__ __forceinline__ hex_sums<float> sums(int h) const
    {
        hex_sums<float> s;
        s.v[SUM_TOP] = top[h], s.v[SUM_REST] = rest[h], s.v[SUM_REST_T] = rest_t[h];
        for (int k = SUM_HARD_TOP; k < SUMS; k++)
            s.v[k] = hard(h, k);
        return s;
    }

    __device__ __forceinline__ void add_lists()
    {
#pragma unroll 1
        for (int h = 0; h < 2; h++) {
            hex_sums<float> s = sums(h);
            const float *last = h ? end[1] : end[0];
#pragma unroll 1
            for (const float *c = list(h); c < last; c += THREADS)
                s.add_hard(*c, scale, beta);
            for (int k = SUM_HARD_TOP; k < SUMS; k++)
                hard(h, k) = s.v[k];
        }
        end[0] = list(0), end[1] = list(1);
        __syncwarp(); // together again before the next tile's products
    }

    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_places &places, bool edge)
    {
        if (edge)
            places.blank(acc, NOTHING);
        if (shared_shift)
            add_at_one(acc);
        else
            add_at_largest(acc);
        const bool full = end[0] > list(0) + FEW * THREADS || end[1] > list(1) + FEW * THREADS;
        if (__any_sync(~0u, full))
            add_lists();
    }

    __device__ __forceinline__ void add_at_one(const float (&acc)[8][4])
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float limit = eps[h];
            float sum = 0, sum_t = 0, *to = end[h];
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    const float c = acc[n][2 * h + q], x = fmaf(c, scale, -scale), e = ex2(x);
                    if (c > limit) {
                        *to = c;
                        to += THREADS;
                    } else {
                        sum += e;
                        sum_t = fmaf(x, e, sum_t);
                    }
                }
            rest[h] += sum;
            rest_t[h] += sum_t;
            end[h] = to;
        }
    }

    __device__ __forceinline__ void add_at_largest(float (&acc)[8][4])
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float limit = eps[h];
            float *to = end[h], most = top[h];
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    float c = acc[n][2 * h + q];
                    if (c > limit) {
                        *to = c;
                        to += THREADS;
                        c = NOTHING;
                    }
                    most = fmaxf(most, c);
                    acc[n][2 * h + q] = c;
                }
            end[h] = to;
            if (most > top[h]) {
                const float d = (top[h] - most) * scale, f = ex2(d);
                rest_t[h] = f * (rest_t[h] + d * rest[h]);
                rest[h] *= f;
                top[h] = most;
            }
            float sum = 0, sum_t = 0;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    const float x = (acc[n][2 * h + q] - most) * scale, e = ex2(x);
                    sum += e;
                    sum_t = fmaf(x, e, sum_t);
                }
            rest[h] += sum;
            rest_t[h] += sum_t;
        }
    }
};

template <int WARPS, bool SPLIT, int PANELS>
static __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS) // 128 registers a thread
    forward_tiles(hex_problem_t p, hex_run r, hex_fit fit, double *sums, void *loss, float *stats)
{
    constexpr int ROWS = 16 * WARPS;
    HEX_SHARED_MEMORY(shared);
    hex_block block;
    block.start(r.parts, ROWS, blockIdx.x);

    statistics<WARPS> s;
    const double tau = read_vector(p.tau, 0);
    s.scale = (float)(HEX_LOG2E / tau);
    s.beta = (float)p.beta;
    s.shared_shift = tau >= 1. / 32;
    s.aside = (float *)(shared + fit.at.more) + threadIdx.x;
    const int lane = (int)threadIdx.x & 31;
    const int64_t mine = block.row0 + (threadIdx.x >> 5) * 16 + (lane >> 2);
    for (int h = 0; h < 2; h++) {
        s.top[h] = s.shared_shift ? 1.f : HEX_LOWEST;
        s.rest[h] = s.rest_t[h] = 0;
        const int64_t i = mine + 8 * h;
        s.eps[h] = block.has(i) ? row_threshold<float>(p, block.place(i)) : INFINITY;
    }
    for_each_tile<WARPS, SPLIT, PANELS>(block, r.unit, p.B, fit, shared, s);
    s.add_lists();

    const int64_t anchors = r.parts.rows;
    float *partial = (float *)r.partial;
    for (int h = 0; h < 2; h++) { // the four threads of a row
        hex_sums<float> row = s.sums(h);
        for (int k = 1; k < 4; k <<= 1) {
            hex_sums<float> other;
            for (int n = 0; n < SUMS; n++)
                other.v[n] = __shfl_xor_sync(~0u, row.v[n], k);
            row.merge(other, s.scale, s.beta);
        }
        const int64_t i = mine + 8 * h;
        if ((lane & 3) == 0 && block.has(i))
            for (int n = 0; n < SUMS; n++)
                partial[(block.slice * SUMS + n) * anchors + block.place(i)] = row.v[n];
    }

    __syncthreads(); // what follows uses the place of the sums
    unsigned *flag = (unsigned *)shared;
    if (!last_to_arrive(r.tickets + block.ticket, block.part.slices, flag))
        return;
    const int64_t i = block.row0 + threadIdx.x, at = block.place(i);
    double value = 0;
    if (threadIdx.x < ROWS && block.has(i)) {
        // Two passes: the largest of the shifts first, so that each slice is rescaled once. Reads
        // of several slices are on their way at a time, or a small batch would wait for each.
        float top = HEX_LOWEST, hard_top = HEX_LOWEST;
#pragma unroll 8
        for (int64_t slice = 0; slice < block.part.slices; slice++) {
            top = fmaxf(top, __ldcg(partial + (slice * SUMS + SUM_TOP) * anchors + at));
            hard_top =
                fmaxf(hard_top, __ldcg(partial + (slice * SUMS + SUM_HARD_TOP) * anchors + at));
        }
        hex_sums<double> all;
        all.clear();
#pragma unroll 4
        for (int64_t slice = 0; slice < block.part.slices; slice++) {
            hex_sums<float> other;
            for (int n = 0; n < SUMS; n++)
                other.v[n] = __ldcg(partial + (slice * SUMS + n) * anchors + at);
            other.raise_rest(top, s.scale);
            other.raise_hard(hard_top, s.scale, s.beta);
            for (int n = 0; n < SUMS; n++)
                all.v[n] += (double)other.v[n];
        }
        all.v[SUM_TOP] = (double)top, all.v[SUM_HARD_TOP] = (double)hard_top;
        value = finish_row(p, at, negatives_of_a_row(p), r.unit.positive[image_of(i, p.B)],
                           row_threshold<float>(p, at), all, (double)s.scale, stats, anchors);
        if (p.reduction == HEX_NONE)
            ((float *)loss)[at] = (float)value;
    }
    if (p.reduction == HEX_NONE)
        return;
    double *scratch = (double *)shared + 1;
    value = block_sum(value, scratch);
    if (threadIdx.x == 0)
        sums[block.ticket] = value;
    if (!last_to_arrive(r.tickets + r.parts.row_blocks, r.parts.row_blocks, flag))
        return;
    value = block_sum_of(sums, r.parts.row_blocks, scratch);
    if (threadIdx.x == 0)
        *(float *)loss = (float)(p.reduction == HEX_MEAN ? value / (double)anchors : value);
}

template <int WARPS, bool SPLIT, int PANELS>
static const char *launch(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                          void *stats)
{
    const hex_fit fit =
        fit_of(r, WARPS, PANELS, PANELS != 0, 2 * COLUMN * 32 * WARPS * (int64_t)sizeof(float));
    const auto kernel = forward_tiles<WARPS, SPLIT, PANELS>;
    if (allow_shared_memory(kernel, r, fit))
        HEX_LAUNCH(kernel, dim3((unsigned)r.parts.blocks), dim3(32 * WARPS), (int)fit.at.bytes,
                   r.stream, p, r, fit, rows, loss, (float *)stats);
    return hex_launched("forward statistics");
}

const char *hex_tile_forward(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                             void *stats)
{
    return with_kind(r.unit, [&](auto split, auto panels) {
        constexpr bool SPLIT = decltype(split)::value;
        constexpr int PANELS = decltype(panels)::value;
        return r.block_rows == 64 ? launch<4, SPLIT, PANELS>(p, r, rows, loss, stats)
               : !PANELS || r.block_rows == 128
                   ? launch<8, SPLIT, PANELS>(p, r, rows, loss, stats)
                   : launch<PANELS ? 16 : 8, SPLIT, PANELS>(p, r, rows, loss, stats);
    });
}
