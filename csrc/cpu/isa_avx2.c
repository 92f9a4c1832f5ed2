/* SPDX-License-Identifier: MIT */
/* The AVX2 + FMA level: 6 x 2 accumulators, two of b, one of a, of 16 registers. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define LEVEL avx2
#define MR 6
#define VEC_BYTES 32
#include "isa.inc"
#else
typedef int hex_no_avx2; /* ISO C wants something in every file */
#endif
