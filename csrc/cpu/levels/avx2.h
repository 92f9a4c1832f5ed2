/* SPDX-License-Identifier: MIT */
/* The AVX2 + FMA level: 6 x 2 accumulators, two of b, one of a, of 16 registers. */
#ifndef HEX_LEVEL
#define HEX_LEVEL avx2
#define MR 6
#define VEC_BYTES 32

#ifdef __clang__
#define LEVEL_TARGET "avx2,fma"
#else
#pragma GCC target("avx2,fma")
#endif

/* The bits of a comparison of two vectors, by an instruction. */
#define MASK_BITS_F32(m) __builtin_ia32_movmskps256((float __attribute__((vector_size(32))))(m))
#define MASK_BITS_F64(m) __builtin_ia32_movmskpd256((double __attribute__((vector_size(32))))(m))
#endif
