// SPDX-License-Identifier: MIT
// The panels of a CUDA block's tiles, on their way through shared memory, and the cosines of each tile
// from them.
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
#include "panels.cuh"

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
