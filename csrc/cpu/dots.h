/* SPDX-License-Identifier: MIT */
/* Pairs of bfloat16 and what is done with a vector of them or, where LEVEL_HAS_TILES, with whole
 * tiles, in plain C. A level that has instructions for it defines DOT_INSTRUCTIONS and its own. A
 * pair is one uint32_t, the first in the low half. */
#ifndef HEX_DOTS_H
#define HEX_DOTS_H

#include "cpu.h"
#ifndef HEX_LEVEL
#include "levels/base.h"
#endif

typedef float dot_sums __attribute__((vector_size(VEC_BYTES), aligned(4), may_alias));
typedef uint32_t dot_pairs __attribute__((vector_size(VEC_BYTES), aligned(4), may_alias));

#ifndef DOT_INSTRUCTIONS

enum { DOT_LANES = VEC_BYTES / 4 };

/* sum + x . y of each pair, of which the second counts first; rounded after each. */
INLINE dot_sums dot(dot_sums sum, dot_pairs x, dot_pairs y)
{
    for (int l = 0; l < DOT_LANES; l++) {
        sum[l] = fmaf(hex_from_bits(x[l] & 0xffff0000u), hex_from_bits(y[l] & 0xffff0000u), sum[l]);
        sum[l] = fmaf(hex_from_bits(x[l] << 16), hex_from_bits(y[l] << 16), sum[l]);
    }
    return sum;
}

/* All numbers of x, then those of y, as bfloat16, to nearest. */
INLINE dot_pairs narrow(dot_sums x, dot_sums y)
{
    dot_pairs out;
    for (int l = 0; l < DOT_LANES; l++) {
        const int at = 2 * l % DOT_LANES;
        const dot_sums *from = 2 * l < DOT_LANES ? &x : &y;
        out[l] = hex_float_to_bf16((*from)[at]) | (uint32_t)hex_float_to_bf16((*from)[at + 1])
                                                      << 16;
    }
    return out;
}

/* Of what narrow made: number l of its x and number l of its y as a pair. */
INLINE dot_pairs interleave(dot_pairs x)
{
    dot_pairs out;
    for (int l = 0; l < DOT_LANES; l++) {
        const int shift = l % 2 * 16;
        out[l] = (x[l / 2] >> shift & 0xffffu) | x[DOT_LANES / 2 + l / 2] >> shift << 16;
    }
    return out;
}

#ifdef LEVEL_HAS_TILES
#define TILE_PAIRS 16 /* the depth of a tile */

INLINE void begin_tiles(void) {}
INLINE void end_tiles(void) {}

/* c[i * ldc + j] (+)= a[i * lda + k] . b[k * ldb + j] for i in [0, MR), j in [0, 32), k in [0, depth),
 * a multiple of TILE_PAIRS: of each tile the sum of the first of all pairs and that of the second,
 * then both, rounded after each. */
static void tile_dots(int64_t depth, const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb,
                      float *c, int64_t ldc, bool add)
{
    for (int64_t i = 0; i < MR; i++)
        for (int64_t j = 0; j < 2 * DOT_LANES; j++) {
            float sum = add ? c[i * ldc + j] : 0;
            for (int64_t from = 0; from < depth; from += TILE_PAIRS) {
                float first = 0, second = 0;
                for (int64_t k = from; k < from + TILE_PAIRS; k++) {
                    const uint32_t x = a[i * lda + k], y = b[k * ldb + j];
                    first = fmaf(hex_from_bits(x << 16), hex_from_bits(y << 16), first);
                    second = fmaf(hex_from_bits(x & 0xffff0000u), hex_from_bits(y & 0xffff0000u),
                                  second);
                }
                sum += first + second;
            }
            c[i * ldc + j] = sum;
        }
}
#endif

#endif
#endif
