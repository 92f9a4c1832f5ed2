/* SPDX-License-Identifier: MIT */
/* The AVX2 + FMA level: 6 x 2 accumulators, two of b, one of a, of 16 registers. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define LEVEL avx2
#define MR 6
#define VEC_BYTES 32
#define MASK_BITS_F32(m) __builtin_ia32_movmskps256((float __attribute__((vector_size(32))))(m))
#define MASK_BITS_F64(m) __builtin_ia32_movmskpd256((double __attribute__((vector_size(32))))(m))
#include "isa.inc"
#else
typedef int hex_no_avx2; /* ISO C wants something in every file */
#endif
