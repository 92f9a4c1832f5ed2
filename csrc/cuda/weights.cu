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
// The memory is for so many weights at a time, whatever the size of the batch. The host goes on with
// the columns until the rows' sums are complete.
//
// Where a problem has labels, a mask, groups or a guide, this is the way at any number of features.
#include <type_traits>

#include "marks.cuh"
#include "weights.cuh"

#define WARPS (WEIGHT_ROWS / 16)
// Of the weights in memory: 16 blocks of 128 x 64 for each processor of a Hopper, half as many
// where u is split; and what the second level of its caches holds.
static int64_t weight_bytes = 32 << 20;

// Weights by marks, each row's term at its own scale.
struct marked_weights {
    hex_row_coefficients<float> row[2];
    float scale, beta;
    const float *coefficients;

    __device__ __forceinline__ void start(const hex_problem_t &p, const hex_run &r,
                                          const hex_block &block, const int (&rows)[2])
    {
        scale = (float)(HEX_LOG2E / read_vector(p.tau, 0)), beta = (float)p.beta;
        coefficients = (const float *)r.coefficients;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            row[h] = {INFINITY, 0, 0, 0, 0, 0, 0, 0, 0};
            if (block.has(rows[h]))
                row[h].read(coefficients + coefficient(0, rows[h]), BN);
        }
    }
    // Those of a tile's columns.
    __device__ __forceinline__ const float *column(int tile) const
    {
        return coefficients + coefficient(0, (int64_t)tile * BN);
    }

    __device__ __forceinline__ float term(const hex_row_coefficients<float> &k, float c,
                                          uint32_t bit, const hex_marks &marks) const
    {
        return (marks.positive | marks.negative) & bit
                   ? k.entry(c, marks.positive & bit, marks.hard & bit, scale, beta)
                   : 0.f;
    }

    // acc becomes the tile's weights; top the largest of each row's. The marks are of the rows as
    // anchors, and of the columns.
    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_marks &of_rows,
                                         const hex_marks &of_columns, int tile_of,
                                         float (&top)[2]) const
    {
        const float *at = column(tile_of);
        top[0] = top[1] = 0;
        for_each_bit([&](uint32_t bit, int n, int q, int col) {
            hex_row_coefficients<float> other;
            other.read(at + col, BN);
            const int h = q >> 1;
            acc[n][q] =
                term(row[h], acc[n][q], bit, of_rows) + term(other, acc[n][q], bit, of_columns);
            top[h] = fmaxf(top[h], fabsf(acc[n][q]));
        });
        largest_of_rows(top);
    }
};

template <bool SPLIT, bool SETS>
static __global__ void __launch_bounds__(32 * WARPS, SETS &&SPLIT ? 1 : 2)
    weigh_tiles(hex_problem_t p, hex_run r, hex_fit fit)
{
    HEX_SHARED_MEMORY(shared);
    const float *coefficients = (const float *)r.coefficients;
    const int lane = (int)threadIdx.x & 31;
    hex_block block;
    block.start(r.parts, WEIGHT_ROWS, blockIdx.x);
    hex_stream<WARPS, SPLIT, 0, false> stream;
    hex_marker marker;
    hex_places &places = marker.places;
    stream.start(r.unit, fit, shared, block.row0, block.tile0, block.tile1);
    if (!SETS)
        stream.take_side(shared + fit.at.more, coefficients, SIDE_BYTES,
                         SIDE_BYTES / K_ROWS * K_ALL);
    stream.fill();
    std::conditional_t<SETS, marked_weights, weights> w;
    if constexpr (SETS) {
        marker.start(p, r, block.row0);
        w.start(p, r, block, places.row);
    } else {
        places.start(block.row0, p.B);
        w.start(p, coefficients, block, places.row);
    }

    const int col0 = (int)block.part.col0, col1 = (int)block.part.col1;
    const int64_t place = place_of_weights(r, block);
    uint4 *to = r.weights.halves + place * WEIGHT_QUADS(SPLIT) + lane;
    float *scale = r.weights.scales + place * 16 + (lane >> 2);
    for (int tile = block.tile0; tile < block.tile1; tile++) {
        float acc[8][4], top[2];
        if constexpr (SETS) {
            hex_marks of_columns, of_rows = marker.enter(tile, col0, col1, &of_columns);
            const float *eps = w.column(tile) + K_EPS * BN;
            const auto row_eps = [&](int h, int) { return w.row[h].eps; };
            const auto column_eps = [&](int, int col) { return eps[col]; };
            const bool guided = r.unit.first > 0;
            if (guided) {
                stream.cosines(acc, r.unit.first);
                of_rows.hard = bits_above(acc, row_eps),
                of_columns.hard = bits_above(acc, column_eps);
            }
            stream.cosines(acc, r.unit.panels - r.unit.first);
            if (!guided && !r.groups)
                of_rows.hard = bits_above(acc, row_eps),
                of_columns.hard = bits_above(acc, column_eps);
            w.tile(acc, of_rows, of_columns, tile, top);
        } else {
            stream.cosines(acc);
            w.column = (const float *)stream.side_of_tile();
            w.tile(acc, places, places.enter(tile, col0, col1), top);
            if (stream.sides == 1)
                __syncthreads(); // all have read the columns' coefficients
        }
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

int hex_weights_at_a_time(const hex_problem_t &p, const hex_run &r)
{
    const bool fit = 2 * fit_of_weights(r).at.bytes <= r.shared_limit;
    return (fit && !(has_sets(p) && r.unit.split) ? 2 : 1) * r.processors; // registers for more
}

const char *hex_weigh_tiles(const hex_problem_t &p, const hex_run &r)
{
    if (r.parts.blocks == 0)
        return NULL;
    const hex_fit fit = fit_of_weights(r);
    const auto kernel = has_sets(p)
                            ? r.unit.split ? weigh_tiles<true, true> : weigh_tiles<false, true>
                        : r.unit.split ? weigh_tiles<true, false>
                                       : weigh_tiles<false, false>;
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
