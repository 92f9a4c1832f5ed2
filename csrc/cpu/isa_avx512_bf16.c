/* SPDX-License-Identifier: MIT */
/* The AVX-512 level with dot products of bfloat16 (Zen 4, Cooper Lake, Sapphire Rapids and later):
 * that of isa_avx512.c, and dots.inc for bfloat16 inputs.
 *
 * Only HEX_ISA chooses it, see dispatch.c. HEX_EMULATE_BF16 compiles it for AVX2 and with the
 * instructions in plain C: slow, and the same bits, so that what is made of them can be tested on
 * most machines. */
#include "cpu.h"

#ifdef HEX_HAVE_BF16_LEVEL
#define MR 12
#define VEC_BYTES 64
#ifdef HEX_EMULATE_BF16
#pragma GCC target("avx2,fma")
#pragma GCC diagnostic ignored "-Wpsabi" /* vectors as arguments, of inlined functions only */
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#pragma GCC target("prefer-vector-width=512")
#include <immintrin.h>
#define MASK_BITS_F32(m) __builtin_ia32_cvtd2mask512(m)
#endif

typedef float dot_sums __attribute__((vector_size(VEC_BYTES), aligned(4), may_alias));
typedef uint32_t dot_pairs __attribute__((vector_size(VEC_BYTES), aligned(4), may_alias));

#ifdef HEX_EMULATE_BF16

/* Of a pair the high half counts first; nothing is rounded but the two sums. */
INLINE dot_sums dot(dot_sums sum, dot_pairs x, dot_pairs y)
{
    for (int l = 0; l < 16; l++) {
        sum[l] = fmaf(hex_from_bits(x[l] & 0xffff0000u), hex_from_bits(y[l] & 0xffff0000u), sum[l]);
        sum[l] = fmaf(hex_from_bits(x[l] << 16), hex_from_bits(y[l] << 16), sum[l]);
    }
    return sum;
}

INLINE dot_pairs narrow(dot_sums x, dot_sums y)
{
    dot_pairs out;
    for (int l = 0; l < 16; l++) {
        const float low = l < 8 ? x[2 * l] : y[2 * l - 16];
        const float high = l < 8 ? x[2 * l + 1] : y[2 * l - 15];
        out[l] = hex_float_to_bf16(low) | (uint32_t)hex_float_to_bf16(high) << 16;
    }
    return out;
}

INLINE dot_pairs interleave(dot_pairs x)
{
    dot_pairs out;
    for (int l = 0; l < 16; l++) {
        const int shift = l % 2 * 16;
        out[l] = (x[l / 2] >> shift & 0xffffu) | x[8 + l / 2] >> shift << 16;
    }
    return out;
}

#else

/* sum += x . y of every pair. */
INLINE dot_sums dot(dot_sums sum, dot_pairs x, dot_pairs y)
{
    return (dot_sums)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}

/* The 32 numbers of x and y as bfloat16, to nearest, in their order. */
INLINE dot_pairs narrow(dot_sums x, dot_sums y)
{
    return (dot_pairs)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
}

/* The two halves of what narrow made as pairs: number l of x with number l of y. */
INLINE dot_pairs interleave(dot_pairs x)
{
    static const _Alignas(64)
        uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                              8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (dot_pairs)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)x);
}

#endif

#define LEVEL avx512_bf16
#define DOTS_F32
#define FLOAT_ONLY
#include "isa.inc"
#else
typedef int hex_no_avx512_bf16; /* ISO C wants something in every file */
#endif
