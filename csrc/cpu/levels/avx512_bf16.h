/* SPDX-License-Identifier: MIT */
/* The AVX-512 level with dot products of bfloat16 (Zen 4, Cooper Lake, Sapphire Rapids and later):
 * that of avx512.h, and dot_product.h for bfloat16 inputs. There is no unit for double, which has
 * no use for it and takes the level below.
 *
 * Only HEX_ISA chooses it, see dispatch.c. HEX_EMULATE_BF16 compiles it for AVX2, with the plain C
 * of dots.h in place of the instructions: slow, and the same bits, so that what is made of them can
 * be tested on most machines. */
#ifndef HEX_LEVEL
#define HEX_LEVEL avx512_bf16
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
#define LEVEL_TARGET "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#pragma GCC target("prefer-vector-width=512")
#endif
#include <immintrin.h> /* its functions have targets of their own for clang, that of here for gcc */
#define MASK_BITS_F32(m) __builtin_ia32_cvtd2mask512(m) /* as in avx512.h */
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

LEVEL_END
#endif
#endif
