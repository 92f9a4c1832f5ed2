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

#define LEVEL_HAS_MASK_BITS
#define MASK_BITS_F32(m) __builtin_ia32_movmskps256((float __attribute__((vector_size(32))))(m))
#define MASK_BITS_F64(m) __builtin_ia32_movmskpd256((double __attribute__((vector_size(32))))(m))
#define LEVEL_HAS_LARGER
#define LARGER_F32(x, y) __builtin_ia32_maxps256(x, y)
#define LARGER_F64(x, y) __builtin_ia32_maxpd256(x, y)
#define SMALLER_F32(x, y) __builtin_ia32_minps256(x, y)
#define SMALLER_F64(x, y) __builtin_ia32_minpd256(x, y)
#endif
