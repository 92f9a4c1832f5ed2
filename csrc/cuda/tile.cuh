// SPDX-License-Identifier: MIT
// Tiles of cosines on the tensor cores, 16 rows for each warp of a block against 64 columns: which of
// them a CUDA block has, which of their elements are no negatives, and how a kernel over them is
// launched. All tiles start at a multiple of 64, also where a rectangle of cosines does not; its
// first and its last tile then hold columns of others.
#pragma once
#include "stream.cuh"

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
