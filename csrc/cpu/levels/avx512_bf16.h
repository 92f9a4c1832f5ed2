/* SPDX-License-Identifier: MIT */
/* The AVX-512 levels with products of bfloat16: that of avx512.h, and dot_product.h for bfloat16
 * inputs.
 *
 *     avx512_bf16   dot products of vectors of pairs (Zen 4, Cooper Lake, Sapphire Rapids and later)
 *     avx512_amx    where LEVEL_HAS_TILES, products of tiles besides (Sapphire Rapids and later)
 *
 * There is no unit for double, which has no use for it and takes the level below. HEX_EMULATE_BF16
 * compiles both for AVX2, with the plain C of dots.h in place of the instructions: slow, and the
 * same bits, so that what is made of them can be tested on most machines. */
#ifndef HEX_LEVEL
#ifdef LEVEL_HAS_TILES
#define HEX_LEVEL avx512_amx
#define TILE_TARGET "amx-tile,amx-bf16,"
#else
#define HEX_LEVEL avx512_bf16
#define TILE_TARGET ""
#endif
#define MR 12
#define VEC_BYTES 64
#define LEVEL_HAS_DOTS

#include "../cpu.h"

#ifdef HEX_EMULATE_BF16
#ifdef __clang__
#define LEVEL_TARGET "avx2,fma"
#else
#pragma GCC target("avx2,fma")
#endif
#else
#ifdef __clang__
#define LEVEL_TARGET TILE_TARGET "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#pragma GCC target("prefer-vector-width=512")
#ifdef LEVEL_HAS_TILES
#pragma GCC target("amx-tile,amx-bf16")
#endif
#endif
#include "avx512_vectors.h"
#define DOT_INSTRUCTIONS
#include "../dots.h"

LEVEL_BEGIN

INLINE dot_sums dot(dot_sums sum, dot_pairs x, dot_pairs y)
{
    return (dot_sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}

INLINE dot_pairs narrow(dot_sums x, dot_sums y)
{
    return (dot_pairs)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x); /* the second is the low half */
}

INLINE dot_pairs interleave(dot_pairs x)
{
    static const _Alignas(64)
        uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (dot_pairs)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)x);
}

#ifdef LEVEL_HAS_TILES
#define TILE_PAIRS 16

/* Tile registers: 0 and 1 of c and 2 of a, MR rows each; 3 and 4 of b. */
INLINE void begin_tiles(void)
{
    static const _Alignas(64) struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } layout = {1, 0, {0}, {64, 64, 64, 64, 64}, {MR, MR, MR, TILE_PAIRS, TILE_PAIRS}};
    _tile_loadconfig(&layout);
}

INLINE void end_tiles(void) { _tile_release(); }

/* As in dots.h. */
static void tile_dots(int64_t depth, const uint32_t *a, int64_t lda, const uint32_t *b, int64_t ldb,
                      float *c, int64_t ldc, bool add)
{
    const int64_t size = sizeof(uint32_t);
    __asm__ volatile("" ::: "memory"); /* gcc does not know what the loads read */
    if (add) {
        _tile_loadd(0, c, ldc * size);
        _tile_loadd(1, c + 16, ldc * size);
    } else {
        _tile_zero(0);
        _tile_zero(1);
    }
    for (int64_t k = 0; k < depth; k += TILE_PAIRS) {
        _tile_loadd(2, a + k, lda * size);
        _tile_loadd(3, b + k * ldb, ldb * size);
        _tile_loadd(4, b + k * ldb + 16, ldb * size);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
    }
    _tile_stored(0, c, ldc * size);
    _tile_stored(1, c + 16, ldc * size);
    __asm__ volatile("" ::: "memory");
}
#endif

LEVEL_END
#endif
#endif
