// SPDX-License-Identifier: MIT
// In which bins bracket.cu has to look for each row's quantile: a histogram of a sample of its
// columns, tiles that stand evenly over the matrix, elsewhere for each block of rows, so that
// classes in order do not mislead it.
//
// Bins over [-1, 1] would be too coarse: cosines of an untrained network lie within a hundredth. So
// some tiles go ahead, and say for each row where its large cosines begin and how far they spread:
// the bins are fine there and coarser beyond. What is smaller is not counted.
#include "bins.cuh"
#include "tile.cuh"

#define BINS 128
#define PITCH (BINS + 1) // words a row; odd, so that rows start in different banks
#define SIGMAS 4.f       // of the sample's count, to either side
#define NEAR 64          // fine bins
#define FAR_BINS 31.f    // in 1 of cosine; two of it are less than the rest

#ifdef HEX_WGMMA
#define THREADS_OF_A_PROCESSOR 512
#else
#define THREADS_OF_A_PROCESSOR 256 // or registers do not suffice
#endif

// ---- the bins of a row: NEAR and the rest, each even, from one cosine on ----

struct row_bins {
    float near, near_add, far_add; // c near + near_add is HEX_BIN0 + a near bin

    __device__ __forceinline__ void set(float mean, float largest)
    {
        const float reach = largest - mean, from = mean + 0.3f * reach;
        near = fminf(NEAR / (1.2f * reach), 32767.5f); // no finer than those of bin_of
        near_add = HEX_BIN0 - rintf(from * near),
        far_add = HEX_BIN0 + NEAR - rintf(from * FAR_BINS);
    }
    // HEX_BIN0 + the bin of c, which is from 0 to 127; less than HEX_BIN0 for what is not counted.
    __device__ __forceinline__ float at(float c) const
    {
        return fminf(fmaf(c, near, near_add), fmaf(c, FAR_BINS, far_add));
    }
    // Where a bin begins, in bins of bin_of.
    __device__ __forceinline__ float begin(int bin) const
    {
        const float in_near = ((float)bin - 0.5f + (HEX_BIN0 - near_add)) / near;
        const float in_far = ((float)bin - 0.5f + (HEX_BIN0 - far_add)) / FAR_BINS;
        return (fmaxf(in_near, in_far) + 1) * 32767.5f;
    }
};

struct pilot {
    float sum[2], count[2], largest[2];

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
        const int t = (int)threadIdx.x & 3;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const int h = q >> 1;
                if (EDGE && places.leaves_out(h, 8 * n + 2 * t + (q & 1)))
                    continue;
                sum[h] += acc[n][q], count[h] += 1;
                largest[h] = fmaxf(largest[h], acc[n][q]);
            }
    }

    __device__ __forceinline__ row_bins of_row(int h)
    {
        for (int k = 1; k < 4; k <<= 1) { // the four threads of a row
            sum[h] += __shfl_xor_sync(~0u, sum[h], k);
            count[h] += __shfl_xor_sync(~0u, count[h], k);
            largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], k));
        }
        row_bins bins;
        bins.set(sum[h] / count[h], largest[h]);
        return bins;
    }
};

template <int ROWS> struct sample_histogram {
    uint32_t *counts; // of all rows
    uint32_t row[2];  // where the thread's two rows are in it, less the bits of HEX_BIN0
    row_bins bins[2];

    __device__ __forceinline__ void start()
    {
        for (int k = (int)threadIdx.x; k < ROWS * PITCH; k += 2 * ROWS)
            counts[k] = 0;
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
        const int t = (int)threadIdx.x & 3;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const int h = q >> 1;
                const float at = bins[h].at(acc[n][q]);
                const uint32_t word = row[h] + __float_as_uint(at);
                if (EDGE && places.leaves_out(h, 8 * n + 2 * t + (q & 1)))
                    continue;
                if (at >= HEX_BIN0)
                    atomicAdd(counts + word, 1u);
            }
    }
};

// ---- the columns ----

// Every `one_of`-th tile of the block's part, those in the block's slice; returns how many columns
// these are over all slices.
static __device__ int64_t choose_tiles(hex_block &block, int one_of)
{
    const hex_part &part = block.part;
    const int begin = (int)(part.col0 / BN), end = (int)((part.col1 + BN - 1) / BN);
    const int first = begin + (int)(block.ticket * 5 % one_of);
    const int n = end > first ? (end - first + one_of - 1) / one_of : 0;
    int64_t columns = (int64_t)n * BN;
    if (n > 0 && first == begin)
        columns -= part.col0 - (int64_t)begin * BN;
    if (n > 0 && first + (n - 1) * one_of == end - 1)
        columns -= (int64_t)end * BN - part.col1;
    const int skipped = block.tile0 > first ? (block.tile0 - first + one_of - 1) / one_of : 0;
    block.tile0 = first + skipped * one_of;
    block.stride = one_of;
    return columns;
}

// ---- the bracket ----

// By one warp, whose lane has the counts of bins 8 lane to 8 lane + 7: the bins of bin_of, first |
// last << 16, that hold the row's element unless the sample is off by SIGMAS. Within a bin it goes
// by proportion. `above`: how many elements of the row are larger than it, of which `extra` may be
// no negatives.
static __device__ uint32_t bracket_of(uint32_t (&count)[8], const row_bins &bins, float share,
                                      float above, int extra)
{
    const int lane = (int)threadIdx.x & 31;
    uint32_t all = 0;
    for (int k = 0; k < 8; k++)
        all += count[k];
    all = warp_sum(all);
    const float sigma = sqrtf((above + 1) * share * (1 - share) + 1);
    float ends[2] = {bins.begin(0), 0xffff};
    for (int k = 0; k < 2; k++) { // how many of the sample are above this end
        const float n = k ? (above - (float)extra) * share - SIGMAS * sigma
                          : (above + 1) * share + SIGMAS * sigma + 1;
        int64_t rank = (int64_t)all - (int64_t)n - k;
        if (n < 0 || rank < 0)
            continue;
        const int bin = pick_bin(count, -1, -1, &rank);
        uint32_t within = 0;
        for (int b = 0; b < 8; b++)
            within = 8 * lane + b == bin ? count[b] : within;
        within = __shfl_sync(~0u, within, bin >> 3);
        const float begin = bins.begin(bin), part = (float)(rank + k) / (float)within;
        ends[k] = begin + part * (bins.begin(bin + 1) - begin);
    }
    // Bin 0 is that of what is left out. A NaN becomes 1.
    const uint32_t first = (uint32_t)rintf(fminf(fmaxf(ends[0], 1.f), 65535.f));
    return first | (uint32_t)rintf(fminf(fmaxf(ends[1], 1.f), 65535.f)) << 16;
}

template <int WARPS, int PANELS>
static __global__ void __launch_bounds__(32 * WARPS, THREADS_OF_A_PROCESSOR / (32 * WARPS))
    sample_tiles(hex_problem_t p, hex_run r, hex_fit fit, hex_choice choice, uint32_t *brackets)
{
    constexpr int THREADS = 32 * WARPS, ROWS = 16 * WARPS;
    HEX_SHARED_MEMORY(shared);
    uint32_t *words = (uint32_t *)(shared + fit.at.more);
    unsigned *flag = (unsigned *)(shared + fit.at.ring); // where the columns' panels were
    row_bins *bins = (row_bins *)(flag + 4);
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    hex_block block;
    block.start(r.bracket.sample, ROWS, blockIdx.x);
    // The same tiles in every slice, so that all have the same bins.
    const int begin = (int)(block.part.col0 / BN);
    const int tiles = (int)((block.part.col1 + BN - 1) / BN) - begin;
    const int some = block.part.slices > 1 ? 2 : 4;
    pilot ahead = {{0, 0}, {0, 0}, {HEX_LOWEST, HEX_LOWEST}};
    for (int k = 0; k < some; k++) {
        hex_block one = block;
        one.tile0 =
            begin + (int)(((2 * k + 1) * (int64_t)tiles / (2 * some) + block.ticket * 5) % tiles);
        one.tile1 = one.tile0 + 1;
        for_each_tile<WARPS, false, PANELS>(one, r.unit, p.B, fit, shared, ahead);
    }
    sample_histogram<ROWS> fold;
    fold.counts = words;
    for (int h = 0; h < 2; h++) {
        const int row = warp * 16 + (lane >> 2) + 8 * h;
        fold.row[h] = (uint32_t)(row * PITCH) - __float_as_uint(HEX_BIN0);
        fold.bins[h] = ahead.of_row(h);
        // Rows past the end of the matrix are whatever shared memory held: nothing of theirs
        // counts.
        if (!block.has(block.row0 + row))
            fold.bins[h].near_add = fold.bins[h].far_add = NAN;
    }
    const int64_t sampled = choose_tiles(block, r.bracket.step);
    for_each_tile<WARPS, false, PANELS>(block, r.unit, p.B, fit, shared, fold);
    for (int h = 0; h < 2; h++)
        if ((lane & 3) == 0)
            bins[warp * 16 + (lane >> 2) + 8 * h] = fold.bins[h];
    __syncthreads(); // the counts are there too

    // Slices add their counts to the row's.
    const int64_t ends = block.part.row1 - block.row0, begins = block.part.row0 - block.row0;
    const int rows = ends < ROWS ? (int)ends : ROWS, skip = begins > 0 ? (int)begins : 0;
    uint32_t *counts = r.counts + block.place(block.row0) * BINS;
    if (block.part.slices > 1) {
        for (int k = (int)threadIdx.x + skip * BINS; k < rows * BINS; k += THREADS)
            if (const uint32_t word = words[k / BINS * PITCH + k % BINS])
                atomicAdd(counts + k, word);
        if (!last_to_arrive(r.bracket.tickets + block.ticket, block.part.slices, flag))
            return;
#pragma unroll 4
        for (int k = 4 * (int)threadIdx.x + skip * BINS; k < rows * BINS; k += 4 * THREADS) {
            const uint4 v = __ldcg((const uint4 *)(counts + k));
            uint32_t *to = words + k / BINS * PITCH + k % BINS;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
            *(uint4 *)(counts + k) = make_uint4(0, 0, 0, 0); // for the two passes
        }
        __syncthreads();
    }
    const int extras = choice.negatives ? 0 : p.mode == HEX_NTXENT ? 2 : 1;
    const float above = (float)(negatives_of_a_row(p) + extras - 1 - choice.rank);
    const float share = (float)sampled / (float)(block.part.col1 - block.part.col0);
    for (int row = warp; row < rows; row += WARPS) {
        if (row < skip)
            continue;
        uint32_t mine[8]; // counts of the lane's bins, of twice as many
        for (int k = 0; k < 8; k++)
            mine[k] = lane < BINS / 8 ? words[row * PITCH + 8 * lane + k] : 0;
        const uint32_t bracket = bracket_of(mine, bins[row], share, above, extras);
        if (lane == 0)
            brackets[block.place(block.row0 + row)] = bracket;
    }
}

int64_t hex_sample_bytes(int warps) { return 16 * warps * (int64_t)(PITCH * sizeof(uint32_t)); }

template <int WARPS, int PANELS>
static const char *launch(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                          uint32_t *brackets)
{
    // Two slots, so that two blocks share a processor.
    const hex_fit fit = fit_of(r, WARPS, PANELS, PANELS != 0, hex_sample_bytes(WARPS), 0, 2);
    const auto kernel = sample_tiles<WARPS, PANELS>;
    if (allow_shared_memory(kernel, r, fit))
        HEX_LAUNCH(kernel, dim3((unsigned)r.bracket.sample.blocks), dim3(32 * WARPS),
                   (int)fit.at.bytes, r.stream, p, r, fit, choice, brackets);
    return hex_launched("sample histogram");
}

const char *hex_sample_tiles(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                             uint32_t *brackets)
{
    return with_kind(r.unit, false, [&](auto, auto panels, auto) {
        constexpr int PANELS = decltype(panels)::value;
        return r.bracket.warps == 8 ? launch<8, PANELS>(p, r, choice, brackets)
                                    : launch<4, PANELS>(p, r, choice, brackets);
    });
}
