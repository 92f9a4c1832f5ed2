/* SPDX-License-Identifier: MIT */
/* The AVX2 + FMA level: 6 x 2 accumulators, two of b, one of a, of 16 registers. */
#include "cpu.h"

#ifdef HEX_HAVE_X86_LEVELS
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LEVEL avx2
#define MR 6
#define VEC_BYTES 32
#define MASK_BITS_F32(m) __builtin_ia32_movmskps256((float __attribute__((vector_size(32))))(m))
#define MASK_BITS_F64(m) __builtin_ia32_movmskpd256((double __attribute__((vector_size(32))))(m))
#include "isa.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int hex_no_avx2; /* ISO C wants something in every file */
#endif
