// SPDX-License-Identifier: MIT
// The quantile of every row, and every row's bounds, over tiles that are computed again.
//
// Quantile: a first pass counts each row's cosines in 256 coarse bins, the second those of the
// coarse bin that holds the rank in 256 fine ones: 65536 bins in all, 1.5e-5 from an element to the
// middle of its own. Only integers are added atomically, so no order matters. A block counts in
// shared memory, two 16-bit counts to a word, for at most 32768 columns. The last block of a row
// picks the bin; the last of all takes the mean, in the order of the rows.
//
// Of a large batch in 16 bits sample.cu and bracket.cu find the bins of nearly all rows in one
// pass; then only what they left is counted here.
//
// The row's own place and its positive are left out of the tiles and added at the end where the row
// is taken whole: self as exactly 1 (0 for a row of zeros), the positive as the inputs give it.
//
// Where positives are several, they are cosines of the tiles like others. Of these rows, and of those
// with a mask, it shows when they have been counted how long they are, and whether they have a NaN.
#include "bins.cuh"
#include "marks.cuh"

#define WARPS 4
#define ROWS (16 * WARPS)
#define THREADS (32 * WARPS)
#define PITCH (HEX_BINS / 2 + 1) // words a row; odd, so that rows start in different banks

enum { COARSE, FINE };

template <int KIND> struct histogram {
    uint32_t *all, *words[2]; // of the block, and of the thread's two rows
    int coarse[2];
    bool negatives, spoilt[2]; // of sets: whether positives do not count; NaN in the rows

    __device__ __forceinline__ void start()
    {
        for (int k = (int)threadIdx.x; k < ROWS * PITCH; k += THREADS)
            all[k] = 0;
    }

    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_places &places, bool edge)
    {
        if (edge)
            tile<true>(acc, places);
        else
            tile<false>(acc, places);
    }
    template <bool EDGE>
    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_places &places)
    {
        for_each_bit([&](uint32_t, int n, int q, int col) {
            if (!EDGE || !places.leaves_out(q >> 1, col))
                add(acc[n][q], q >> 1);
        });
    }
    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_marks &marks)
    {
        const uint32_t row = marks.negative | marks.positive;
        const uint32_t nan = row & bits_not_numbers(acc), counts = negatives ? marks.negative : row;
        for (int h = 0; h < 2; h++)
            spoilt[h] |= (nan & BITS_OF_ROW(h)) != 0;
        for_each_bit([&](uint32_t bit, int n, int q, int) {
            if (counts & bit)
                add(acc[n][q], q >> 1);
        });
    }
    __device__ __forceinline__ void add(float c, int h)
    {
        const int bin = bin_of(c), at = KIND == COARSE ? bin >> 8 : bin & 255;
        if (KIND == COARSE || bin >> 8 == coarse[h])
            atomicAdd(words[h] + (at >> 1), at & 1 ? 65536u : 1u);
    }
};

struct bounds {
    float low[2], high[2], finite[2];

    __device__ __forceinline__ void start() {}

    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_places &places, bool edge)
    {
        if (edge)
            tile<true>(acc, places);
        else
            tile<false>(acc, places);
    }
    template <bool EDGE>
    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_places &places)
    {
        for_each_bit([&](uint32_t, int n, int q, int col) {
            if (!EDGE || !places.leaves_out(q >> 1, col))
                add(acc[n][q], q >> 1);
        });
    }
    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_marks &marks)
    {
        for_each_bit([&](uint32_t bit, int n, int q, int) {
            if ((marks.negative | marks.positive) & bit)
                add(acc[n][q], q >> 1);
        });
    }
    __device__ __forceinline__ void add(float c, int h)
    {
        low[h] = fminf(low[h], c);
        high[h] = fmaxf(high[h], c);
        finite[h] += c * 0;
    }
};

struct selection {
    hex_choice choice;
    int *coarse;           // of each row
    int64_t *ranks;        // left within the coarse bin
    double *sums;          // of each block of rows; where rows are uneven, each row's quantile
    unsigned *spoilt;      // of each block of rows: some of its columns are not finite, if not 0
    unsigned *spoilt_rows; // the same of each row, where they are uneven; else NULL
    int *chosen; // each row's bin as bracket.cu found it, -1 where it did not; NULL: nobody looked
};

// Whether a row of the block has still to be counted: each warp looks for itself.
static __device__ bool is_left(const selection &s, const hex_block &block)
{
    bool left = false;
    for (int k = (int)threadIdx.x & 31; s.chosen && k < ROWS; k += 32)
        left |= block.has(block.row0 + k) && s.chosen[block.place(block.row0 + k)] < 0;
    return !s.chosen || __any_sync(~0u, left);
}

// Where each row has its quantile: whether any of the block's columns is not finite. A row is not
// where one of its columns is not, and no histogram has a bin for that.
static __device__ void look_at_columns(const hex_run &r, const selection &s, const hex_block &block)
{
    bool spoilt = false;
    for (int64_t k = block.tile0 * BN + (int)threadIdx.x; k < block.tile1 * BN; k += THREADS)
        if (k >= block.part.col0 && k < block.part.col1)
            spoilt |= !(r.unit.inverse[k] * 0 == 0);
    if (__any_sync(~0u, spoilt) && (threadIdx.x & 31) == 0)
        atomicAdd(s.spoilt + block.ticket, 1u);
}

// By one thread: the quantile of row i, which is of this bin, to its place; +Inf of an empty row, whose
// bin is -1.
static __device__ void write_quantile(const hex_problem_t &p, const hex_run &r, const selection &s,
                                      const hex_block &block, int64_t i, int bin)
{
    const int64_t at = block.place(i);
    const bool apart = p.several || r.unit.positive[image_of(i, p.B)] * 0 == 0;
    const bool finite =
        apart && (s.spoilt_rows ? __ldcg(s.spoilt_rows + at) == 0 &&
                                      (p.mode != HEX_NTXENT || r.unit.inverse[i] * 0 == 0)
                                : s.spoilt[block.ticket] == 0);
    const double quantile = !finite ? (double)NAN : bin >= 0 ? bin_middle(bin) : (double)INFINITY;
    if (s.choice.each)
        ((float *)s.choice.each)[at] = (float)quantile;
    else
        s.sums[at] = quantile;
}

// The last of the threshold where rows are uneven: the mean of the rows that have an element.
static __device__ void add_rows(const hex_run &r, const selection &s, unsigned *flag)
{
    if (!last_to_arrive(r.tickets + 2 * r.parts.row_blocks + 1, r.parts.row_blocks, flag))
        return;
    double sum = 0, count = 0;
    for (int64_t i = threadIdx.x; i < r.parts.rows; i += THREADS) {
        const double x = __ldcg(s.sums + i);
        sum += x != (double)INFINITY ? x : 0;
        count += x != (double)INFINITY;
    }
    sum = block_sum(sum, (double *)(flag + 2));
    count = block_sum(count, (double *)(flag + 2));
    if (threadIdx.x == 0)
        settle(s.choice, sum / count, r.parts.rows); // NaN where no row has an element
}

// The last of the threshold: the block's sum, by one block for each block of rows, and the mean.
static __device__ void add_up(const hex_problem_t &p, const hex_run &r, const selection &s,
                              const hex_block &block, double sum, unsigned *flag)
{
    // A batch that is not finite has no threshold: each block looks at its share of the unit rows.
    double *scratch = (double *)(flag + 2);
    const int64_t share = (r.unit.count + r.parts.row_blocks - 1) / r.parts.row_blocks;
    for (int64_t k = threadIdx.x; k < share; k += THREADS)
        if (block.ticket * share + k < r.unit.count)
            sum += r.unit.inverse[block.ticket * share + k] * 0;
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0)
        s.sums[block.ticket] = sum;
    if (!last_to_arrive(r.tickets + 2 * r.parts.row_blocks + 1, r.parts.row_blocks, flag))
        return;
    sum = block_sum_of(s.sums, r.parts.row_blocks, scratch);
    if (threadIdx.x == 0)
        settle(s.choice, sum / (double)anchors_of(p), anchors_of(p));
}

// What a thread adds of the rows that are not left, in the order of those that are.
static __device__ double chosen_sum(const selection &s, const hex_block &block)
{
    double sum = 0;
    for (int row = (int)threadIdx.x >> 5; row < ROWS; row += WARPS)
        if ((threadIdx.x & 31) == 0 && block.has(block.row0 + row))
            sum += bin_middle(s.chosen[block.place(block.row0 + row)]);
    return sum;
}

template <int KIND, bool SPLIT, int PANELS, bool SETS>
static __global__ void __launch_bounds__(THREADS, SETS ? 3 : 4)
    count_tiles(hex_problem_t p, hex_run r, hex_fit fit, selection s)
{
    HEX_SHARED_MEMORY(shared);
    uint32_t *words = (uint32_t *)(shared + fit.at.more);
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    hex_block block;
    block.start(r.parts, ROWS, blockIdx.x);
    unsigned *flag = (unsigned *)(shared + fit.at.ring); // the counts may lie at the beginning
    if (KIND == COARSE && s.choice.each && !SETS)
        look_at_columns(r, s, block);
    if (!SETS && !is_left(s, block)) {
        if (KIND == COARSE || block.slice > 0)
            return;
        const int64_t i = block.row0 + threadIdx.x;
        if (!s.choice.each)
            add_up(p, r, s, block, chosen_sum(s, block), flag);
        else if (threadIdx.x < ROWS && block.has(i))
            write_quantile(p, r, s, block, i, s.chosen[block.place(i)]);
        return;
    }
    histogram<KIND> fold;
    fold.all = words;
    for (int h = 0; h < 2; h++) {
        const int row = warp * 16 + (lane >> 2) + 8 * h;
        fold.words[h] = words + row * PITCH;
        fold.coarse[h] = KIND == FINE && block.has(block.row0 + row)
                             ? s.coarse[block.place(block.row0 + row)]
                             : 0;
    }
    if constexpr (SETS) {
        fold.negatives = s.choice.negatives, fold.spoilt[0] = fold.spoilt[1] = false;
        const float none[2] = {INFINITY, INFINITY};
        for_each_marked_tile<WARPS, SPLIT>(block, p, r, fit, shared, none, fold);
        for (int h = 0; h < 2; h++) {
            const int64_t i = block.row0 + warp * 16 + (lane >> 2) + 8 * h;
            if (KIND == COARSE && fold.spoilt[h] && block.has(i))
                atomicAdd(s.spoilt_rows + block.place(i), 1u);
        }
    } else
        for_each_tile<WARPS, SPLIT, PANELS>(block, r.unit, p.B, fit, shared, fold); // has barriers
    const int pitch = r.narrow ? HEX_BINS / 2 : HEX_BINS;
    for (int k = (int)threadIdx.x; k < ROWS * HEX_BINS / 2; k += THREADS) {
        const int row = k / (HEX_BINS / 2), pair = k % (HEX_BINS / 2);
        const uint32_t word = words[row * PITCH + pair];
        if (word == 0 || !block.has(block.row0 + row))
            continue;
        uint32_t *to = r.counts + block.place(block.row0 + row) * pitch;
        if (r.narrow)
            atomicAdd(to + pair, word);
        else {
            atomicAdd(to + 2 * pair, word & 0xffff);
            atomicAdd(to + 2 * pair + 1, word >> 16);
        }
    }
    const int64_t other_tickets = KIND == FINE ? r.parts.row_blocks + 1 : 0;
    if (!last_to_arrive(r.tickets + other_tickets + block.ticket, block.part.slices, flag))
        return;
    const int64_t ends = block.part.row1 - block.row0, begins = block.part.row0 - block.row0;
    const int rows = ends < ROWS ? (int)ends : ROWS, skip = begins > 0 ? (int)begins : 0;
    // All that a row needs is read for all rows at once: one after the other would wait for each.
    if (r.narrow) {
        constexpr int WORDS = HEX_BINS / 2;
        uint32_t *from = r.counts + block.place(block.row0) * WORDS;
#pragma unroll 4
        for (int k = 4 * (int)threadIdx.x + skip * WORDS; k < rows * WORDS; k += 4 * THREADS) {
            const uint4 v = __ldcg((const uint4 *)(from + k));
            uint32_t *to = words + k / WORDS * PITCH + k % WORDS;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        }
        __syncthreads();
    }
    // Lane n of a warp has that of the warp's row n: the bins of what is added at the end, the
    // rank.
    static_assert(ROWS <= 32 * WARPS, "a lane for each row of a warp");
    int extra[2] = {-1, -1}, coarse_of = 0;
    int64_t rank_of = s.choice.rank;
    if (warp + WARPS * lane >= skip && warp + WARPS * lane < rows) {
        const int64_t i = block.row0 + warp + WARPS * lane;
        if (KIND == FINE)
            coarse_of = s.coarse[block.place(i)], rank_of = s.ranks[block.place(i)];
        if (!s.choice.negatives) {
            if (!SETS || !p.several)
                extra[0] = bin_of((float)r.unit.positive[image_of(i, p.B)]);
            if (p.mode == HEX_NTXENT)
                extra[1] = bin_of(r.unit.inverse[i] == 0 ? 0.f : 1.f);
        }
        for (int k = 0; k < 2; k++)
            extra[k] = extra[k] < 0                 ? -1
                       : KIND == COARSE             ? extra[k] >> 8
                       : extra[k] >> 8 == coarse_of ? extra[k] & 255
                                                    : -1;
    }
    double sum = 0;
    int bin_of_lane = 0; // of the warp's row of that number
    for (int n = 0; warp + WARPS * n < rows; n++) {
        const int row = warp + WARPS * n, coarse = __shfl_sync(~0u, coarse_of, n);
        if (row < skip)
            continue;
        const int extra0 = __shfl_sync(~0u, extra[0], n), extra1 = __shfl_sync(~0u, extra[1], n);
        const int64_t i = block.row0 + row, at = block.place(i);
        int64_t rank = __shfl_sync(~0u, rank_of, n);
        uint32_t *counts = r.counts + at * pitch;
        uint32_t mine[8]; // counts of the lane's bins
        for (int k = 0; k < 8; k++)
            mine[k] = r.narrow ? words[row * PITCH + 4 * lane + k / 2] >> 16 * (k & 1) & 0xffff
                               : __ldcg(counts + 8 * lane + k);
        if (SETS && KIND == COARSE) {
            uint32_t all = 0;
            for (int k = 0; k < 8; k++)
                all += mine[k];
            const double last = (double)warp_sum(all) + (extra0 >= 0) + (extra1 >= 0) - 1;
            rank = last >= 0 ? (int64_t)rint(s.choice.quantile * last) : -1;
        }
        const bool empty = SETS && rank < 0;
        const int bin = pick_bin(mine, extra0, extra1, &rank);
        if (KIND == FINE) {
            if (lane == n)
                bin_of_lane = empty ? -1 : 256 * coarse + bin;
            if (lane == 0)
                sum += s.choice.rank < 0 ? (double)NAN : bin_middle(256 * coarse + bin);
        } else {
            if (lane == 0)
                s.coarse[at] = bin, s.ranks[at] = rank;
            for (int k = lane; k < pitch; k += 32)
                counts[k] = 0;
        }
    }
    if (KIND == COARSE)
        return;
    const int row = warp + WARPS * lane;
    if ((SETS || s.choice.each) && row >= skip && row < rows)
        write_quantile(p, r, s, block, block.row0 + row,
                       SETS || s.choice.rank >= 0 ? bin_of_lane : -1);
    if (!s.choice.each) {
        if (SETS)
            add_rows(r, s, flag);
        else
            add_up(p, r, s, block, sum, flag);
    }
}

static __global__ void settle_alone(hex_choice choice)
{
    settle(choice, (double)NAN, 0); // which counts, and changes nothing else
}

template <bool SPLIT, int PANELS, bool SETS>
static __global__ void __launch_bounds__(THREADS, 3)
    bound_tiles(hex_problem_t p, hex_run r, hex_fit fit, float *low, float *high)
{
    HEX_SHARED_MEMORY(shared);
    const int64_t anchors = r.parts.rows;
    float *partial = (float *)r.partial;
    const int lane = (int)threadIdx.x & 31;
    hex_block block;
    block.start(r.parts, ROWS, blockIdx.x);
    bounds fold = {{INFINITY, INFINITY}, {-INFINITY, -INFINITY}, {0, 0}};
    if constexpr (SETS) {
        const float none[2] = {INFINITY, INFINITY};
        for_each_marked_tile<WARPS, SPLIT>(block, p, r, fit, shared, none, fold);
    } else
        for_each_tile<WARPS, SPLIT, PANELS>(block, r.unit, p.B, fit, shared, fold);
    for (int h = 0; h < 2; h++) {
        for (int k = 1; k < 4; k <<= 1) {
            fold.low[h] = fminf(fold.low[h], __shfl_xor_sync(~0u, fold.low[h], k));
            fold.high[h] = fmaxf(fold.high[h], __shfl_xor_sync(~0u, fold.high[h], k));
            fold.finite[h] += __shfl_xor_sync(~0u, fold.finite[h], k);
        }
        const int64_t i = block.row0 + (threadIdx.x >> 5) * 16 + (lane >> 2) + 8 * h;
        if ((lane & 3) == 0 && block.has(i)) {
            float *to = partial + block.slice * 3 * anchors + block.place(i);
            to[0] = fold.low[h], to[anchors] = fold.high[h], to[2 * anchors] = fold.finite[h];
        }
    }
    if (!last_to_arrive(r.tickets + block.ticket, block.part.slices, (unsigned *)shared))
        return;
    const int64_t i = block.row0 + threadIdx.x, at = block.place(i);
    if (threadIdx.x >= ROWS || !block.has(i))
        return;
    float least = INFINITY, most = -INFINITY, finite = 0;
    if (!SETS || !p.several) {
        const float positive = (float)r.unit.positive[image_of(i, p.B)];
        least = most = positive, finite = positive * 0;
    }
    if (p.mode == HEX_NTXENT) {
        const float self = r.unit.inverse[i] == 0 ? 0.f : 1.f;
        finite += (float)(r.unit.inverse[i] * 0);
        least = fminf(least, self), most = fmaxf(most, self);
    }
    for (int64_t slice = 0; slice < block.part.slices; slice++) {
        const float *from = partial + slice * 3 * anchors + at;
        least = fminf(least, __ldcg(from)), most = fmaxf(most, __ldcg(from + anchors));
        finite += __ldcg(from + 2 * anchors);
    }
    finite = least <= most ? finite : NAN; // where they are uneven a row may be empty
    low[at] = finite == 0 ? fmaxf(fminf(least, 1.f), -1.f) : NAN;
    high[at] = finite == 0 ? fmaxf(fminf(most, 1.f), -1.f) : NAN;
}

// Both kinds of kernel: `more` bytes of shared memory beside the panels.
template <int PANELS, class Kernel, class... Rest>
static const char *launch(const char *name, Kernel kernel, int64_t more, const hex_problem_t &p,
                          const hex_run &r, Rest... rest)
{
    const hex_fit fit = fit_of(r, WARPS, PANELS, PANELS != 0, more);
    if (allow_shared_memory(kernel, r, fit))
        HEX_LAUNCH(kernel, dim3((unsigned)r.parts.blocks), dim3(THREADS), (int)fit.at.bytes,
                   r.stream, p, r, fit, rest...);
    return hex_launched(name);
}

const char *hex_threshold_of_nothing(const hex_run &r, const hex_choice &choice)
{
    HEX_LAUNCH(settle_alone, dim3(1), dim3(32), 0, r.stream, choice);
    return hex_launched("threshold of nothing");
}

const char *hex_tile_threshold(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                               double *rows)
{
    const int64_t anchors = r.parts.rows, words = ROWS * PITCH * (int64_t)sizeof(uint32_t);
    selection s = {choice, (int *)((int64_t *)r.partial + anchors), (int64_t *)r.partial,
                   rows,   r.tickets + 2 * r.parts.row_blocks + 2,  NULL,
                   NULL};
    if (are_uneven(p))
        s.spoilt_rows = s.spoilt + r.parts.row_blocks;
    if (r.bracket.warps) {
        uint32_t *brackets = (uint32_t *)s.coarse;
        int *chosen = s.coarse + anchors;
        const char *error = hex_sample_tiles(p, r, choice, brackets);
        if (!error)
            error =
                hex_bracket_tiles(p, r, choice, brackets, chosen, (uint16_t *)(chosen + anchors));
        if (error)
            return error;
        s.chosen = chosen; // what follows looks first whether there is anything left to do
    }
    auto both = [&](auto split, auto panels, auto sets) {
        constexpr bool SPLIT = decltype(split)::value, SETS = decltype(sets)::value;
        constexpr int PANELS = decltype(panels)::value;
        const char *error = launch<PANELS>(
            "coarse histogram", count_tiles<COARSE, SPLIT, PANELS, SETS>, words, p, r, s);
        return error ? error
                     : launch<PANELS>("fine histogram", count_tiles<FINE, SPLIT, PANELS, SETS>,
                                      words, p, r, s);
    };
    return with_kind(r.unit, has_sets(p), both);
}

const char *hex_tile_range(const hex_problem_t &p, const hex_run &r, void *low, void *high)
{
    auto bound = [&](auto split, auto panels, auto sets) {
        constexpr bool SPLIT = decltype(split)::value, SETS = decltype(sets)::value;
        constexpr int PANELS = decltype(panels)::value;
        return launch<PANELS>("row bounds", bound_tiles<SPLIT, PANELS, SETS>, 0, p, r, (float *)low,
                              (float *)high);
    };
    return with_kind(r.unit, has_sets(p), bound);
}
