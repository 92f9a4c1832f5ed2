// SPDX-License-Identifier: MIT
// The weights of a tile from its cosines, and what is done with weights: for the gather, which
// multiplies them where they are (backward.cu), and for more features, where they go through memory
// (weights.cu, product.cu). The formulas are in backward.cu.
#pragma once
#include "row.cuh"
#include "tile.cuh"

#define SIDE_BYTES (K_ROWS * BN * (int)sizeof(float)) // of the coefficients of a tile's columns
// Tensor cores cut off what they add to a sum, so it drifts; after so many tiles it goes to memory.
// By 16,384 columns it has lost less than the weights have by their rounding to fp16.
#define MOST_TILES 256

// Over the four lanes of a row.
DEVICE void largest_of_rows(float (&top)[2])
{
    for (int h = 0; h < 2; h++)
        for (int k = 1; k < 4; k <<= 1)
            top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], k));
}

// Coefficients of the two rows of a thread, at the common scale unless `apart`, and of the tile's
// columns in shared memory.
struct weights {
    float row[2][K_HARD + 1], scale, beta;
    bool apart;          // small tau: no common scale
    const float *column; // K_ROWS x BN

    __device__ __forceinline__ void start(const hex_problem_t &p, const float *coefficients,
                                          const hex_block &block, const int (&rows)[2])
    {
        const double tau = read_vector(p.tau, 0);
        scale = (float)(HEX_LOG2E / tau), beta = (float)p.beta;
        apart = !(tau >= 1. / 32 && (1 + p.beta) * HEX_LOG2E <= 80 * tau);
        for (int h = 0; h < 2; h++)
            for (int k = 0; k <= K_HARD; k++) {
                const int kind = k < K_REST || apart ? k : k + K_COMMON;
                row[h][k] = block.has(rows[h]) ? coefficients[coefficient(kind, rows[h])]
                            : k == K_EPS       ? INFINITY
                                               : 0.f;
            }
    }

    __device__ __forceinline__ float exact(float c, int h, int col) const
    {
        const float *k = column + col;
        return row_entry(c, row[h][K_EPS], row[h][K_SHIFT], row[h][K_REST], row[h][K_HARD_E],
                         row[h][K_HARD], scale, beta) +
               row_entry(c, k[K_EPS * BN], k[K_SHIFT * BN], k[K_REST * BN], k[K_HARD_E * BN],
                         k[K_HARD * BN], scale, beta);
    }

    // The same at the common scale, where c is in H for one of the two rows at least.
    __device__ __forceinline__ float hard(float c, float e, int h, int col) const
    {
        const float *k = column + col;
        const float b = beta == 1 ? e : ex2(beta * c * scale);
        const float x =
            c > row[h][K_EPS] ? b * fmaf(row[h][K_HARD_E], e, -row[h][K_HARD]) : row[h][K_REST] * e;
        const float y = c > k[K_EPS * BN] ? b * fmaf(k[K_HARD_E0 * BN], e, -k[K_HARD0 * BN])
                                          : k[K_REST0 * BN] * e;
        return x + y;
    }

    // acc becomes the tile's weights; top the largest of each row's.
    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_places &places, bool edge,
                                         float (&top)[2]) const
    {
        const int t = (int)threadIdx.x & 3, lane = (int)threadIdx.x & 31;
        if (apart) {
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    acc[n][q] = exact(acc[n][q], q >> 1, 8 * n + 2 * t + (q & 1));
        } else {
            float lowest = fminf(column[K_EPS * BN + lane], column[K_EPS * BN + lane + 32]);
            for (int k = 16; k > 0; k >>= 1)
                lowest = fminf(lowest, __shfl_xor_sync(~0u, lowest, k));
            const float limit[2] = {fminf(lowest, row[0][K_EPS]), fminf(lowest, row[1][K_EPS])};
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const float2 rest = *(const float2 *)(column + K_REST0 * BN + 8 * n + 2 * t);
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    const int h = q >> 1;
                    const float c = acc[n][q], e = ex2(c * scale);
                    acc[n][q] = (row[h][K_REST] + (q & 1 ? rest.y : rest.x)) * e;
                    if (c > limit[h])
                        acc[n][q] = hard(c, e, h, 8 * n + 2 * t + (q & 1));
                }
            }
        }
        if (edge)
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    if (places.leaves_out(q >> 1, 8 * n + 2 * t + (q & 1)))
                        acc[n][q] = 0;
        top[0] = top[1] = 0;
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                top[q >> 1] = fmaxf(top[q >> 1], fabsf(acc[n][q]));
        largest_of_rows(top);
    }
};

// The power of two that takes `top` to [2^9, 2^10), at most 2^100.
DEVICE float weight_scale(float top)
{
    const int exponent = (int)(__float_as_uint(top) >> 23);
    const int power = 127 + 9 - (exponent - 127);
    return __uint_as_float((uint32_t)(power > 227 ? 227 : power < 1 ? 1 : power) << 23);
}

// The weights times each row's power of two, as the left operand of products: two neighbouring
// 8-column pieces of the accumulator. Low: what their rounding to fp16 has left.
template <bool SPLIT>
DEVICE void to_halves(uint32_t (&high)[4][4], uint32_t (&low)[4][4], const float (&acc)[8][4],
                      const float (&unit)[2])
{
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const float *x = acc[2 * k + (q >> 1)] + 2 * (q & 1);
            const float x0 = x[0] * unit[q & 1], x1 = x[1] * unit[q & 1];
            high[k][q] = pack_f16(x0, x1);
            low[k][q] = SPLIT ? pack_f16(x0 - f16_to_float((uint16_t)high[k][q]),
                                         x1 - f16_to_float((uint16_t)(high[k][q] >> 16)))
                              : 0;
        }
}

// Lowers the rows' power of two to what a tile wants, where that is less, and takes what has been
// summed along.
template <int OUT>
DEVICE void lower_unit(float (&unit)[2], float (&out)[OUT][8][4], const float (&wanted)[2])
{
    bool larger = false;
    float factor[2];
    for (int h = 0; h < 2; h++) {
        factor[h] = 1;
        if (wanted[h] < unit[h]) {
            factor[h] = wanted[h] / unit[h];
            unit[h] = wanted[h];
            larger = true;
        }
    }
    if (__any_sync(~0u, larger))
#pragma unroll
        for (int v = 0; v < OUT; v++)
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    out[v][n][q] *= factor[q >> 1];
}

// out[16 rows a warp][64 features of the panel] += the weights times the tile's columns.
template <bool SPLIT>
DEVICE void multiply_weights(float (&out)[8][4], const uint32_t (&high)[4][4],
                             const uint32_t (&low)[4][4], const uint16_t *b)
{
    if (!SPLIT) {
        multiply_transposed(out, high, b);
        return;
    }
    // A tile by itself, the small products first: tensor cores cut off what they add.
    float part[8][4] = {};
    wgmma_begin(part);
    multiply_transposed(part, low, b);
    multiply_transposed(part, high, b + HALVES);
    multiply_transposed(part, high, b);
    wgmma_end(part);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int q = 0; q < 4; q++)
            out[n][q] += part[n][q];
}

// What has been summed of `panels` panels from `panel0` on goes to the slice's sums in memory, and
// is 0 then; more: it is added to what is there.
template <int OUT>
DEVICE void add_to_memory(const hex_run &r, const hex_block &mine, const int (&rows)[2], int panel0,
                          int panels, bool more, float (&out)[OUT][8][4], const float (&unit)[2])
{
    const float back[2] = {1 / unit[0], 1 / unit[1]}; // powers of two
    const int64_t first = mine.part.first_row - mine.part.row0 + mine.slice * r.parts.rows;
    float *to = (float *)r.partial + panel0 * PANEL + 2 * ((int)threadIdx.x & 3);
#pragma unroll
    for (int v = 0; v < OUT; v++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (v < panels && mine.has(rows[h])) {
                    float2 *at =
                        (float2 *)(to + (first + rows[h]) * r.unit.width + v * PANEL + 8 * n);
                    const float2 old = more ? *at : make_float2(0, 0);
                    *at = make_float2(old.x + out[v][n][2 * h] * back[h],
                                      old.y + out[v][n][2 * h + 1] * back[h]);
                }
                out[v][n][2 * h] = out[v][n][2 * h + 1] = 0;
            }
}

#define WEIGHT_ROWS 128                              // of a block of weights.cu and product.cu
#define WEIGHT_QUADS(split) (32 * ((split) ? 8 : 4)) // uint4 of 16 rows and a tile, 4 or 8 a lane

// Which of those in memory is of the warp's 16 rows and the block's first tile. The next tile's
// follows it.
DEVICE int64_t place_of_weights(const hex_run &r, const hex_block &block)
{
    const int64_t rows = block.ticket * (WEIGHT_ROWS / 16) + ((int)threadIdx.x >> 5);
    return rows * r.weights.tiles + (block.tile0 - block.part.col0 / BN);
}
