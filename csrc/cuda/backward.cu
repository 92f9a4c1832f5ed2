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
// Outside H both terms share an exponential: w = (rest_o + rest_t) 2^(c log2(e) / tau), with each
// row's coefficient put on the common scale. That stays in range down to tau = 1/32; below, and for
// members of H, each row's term is computed at its own scale.
//
// The second product takes w in fp16, split in two where u is. A power of two for each row keeps
// its largest weight near 2^9; it falls when a larger weight comes, and what was summed is
// rescaled. So the error is relative to the row, however small its gradient is beside the others'.
#include "tile.cuh"

#define WARPS 8
#define ROWS (16 * WARPS)
#define THREADS (32 * WARPS)
#define VALUES 2 // panels of the gradient that a block has in its registers

// Of rows past the end: in no H, repelled by nothing.
DEVICE float nothing(int coefficient) { return coefficient == K_EPS ? INFINITY : 0.f; }

// Coefficients of the two rows of a thread, and of the tile's columns in shared memory.
struct weights {
    float row[2][K_ROWS], scale, beta;
    bool apart;          // small tau: no common scale
    const float *column; // K_ROWS x BN

    __device__ __forceinline__ float exact(float c, int h, int col) const
    {
        const float *k = column + col;
        return row_entry(c, row[h][K_EPS], row[h][K_SHIFT], row[h][K_REST], row[h][K_HARD_E],
                         row[h][K_HARD], scale, beta) +
               row_entry(c, k[K_EPS * BN], k[K_SHIFT * BN], k[K_REST * BN], k[K_HARD_E * BN],
                         k[K_HARD * BN], scale, beta);
    }

    // acc becomes the tile's weights; top the largest of each row's.
    __device__ __forceinline__ void tile(float (&acc)[8][4], const hex_places &places, bool edge,
                                         float (&top)[2]) const
    {
        const int t = (int)threadIdx.x & 3, lane = (int)threadIdx.x & 31;
        float lowest = fminf(column[K_EPS * BN + lane], column[K_EPS * BN + lane + 32]);
        for (int k = 16; k > 0; k >>= 1)
            lowest = fminf(lowest, __shfl_xor_sync(~0u, lowest, k));
        float limit[2];
        for (int h = 0; h < 2; h++)
            limit[h] = apart ? -INFINITY : fminf(lowest, row[h][K_EPS]);
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float2 rest = *(const float2 *)(column + K_REST0 * BN + 8 * n + 2 * t);
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const int h = q >> 1;
                const float c = acc[n][q];
                acc[n][q] = (row[h][K_REST0] + (q & 1 ? rest.y : rest.x)) * ex2(c * scale);
                if (c > limit[h])
                    acc[n][q] = exact(c, h, 8 * n + 2 * t + (q & 1));
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
    }
};

// The power of two that takes `top` to [2^9, 2^10), at most 2^100.
DEVICE float weight_scale(float top)
{
    const int exponent = (int)(__float_as_uint(top) >> 23);
    const int power = 127 + 9 - (exponent - 127);
    return __uint_as_float((uint32_t)(power > 227 ? 227 : power < 1 ? 1 : power) << 23);
}

// out[16 rows][64 columns of the panel] += the weights times the tile's columns.
DEVICE void multiply_weights(float (*out)[4], const uint32_t (&high)[4][4], const uint16_t *b)
{
    const int lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < BN / 16; k++)
#pragma unroll
        for (int d = 0; d < PANEL / 16; d++) {
            uint32_t y[4];
            ldmatrix_transposed(y, b + swizzle(16 * k + (lane & 15), 2 * d + (lane >> 4)));
            mma_f16(out[2 * d], high[k], y[0], y[1]);
            mma_f16(out[2 * d + 1], high[k], y[2], y[3]);
        }
}

// The same by three products. A tile is summed by itself and then added, as in tile.cuh: tensor
// cores cut off where they add. 32 columns at a time, for that many registers are free.
DEVICE void multiply_split_weights(float (*out)[4], const uint32_t (&high)[4][4],
                                   const uint32_t (&low)[4][4], const uint16_t *b)
{
    const int lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float part[4][4] = {};
#pragma unroll
        for (int k = 0; k < BN / 16; k++)
#pragma unroll
            for (int d = 0; d < 2; d++) {
                uint32_t y[4];
                const int at = swizzle(16 * k + (lane & 15), 4 * half + 2 * d + (lane >> 4));
                ldmatrix_transposed(y, b + B_HALVES + at);
                mma_f16(part[2 * d], high[k], y[0], y[1]);
                mma_f16(part[2 * d + 1], high[k], y[2], y[3]);
                ldmatrix_transposed(y, b + at);
                mma_f16(part[2 * d], low[k], y[0], y[1]);
                mma_f16(part[2 * d + 1], low[k], y[2], y[3]);
                mma_f16(part[2 * d], high[k], y[0], y[1]);
                mma_f16(part[2 * d + 1], high[k], y[2], y[3]);
            }
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int q = 0; q < 4; q++)
                out[4 * half + n][q] += part[n][q];
    }
}

// The gradient's columns are cut in chunks of VALUES panels, each with CUDA blocks of its own,
// which compute the cosines again.
template <bool SPLIT>
static __global__ void __launch_bounds__(THREADS, 1)
    gather_tiles(hex_problem p, hex_run r, bool resident)
{
    HEX_SHARED_MEMORY(shared);
    const int t = (int)threadIdx.x & 3;
    const unsigned blocks = (unsigned)r.parts.blocks;
    const int panels = (int)(r.unit.width / PANEL), chunk = (int)(blockIdx.x / blocks);
    const int value0 = chunk * VALUES, values = panels - value0 < VALUES ? panels - value0 : VALUES;
    float *column = (float *)(shared + tile_bytes(WARPS, SPLIT, panels, resident));
    const float *coefficients = (const float *)r.coefficients;

    hex_block block;
    block.start(r.parts, ROWS, blockIdx.x % blocks);
    hex_stream<WARPS, SPLIT> stream;
    hex_places places;
    stream.start(r.unit, shared, block.row0, block.part.row1, block.col0, block.col1, resident,
                 values, value0);
    places.start(block.row0, p.B);

    const double tau = read_vector(p.tau, 0);
    weights w;
    w.scale = (float)(HEX_LOG2E / tau), w.beta = (float)p.beta, w.column = column;
    w.apart = !(tau >= 1. / 32);
    for (int h = 0; h < 2; h++)
        for (int k = 0; k < K_ROWS; k++)
            w.row[h][k] = places.row[h] < block.part.row1
                              ? coefficients[k * r.unit.count + places.row[h]]
                              : nothing(k);

    float out[8 * VALUES][4] = {}, unit[2] = {0x1p100f, 0x1p100f}; // out is du times unit
    int64_t col = block.col0;
    // A tile's coefficients travel with its first panel: all warps are then done with the last
    // ones.
    auto bring_coefficients = [&](int64_t from) {
        for (int k = (int)threadIdx.x; k < K_ROWS * BN; k += THREADS) {
            const int64_t j = from + k % BN;
            column[k] = j < block.col1 ? coefficients[k / BN * r.unit.count + j] : nothing(k / BN);
        }
    };
    if (stream.request(0))
        bring_coefficients(col);
    for (; col < block.col1; col += BN) {
        float acc[8][4] = {}, top[2];
#pragma unroll 1
        for (int panel = 0; panel < panels; panel++) {
            stream.advance();
            stream.add_cosines(acc, panel);
        }
        w.tile(acc, places, places.enter(col, block.col1), top);

        bool larger = false;
        float factor[2];
        for (int h = 0; h < 2; h++) {
            for (int k = 1; k < 4 /* lanes of a row */; k <<= 1)
                top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], k));
            const float wanted = weight_scale(top[h]);
            factor[h] = 1;
            if (wanted < unit[h]) {
                factor[h] = wanted / unit[h];
                unit[h] = wanted;
                larger = true;
            }
        }
        if (__any_sync(~0u, larger))
#pragma unroll
            for (int n = 0; n < 8 * VALUES; n++)
#pragma unroll
                for (int q = 0; q < 4; q++)
                    out[n][q] *= factor[q >> 1];

        // Two neighbouring 8-column pieces of the accumulator are a left operand.
        uint32_t high[4][4], low[4][4];
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
#pragma unroll
        for (int v = 0; v < VALUES; v++)
            if (v < values) {
                if (stream.advance())
                    bring_coefficients(col + BN);
                const uint16_t *b = stream.b_panel(stream.slot);
                if (SPLIT)
                    multiply_split_weights(out + 8 * v, high, low, b);
                else
                    multiply_weights(out + 8 * v, high, b);
            }
    }

    float *partial = (float *)r.partial;
    const int64_t first = block.part.first_row;
#pragma unroll
    for (int v = 0; v < VALUES; v++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int64_t o = places.row[h] - block.part.row0;
                if (v < values && places.row[h] < block.part.row1)
                    *(float2 *)(partial + (block.slice * r.parts.rows + first + o) * r.unit.width +
                                (value0 + v) * PANEL + 8 * n + 2 * t) =
                        make_float2(out[8 * v + n][2 * h] / unit[h],
                                    out[8 * v + n][2 * h + 1] / unit[h]);
            }
}

template <bool SPLIT> static const char *launch(const hex_problem &p, const hex_run &r)
{
    const int64_t panels = r.unit.width / PANEL, more = K_ROWS * BN * (int64_t)sizeof(float);
    const bool resident = tile_bytes(WARPS, SPLIT, panels, true) + more <= r.shared_limit;
    const int bytes = (int)(tile_bytes(WARPS, SPLIT, panels, resident) + more);
    const int64_t blocks = (panels + VALUES - 1) / VALUES * r.parts.blocks;
    const auto kernel = gather_tiles<SPLIT>;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
        cudaSuccess)
        HEX_LAUNCH(kernel, dim3((unsigned)blocks), dim3(THREADS), bytes, r.stream, p, r, resident);
    return hex_launched("backward gather");
}

const char *hex_tile_gather(const hex_problem &p, const hex_run &r)
{
    if (r.parts.blocks == 0)
        return NULL;
    return r.unit.low ? launch<true>(p, r) : launch<false>(p, r);
}
