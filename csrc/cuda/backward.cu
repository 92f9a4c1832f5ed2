// SPDX-License-Identifier: MIT
// The gradient, gathered by the owner of each row, so that nothing is added by two blocks: with
// g_ij = dL_i / dc_ij, and 0 where i is no anchor,
//
//     du_o = sum_t w_ot u_t,   w_ot = g_ot + g_to      over the rows t that o meets but its partner
//     dz_o = (du_o + w_op u_p - (..., u_o) u_o) / |z_o|
//
// as attention's forward pass does it: the weights of a tile become, in registers, the left operand
// of a second product, whose right one is the tile's columns again. Two products a tile; no
// atomics.
//
// For tau >= 1/32 all of it is taken from one exponential E = 2^(c log2(e) / tau), with each row's
// coefficients put on that common scale: (rest_o + rest_t) E where both rows have t and o in G. So
// exponentials stay in range down to tau = 1/32 (with beta: E^(1 + beta) up to 2^80); beyond, each
// row's term is computed at its own scale.
//
// The second product takes w in fp16, split in two where u is. A power of two for each row keeps
// its largest weight near 2^9; it falls when a larger weight comes, and what was summed is
// rescaled. So the error is relative to the row, however small its gradient is beside the others'.
//
// Here the second product reads the panels of the first, and a tile is loaded once. A block has the
// gradient of its rows in registers, which is room for 256 features, or for 128 where u is split.
// For more the weights of a band of rows go to memory (weights.cu), and the second product is a
// kernel of its own (product.cu).
#include "weights.cuh"

template <int WARPS, bool SPLIT, int PANELS, bool KEEP>
static __global__ void __launch_bounds__(32 * WARPS, 1)
    gather_tiles(hex_problem_t p, hex_run r, hex_fit fit)
{
    constexpr int ROWS = 16 * WARPS;
    HEX_SHARED_MEMORY(shared);
    const float *coefficients = (const float *)r.coefficients;

    hex_block block;
    block.start(r.parts, ROWS, blockIdx.x);
    hex_stream<WARPS, SPLIT, PANELS, KEEP> stream;
    hex_places places;
    stream.start(r.unit, fit, shared, block.row0, block.tile0, block.tile1);
    stream.take_side(shared + fit.at.more, coefficients, SIDE_BYTES, SIDE_BYTES / K_ROWS * K_ALL);
    stream.fill();
    places.start(block.row0, p.B);
    weights w;
    w.start(p, coefficients, block, places.row);

    float out[PANELS][8][4] = {}, unit[2] = {0x1p100f, 0x1p100f}; // out is du times unit
    const int col0 = (int)block.part.col0, col1 = (int)block.part.col1;
    int tile = block.tile0;
    do {
        const int end = block.tile1 - tile > MOST_TILES ? tile + MOST_TILES : block.tile1;
        for (; tile < end; tile++) {
            float acc[8][4], top[2];
            const int slot = stream.cosines(acc);
            w.column = (const float *)stream.side_of_tile();
            w.tile(acc, places, places.enter(tile, col0, col1), top);
            const float wanted[2] = {weight_scale(top[0]), weight_scale(top[1])};
            lower_unit(unit, out, wanted);

            uint32_t high[4][4], low[4][4];
            to_halves<SPLIT>(high, low, acc, unit);
            wgmma_operand(high);
            if (SPLIT)
                wgmma_operand(low);
            // The same for all threads: then the tile is an edge for all warps.
            if (tile * BN < col0 || (tile + 1) * BN > col1)
                stream.clear_others(slot, places.from, places.valid);
            if (!SPLIT)
                wgmma_begin(out);
#pragma unroll
            for (int v = 0; v < PANELS; v++)
                multiply_weights<SPLIT>(out[v], high, low, stream.b_panel(slot, v));
            if (!SPLIT)
                wgmma_end(out);
            stream.done(slot);
        }
        // What is to be known for this takes no registers above.
        hex_block mine;
        mine.start(r.parts, ROWS, anew(blockIdx.x));
        add_to_memory(r, mine, places.row, 0, PANELS, tile - mine.tile0 > MOST_TILES, out, unit);
    } while (tile < block.tile1);
}

template <int WARPS, bool SPLIT, int PANELS, bool KEEP>
static const char *launch(const hex_problem_t &p, const hex_run &r)
{
    const hex_fit fit = fit_of(r, WARPS, PANELS, KEEP, 0, SIDE_BYTES);
    const auto kernel = gather_tiles<WARPS, SPLIT, PANELS, KEEP>;
    if (allow_shared_memory(kernel, r, fit))
        HEX_LAUNCH(kernel, dim3((unsigned)r.parts.blocks), dim3(32 * WARPS), (int)fit.at.bytes,
                   r.stream, p, r, fit);
    return hex_launched("backward gather");
}

template <int PANELS> static const char *few(const hex_problem_t &p, const hex_run &r)
{
    return r.block_rows == 192 ? launch<12, false, PANELS, false>(p, r)
           : r.unit.split      ? launch<8, true, PANELS, false>(p, r)
                               : launch<8, false, PANELS, true>(p, r);
}

bool hex_holds_tiles(const hex_run &r)
{
    const int panels = (int)(r.unit.width / PANEL);
    return panels <= (r.unit.split ? 2 : 4) && // so many of the gradient a block has in registers
           fit_of(r, 8, panels, false, 0, SIDE_BYTES).at.bytes <= r.shared_limit;
}

const char *hex_tile_gather(const hex_problem_t &p, const hex_run &r)
{
    if (r.parts.blocks == 0)
        return NULL;
    switch (r.unit.width / PANEL) {
    case 1:
        return few<1>(p, r);
    case 2:
        return few<2>(p, r);
    case 3:
        return launch<8, false, 3, false>(p, r);
    default:
        return launch<8, false, 4, false>(p, r);
    }
}
