/* SPDX-License-Identifier: MIT */
/* The core for float, at the level of avx512_bf16.h. */
#include "../cpu.h"

#ifdef HEX_HAVE_BF16_LEVEL
#include "avx512_bf16.h"

#include "../core.h"
#endif
