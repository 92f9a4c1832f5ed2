// SPDX-License-Identifier: MIT
// In which bins bracket.cu has to look for each row's quantile: a histogram of a sample of its
// columns, tiles that stand evenly over the matrix, elsewhere for each block of rows, so that
// classes in order do not mislead it.
//
// 256 bins are too few for [-1, 1]: cosines of an untrained network lie within a hundredth. So some
// tiles go ahead, and say for each row where its large cosines begin and how far they spread: the
// bins are fine there and coarser beyond. What is smaller is not counted.
#include "tile.cuh"

#define PITCH (HEX_BINS / 2 + 1) // words a row, as in threshold.cu
#define SIGMAS 4.f               // of the sample's count, to either side
#define FINE_BINS 192            // of about one width; the rest are 1024 of bin_of's wide

// ---- how the bins of a row lie, in those of bin_of: the first, and the width as a power of 2 ----

struct scale_of_row {
    int base, shift;

    // The sum and the largest of some of its cosines, as bins; NaN is passed over.
    __device__ __forceinline__ void set(float sum, float count, float largest)
    {
        const float mean = count > 0 ? sum / count : 0, reach = fmaxf(largest - mean, 0.f);
        base = (int)(mean + 0.2f * reach);
        shift = 0;
        while ((float)(FINE_BINS << shift) < 1.5f * reach && shift < 9)
            shift++;
    }
    // Of a bin, from 0 to 255; negative below all.
    __device__ __forceinline__ int at(int bin) const
    {
        const int x = bin - base, near = x >> shift, far = FINE_BINS + (x >> 10);
        return near < far ? near : far;
    }
    // The first bin of one.
    __device__ __forceinline__ int begin(int at_) const
    {
        const int near = at_ << shift, far = (at_ - FINE_BINS) * 1024;
        return base + (near > far ? near : far);
    }
};

struct pilot {
    float sum[2], count[2], largest[2];

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
                const float bin = (float)bin_of(acc[n][q]);
                sum[h] += bin, count[h] += 1;
                largest[h] = fmaxf(largest[h], bin);
            }
    }

    __device__ __forceinline__ scale_of_row of_row(int h)
    {
        for (int k = 1; k < 4; k <<= 1) { // the four threads of a row
            sum[h] += __shfl_xor_sync(~0u, sum[h], k);
            count[h] += __shfl_xor_sync(~0u, count[h], k);
            largest[h] = fmaxf(largest[h], __shfl_xor_sync(~0u, largest[h], k));
        }
        scale_of_row scale;
        scale.set(sum[h], count[h], largest[h]);
        return scale;
    }
};

struct sample_histogram {
    uint32_t *words[2]; // of the thread's two rows
    scale_of_row scale[2];

    template <bool EDGE>
    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_places &places)
    {
        const int t = (int)threadIdx.x & 3;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const int h = q >> 1, at = scale[h].at(bin_of(acc[n][q]));
                if (EDGE && places.leaves_out(h, 8 * n + 2 * t + (q & 1)))
                    continue;
                if (at >= 0)
                    atomicAdd(words[h] + (at >> 1), at & 1 ? 65536u : 1u);
            }
    }
};

// ---- the columns ----

// Every `one_of`-th tile of the block's part, those in the block's slice.
struct sampled {
    int64_t first, step, all; // all: columns, over the slices

    __device__ __forceinline__ void start(const hex_block &block, int one_of)
    {
        const int64_t width = block.part.col1 - block.part.col0;
        const int64_t offset = block.row_block * 5 % one_of * BN;
        const int64_t from = block.col0 - block.part.col0;
        step = (int64_t)one_of * BN;
        first = block.part.col0 + (from + step - 1 - offset) / step * step + offset;
        const int64_t whole = width > offset ? (width - offset) / step : 0;
        const int64_t rest = width - offset - whole * step;
        all = whole * BN + (rest < 0 ? 0 : rest < BN ? rest : BN);
    }
};

static __device__ hex_block tile_of(const hex_block &block, int64_t col)
{
    hex_block one = block;
    one.col0 = col;
    one.col1 = col + BN < block.part.col1 ? col + BN : block.part.col1;
    return one;
}

// ---- the bracket ----

// By one warp, whose lane has the counts of bins 8 lane to 8 lane + 7: the bins of bin_of, first |
// last << 16, that hold the row's element unless the sample is off by SIGMAS. Within a bin it goes
// by proportion. `above`: how many elements of the row are larger than it, of which `extra` may be
// no negatives.
static __device__ uint32_t bracket_of(uint32_t (&count)[8], const scale_of_row &scale, float share,
                                      float above, int extra)
{
    const int lane = (int)threadIdx.x & 31;
    uint32_t all = 0;
    for (int k = 0; k < 8; k++)
        all += count[k];
    all = warp_sum(all);
    const float sigma = sqrtf((above + 1) * share * (1 - share) + 1);
    int ends[2] = {1, 0xffff}; // bin 0 is that of what is left out
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
        const int begin = scale.begin(bin), width = scale.begin(bin + 1) - begin;
        const float part = (float)(rank + k) / (float)(within ? within : 1);
        const int end = begin + (int)(part * (float)width) + k;
        ends[k] = end < 1 ? 1 : end > 0xffff ? 0xffff : end;
    }
    return (uint32_t)ends[0] | (uint32_t)ends[1] << 16;
}

template <int WARPS>
static __global__ void __launch_bounds__(32 * WARPS, 16 / WARPS)
    sample_tiles(hex_problem p, hex_run r, bool resident, hex_choice choice, uint32_t *brackets)
{
    constexpr int THREADS = 32 * WARPS, ROWS = 16 * WARPS, WORDS = HEX_BINS / 2;
    HEX_SHARED_MEMORY(shared);
    uint32_t *words =
        (uint32_t *)(shared + tile_bytes(WARPS, false, r.unit.width / PANEL, resident));
    scale_of_row *scales = (scale_of_row *)(words + ROWS * PITCH);
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    hex_block block;
    block.start(r.bracket.sample, ROWS, blockIdx.x);
    for (int k = (int)threadIdx.x; k < ROWS * PITCH; k += THREADS)
        words[k] = 0;
    // The same tiles in every slice, so that all have the same bins.
    const int64_t tiles = (block.part.col1 - block.part.col0 + BN - 1) / BN;
    const int some = block.part.slices > 1 ? 2 : 4;
    pilot ahead = {{0, 0}, {0, 0}, {0, 0}};
    for (int k = 0; k < some; k++) {
        const int64_t tile = ((2 * k + 1) * tiles / (2 * some) + block.row_block * 5) % tiles;
        for_each_tile<WARPS, false>(tile_of(block, block.part.col0 + tile * BN), r.unit, p.B,
                                    resident, shared, ahead);
    }
    sample_histogram fold;
    for (int h = 0; h < 2; h++) {
        const int row = warp * 16 + (lane >> 2) + 8 * h;
        fold.words[h] = words + row * PITCH;
        fold.scale[h] = ahead.of_row(h);
        if ((lane & 3) == 0)
            scales[row] = fold.scale[h];
    }
    sampled sample;
    sample.start(block, r.bracket.step);
    for (int64_t col = sample.first; col < block.col1; col += sample.step)
        for_each_tile<WARPS, false>(tile_of(block, col), r.unit, p.B, resident, shared, fold);
    __syncthreads(); // where there was no column

    // Slices add their counts to the row's.
    const int64_t ends = block.part.row1 - block.row0;
    const int rows = ends < ROWS ? (int)ends : ROWS;
    uint32_t *counts = r.counts + block.row0 * WORDS;
    if (block.part.slices > 1) {
        for (int k = (int)threadIdx.x; k < rows * WORDS; k += THREADS)
            if (const uint32_t word = words[k / WORDS * PITCH + k % WORDS])
                atomicAdd(counts + k, word);
        if (!last_to_arrive(r.bracket.tickets + block.ticket, block.part.slices,
                            (unsigned *)shared))
            return;
#pragma unroll 4
        for (int k = 4 * (int)threadIdx.x; k < rows * WORDS; k += 4 * THREADS) {
            const uint4 v = __ldcg((const uint4 *)(counts + k));
            uint32_t *to = words + k / WORDS * PITCH + k % WORDS;
            to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
            *(uint4 *)(counts + k) = make_uint4(0, 0, 0, 0); // for the two passes
        }
        __syncthreads();
    }
    const int extras = choice.negatives ? 0 : p.mode == HEX_NTXENT ? 2 : 1;
    const float above = (float)(negatives_of_a_row(p) + extras - 1 - choice.rank);
    const float share = (float)sample.all / (float)(block.part.col1 - block.part.col0);
    for (int row = warp; row < rows; row += WARPS) {
        uint32_t mine[8]; // counts of the lane's bins
        for (int k = 0; k < 8; k++)
            mine[k] = words[row * PITCH + 4 * lane + k / 2] >> 16 * (k & 1) & 0xffff;
        const uint32_t bracket = bracket_of(mine, scales[row], share, above, extras);
        if (lane == 0)
            brackets[block.row0 + row] = bracket;
    }
}

int64_t hex_sample_bytes(int warps)
{
    return 16 * warps * (int64_t)(PITCH * sizeof(uint32_t) + sizeof(scale_of_row));
}

template <int WARPS>
static const char *launch(const hex_problem &p, const hex_run &r, const hex_choice &choice,
                          uint32_t *brackets)
{
    const int64_t panels = r.unit.width / PANEL, more = hex_sample_bytes(WARPS);
    const bool resident = tile_bytes(WARPS, false, panels, true) + more <= r.shared_limit;
    const int bytes = (int)(tile_bytes(WARPS, false, panels, resident) + more);
    const auto kernel = sample_tiles<WARPS>;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
        cudaSuccess)
        HEX_LAUNCH(kernel, dim3((unsigned)r.bracket.sample.blocks), dim3(32 * WARPS), bytes,
                   r.stream, p, r, resident, choice, brackets);
    return hex_launched("sample histogram");
}

const char *hex_sample_tiles(const hex_problem &p, const hex_run &r, const hex_choice &choice,
                             uint32_t *brackets)
{
    return r.bracket.warps == 8 ? launch<8>(p, r, choice, brackets)
                                : launch<4>(p, r, choice, brackets);
}
