/* SPDX-License-Identifier: MIT */
/* The core for float, at the level of avx512_amx.h. */
#include "../cpu.h"

#ifdef HEX_HAVE_AMX_LEVEL
#include "avx512_amx.h"

#include "../core.h"
#endif
