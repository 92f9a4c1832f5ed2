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
#include <type_traits>

#include "marks.cuh"
#include "row.cuh"

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
        add_full_lists();
    }

    __device__ __forceinline__ void add_full_lists()
    {
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
            float *to = end[h];
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    float &c = acc[n][2 * h + q];
                    if (c > limit) {
                        *to = c;
                        to += THREADS;
                        c = NOTHING;
                    }
                }
            end[h] = to;
        }
        add_rest(acc);
    }

    // Of a tile what is not NOTHING.
    __device__ __forceinline__ void add_rest(const float (&acc)[8][4])
    {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float most = top[h];
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int q = 0; q < 2; q++)
                    most = fmaxf(most, acc[n][2 * h + q]);
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

// With labels, a mask, groups or a guide. All sums have the largest so far as their shift; those over
// P go without lists, for a tile has either none of it or many.
template <int WARPS> struct marked_statistics {
    static constexpr int THREADS = 32 * WARPS;
    statistics<WARPS> of; // G and H
    float pos_top[2], pos_e[2], pos_t[2], pos_te[2];
    int positives[2], negatives[2], unknown[2];

    __device__ __forceinline__ void start() { of.start(); }

    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_marks &marks)
    {
        if (__any_sync(~0u, marks.positive != 0))
            add_positives(acc, marks.positive);
        const uint32_t unknown_bits = marks.unknown & ~bits_not_numbers(acc);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            negatives[h] += __popc(marks.negative & BITS_OF_ROW(h));
            unknown[h] += __popc(unknown_bits & BITS_OF_ROW(h));
        }
        const uint32_t hard = marks.hard & marks.negative;
        for_each_bit([&](uint32_t bit, int n, int q, int) {
            const int h = q >> 1;
            if (hard & bit) {
                *of.end[h] = acc[n][q];
                of.end[h] += THREADS;
            }
            acc[n][q] = marks.negative & ~hard & bit ? acc[n][q] : NOTHING;
        });
        of.add_rest(acc);
        of.add_full_lists();
    }

    __device__ __forceinline__ void add_positives(const float (&acc)[8][4], uint32_t bits)
    {
        float top[2] = {pos_top[0], pos_top[1]};
        for_each_bit([&](uint32_t bit, int n, int q, int) {
            top[q >> 1] = bits & bit ? fmaxf(top[q >> 1], acc[n][q]) : top[q >> 1];
        });
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float d = (pos_top[h] - top[h]) * of.scale, f = ex2(d);
            pos_te[h] = f * (pos_te[h] + d * pos_e[h]);
            pos_e[h] *= f;
            pos_t[h] += d * (float)positives[h];
            pos_top[h] = top[h];
            positives[h] += __popc(bits & BITS_OF_ROW(h));
        }
        for_each_bit([&](uint32_t bit, int n, int q, int) {
            const int h = q >> 1;
            const float t = bits & bit ? (acc[n][q] - pos_top[h]) * of.scale : 0;
            const float e = bits & bit ? ex2(t) : 0;
            pos_e[h] += e;
            pos_t[h] += t;
            pos_te[h] = fmaf(t, e, pos_te[h]);
        });
    }

    __device__ __forceinline__ hex_sums<float, true> sums(int h) const
    {
        const hex_sums<float> mine = of.sums(h);
        hex_sums<float, true> s;
        for (int k = 0; k < SUMS; k++)
            s.v[k] = mine.v[k];
        s.v[SUM_POS_TOP] = pos_top[h], s.v[SUM_POS_COUNT] = (float)positives[h];
        s.v[SUM_POS_E] = pos_e[h], s.v[SUM_POS_T] = pos_t[h], s.v[SUM_POS_TE] = pos_te[h];
        s.v[SUM_NEGATIVES] = (float)negatives[h], s.v[SUM_UNKNOWN] = (float)unknown[h];
        // Any NaN is in one of these, which are finite otherwise.
        s.v[SUM_FINITE] = (mine.v[SUM_REST] + mine.v[SUM_BE] + pos_e[h]) * 0;
        return s;
    }
};

template <int WARPS> DEVICE statistics<WARPS> &of_rest(statistics<WARPS> &s) { return s; }
template <int WARPS> DEVICE statistics<WARPS> &of_rest(marked_statistics<WARPS> &s) { return s.of; }

template <int WARPS, bool SPLIT, int PANELS, bool SETS>
static __global__ void __launch_bounds__(32 * WARPS, (SETS ? 8 : 16) / WARPS)
    forward_tiles(hex_problem_t p, hex_run r, hex_fit fit, double *sums, void *loss, float *stats)
{
    constexpr int ROWS = 16 * WARPS, KINDS = SETS ? SUMS_OF_SETS : SUMS;
    HEX_SHARED_MEMORY(shared);
    hex_block block;
    block.start(r.parts, ROWS, blockIdx.x);

    std::conditional_t<SETS, marked_statistics<WARPS>, statistics<WARPS>> fold = {};
    statistics<WARPS> &s = of_rest(fold);
    const double tau = read_vector(p.tau, 0);
    s.scale = (float)(HEX_LOG2E / tau);
    s.beta = (float)p.beta;
    s.shared_shift = !SETS && tau >= 1. / 32;
    s.aside = (float *)(shared + fit.at.more) + threadIdx.x;
    const int lane = (int)threadIdx.x & 31;
    const int64_t mine = block.row0 + (threadIdx.x >> 5) * 16 + (lane >> 2);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        s.top[h] = s.shared_shift ? 1.f : HEX_LOWEST;
        const int64_t i = mine + 8 * h;
        s.eps[h] = block.has(i) ? row_eps<float>(p, block.place(i)) : INFINITY;
    }
    if constexpr (SETS) {
        fold.pos_top[0] = fold.pos_top[1] = HEX_LOWEST;
        for_each_marked_tile<WARPS, SPLIT>(block, p, r, fit, shared, s.eps, fold);
    } else
        for_each_tile<WARPS, SPLIT, PANELS>(block, r.unit, p.B, fit, shared, s);
    s.add_lists();

    const int64_t anchors = r.parts.rows;
    float *partial = (float *)r.partial;
#pragma unroll
    for (int h = 0; h < 2; h++) { // the four threads of a row
        hex_sums<float, SETS> row = fold.sums(h);
        for (int k = 1; k < 4; k <<= 1)
            row.merge(shuffled(row, k), s.scale, s.beta);
        const int64_t i = mine + 8 * h;
        if ((lane & 3) == 0 && block.has(i))
            for (int n = 0; n < KINDS; n++)
                partial[(block.slice * KINDS + n) * anchors + block.place(i)] = row.v[n];
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
        float top = HEX_LOWEST, hard_top = HEX_LOWEST, pos_top = HEX_LOWEST;
#pragma unroll 8
        for (int64_t slice = 0; slice < block.part.slices; slice++) {
            const float *from = partial + slice * KINDS * anchors + at;
            top = fmaxf(top, __ldcg(from + SUM_TOP * anchors));
            hard_top = fmaxf(hard_top, __ldcg(from + SUM_HARD_TOP * anchors));
            if (SETS)
                pos_top = fmaxf(pos_top, __ldcg(from + SUM_POS_TOP * anchors));
        }
        hex_sums<double, SETS> all;
        all.clear();
#pragma unroll 4
        for (int64_t slice = 0; slice < block.part.slices; slice++) {
            hex_sums<float, SETS> other;
            for (int n = 0; n < KINDS; n++)
                other.v[n] = __ldcg(partial + (slice * KINDS + n) * anchors + at);
            other.raise_rest(top, s.scale);
            other.raise_hard(hard_top, s.scale, s.beta);
            if constexpr (SETS)
                other.raise_positives(pos_top, s.scale);
            for (int n = 0; n < KINDS; n++)
                all.v[n] += (double)other.v[n];
        }
        all.v[SUM_TOP] = (double)top, all.v[SUM_HARD_TOP] = (double)hard_top;
        if constexpr (SETS)
            all.v[SUM_POS_TOP] = (double)pos_top;
        const hex_row row = {SETS ? all.v[SUM_NEGATIVES] : (double)negatives_of_a_row(p),
                             p.several ? 0 : r.unit.positive[image_of(i, p.B)]};
        value = finish_row(p, at, row, row_eps<float>(p, at), all, (double)s.scale, stats, anchors);
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

template <int WARPS, bool SPLIT, int PANELS, bool SETS>
static const char *launch(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                          void *stats)
{
    const hex_fit fit =
        fit_of(r, WARPS, PANELS, PANELS != 0, 2 * COLUMN * 32 * WARPS * (int64_t)sizeof(float));
    const auto kernel = forward_tiles<WARPS, SPLIT, PANELS, SETS>;
    if (allow_shared_memory(kernel, r, fit))
        HEX_LAUNCH(kernel, dim3((unsigned)r.parts.blocks), dim3(32 * WARPS), (int)fit.at.bytes,
                   r.stream, p, r, fit, rows, loss, (float *)stats);
    return hex_launched("forward statistics");
}

const char *hex_tile_forward(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                             void *stats)
{
    return with_kind(r.unit, has_sets(p), [&](auto split, auto panels, auto sets) {
        constexpr bool SPLIT = decltype(split)::value, SETS = decltype(sets)::value;
        constexpr int PANELS = decltype(panels)::value;
        return r.block_rows == 64 ? launch<4, SPLIT, PANELS, SETS>(p, r, rows, loss, stats)
               : !PANELS || r.block_rows == 128
                   ? launch<8, SPLIT, PANELS, SETS>(p, r, rows, loss, stats)
                   : launch<PANELS ? 16 : 8, SPLIT, PANELS, SETS>(p, r, rows, loss, stats);
    });
}
