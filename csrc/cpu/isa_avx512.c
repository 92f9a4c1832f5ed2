/* SPDX-License-Identifier: MIT */
/* The AVX-512 level (Skylake-X and later): 12 x 2 accumulators, two of b, one of a, of 32
 * registers. */
#include "cpu.h"

#ifdef HEX_HAVE_X86_LEVELS
#ifdef __clang__ /* knows prefer-vector-width for the command line only */
#pragma clang attribute push(                                                                      \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define LEVEL avx512
#define MR 12
#define VEC_BYTES 64
#define MASK_BITS_F32(m) __builtin_ia32_cvtd2mask512(m)
#define MASK_BITS_F64(m) __builtin_ia32_cvtq2mask512(m)
#include "isa.inc"
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
typedef int hex_no_avx512; /* ISO C wants something in every file */
#endif
