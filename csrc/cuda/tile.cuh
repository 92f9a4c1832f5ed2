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
template <bool FRESH>
DEVICE void multiply_panel(float (&acc)[8][4], const uint16_t *a, const uint16_t *b)
{
#ifdef HEX_WGMMA
    const uint32_t pa = wgmma_panel(a), pb = wgmma_panel(b);
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
template <bool FRESH>
DEVICE void multiply_panel(float (&acc)[8][4], const uint32_t (&a)[4][4], const uint16_t *b)
{
#ifdef HEX_WGMMA
    const uint32_t pb = wgmma_panel(b);
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

// acc (16 rows a warp, 64 features) += the weights a (16 rows a warp, 64 columns) times the panel
// b, whose 64 rows are those columns.
DEVICE void multiply_transposed(float (&acc)[8][4], const uint32_t (&a)[4][4], const uint16_t *b)
{
#ifdef HEX_WGMMA
    const uint32_t pb = wgmma_panel_transposed(b);
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
template <class Accumulators> DEVICE void wgmma_begin(Accumulators &) {}
template <class Accumulators> DEVICE void wgmma_end(Accumulators &) {}
DEVICE void wgmma_operand(uint32_t (&)[4][4]) {}
#endif

// ---- shared memory of a block ----

// What the stream of panels takes, and where `more` bytes of the kernel's own begin. `over`: they
// lie over the rows' panels, which have gone to registers when the kernel begins to use them.
struct hex_layout {
    int64_t ring, barriers, more, bytes;
};

#define RING_BARRIERS 32 // bytes for each slot: two barriers, and room for one of the rows'

// `wide` panels a slot.
SHARED_DEVICE __host__ hex_layout layout_of(int warps, bool split, bool resident, bool over,
                                            int64_t panels, int wide, int slots, int64_t more)
{
    const int64_t panel = 2 * HALVES * (split ? 2 : 1), blocks = warps / 4;
    const int64_t rows = (resident ? panels : 0) * blocks * panel;
    const int64_t slot = panel * (resident ? wide : 1 + blocks);
    hex_layout at;
    at.ring = over && more > rows ? (more + 1023) / 1024 * 1024 : rows;
    at.barriers = at.ring + slots * slot;
    at.more = over ? 0 : at.barriers + slots * RING_BARRIERS;
    at.bytes = at.barriers + slots * RING_BARRIERS + (over ? 0 : more);
    return at;
}

// Tiles whose side may be in use or on its way. One is enough where two slots hold a panel each, a
// tile has two panels or more, and the block is together when it has read the side: that of the
// next tile is sent for with its last panel, which is after all have begun with the tile.
SHARED_DEVICE __host__ int sides_of(bool tiles, int slots)
{
    return tiles || slots > 2 ? slots : 1;
}

// How a kernel runs: whether all of the rows' panels stay, the slots, where things are.
struct hex_fit {
    bool resident;
    int slots;
    hex_layout at;
};

// ---- the panels of a block's tiles, in the order of their use ----

// A slot of the ring holds all panels of a tile, where their number is known (PANELS), else one.
// Then the columns may come without any rows, and of them `some` panels, from `panel0` on. Beside a
// tile's last panel may travel `side_bytes` of its own, a multiple of 16.
//
// The calls, by all threads: start, take_... , fill; then for each slot `next`, and `done` when the
// warp has read it. One slot at a time is in use.
template <int WARPS, bool SPLIT, int PANELS, bool KEEP> struct hex_stream {
    static_assert(PANELS > 0 || !KEEP, "registers have constant indices");
    static constexpr int ROWS = 16 * WARPS, THREADS = 32 * WARPS, BLOCKS = WARPS / 4;
    static constexpr int PIECE = (SPLIT ? 2 : 1) * HALVES; // of a panel
    static constexpr int WIDE = PANELS ? PANELS : 1;
    uint16_t *a, *ring;
    const uint16_t *tiles;
    unsigned char *side;
    const unsigned char *side_from;
    int row_block, row_blocks, next_tile, end_tile, stride; // of 64 rows
    int any_panels, panel0, some, slots, side_bytes, side_pitch;
    bool resident;
    int slot, next_slot, this_panel, next_panel, side_slot, next_side, sides;
    uint32_t kept[KEEP ? PANELS : 1][4][4];
#ifdef HEX_WGMMA
    uint64_t *full, *empty;
    unsigned parity, next_parity;
    int ahead; // slots that may be sent for
#endif

    __device__ __forceinline__ int panels() const { return PANELS ? PANELS : any_panels; }
    // The columns' panels in a slot, where the rows' follow them if they travel.
    __device__ __forceinline__ uint16_t *b_panel(int in_slot, int panel = 0) const
    {
        return ring + (in_slot * (PANELS || resident ? WIDE : 1 + BLOCKS) + panel) * PIECE;
    }
    // The rows' panel, of the 64 rows that hold the warp's.
    __device__ __forceinline__ const uint16_t *a_panel(int panel, int in_slot) const
    {
        const int block = (int)threadIdx.x >> 7;
        return PANELS || resident ? a + (block * panels() + panel) * PIECE
                                  : b_panel(in_slot, 1 + block);
    }
    // The panels of 64 rows follow one another, and those of the next 64 rows follow them.
    __device__ __forceinline__ const uint16_t *place(int block, int panel) const
    {
        return tiles + ((int64_t)block * panels() + panel) * PIECE;
    }

    // Copies into shared memory, by the copy engine or by all threads.
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

    // Sends for what comes next, if there is more, into the next slot.
    __device__ __forceinline__ void request()
    {
        if (next_tile >= end_tile)
            return;
        const int panel = PANELS ? 0 : panel0 + next_panel;
        const int bytes = 2 * WIDE * PIECE, last = PANELS ? 0 : some - 1;
        const int beside = next_panel == last ? side_bytes : 0;
        int blocks = PANELS || resident ? 0 : row_blocks - row_block;
        blocks = blocks < BLOCKS ? blocks : BLOCKS; // the last block of rows may have fewer
#ifdef HEX_WGMMA
        barrier_expect(full + next_slot, bytes * (1 + blocks) + beside);
#endif
        bring(b_panel(next_slot), place(next_tile, panel), bytes, next_slot);
        for (int k = 0; k < blocks; k++)
            bring(b_panel(next_slot, 1 + k), place(row_block + k, panel), bytes, next_slot);
        if (beside)
            bring(side + next_side * side_bytes, side_from + (int64_t)next_tile * side_pitch,
                  beside, next_slot);
        next_slot = next_slot + 1 == slots ? 0 : next_slot + 1;
        if (PANELS || ++next_panel == some) {
            next_panel = 0;
            next_tile += stride;
            next_side = next_side + 1 == sides ? 0 : next_side + 1;
        }
    }

    // Of tiles [tile0, tile1) of columns every `one_of`-th, against the rows from row0 on.
    __device__ __forceinline__ void start(const hex_unit &u, const hex_fit &fit,
                                          unsigned char *shared, int64_t row0, int64_t tile0,
                                          int64_t tile1, int one_of = 1)
    {
        tiles = u.tiles;
        any_panels = some = u.panels, panel0 = 0;
        row_block = (int)(row0 / BN), row_blocks = (int)((u.count + BN - 1) / BN);
        next_tile = (int)tile0, end_tile = (int)tile1, stride = one_of;
        slots = fit.slots;
        resident = fit.resident;
        a = (uint16_t *)shared;
        ring = (uint16_t *)(shared + fit.at.ring);
        slot = next_slot = this_panel = next_panel = side_slot = next_side = 0;
        side_bytes = side_pitch = 0, sides = 1;
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
        parity = next_parity = 0, ahead = 0;
        __syncthreads();
#endif
    }

    // Of each tile `count` panels, and none of the rows, for which `fit` has no place.
    __device__ __forceinline__ void take_columns(int from, int count)
    {
        panel0 = from, some = count, row_block = row_blocks;
    }
    __device__ __forceinline__ void take_side(void *to, const void *from, int bytes, int pitch)
    {
        side = (unsigned char *)to, side_from = (const unsigned char *)from;
        side_bytes = bytes, side_pitch = pitch;
        sides = sides_of(PANELS > 0, slots);
    }

    // The rows' panels, and the first of the columns'.
    __device__ __forceinline__ void fill()
    {
        const int blocks = row_blocks - row_block < BLOCKS ? row_blocks - row_block : BLOCKS;
        const int bytes = PANELS || resident ? 2 * blocks * panels() * PIECE : 0;
#ifdef HEX_WGMMA
        if (threadIdx.x == 0) {
            if (bytes) {
                barrier_expect(empty + slots, bytes);
                copy_bulk(a, place(row_block, 0), bytes, empty + slots);
            }
            for (int k = 0; k < slots; k++)
                request();
        }
        __syncwarp();
        if (bytes)
            barrier_wait(empty + slots, 0);
#else
        bring(a, place(row_block, 0), bytes, 0);
        request();
        if (KEEP) {
            copy_wait();
            __syncthreads();
        }
#endif
        if (KEEP) {
            const int block = (int)threadIdx.x >> 7;
#pragma unroll
            for (int k = 0; k < (KEEP ? PANELS : 0); k++)
                load_fragments(kept[k], a + (block * PANELS + k) * PIECE);
            __syncthreads(); // the place is free for the kernel
        }
    }

    // Waits for the next slot to be full.
    __device__ __forceinline__ int next()
    {
        const int now = slot;
        slot = slot + 1 == slots ? 0 : slot + 1;
#ifdef HEX_WGMMA
        barrier_wait_together(full + now, parity);
        parity ^= slot == 0;
#else
        copy_wait();
        __syncthreads(); // all warps are done with the other slot
        request();
        __syncwarp(); // the products are a warp's own instructions
#endif
        return now;
    }

    // The warp has read the slot. One thread sends for more, into the slot before it, which the
    // other warps have left by now or soon will.
    __device__ __forceinline__ void done(int in_slot)
    {
#ifdef HEX_WGMMA
        __syncwarp();
        if ((threadIdx.x & 31) == 0)
            barrier_arrive(empty + in_slot);
        if (threadIdx.x == 0) {
            if (ahead && next_tile < end_tile) {
                barrier_wait(empty + next_slot, next_parity);
                request();
                next_parity ^= next_slot == 0;
            }
            ahead = 1;
        }
        __syncwarp();
#else
        (void)in_slot;
#endif
    }

    // For a tile that holds columns outside of [from, to), of which the block has nothing to do but
    // which may hold NaN: makes 0 of them in a slot, when all warps have read it.
    __device__ __forceinline__ void clear_others(int in_slot, int from, int to) const
    {
        __syncthreads();
        for (int k = (int)threadIdx.x; k < WIDE * PIECE / 8; k += THREADS) {
            const int row = k / (PANEL / 8) % BN;
            if (row < from || row >= to)
                *(uint4 *)(b_panel(in_slot) + 8 * k) = make_uint4(0, 0, 0, 0);
        }
        fence_async();
        __syncthreads();
    }

    // After the last tile, so that the barriers' place can be set up again; all threads are here.
    __device__ __forceinline__ void stop()
    {
#ifdef HEX_WGMMA
        if (threadIdx.x == 0) {
            for (int k = 0; k < slots; k++) {
                barrier_stop(full + k);
                barrier_stop(empty + k);
            }
            barrier_stop(empty + slots);
        }
#endif
    }

    // What came beside the tile whose cosines were computed last.
    __device__ __forceinline__ const unsigned char *side_of_tile()
    {
        const unsigned char *now = side + side_slot * side_bytes;
        side_slot = side_slot + 1 == sides ? 0 : side_slot + 1;
        return now;
    }

    // acc += the cosines' share of a panel, in three products. A panel by itself, the small ones
    // first: tensor cores cut off what they add.
    __device__ __forceinline__ void add_split(float (&acc)[8][4], const uint16_t *x,
                                              const uint16_t *y) const
    {
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
    }

    // The cosines of a tile.
    __device__ __forceinline__ int cosines(float (&acc)[8][4]) { return cosines(acc, panels()); }

    // The cosines of a tile, of its next so many panels. With PANELS that is all of them, and their
    // slot, which is returned, stays in use.
    __device__ __forceinline__ int cosines(float (&acc)[8][4], int count)
    {
        if (PANELS && !SPLIT) {
            const int now = next();
            wgmma_begin(acc);
            if (KEEP)
                multiply_panel<true>(acc, kept[0], b_panel(now));
            else
                multiply_panel<true>(acc, a_panel(0, now), b_panel(now));
#pragma unroll
            for (int k = 1; k < PANELS; k++)
                if (KEEP)
                    multiply_panel<false>(acc, kept[KEEP ? k : 0], b_panel(now, k));
                else
                    multiply_panel<false>(acc, a_panel(k, now), b_panel(now, k));
            wgmma_end(acc);
            return now;
        }
        int now = 0;
        clear(acc);
        if (PANELS)
            now = next();
#pragma unroll 1
        for (int k = 0; k < count; k++) {
            if (!PANELS)
                now = next();
            const int panel = PANELS ? k : this_panel;
            const uint16_t *x = a_panel(panel, now), *y = b_panel(now, PANELS ? panel : 0);
            if (SPLIT)
                add_split(acc, x, y);
            else {
                wgmma_begin(acc);
                multiply_panel<false>(acc, x, y);
                wgmma_end(acc);
            }
            if (!PANELS) {
                done(now);
                this_panel = this_panel + 1 == any_panels ? 0 : this_panel + 1;
            }
        }
        return now;
    }
};

// ---- which elements of a tile are no negatives ----

// The thread's two rows, 8 apart, and where in a tile they and their partners stand (-1: not in
// it). A row's number is less than 2^31: its unit row alone takes 128 bytes.
struct hex_places {
    int row[2], partner[2];
    int own[2], positive[2], from, valid;

    __device__ __forceinline__ void start(int64_t row0, int64_t B)
    {
        const int lane = (int)threadIdx.x & 31;
        for (int h = 0; h < 2; h++) {
            row[h] = (int)row0 + ((int)threadIdx.x >> 5) * 16 + (lane >> 2) + 8 * h;
            // the queue has none
            partner[h] = row[h] < 2 * B ? (int)partner_of(row[h], B) : -1;
        }
    }
    // Whether a tile has such a column.
    __device__ __forceinline__ static bool is_in(int col) { return (unsigned)col < BN; }
    // Whether the warp's part of a tile holds any such element, or any outside of [col0, col1).
    __device__ __forceinline__ bool enter(int tile, int col0, int col1)
    {
        const int col = tile * BN;
        const bool edge = is_in(row[0] - col) || is_in(partner[0] - col) ||
                          is_in(partner[1] - col) || col < col0 || col + BN > col1;
        if (!__any_sync(~0u, edge))
            return false;
        valid = col1 - col < BN ? col1 - col : BN;
        from = col < col0 ? col0 - col : 0;
        for (int h = 0; h < 2; h++) {
            const int o = row[h] - col, q = partner[h] - col;
            own[h] = is_in(o) ? o : -1;
            positive[h] = is_in(q) ? q : -1;
        }
        return true;
    }
    __device__ __forceinline__ bool leaves_out(int h, int col) const
    {
        return col == own[h] || col == positive[h] || col >= valid || col < from;
    }
    // Puts `value` in the place of all that is no negative.
    __device__ __forceinline__ void blank(float (&acc)[8][4], float value) const
    {
        const int t = (int)threadIdx.x & 3;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                if (leaves_out(q >> 1, 8 * n + 2 * t + (q & 1)))
                    acc[n][q] = value;
    }
};

// ---- every tile of a block, handed to `fold` ----

// The rows and columns of this block, as unit rows; the first of either is a multiple of 64.
struct hex_block {
    hex_part part;
    int64_t slice, row0, ticket;
    int tile0, tile1, stride; // of columns; stride: every so many of the tiles

    __device__ __forceinline__ void start(const hex_parts &parts, int rows, int64_t number)
    {
        const int k = part_of_block(parts, number);
        part = parts.part[k];
        const int64_t b = number - part.first_block;
        ticket = (unsigned)b % (unsigned)part.row_blocks; // a grid has less than 2^31 blocks
        slice = (unsigned)b / (unsigned)part.row_blocks;
        row0 = part.row0 / BN * BN + ticket * rows;
        const int64_t end = (part.col1 + BN - 1) / BN;
        tile0 = (int)(part.col0 / BN + slice * part.tiles);
        tile1 = (int)(tile0 + part.tiles < end ? tile0 + part.tiles : end);
        stride = 1;
        for (int i = 0; i < k; i++)
            ticket += parts.part[i].row_blocks;
    }
    // Whether the block has to do with a row, and where that stands in memory by row.
    __device__ __forceinline__ bool has(int64_t i) const { return i >= part.row0 && i < part.row1; }
    __device__ __forceinline__ int64_t place(int64_t i) const
    {
        return part.first_row + i - part.row0;
    }
};

template <int WARPS, bool SPLIT, int PANELS, class Fold>
DEVICE void for_each_tile(const hex_block &block, const hex_unit &unit, int64_t B,
                          const hex_fit &fit, unsigned char *shared, Fold &fold)
{
    hex_stream<WARPS, SPLIT, PANELS, PANELS != 0> stream;
    hex_places places;
    stream.start(unit, fit, shared, block.row0, block.tile0, block.tile1, block.stride);
    stream.fill();
    fold.start();
    __syncthreads();
    places.start(block.row0, B);
    const int col0 = (int)block.part.col0, col1 = (int)block.part.col1;
    for (int tile = block.tile0; tile < block.tile1; tile += block.stride) {
        float acc[8][4];
        const int slot = stream.cosines(acc);
        if (PANELS)
            stream.done(slot);
        fold.tile(acc, places, places.enter(tile, col0, col1));
    }
#ifndef HEX_WGMMA
    copy_wait(); // for the rows' panels, where there was no tile
#endif
    __syncthreads(); // the shared memory is free again
    stream.stop();
}

// ---- launching ----

// Calls f(SPLIT, PANELS, SETS), constants: for three products or one; the panels whose fragments of
// the rows stay in registers, 0 where there are too many of them; and what the caller says.
template <int VALUE> struct constant {
    static constexpr int value = VALUE;
};
template <class F> static inline const char *with_kind(const hex_unit &u, bool sets, F f)
{
    const constant<true> yes;
    const constant<false> no;
    return sets                   ? u.split ? f(yes, constant<0>{}, yes) : f(no, constant<0>{}, yes)
           : u.split              ? f(yes, constant<0>{}, no)
           : u.width == PANEL     ? f(no, constant<1>{}, no)
           : u.width == 2 * PANEL ? f(no, constant<2>{}, no)
                                  : f(no, constant<0>{}, no);
}

// For so many warps, with PANELS or not, and `more` bytes. The more slots, the more is on its way;
// small blocks share a processor, or the caller says how many are enough. `side` bytes are for what
// travels beside a tile, and come first in the kernel's own; without them these may lie over the
// rows' panels, if they go to registers.
static inline hex_fit fit_of(const hex_run &r, int warps, int panels, bool keep, int64_t more,
                             int64_t side = 0, int enough = 8)
{
    int most = !r.hopper || (panels && warps == 4) ? 2 : panels == 1 ? 8 : 4;
    most = most < enough ? most : enough;
    hex_fit fit = {};
    for (int stays = 1; stays >= (panels ? 1 : 0); stays--)
        for (int slots = most; slots >= 2; slots--) {
            const int64_t bytes = more + side * sides_of(panels > 0, slots);
            fit = {stays != 0, slots,
                   layout_of(warps, r.unit.split, stays != 0, keep && !side, r.unit.panels,
                             panels ? panels : 1, slots, bytes)};
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
