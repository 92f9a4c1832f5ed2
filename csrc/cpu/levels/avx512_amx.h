/* SPDX-License-Identifier: MIT */
/* The AVX-512 level with products of tiles of bfloat16: see avx512_bf16.h. */
#ifndef LEVEL_HAS_TILES
#define LEVEL_HAS_TILES

#include "avx512_bf16.h"
#endif
