/* SPDX-License-Identifier: MIT */
/* The AVX-512 level (Skylake-X and later): 12 x 2 accumulators, two of b, one of a, of 32
 * registers. */
#ifndef HEX_LEVEL
#define HEX_LEVEL avx512
#define MR 12
#define VEC_BYTES 64

#ifdef __clang__ /* knows prefer-vector-width for the command line only */
#define LEVEL_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#include "avx512_vectors.h"
#endif
