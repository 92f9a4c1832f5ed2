/* SPDX-License-Identifier: MIT */
/* The core for float, at the level avx512_amx of avx512_bf16.h. */
#include "../cpu.h"

#ifdef HEX_HAVE_AMX_LEVEL
#define LEVEL_HAS_TILES
#include "avx512_bf16.h"

#include "../core.h"
#endif
