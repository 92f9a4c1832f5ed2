// SPDX-License-Identifier: MIT
// The gradient of many features, second kernel: the weights that are in memory (weights.cu) times
// the unit rows of their columns. A block has 128 rows and a chunk of up to VALUES panels of
// features, whose sums stay in registers over all of its columns; the chunks of a slice follow one
// another by `blocks`.
//
// A warp has the weights of the next tile on their way from memory to registers while it multiplies
// those of this one; the unit rows come through the stream of panels. A row's sums have one power
// of two, as in backward.cu: it falls to that of a tile that has a lower one, and a tile that has a
// higher one is multiplied by the quotient, which rounds what is small beside the row's largest
// weights so far, and no more than there.
#include "weights.cuh"

#define WARPS (WEIGHT_ROWS / 16)
#define VALUES(split) ((split) ? 2 : 4) // registers for more are not there

// What a thread has of a tile's weights: of its rows, the powers of two and the fragments.
template <bool SPLIT> struct tile_weights {
    float unit[2];
    uint4 part[SPLIT ? 8 : 4];

    __device__ __forceinline__ void load(const uint4 *halves, const float *scales)
    {
        unit[0] = scales[0], unit[1] = scales[8];
#pragma unroll
        for (int k = 0; k < (SPLIT ? 8 : 4); k++)
            part[k] = halves[32 * k];
    }
    // At the rows' power of two, which is no higher than the tile's.
    __device__ __forceinline__ void operands(uint32_t (&high)[4][4], uint32_t (&low)[4][4],
                                             const float (&at)[2]) const
    {
        uint32_t by[2];
        for (int h = 0; h < 2; h++)
            by[h] = pack_f16(at[h] / unit[h], at[h] / unit[h]);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint4 x = part[k], y = SPLIT ? part[SPLIT ? 4 + k : 0] : make_uint4(0, 0, 0, 0);
            high[k][0] = multiply_f16(x.x, by[0]), high[k][1] = multiply_f16(x.y, by[1]);
            high[k][2] = multiply_f16(x.z, by[0]), high[k][3] = multiply_f16(x.w, by[1]);
            low[k][0] = multiply_f16(y.x, by[0]), low[k][1] = multiply_f16(y.y, by[1]);
            low[k][2] = multiply_f16(y.z, by[0]), low[k][3] = multiply_f16(y.w, by[1]);
        }
    }
};

template <bool SPLIT>
static __global__ void __launch_bounds__(32 * WARPS, 1)
    multiply_tiles(hex_run r, int chunks, hex_fit fit)
{
    HEX_SHARED_MEMORY(shared);
    const int lane = (int)threadIdx.x & 31, panels = (int)(r.unit.width / PANEL);
    const unsigned blocks = (unsigned)r.parts.blocks;
    const int chunk = (int)(blockIdx.x / blocks);
    const int panel0 = chunk * panels / chunks, values = (chunk + 1) * panels / chunks - panel0;
    hex_block block;
    block.start(r.parts, WEIGHT_ROWS, blockIdx.x % blocks);
    hex_stream<WARPS, SPLIT, 0, false> stream;
    stream.start(r.unit, fit, shared, block.row0, block.tile0, block.tile1);
    stream.take_columns(r.unit.first + panel0, values);
    stream.fill();

    int rows[2];
    for (int h = 0; h < 2; h++)
        rows[h] = (int)block.row0 + ((int)threadIdx.x >> 5) * 16 + (lane >> 2) + 8 * h;
    const int64_t place = place_of_weights(r, block);
    const uint4 *halves = r.weights.halves + place * WEIGHT_QUADS(SPLIT) + lane;
    const float *scales = r.weights.scales + place * 16 + (lane >> 2);
    tile_weights<SPLIT> next = {};
    if (block.tile0 < block.tile1)
        next.load(halves, scales);

    float out[VALUES(SPLIT)][8][4] = {}, unit[2] = {0x1p100f, 0x1p100f}; // out is du times unit
    const int col0 = (int)block.part.col0, col1 = (int)block.part.col1;
    int tile = block.tile0;
    do {
        const int end = block.tile1 - tile > MOST_TILES ? tile + MOST_TILES : block.tile1;
        for (; tile < end; tile++) {
            uint32_t high[4][4], low[4][4];
            lower_unit(unit, out, next.unit);
            next.operands(high, low, unit);
            halves += WEIGHT_QUADS(SPLIT), scales += 16;
            if (tile + 1 < block.tile1)
                next.load(halves, scales);
            wgmma_operand(high);
            if (SPLIT)
                wgmma_operand(low);
            const int from = col0 - tile * BN, to = col1 - tile * BN;
#pragma unroll
            for (int v = 0; v < VALUES(SPLIT); v++)
                if (v < values) {
                    const int now = stream.next();
                    if (from > 0 || to < BN)
                        stream.clear_others(now, from, to);
                    if (!SPLIT)
                        wgmma_begin(out[v]);
                    multiply_weights<SPLIT>(out[v], high, low, stream.b_panel(now));
                    if (!SPLIT)
                        wgmma_end(out[v]);
                    stream.done(now);
                }
        }
        const bool more = r.weights.more || tile - block.tile0 > MOST_TILES;
        add_to_memory(r, block, rows, panel0, values, more, out, unit);
    } while (tile < block.tile1);
}

int64_t hex_product_chunks(const hex_run &r)
{
    const int64_t chunk = VALUES(r.unit.split) * PANEL;
    return (r.unit.width + chunk - 1) / chunk;
}

const char *hex_multiply_tiles(const hex_run &r)
{
    if (r.parts.blocks == 0)
        return NULL;
    const int chunks = (int)hex_product_chunks(r), slots = r.hopper ? 8 : 2;
    const hex_fit fit = {true, slots, layout_of(WARPS, r.unit.split, true, false, 0, 1, slots, 0)};
    const auto kernel = r.unit.split ? multiply_tiles<true> : multiply_tiles<false>;
    if (allow_shared_memory(kernel, r, fit))
        HEX_LAUNCH(kernel, dim3((unsigned)(chunks * r.parts.blocks)), dim3(32 * WARPS),
                   (int)fit.at.bytes, r.stream, r, chunks, fit);
    return hex_launched("backward product");
}
