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
// Up to 128 features the second product reads the panels of the first, and a tile is loaded once.
// More features are cut in chunks of VALUES panels, each with CUDA blocks of its own, which compute
// the cosines again.
#include "row.cuh"
#include "tile.cuh"

#define SIDE_BYTES (K_ROWS * BN * (int)sizeof(float)) // of the coefficients of a tile's columns
// Tensor cores cut off what they add to a sum, so it drifts; after so many tiles it goes to memory.
// By 16,384 columns it has lost less than the weights have by their rounding to fp16.
#define MOST_TILES 256
#define VALUES 2 // panels of the gradient that a block has in its registers

// Coefficients of the two rows of a thread, at the common scale unless `apart`, and of the tile's
// columns in shared memory.
struct weights {
    float row[2][K_HARD + 1], scale, beta;
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
    }
};

// The power of two that takes `top` to [2^9, 2^10), at most 2^100.
DEVICE float weight_scale(float top)
{
    const int exponent = (int)(__float_as_uint(top) >> 23);
    const int power = 127 + 9 - (exponent - 127);
    return __uint_as_float((uint32_t)(power > 227 ? 227 : power < 1 ? 1 : power) << 23);
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

template <int WARPS, bool SPLIT, int PANELS, bool KEEP>
static __global__ void __launch_bounds__(32 * WARPS, 1)
    gather_tiles(hex_problem_t p, hex_run r, hex_fit fit)
{
    constexpr int ROWS = 16 * WARPS;
    constexpr bool HOLD = PANELS > 0;
    constexpr int OUT = HOLD ? PANELS : VALUES;
    HEX_SHARED_MEMORY(shared);
    const int t = (int)threadIdx.x & 3;
    const unsigned blocks = (unsigned)r.parts.blocks;
    const int panels = (int)(r.unit.width / PANEL), chunk = (int)(blockIdx.x / blocks);
    const int value0 = HOLD ? 0 : chunk * VALUES;
    const int values = HOLD || panels - value0 > OUT ? OUT : panels - value0;
    const float *coefficients = (const float *)r.coefficients;

    hex_block block;
    block.start(r.parts, ROWS, blockIdx.x % blocks);
    hex_stream<WARPS, SPLIT, PANELS, KEEP> stream;
    hex_places places;
    stream.start(r.unit, fit, shared, block.row0, block.tile0, block.tile1);
    stream.take_side(shared + fit.at.more, coefficients, SIDE_BYTES, SIDE_BYTES / K_ROWS * K_ALL);
    if (!HOLD)
        stream.take_values(values, value0);
    stream.fill();
    places.start(block.row0, p.B);

    const double tau = read_vector(p.tau, 0);
    weights w;
    w.scale = (float)(HEX_LOG2E / tau), w.beta = (float)p.beta;
    w.apart = !(tau >= 1. / 32 && (1 + p.beta) * HEX_LOG2E <= 80 * tau);
    for (int h = 0; h < 2; h++)
        for (int k = 0; k <= K_HARD; k++) {
            const int kind = k < K_REST || w.apart ? k : k + K_COMMON;
            w.row[h][k] = block.has(places.row[h]) ? coefficients[coefficient(kind, places.row[h])]
                          : k == K_EPS             ? INFINITY
                                                   : 0.f;
        }

    float out[OUT][8][4] = {}, unit[2] = {0x1p100f, 0x1p100f}; // out is du times unit
    const int col0 = (int)block.part.col0, col1 = (int)block.part.col1;
    int tile = block.tile0;
    do {
        const int end = block.tile1 - tile > MOST_TILES ? tile + MOST_TILES : block.tile1;
        for (; tile < end; tile++) {
            float acc[8][4], top[2];
            const int slot = stream.cosines(acc, stream.panels());
            w.column = (const float *)stream.side_of_tile();
            w.tile(acc, places, places.enter(tile, col0, col1), top);

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
                for (int v = 0; v < OUT; v++)
#pragma unroll
                    for (int n = 0; n < 8; n++)
#pragma unroll
                        for (int q = 0; q < 4; q++)
                            out[v][n][q] *= factor[q >> 1];

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
            wgmma_operand(high);
            if (SPLIT)
                wgmma_operand(low);
            // The same for all threads: then the tile is an edge for all warps.
            const bool others = tile * BN < col0 || (tile + 1) * BN > col1;
            if (HOLD) {
                if (others)
                    stream.clear_others(slot, places.from, places.valid);
                if (!SPLIT)
                    wgmma_begin(out);
#pragma unroll
                for (int v = 0; v < OUT; v++)
                    multiply_weights<SPLIT>(out[v], high, low, stream.b_panel(slot, v));
                if (!SPLIT)
                    wgmma_end(out);
                stream.done(slot);
            } else {
                // Else the next tile's would be sent for when all have left the last of its panels.
                if (stream.sides == 1 && values == 1)
                    __syncthreads(); // all have read the columns' coefficients
#pragma unroll
                for (int v = 0; v < OUT; v++)
                    if (v < values) {
                        const int now = stream.next();
                        if (others)
                            stream.clear_others(now, places.from, places.valid);
                        if (!SPLIT)
                            wgmma_begin(out[v]);
                        multiply_weights<SPLIT>(out[v], high, low, stream.b_panel(now));
                        if (!SPLIT)
                            wgmma_end(out[v]);
                        stream.done(now);
                    }
            }
        }
        // To the slice's sums in memory. What is to be known for it takes no registers above.
        hex_block mine;
        mine.start(r.parts, ROWS, anew(blockIdx.x % blocks));
        const bool more = tile - mine.tile0 > MOST_TILES;
        const float back[2] = {1 / unit[0], 1 / unit[1]}; // powers of two
        const int64_t first = mine.part.first_row - mine.part.row0 + mine.slice * r.parts.rows;
        float *to = (float *)r.partial + value0 * PANEL + 2 * t;
#pragma unroll
        for (int v = 0; v < OUT; v++)
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    if (v < values && mine.has(places.row[h])) {
                        float2 *at = (float2 *)(to + (first + places.row[h]) * r.unit.width +
                                                v * PANEL + 8 * n);
                        const float2 old = more ? *at : make_float2(0, 0);
                        *at = make_float2(old.x + out[v][n][2 * h] * back[h],
                                          old.y + out[v][n][2 * h + 1] * back[h]);
                        out[v][n][2 * h] = out[v][n][2 * h + 1] = 0;
                    }
    } while (tile < block.tile1);
}

template <int WARPS, bool SPLIT, int PANELS, bool KEEP>
static const char *launch(const hex_problem_t &p, const hex_run &r)
{
    const hex_fit fit = fit_of(r, WARPS, PANELS, KEEP, 0, SIDE_BYTES);
    const int64_t chunks = PANELS > 0 ? 1 : (r.unit.width / PANEL + VALUES - 1) / VALUES;
    const auto kernel = gather_tiles<WARPS, SPLIT, PANELS, KEEP>;
    if (allow_shared_memory(kernel, r, fit))
        HEX_LAUNCH(kernel, dim3((unsigned)(chunks * r.parts.blocks)), dim3(32 * WARPS),
                   (int)fit.at.bytes, r.stream, p, r, fit);
    return hex_launched("backward gather");
}

// The panels of a tile that are held for both products are PANELS, where shared memory suffices.
template <int PANELS> static const char *held(const hex_problem_t &p, const hex_run &r)
{
    if (r.block_rows == 192)
        return launch<12, false, PANELS, false>(p, r);
    if (!r.unit.split)
        return launch<8, false, PANELS, true>(p, r);
    return fit_of(r, 8, PANELS, false, 0, SIDE_BYTES).at.bytes <= r.shared_limit
               ? launch<8, true, PANELS, false>(p, r)
               : launch<8, true, 0, false>(p, r);
}

const char *hex_tile_gather(const hex_problem_t &p, const hex_run &r)
{
    if (r.parts.blocks == 0)
        return NULL;
    return r.unit.width == PANEL       ? held<1>(p, r)
           : r.unit.width == 2 * PANEL ? held<2>(p, r)
           : r.unit.split              ? launch<8, true, 0, false>(p, r)
                                       : launch<8, false, 0, false>(p, r);
}
