// SPDX-License-Identifier: MIT
// Tiles of cosines on the tensor cores: 16 rows for each warp of a block against 64 columns.
//
// Unit rows stand in memory as fp16, in panels of 64 rows and 64 features that are laid out as
// shared memory wants them (place_of in core.cuh): a row is 128 bytes whose eight 16-byte chunks
// are exchanged by c ^ (row & 7). So ldmatrix meets no bank twice, wgmma reads its 128-byte
// swizzle, and a panel is copied in one piece. All tiles start at a multiple of 64, also where a
// rectangle of cosines does not; its first and its last tile then hold columns of others.
//
// The columns' panels go through a ring of slots in shared memory. On Hopper one thread sends for
// them by bulk copies; a barrier for each slot says that it is full, another that all warps are
// done with it. Elsewhere all threads copy, and one barrier of the block for each panel says both.
// The rows' own panels are fragments in registers (KEEP), or stay in shared memory where there is
// room for all of them (`resident`), or travel with the columns' panels.
//
// SPLIT: u = high + low, each fp16, and c = high high + high low + low high, as exact as float32.
// Otherwise high alone, whose rows have length one, so that fp16's range does not matter.
#pragma once
#include "core.cuh"

#define BN 64
#define PANEL 64
#define HALVES (BN * PANEL) // of a panel

DEVICE void clear(float (&acc)[8][4])
{
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int q = 0; q < 4; q++)
            acc[n][q] = 0;
}

// acc += 16 rows a warp of the panel a times the 64 rows of the panel b; FRESH: acc is set.
template <bool FRESH> DEVICE void multiply_panel(float (&acc)[8][4], const uint16_t *a, const uint16_t *b)
{
#ifdef HEX_WGMMA
    const uint64_t pa = wgmma_panel(a), pb = wgmma_panel(b);
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++) // 16 halves are two units of 16 bytes
        if (FRESH && k == 0)
            wgmma_f16<true>(acc, pa, pb);
        else
            wgmma_f16<false>(acc, pa + 2 * k, pb + 2 * k);
#else
    if (FRESH)
        clear(acc);
    const int warp = (int)threadIdx.x >> 5 & 3, lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++) {
        uint32_t x[4];
        ldmatrix(x, a + swizzle(warp * 16 + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < BN / 16; n++) {
            uint32_t y[4];
            ldmatrix(y,
                     b + swizzle(16 * n + (lane & 7) + (lane >> 4 << 3), 2 * k + (lane >> 3 & 1)));
            mma_f16(acc[2 * n], x, y[0], y[1]);
            mma_f16(acc[2 * n + 1], x, y[2], y[3]);
        }
    }
#endif
}

// The warp's 16 rows of a panel in shared memory, as the left operand of four products.
DEVICE void load_fragments(uint32_t (&to)[4][4], const uint16_t *a)
{
    const int warp = (int)threadIdx.x >> 5 & 3, lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++)
        ldmatrix(to[k], a + swizzle(warp * 16 + (lane & 15), 2 * k + (lane >> 4)));
}

// The same with a as fragments.
template <bool FRESH> DEVICE void multiply_panel(float (&acc)[8][4], const uint32_t (&a)[4][4], const uint16_t *b)
{
#ifdef HEX_WGMMA
    const uint64_t pb = wgmma_panel(b);
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++)
        if (FRESH && k == 0)
            wgmma_f16<true>(acc, a[k], pb);
        else
            wgmma_f16<false>(acc, a[k], pb + 2 * k);
#else
    if (FRESH)
        clear(acc);
    const int lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++)
#pragma unroll
        for (int n = 0; n < BN / 16; n++) {
            uint32_t y[4];
            ldmatrix(y,
                     b + swizzle(16 * n + (lane & 7) + (lane >> 4 << 3), 2 * k + (lane >> 3 & 1)));
            mma_f16(acc[2 * n], a[k], y[0], y[1]);
            mma_f16(acc[2 * n + 1], a[k], y[2], y[3]);
        }
#endif
}

// acc (16 rows a warp, 64 features) += the weights a (16 rows a warp, 64 columns) times the panel b,
// whose 64 rows are those columns.
DEVICE void multiply_transposed(float (&acc)[8][4], const uint32_t (&a)[4][4], const uint16_t *b)
{
#ifdef HEX_WGMMA
    const uint64_t pb = wgmma_panel(b);
#pragma unroll
    for (int k = 0; k < BN / 16; k++) // 16 rows are 128 units of 16 bytes
        wgmma_f16_transposed(acc, a[k], pb + 128 * k);
#else
    const int lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < BN / 16; k++)
#pragma unroll
        for (int d = 0; d < PANEL / 16; d++) {
            uint32_t y[4];
            ldmatrix_transposed(y, b + swizzle(16 * k + (lane & 15), 2 * d + (lane >> 4)));
            mma_f16(acc[2 * d], a[k], y[0], y[1]);
            mma_f16(acc[2 * d + 1], a[k], y[2], y[3]);
        }
#endif
}

#ifndef HEX_WGMMA
DEVICE void wgmma_begin(float (&)[8][4]) {}
DEVICE void wgmma_end(float (&)[8][4]) {}
#endif

// ---- shared memory of a block ----

// What the stream of panels takes, and where `more` bytes of the kernel's own begin. `over`: they
// lie over the rows' panels, which have gone to registers when the kernel begins to use them.
struct hex_layout {
    int64_t ring, barriers, more, bytes;
};

// Tiles whose side may be in use or on its way. Without HOLD each of a tile's panels has a slot of
// its own: four or more a tile, three of them sent for before the tile before is done with.
SHARED_DEVICE __host__ int sides_of(bool hold, int slots) { return hold ? slots : slots > 2 ? 4 : 1; }

#define RING_BARRIERS 32 // bytes for each slot: two barriers, and room for one of the rows'

SHARED_DEVICE __host__ hex_layout layout_of(int warps, bool split, bool resident, bool over,
                                            int64_t panels, int slots, int64_t more)
{
    const int64_t panel = 2 * HALVES * (split ? 2 : 1), blocks = warps / 4;
    const int64_t rows = (resident ? panels : 0) * blocks * panel;
    const int64_t slot = panel * (resident ? 1 : 1 + blocks);
    hex_layout at;
    at.ring = over && more > rows ? (more + 1023) / 1024 * 1024 : rows;
    at.barriers = at.ring + slots * slot;
    at.more = over ? 0 : at.barriers + slots * RING_BARRIERS;
    at.bytes = at.barriers + slots * RING_BARRIERS + (over ? 0 : more);
    return at;
}

// How a kernel runs: whether all of the rows' panels stay, the slots, where things are.
struct hex_fit {
    bool resident;
    int slots;
    hex_layout at;
};

// ---- the panels of a block's tiles, in the order of their use ----

// For each tile the `panels` of its cosines, then, where a second product cannot read those (not
// HOLD), `values` more of the columns alone, from panel `value0` on. Beside a tile's first panel
// may travel `side_bytes` of its own, from `side_from` on, a multiple of 16.
//
// The calls, by all threads: start, then for each panel `next`, and `done(n)` when the warp needs
// its n oldest panels no more. HOLD: at most two are in use at a time, else one.
template <int WARPS, bool SPLIT, int PANELS, bool KEEP, bool HOLD> struct hex_stream {
    static_assert(PANELS > 0 || !(KEEP || HOLD), "registers have constant indices");
    static constexpr int ROWS = 16 * WARPS, THREADS = 32 * WARPS, PARTS = SPLIT ? 2 : 1;
    static constexpr int MOST_IN_USE = HOLD || KEEP ? 2 : 1;
    uint16_t *a, *ring;
    const uint16_t *tiles;
    unsigned char *side;
    const unsigned char *side_from;
    int64_t col_end, next_col, row_block, row_blocks;
    int any_panels, values, value0, slots, side_bytes, side_pitch;
    bool resident;
    int slot, next_panel, next_slot, tile, next_tile, sides;
    uint32_t kept[KEEP ? PANELS : 1][4][4];
#ifdef HEX_WGMMA
    uint64_t *full, *empty;
    unsigned parity;
    int ahead; // panels that may be sent for
    int wrapped;
#endif

    __device__ __forceinline__ int panels() const { return PANELS ? PANELS : any_panels; }
    // Halves of a slot, which holds the rows' panel too where that travels.
    __device__ __forceinline__ int slot_halves() const
    {
        return PARTS * HALVES * (KEEP || resident ? 1 : 1 + WARPS / 4);
    }
    __device__ __forceinline__ const uint16_t *b_panel(int in_slot) const
    {
        return ring + in_slot * slot_halves();
    }
    // The rows' panel, of the 64 rows that hold the warp's.
    __device__ __forceinline__ const uint16_t *a_panel(int panel, int in_slot) const
    {
        const int block = (int)threadIdx.x >> 7;
        return resident ? a + (block * panels() + panel) * PARTS * HALVES
                        : b_panel(in_slot) + (1 + block) * PARTS * HALVES;
    }
    // The panels of 64 rows follow one another, so they are one piece of memory.
    __device__ __forceinline__ const uint16_t *place(int64_t block, int64_t panel) const
    {
        return tiles + (block * panels() + panel) * PARTS * HALVES;
    }

    // Copies halves into shared memory, a multiple of 8 for each thread of the block.
    __device__ __forceinline__ void bring(void *to, const void *from, int bytes, int in_slot) const
    {
#ifdef HEX_WGMMA
        copy_bulk(to, from, bytes, full + in_slot);
#else
        (void)in_slot;
        const unsigned char *source = (const unsigned char *)from + 16 * threadIdx.x;
        unsigned char *target = (unsigned char *)to + 16 * threadIdx.x;
        for (int k = 16 * (int)threadIdx.x; k < bytes; k += 16 * THREADS) {
            copy_async(target, source);
            source += 16 * THREADS, target += 16 * THREADS;
        }
#endif
    }

    // Sends for the next panel, if there is one, into the next slot.
    __device__ __forceinline__ void request()
    {
        if (next_col < col_end) {
            const bool cosines = next_panel < panels(), first = next_panel == 0;
            const int panel = cosines ? next_panel : value0 + next_panel - panels();
            const bool rows = cosines && !KEEP && !resident;
            const int bytes = 2 * PARTS * HALVES;
            uint16_t *to = ring + next_slot * slot_halves();
#ifdef HEX_WGMMA
            int64_t blocks = rows ? row_blocks - row_block : 0; // the last may have fewer
            blocks = blocks < WARPS / 4 ? blocks : WARPS / 4;
            barrier_expect(full + next_slot,
                           bytes * (int)(1 + blocks) + (first ? side_bytes : 0));
#else
            const int64_t blocks = rows ? WARPS / 4 : 0;
#endif
            bring(to, place(next_col / BN, panel), bytes, next_slot);
            for (int k = 0; k < blocks; k++)
                if (row_block + k < row_blocks)
                    bring(to + (1 + k) * PARTS * HALVES, place(row_block + k, panel), bytes,
                          next_slot);
            if (first && side_bytes)
                bring(side + next_tile * side_bytes, side_from + next_col / BN * side_pitch,
                      side_bytes, next_slot);
            if (++next_panel == panels() + values) {
                next_panel = 0;
                next_col += BN;
                next_tile = next_tile + 1 == sides ? 0 : next_tile + 1;
            }
            next_slot = next_slot + 1 == slots ? 0 : next_slot + 1;
        }
#ifndef HEX_WGMMA
        copy_commit();
#endif
    }

    __device__ __forceinline__ void start(const hex_unit &u, const hex_fit &fit,
                                          unsigned char *shared, int64_t row0, int64_t cols_from,
                                          int64_t cols_to)
    {
        tiles = u.tiles;
        any_panels = (int)(u.width / PANEL);
        row_block = row0 / BN, row_blocks = (u.count + BN - 1) / BN;
        slots = fit.slots;
        resident = fit.resident;
        a = (uint16_t *)shared;
        ring = (uint16_t *)(shared + fit.at.ring);
        next_col = cols_from, col_end = cols_to;
        next_panel = next_slot = next_tile = tile = slot = 0;
        values = value0 = side_bytes = side_pitch = 0, sides = 1;
#ifdef HEX_WGMMA
        full = (uint64_t *)(shared + fit.at.barriers);
        empty = full + slots;
        if (threadIdx.x == 0) {
            for (int k = 0; k < slots; k++) {
                barrier_start(full + k, 1);
                barrier_start(empty + k, WARPS);
            }
            barrier_start(empty + slots, 1); // the rows'
            barrier_fence();
        }
        parity = 0, ahead = slots, wrapped = 0;
        __syncthreads();
#endif
    }

    // A second product's panels, and what travels beside a tile.
    __device__ __forceinline__ void take_values(int count, int from) { values = count, value0 = from; }
    __device__ __forceinline__ void take_side(void *to, const void *from, int bytes, int pitch)
    {
        side = (unsigned char *)to, side_from = (const unsigned char *)from;
        side_bytes = bytes, side_pitch = pitch;
        sides = sides_of(HOLD, slots);
    }

    // The rows' panels, and the first panels of the columns.
    __device__ __forceinline__ void fill()
    {
        int blocks = row_blocks - row_block < WARPS / 4 ? (int)(row_blocks - row_block) : WARPS / 4;
        const int bytes = KEEP || resident ? 2 * blocks * panels() * PARTS * HALVES : 0;
#ifdef HEX_WGMMA
        if (threadIdx.x == 0) {
            if (bytes) {
                barrier_expect(empty + slots, bytes);
                copy_bulk(a, place(row_block, 0), bytes, empty + slots);
            }
            for (; ahead > 0; ahead--)
                request();
        }
        __syncwarp();
        if (bytes)
            barrier_wait(empty + slots, 0);
#else
        bring(a, place(row_block, 0), bytes, 0);
        for (int k = 0; k < MOST_IN_USE; k++)
            request();
        if (KEEP) {
            copy_wait<MOST_IN_USE - 1>();
            __syncthreads();
        }
#endif
        if (KEEP) {
            const int block = (int)threadIdx.x >> 7;
#pragma unroll
            for (int k = 0; k < (KEEP ? PANELS : 0); k++)
                load_fragments(kept[k], a + (block * PANELS + k) * HALVES);
            __syncthreads(); // the place is free for the kernel
        }
    }

    // Waits for the next panel; its slot.
    __device__ __forceinline__ int next()
    {
        const int now = slot;
#ifdef HEX_WGMMA
        barrier_wait(full + now, parity);
        if (slot + 1 == slots)
            parity ^= 1;
#else
        copy_wait<MOST_IN_USE - 1>();
        __syncthreads(); // all warps are done with the slots that were in use before
        request();
#endif
        slot = slot + 1 == slots ? 0 : slot + 1;
        return now;
    }

    // The warp needs its `count` oldest panels no more, the last of which was in slot - 1.
    __device__ __forceinline__ void done(int count)
    {
#ifdef HEX_WGMMA
        __syncwarp();
        if ((threadIdx.x & 31) == 0)
            for (int k = count; k > 0; k--)
                barrier_arrive(empty + (slot >= k ? slot - k : slot - k + slots));
        // Sends again into the slots that were let go a tile ago, which all have left by now or
        // soon will.
        if (threadIdx.x == 0) {
            for (; ahead > 0 && next_col < col_end; ahead--) {
                barrier_wait(empty + next_slot, (unsigned)wrapped);
                if (next_slot + 1 == slots)
                    wrapped ^= 1;
                request();
            }
            ahead += count;
        }
        __syncwarp();
#else
        (void)count;
#endif
    }

    // What came beside the tile whose cosines were computed last.
    __device__ __forceinline__ const unsigned char *side_of_tile()
    {
        const unsigned char *now = side + tile * side_bytes;
        tile = tile + 1 == sides ? 0 : tile + 1;
        return now;
    }

    // acc += the cosines' share of a panel that is in a slot.
    __device__ __forceinline__ void add_cosines(float (&acc)[8][4], int panel, int in_slot) const
    {
        const uint16_t *y = b_panel(in_slot);
        if (SPLIT) {
            // A panel by itself, the small products first: tensor cores cut off what they add.
            const uint16_t *x = a_panel(panel, in_slot);
            float part[8][4];
            wgmma_begin(part);
            multiply_panel<true>(part, x + HALVES, y);
            multiply_panel<false>(part, x, y + HALVES);
            multiply_panel<false>(part, x, y);
            wgmma_end(part);
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    acc[n][q] += part[n][q];
        } else {
            wgmma_begin(acc);
            multiply_panel<false>(acc, a_panel(panel, in_slot), y);
            wgmma_end(acc);
        }
    }

    // The cosines of a tile. Its panels stay in use with HOLD; the first one's slot.
    __device__ __forceinline__ int cosines(float (&acc)[8][4])
    {
        int first = 0;
        if (KEEP || (HOLD && !SPLIT)) {
            first = next();
            const int second = PANELS > 1 ? next() : first;
            wgmma_begin(acc);
            if (KEEP)
                multiply_panel<true>(acc, kept[0], b_panel(first));
            else
                multiply_panel<true>(acc, a_panel(0, first), b_panel(first));
            if (KEEP && PANELS > 1)
                multiply_panel<false>(acc, kept[KEEP && PANELS > 1 ? 1 : 0], b_panel(second));
            else if (PANELS > 1)
                multiply_panel<false>(acc, a_panel(1, second), b_panel(second));
            wgmma_end(acc);
            if (!HOLD)
                done(PANELS);
            return first;
        }
        clear(acc);
#pragma unroll 1
        for (int panel = 0; panel < panels(); panel++) {
            const int now = next();
            if (panel == 0)
                first = now;
            add_cosines(acc, panel, now);
            if (!HOLD)
                done(1);
        }
        return first;
    }
};

// ---- which elements of a tile are no negatives ----

// The thread's two rows, 8 apart, and where in a tile they and their partners stand (-1: not in
// it).
struct hex_places {
    int64_t row[2], partner[2];
    int own[2], positive[2], from, valid;

    __device__ __forceinline__ void start(int64_t row0, int64_t B)
    {
        const int lane = (int)threadIdx.x & 31;
        for (int h = 0; h < 2; h++) {
            row[h] = row0 + ((int)threadIdx.x >> 5) * 16 + (lane >> 2) + 8 * h;
            partner[h] = row[h] < 2 * B ? partner_of(row[h], B) : -1; // the queue has none
        }
    }
    // Whether the warp's part of the tile holds any such element, or any before col0 or from
    // col_end on.
    __device__ __forceinline__ bool enter(int64_t col, int64_t col0, int64_t col_end)
    {
        bool edge = col_end - col < BN || col < col0;
        valid = col_end - col < BN ? (int)(col_end - col) : BN;
        from = col < col0 ? (int)(col0 - col) : 0;
        for (int h = 0; h < 2; h++) {
            const int64_t o = row[h] - col, q = partner[h] - col;
            own[h] = (uint64_t)o < BN ? (int)o : -1;
            positive[h] = (uint64_t)q < BN ? (int)q : -1;
            edge |= own[h] >= 0 || positive[h] >= 0;
        }
        return __any_sync(~0u, edge);
    }
    __device__ __forceinline__ bool leaves_out(int h, int col) const
    {
        return col == own[h] || col == positive[h] || col >= valid || col < from;
    }
};

// ---- every tile of a block, handed to `fold` ----

// The rows and columns of this block, as unit rows; the first of either is a multiple of 64.
struct hex_block {
    hex_part part;
    int64_t row_block, slice, row0, col0, col1;
    int64_t ticket;

    __device__ __forceinline__ void start(const hex_parts &parts, int rows, int64_t number)
    {
        const int k = part_of_block(parts, number);
        part = parts.part[k];
        const int64_t b = number - part.first_block;
        row_block = (unsigned)b % (unsigned)part.row_blocks; // a grid has less than 2^31 blocks
        slice = (unsigned)b / (unsigned)part.row_blocks;
        row0 = part.row0 / BN * BN + row_block * rows;
        col0 = part.col0 / BN * BN + slice * part.tiles * BN;
        const int64_t end = col0 + part.tiles * BN;
        col1 = end < part.col1 ? end : part.col1;
        ticket = row_block;
        for (int i = 0; i < k; i++)
            ticket += parts.part[i].row_blocks;
    }
    // Whether the block has to do with a row.
    __device__ __forceinline__ bool has(int64_t i) const { return i >= part.row0 && i < part.row1; }
};

template <int WARPS, bool SPLIT, int PANELS, class Fold>
DEVICE void for_each_tile(const hex_block &block, const hex_unit &unit, int64_t B,
                          const hex_fit &fit, unsigned char *shared, Fold &fold)
{
    hex_stream<WARPS, SPLIT, PANELS, PANELS != 0, false> stream;
    hex_places places;
    stream.start(unit, fit, shared, block.row0, block.col0, block.col1);
    stream.fill();
    fold.start();
    __syncthreads();
    places.start(block.row0, B);
    for (int64_t col = block.col0; col < block.col1; col += BN) {
        float acc[8][4];
        stream.cosines(acc);
        if (places.enter(col, block.part.col0, block.col1))
            fold.template tile<true>(acc, places);
        else
            fold.template tile<false>(acc, places);
    }
    __syncthreads(); // the shared memory is free again
}

// ---- launching ----

// Calls f(SPLIT, PANELS), two constants: for three products or one; and the panels whose fragments of
// the rows stay in registers, 0 where there are too many of them.
template <int VALUE> struct constant {
    static constexpr int value = VALUE;
};
template <class F> static inline const char *with_kind(const hex_unit &u, F f)
{
    return u.split                ? f(constant<true>{}, constant<0>{})
           : u.width == PANEL     ? f(constant<false>{}, constant<1>{})
           : u.width == 2 * PANEL ? f(constant<false>{}, constant<2>{})
                                  : f(constant<false>{}, constant<0>{});
}

// For so many warps and `more` bytes. The more slots, the more panels are on their way. `side`
// bytes are for what travels beside a tile, and come first in the kernel's own.
static inline hex_fit fit_of(const hex_run &r, int warps, bool keep, bool hold, int64_t more,
                             int64_t side = 0)
{
    const int64_t panels = r.unit.width / PANEL;
    const int least = hold || keep ? 4 : 2, most = r.hopper ? 8 : least;
    hex_fit fit = {};
    for (int stays = 1; stays >= 0; stays--)
        for (int slots = most; slots >= least; slots -= 2) {
            const int64_t bytes = more + side * sides_of(hold, slots);
            fit = {stays != 0, slots,
                   layout_of(warps, r.unit.split, stays != 0, keep && !side, panels, slots, bytes)};
            if (fit.at.bytes <= r.shared_limit)
                return fit;
        }
    return fit; // the launch says that it is too much
}

// Lets a kernel have the shared memory it needs. The limit is set to what the device has, so that a
// call from another thread, for a smaller problem, does not lower it before the launch.
template <class Kernel>
static inline bool allow_shared_memory(Kernel kernel, const hex_run &r, const hex_fit &fit)
{
    const int bytes = fit.at.bytes > r.shared_limit ? (int)fit.at.bytes : r.shared_limit;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
           cudaSuccess;
}
