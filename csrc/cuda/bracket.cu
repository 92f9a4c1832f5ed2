// SPDX-License-Identifier: MIT
// The quantile of every row in one pass over the tiles, where a sample of the columns
// (sample.cu) has said in which bins, first to last, it must be looked for.
//
// Nearly all cosines are below the bracket, and a comparison is all that they cost. On its way
// through a tile a thread sets aside, in shared memory, the pairs of which one is not; then it
// counts those above and keeps the bins of those within, which are the fine bins of threshold.cu,
// 16 bits each, in a list of its own for each of its two rows. A row's element of a rank among what
// its four threads kept is its quantile: to the bit that of the two passes.
//
// A row whose rank is not in its bracket, or whose list was too short, is left: -1 instead of its
// bin. threshold.cu is launched behind this and counts such rows as ever.
#include "bins.cuh"
#include "tile.cuh"

// What is kept of a row: a list in four parts, of its threads, or one that is in global memory.
struct entries {
    const uint16_t *shared; // of the first of the threads
    int step;               // from one entry of a thread to the next
    uint32_t count[4];
    const uint16_t *global; // instead
    uint32_t all, above;    // in the bracket, above it
    bool fits;

    // By one warp: counts the bins by their high byte, or by their low one where that is `coarse`.
    __device__ __forceinline__ void one(uint32_t *bins, int bin, int coarse) const
    {
        if (coarse < 0 || bin >> 8 == coarse)
            atomicAdd(bins + (coarse < 0 ? bin >> 8 : bin & 255), 1u);
    }
    __device__ __forceinline__ void histogram(uint32_t *bins, int coarse) const
    {
        const int lane = (int)threadIdx.x & 31;
        for (int k = lane; k < HEX_BINS; k += 32)
            bins[k] = 0;
        __syncwarp();
        if (global)
            for (uint32_t k = (uint32_t)lane; k < all; k += 32)
                one(bins, __ldcg(global + k), coarse);
        else
#pragma unroll
            for (int t = 0; t < 4; t++)
                for (uint32_t k = (uint32_t)lane; k < count[t]; k += 32)
                    one(bins, shared[(int)k * step + t], coarse);
        __syncwarp();
    }
};

template <int WARPS> struct kept {
    static constexpr int THREADS = 32 * WARPS;
    float low[2];            // what is not larger is below the bracket
    float first[2], last[2]; // its bins, as above_bin0 gives them
    uint32_t above[2];
    float2 *aside;     // 8 x threads, this thread's column
    uint16_t *list;    // 2 x depth x threads, this thread's column
    int at[2], end[2]; // in it: the next place, the end

    __device__ __forceinline__ void add(int h, float c)
    {
        const float bin = above_bin0(c);
        if (bin >= first[h] && bin <= last[h] && at[h] < end[h]) {
            list[at[h]] = (uint16_t)__float_as_uint(bin);
            at[h] += THREADS;
        }
        above[h] += bin > last[h];
    }

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
        for (int h = 0; h < 2; h++) {
            const float limit = low[h];
            float2 *pairs = aside;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                float2 c = make_float2(acc[n][2 * h], acc[n][2 * h + 1]);
                if (EDGE && places.leaves_out(h, 8 * n + 2 * t))
                    c.x = -4; // bin 0, where no bracket begins
                if (EDGE && places.leaves_out(h, 8 * n + 2 * t + 1))
                    c.y = -4;
                if (fmaxf(c.x, c.y) > limit) {
                    *pairs = c;
                    pairs += THREADS;
                }
            }
#pragma unroll 1
            for (const float2 *pair = aside; pair < pairs; pair += THREADS) {
                const float2 c = *pair;
                add(h, c.x);
                add(h, c.y);
            }
        }
        __syncwarp(); // together again before the next tile's products
    }

    // By one warp: its row of this number. A list that is full was too short.
    __device__ __forceinline__ entries of_row(int row) const
    {
        const int h = row >> 3, from = 4 * (row & 7), lane = (int)threadIdx.x & 31;
        const int begin = h ? end[0] : 0, depth = end[0] / THREADS;
        const uint32_t mine = (uint32_t)((h ? at[1] : at[0]) - begin) / THREADS;
        entries in = {list - lane + from + begin, THREADS, {}, NULL, 0, 0, true};
#pragma unroll
        for (int t = 0; t < 4; t++) {
            in.count[t] = __shfl_sync(~0u, mine, from + t);
            in.all += in.count[t];
            in.above += __shfl_sync(~0u, h ? above[1] : above[0], from + t);
            in.fits &= (int)in.count[t] < depth;
        }
        return in;
    }
};

// By one warp: the bin of row i's element, or -1.
static __device__ __forceinline__ int find_bin(const hex_problem_t &p, const hex_run &r,
                                               const hex_choice &choice, int64_t i,
                                               uint32_t bracket, const entries &in, uint32_t *bins)
{
    const int lane = (int)threadIdx.x & 31, first = (int)(bracket & 0xffff);
    const int last = (int)(bracket >> 16);
    int64_t all = negatives_of_a_row(p);
    int extra[2] = {-1, -1};
    uint32_t inside = in.all, above = in.above;
    if (!choice.negatives) {
        extra[0] = bin_of((float)r.unit.positive[image_of(i, p.B)]);
        if (p.mode == HEX_NTXENT)
            extra[1] = bin_of(r.unit.inverse[i] == 0 ? 0.f : 1.f);
    }
    for (int k = 0; k < 2; k++) {
        all += extra[k] >= 0;
        above += extra[k] > last;
        if (extra[k] < first || extra[k] > last)
            extra[k] = -1;
        inside += extra[k] >= 0;
    }
    int64_t rank = choice.rank - (all - above - inside);
    if (!in.fits || rank < 0 || rank >= inside)
        return -1;
    int bin = -1;
    for (int pass = 0; pass < 2; pass++) {
        in.histogram(bins, bin);
        uint32_t mine[8];
        int at[2];
        for (int k = 0; k < 8; k++)
            mine[k] = bins[8 * lane + k];
        for (int k = 0; k < 2; k++)
            at[k] = extra[k] < 0           ? -1
                    : pass == 0            ? extra[k] >> 8
                    : extra[k] >> 8 == bin ? extra[k] & 255
                                           : -1;
        __syncwarp(); // before the bins are 0 again
        const int picked = pick_bin(mine, at[0], at[1], &rank);
        bin = pass == 0 ? picked : 256 * bin + picked;
    }
    return bin;
}

template <int WARPS, int PANELS>
static __global__ void __launch_bounds__(32 * WARPS, 1)
    bracket_tiles(hex_problem_t p, hex_run r, hex_fit fit, hex_choice choice,
                  const uint32_t *brackets, int *chosen, uint16_t *lists)
{
    constexpr int THREADS = 32 * WARPS, ROWS = 16 * WARPS;
    HEX_SHARED_MEMORY(shared);
    unsigned char *more = shared + fit.at.more;
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
    hex_block block;
    block.start(r.bracket.tiles, ROWS, blockIdx.x);
    unsigned *tickets = r.bracket.tickets + r.bracket.sample.row_blocks;
    const int64_t mine = block.row0 + warp * 16 + (lane >> 2);
    // Where the columns' panels were: a flag, then what find_bin counts in.
    static_assert(WARPS * HEX_BINS * sizeof(uint32_t) + 16 <= 2 * 2 * HALVES, "in two slots");
    unsigned *flag = (unsigned *)(shared + fit.at.ring);
    uint32_t *bins = flag + 4 + warp * HEX_BINS;
    kept<WARPS> fold;
    fold.aside = (float2 *)more + threadIdx.x;
    fold.list = (uint16_t *)(more + 8 * THREADS * sizeof(float2)) + threadIdx.x;
    for (int h = 0; h < 2; h++) {
        const int64_t i = mine + 8 * h;
        const uint32_t bracket = block.has(i) ? brackets[block.place(i)] : 0;
        const float first = (float)(bracket & 0xffff), last = (float)(bracket >> 16);
        // Half a bin lower, and more than above_bin0 and this round.
        fold.low[h] = block.has(i) ? (first - 0.5f) / 32767.5f - 1 - 1e-6f : INFINITY;
        fold.first[h] = first + HEX_BIN0, fold.last[h] = last + HEX_BIN0;
        fold.above[h] = 0;
        fold.at[h] = h * r.bracket.depth * THREADS;
        fold.end[h] = fold.at[h] + r.bracket.depth * THREADS;
    }
    for_each_tile<WARPS, false, PANELS>(block, r.unit, p.B, fit, shared, fold);

    // Of several slices each adds its list to the row's, in any order: what is found in it is the
    // same. Too many for a thread are too many for all.
    const bool sliced = block.part.slices > 1;
    const int64_t most = r.bracket.most;
    unsigned *counts = tickets + r.bracket.tiles.row_blocks; // in the bracket, above; of each row
    for (int row = 0; sliced && row < 16; row++) {
        const int64_t i = block.row0 + warp * 16 + row;
        if (!block.has(i))
            continue;
        const int64_t at = block.place(i);
        const entries in = fold.of_row(row);
        uint32_t to = 0;
        if (lane == 0) {
            to = atomicAdd(counts + 2 * at, in.fits ? in.all : (uint32_t)most + 1);
            atomicAdd(counts + 2 * at + 1, in.above);
        }
        to = __shfl_sync(~0u, to, 0);
        for (int t = 0; t < 4; t++) {
            for (uint32_t k = (uint32_t)lane; in.fits && k < in.count[t]; k += 32)
                if (to + k < most)
                    lists[at * most + to + k] = in.shared[k * THREADS + t];
            to += in.count[t];
        }
    }
    if (sliced && !last_to_arrive(tickets + block.ticket, block.part.slices, flag))
        return;
    for (int row = 0; row < 16; row++) {
        const int64_t i = block.row0 + warp * 16 + row;
        if (!block.has(i))
            continue;
        const int64_t at = block.place(i);
        entries in = fold.of_row(row);
        if (sliced) {
            in.global = lists + at * most;
            in.all = __ldcg(counts + 2 * at), in.above = __ldcg(counts + 2 * at + 1);
            in.fits = in.all <= most;
        }
        const int bin = find_bin(p, r, choice, i, brackets[at], in, bins);
        if (lane == 0)
            chosen[at] = bin;
    }
}

// ---- whether, and how ----

// From how many anchors times candidates on it is worth a kernel more, and how many columns are a
// sample. A test lowers them.
static int64_t least_cosines = 64000000, least_sample = 2000;
#ifdef HEX_EMULATION
static int64_t rows_left;
#endif

static int64_t bytes_beside(int warps, int depth)
{
    return 32 * warps * (int64_t)(8 * sizeof(float2) + 2 * depth * sizeof(uint16_t));
}

// Shared memory that the panels leave to the lists. Of up to two panels the rows' go to registers.
static int64_t room_beside(const hex_run &r, int warps)
{
    const int64_t panels = r.unit.width / PANEL;
    const bool keep = panels <= 2;
    const int slots = keep && r.hopper ? 3 : 2;
    const int64_t stay =
        layout_of(warps, false, true, keep, panels, keep ? (int)panels : 1, slots, 0).bytes;
    const int64_t move = layout_of(warps, false, false, false, panels, 1, slots, 0).bytes;
    const int64_t rows = keep ? warps / 4 * panels * 2 * HALVES : 0;
    // The lists then lie over the rows' panels, and the ring begins at a multiple of 1024.
    return r.shared_limit - (keep ? stay - rows + 1023 : stay < move ? stay : move);
}

// The smallest sample for which a thread's list is long enough, given that the row's element is
// looked for `sigmas` deviations of the sample's count on either side.
hex_bracket hex_plan_bracket(const hex_problem_t &p, const hex_run &r, const hex_choice &choice)
{
    hex_bracket plan = {};
    const int64_t columns = negatives_of_a_row(p), extras = choice.negatives       ? 0
                                                            : p.mode == HEX_NTXENT ? 2
                                                                                   : 1;
    const int64_t above = columns + extras - 1 - choice.rank;
    if (choice.rank < 0 || hex_block_anchors(&p) * columns < least_cosines || columns > 250000 ||
        above * 20 > columns + 19 * extras)
        return plan;
    for (int warps = 8; warps >= 4; warps -= 4) {
        const int64_t room = room_beside(r, warps);
        if (room < hex_sample_bytes(warps))
            continue;
        const int64_t depth =
            (room - bytes_beside(warps, 0)) / (32 * warps * 2 * (int64_t)sizeof(uint16_t));
        for (int step = 8; step > (warps == 8 ? 2 : 1); step--) {
            const int64_t sample = columns / step;
            if (sample < least_sample || sample < BN)
                continue;
            const double width = 4 * sqrt(((double)above + 1) * (step - 1) + 1); // of a half
            const double mean = width / 2, spread = sqrt(mean + width * width / 128);
            if (mean + (double)extras + 3.75 * spread + 1 > (double)depth)
                continue;
            plan.warps = warps, plan.step = step;
            plan.depth = (int)(depth < 256 ? depth : 256);
            plan.most = 4 * plan.depth;
            return plan;
        }
    }
    return plan;
}

template <int WARPS, int PANELS>
static const char *launch(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                          const uint32_t *brackets, int *chosen, uint16_t *lists)
{
    const hex_fit fit = fit_of(r, WARPS, PANELS, PANELS != 0, bytes_beside(WARPS, r.bracket.depth));
    const auto kernel = bracket_tiles<WARPS, PANELS>;
    if (allow_shared_memory(kernel, r, fit))
        HEX_LAUNCH(kernel, dim3((unsigned)r.bracket.tiles.blocks), dim3(32 * WARPS),
                   (int)fit.at.bytes, r.stream, p, r, fit, choice, brackets, chosen, lists);
    return hex_launched("brackets");
}

const char *hex_bracket_tiles(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                              const uint32_t *brackets, int *chosen, uint16_t *lists)
{
    const char *error = with_kind(r.unit, false, [&](auto, auto panels, auto) {
        constexpr int PANELS = decltype(panels)::value;
        return r.bracket.warps == 8 ? launch<8, PANELS>(p, r, choice, brackets, chosen, lists)
                                    : launch<4, PANELS>(p, r, choice, brackets, chosen, lists);
    });
#ifdef HEX_EMULATION
    for (int64_t i = rows_left = 0; i < r.parts.rows; i++)
        rows_left += chosen[i] < 0;
#endif
    return error;
}

#ifdef HEX_EMULATION
// What is large, and how many columns are a sample of it. Returns the rows that the last call left.
extern "C" __attribute__((visibility("default"))) int64_t hex_emu_bracket(int64_t cosines,
                                                                          int64_t sample)
{
    least_cosines = cosines, least_sample = sample;
    return rows_left;
}
#endif
