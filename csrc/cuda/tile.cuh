// SPDX-License-Identifier: MIT
// Tiles of cosines on the tensor cores: 16 rows for each warp of a block against 64 columns.
//
// Unit rows stand in memory as fp16, in panels of 64 features. In shared memory a panel's row is
// 128 bytes whose eight 16-byte chunks are exchanged by c ^ (row & 7): ldmatrix meets no bank
// twice, and it is the 128-byte swizzle that wgmma reads. A tile is computed panel by panel; while
// one is multiplied the next is on its way, so there are two slots and one barrier for each panel.
// The rows' own panels stay where there is room for all of them (`resident`), else they travel
// again.
//
// SPLIT: u = high + low, each fp16, and c = high high + high low + low high, as exact as float32.
// Otherwise high alone, whose rows have length one, so that fp16's range does not matter.
#pragma once
#include "core.cuh"

#define BN 64
#define PANEL 64
#define B_HALVES (BN * PANEL)

SHARED_DEVICE int swizzle(int row, int chunk) { return row * PANEL + (((chunk ^ row) & 7) << 3); }

// Bytes of shared memory for the panels of `warps` * 16 rows.
static inline __host__ __device__ int64_t tile_bytes(int warps, bool split, int64_t panels,
                                                     bool resident)
{
    const int64_t a_slots = resident ? panels : 2;
    return (split ? 2 : 1) * 2 * (a_slots * warps * 16 * PANEL + 2 * B_HALVES);
}

// Rows [first, first + ROWS) of a panel, those from `end` on as zeros.
template <int ROWS, int THREADS>
DEVICE void load_panel(uint16_t *to, const uint16_t *u, int64_t width, int64_t first, int64_t end,
                       int64_t panel)
{
#pragma unroll
    for (int i = (int)threadIdx.x; i < ROWS * 8; i += THREADS) {
        const int r = i >> 3, c = i & 7;
        if (first + r < end)
            copy_async(to + swizzle(r, c), u + (first + r) * width + panel * PANEL + c * 8);
        else
            *(uint4 *)(to + swizzle(r, c)) = make_uint4(0, 0, 0, 0);
    }
}

// acc += 16 rows of a (per warp) times the 64 rows of b.
DEVICE void multiply_panel(float (&acc)[8][4], const uint16_t *a, const uint16_t *b)
{
    const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
#ifdef HEX_WGMMA
    (void)lane;
    const uint64_t pa = wgmma_panel(a + (warp >> 2) * 64 * PANEL), pb = wgmma_panel(b);
    wgmma_begin(acc);
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++) // 16 halves are two units of 16 bytes
        wgmma_f16(acc, pa + 2 * k, pb + 2 * k);
    wgmma_end(acc);
#else
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

// The panels of a block's tiles, in the order of their use: for each tile the `panels` of its
// cosines, then `values` more of the columns alone, from panel `value0` on.
template <int WARPS, bool SPLIT> struct hex_stream {
    static constexpr int ROWS = 16 * WARPS, THREADS = 32 * WARPS;
    uint16_t *a, *b;
    const uint16_t *high, *low;
    int64_t width, row0, row_end, col_end;
    int panels, values, value0;
    bool resident;
    int slot, next_panel; // of the panel in use; the next one's place in its tile
    int64_t next_col, first_col;

    __device__ __forceinline__ uint16_t *a_panel(int panel, int in_slot) const
    {
        return a + (resident ? panel : in_slot) * (SPLIT ? 2 : 1) * ROWS * PANEL;
    }
    __device__ __forceinline__ uint16_t *b_panel(int in_slot) const
    {
        return b + in_slot * (SPLIT ? 2 : 1) * B_HALVES;
    }

    // Sends for the next panel, into the given slot. True if it is the first of a tile.
    __device__ __forceinline__ bool request(int into)
    {
        if (next_col >= col_end)
            return false;
        const bool cosines = next_panel < panels, first = next_panel == 0;
        const int64_t panel = cosines ? next_panel : value0 + next_panel - panels;
        uint16_t *to = b_panel(into);
        load_panel<BN, THREADS>(to, high, width, next_col, col_end, panel);
        if (SPLIT)
            load_panel<BN, THREADS>(to + B_HALVES, low, width, next_col, col_end, panel);
        if (cosines && !(resident && next_col != first_col)) {
            to = a_panel((int)panel, into);
            load_panel<ROWS, THREADS>(to, high, width, row0, row_end, panel);
            if (SPLIT)
                load_panel<ROWS, THREADS>(to + ROWS * PANEL, low, width, row0, row_end, panel);
        }
        if (++next_panel == panels + values) {
            next_panel = 0;
            next_col += BN;
        }
        return first;
    }

    __device__ __forceinline__ void start(const hex_unit &u, unsigned char *shared,
                                          int64_t rows_from, int64_t rows_to, int64_t cols_from,
                                          int64_t cols_to, bool stays, int value_panels,
                                          int value_from)
    {
        high = u.high, low = u.low, width = u.width;
        panels = (int)(u.width / PANEL), values = value_panels, value0 = value_from;
        resident = stays;
        a = (uint16_t *)shared;
        b = a + (SPLIT ? 2 : 1) * (resident ? panels : 2) * ROWS * PANEL;
        row0 = rows_from, row_end = rows_to, col_end = cols_to;
        next_col = first_col = cols_from;
        next_panel = 0, slot = 1;
    }

    // Waits for the panel sent for last and sends for the one after it. The barrier also says that
    // all warps are done with the slot that is filled now.
    __device__ __forceinline__ bool advance()
    {
        copy_wait();
        fence_async();
        __syncthreads();
        slot ^= 1;
        return request(slot ^ 1);
    }

    __device__ __forceinline__ void add_cosines(float (&acc)[8][4], int panel) const
    {
        const uint16_t *x = a_panel(panel, slot), *y = b_panel(slot);
        if (!SPLIT) {
            multiply_panel(acc, x, y);
            return;
        }
        // Tensor cores cut off where they add, always towards 0, so that a long sum would not be as
        // exact as float32: a panel is summed by itself, the small products first, and then added.
        float part[8][4] = {};
#pragma unroll 1
        for (int term = 2; term >= 0; term--)
            multiply_panel(part, x + (term == 2 ? ROWS * PANEL : 0),
                           y + (term == 1 ? B_HALVES : 0));
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                acc[n][q] += part[n][q];
    }
};

// ---- which elements of a tile are no negatives ----

// The thread's two rows, 8 apart, and where in a tile they and their partners stand (-1: not in
// it).
struct hex_places {
    int64_t row[2], partner[2];
    int own[2], positive[2], valid;

    __device__ __forceinline__ void start(int64_t row0, int64_t B)
    {
        const int lane = (int)threadIdx.x & 31;
        for (int h = 0; h < 2; h++) {
            row[h] = row0 + ((int)threadIdx.x >> 5) * 16 + (lane >> 2) + 8 * h;
            partner[h] = row[h] < 2 * B ? partner_of(row[h], B) : -1; // the queue has none
        }
    }
    // Whether the warp's part of the tile holds any such element, or ends before the 64th column.
    __device__ __forceinline__ bool enter(int64_t col, int64_t col_end)
    {
        bool edge = col_end - col < BN;
        valid = edge ? (int)(col_end - col) : BN;
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
        return col == own[h] || col == positive[h] || col >= valid;
    }
};

// ---- every tile of a block, handed to `fold` ----

// The rows and columns of this block.
struct hex_block {
    hex_part part;
    int64_t row_block, slice, row0, col0, col1; // row0 and the columns as unit rows
    int64_t ticket;

    __device__ __forceinline__ void start(const hex_parts &parts, int rows, int64_t number)
    {
        const int k = part_of_block(parts, number);
        part = parts.part[k];
        const int64_t b = number - part.first_block;
        row_block = (unsigned)b % (unsigned)part.row_blocks; // a grid has less than 2^31 blocks
        slice = (unsigned)b / (unsigned)part.row_blocks;
        row0 = part.row0 + row_block * rows;
        col0 = part.col0 + slice * part.tiles * BN;
        const int64_t end = col0 + part.tiles * BN;
        col1 = end < part.col1 ? end : part.col1;
        ticket = row_block;
        for (int i = 0; i < k; i++)
            ticket += parts.part[i].row_blocks;
    }
};

template <int WARPS, bool SPLIT, class Fold>
DEVICE void for_each_tile(const hex_block &block, const hex_unit &unit, int64_t B, bool resident,
                          unsigned char *shared, Fold &fold)
{
    hex_stream<WARPS, SPLIT> stream;
    hex_places places;
    stream.start(unit, shared, block.row0, block.part.row1, block.col0, block.col1, resident, 0, 0);
    places.start(block.row0, B);
    stream.request(0);
    for (int64_t col = block.col0; col < block.col1; col += BN) {
        float acc[8][4] = {};
#pragma unroll 1
        for (int panel = 0; panel < stream.panels; panel++) {
            stream.advance();
            stream.add_cosines(acc, panel);
        }
        if (places.enter(col, block.col1))
            fold.template tile<true>(acc, places);
        else
            fold.template tile<false>(acc, places);
    }
    __syncthreads(); // the shared memory is free again
}
