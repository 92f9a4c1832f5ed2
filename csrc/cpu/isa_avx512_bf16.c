/* SPDX-License-Identifier: MIT */
/* The AVX-512 level with dot products of bfloat16 (Zen 4, Cooper Lake, Sapphire Rapids and later):
 * that of isa_avx512.c, and dot_tile.inc for bfloat16 inputs.
 *
 * Only HEX_ISA chooses it, see dispatch.c. HEX_EMULATE_BF16 compiles it for AVX2, with dots.h in
 * place of the instructions: slow, and the same bits, so that what is made of them can be tested on
 * most machines. */
#include "cpu.h"

#ifdef HEX_HAVE_BF16_LEVEL
#define LEVEL avx512_bf16
#define LEVEL_DOTS 1
#define FLOAT_ONLY
#define MR 12
#define VEC_BYTES 64

#ifdef HEX_EMULATE_BF16
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#else
#ifdef __clang__
#include <immintrin.h> /* before the attribute: its functions have their own */
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))),             \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#pragma GCC target("prefer-vector-width=512")
#include <immintrin.h>
#endif
#define MASK_BITS_F32(m) __builtin_ia32_cvtd2mask512(m)
#define DOT_INSTRUCTIONS
#include "dots.h"

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
#endif

#include "isa.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int hex_no_avx512_bf16; /* ISO C wants something in every file */
#endif
