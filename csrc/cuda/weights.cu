// SPDX-License-Identifier: MIT
// The gradient of many features, first kernel: the weights of a band of rows against some columns,
// into memory, for the second kernel to multiply by the unit rows (product.cu). The formulas, and
// what is many, are in backward.cu. Every cosine and every exponential is computed once, at any
// number of features.
//
// A weight is fp16, or two where u is, times a power of two for its row and tile that takes the
// largest of them to 2^9. So the error of each is relative to the row's largest in the tile. A warp
// writes its 16 rows of a tile as the left operand of a product that a warp of the second kernel
// has in its registers: no exchange there, and no shared memory.
//
// The memory is for so many weights at a time, whatever the size of the batch. The host goes on
// with the columns until the rows' sums are complete.
#include "weights.cuh"

#define WARPS (WEIGHT_ROWS / 16)
// Of the weights in memory: 16 blocks of 128 x 64 for each processor of a Hopper, half as many
// where u is split; and what the second level of its caches holds.
static int64_t weight_bytes = 32 << 20;

template <bool SPLIT>
static __global__ void __launch_bounds__(32 * WARPS, 2)
    weigh_tiles(hex_problem_t p, hex_run r, hex_fit fit)
{
    HEX_SHARED_MEMORY(shared);
    const float *coefficients = (const float *)r.coefficients;
    const int lane = (int)threadIdx.x & 31;
    hex_block block;
    block.start(r.parts, WEIGHT_ROWS, blockIdx.x);
    hex_stream<WARPS, SPLIT, 0, false> stream;
    hex_places places;
    stream.start(r.unit, fit, shared, block.row0, block.tile0, block.tile1);
    stream.take_side(shared + fit.at.more, coefficients, SIDE_BYTES, SIDE_BYTES / K_ROWS * K_ALL);
    stream.fill();
    places.start(block.row0, p.B);
    weights w;
    w.start(p, coefficients, block, places.row);

    const int col0 = (int)block.part.col0, col1 = (int)block.part.col1;
    const int64_t place = place_of_weights(r, block);
    uint4 *to = r.weights.halves + place * WEIGHT_QUADS(SPLIT) + lane;
    float *scale = r.weights.scales + place * 16 + (lane >> 2);
    for (int tile = block.tile0; tile < block.tile1; tile++) {
        float acc[8][4], top[2];
        stream.cosines(acc);
        w.column = (const float *)stream.side_of_tile();
        w.tile(acc, places, places.enter(tile, col0, col1), top);
        if (stream.sides == 1)
            __syncthreads(); // all have read the columns' coefficients
        const float unit[2] = {weight_scale(top[0]), weight_scale(top[1])};
        uint32_t high[4][4], low[4][4];
        to_halves<SPLIT>(high, low, acc, unit);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            to[32 * k] = make_uint4(high[k][0], high[k][1], high[k][2], high[k][3]);
            if (SPLIT)
                to[32 * (4 + k)] = make_uint4(low[k][0], low[k][1], low[k][2], low[k][3]);
        }
        if ((lane & 3) == 0)
            scale[0] = unit[0], scale[8] = unit[1];
        to += WEIGHT_QUADS(SPLIT), scale += 16;
    }
}

static hex_fit fit_of_weights(const hex_run &r)
{
    return fit_of(r, WARPS, 0, false, 0, SIDE_BYTES);
}

int64_t hex_bytes_of_weights(const hex_run &r) { return WEIGHT_ROWS * BN * (r.unit.split ? 4 : 2); }

int64_t hex_most_weights(const hex_run &r) { return weight_bytes / hex_bytes_of_weights(r); }

int hex_weights_at_a_time(const hex_run &r)
{
    return (2 * fit_of_weights(r).at.bytes <= r.shared_limit ? 2 : 1) * r.processors;
}

const char *hex_weigh_tiles(const hex_problem_t &p, const hex_run &r)
{
    if (r.parts.blocks == 0)
        return NULL;
    const hex_fit fit = fit_of_weights(r);
    const auto kernel = r.unit.split ? weigh_tiles<true> : weigh_tiles<false>;
    if (allow_shared_memory(kernel, r, fit))
        HEX_LAUNCH(kernel, dim3((unsigned)r.parts.blocks), dim3(32 * WARPS), (int)fit.at.bytes,
                   r.stream, p, r, fit);
    return hex_launched("backward weights");
}

#ifdef HEX_EMULATION
extern "C" __attribute__((visibility("default"))) void hex_emu_weights(int64_t bytes)
{
    weight_bytes = bytes;
}
#endif
