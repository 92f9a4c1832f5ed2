/* SPDX-License-Identifier: MIT */
/* The core for double, at the level of avx512.h. */
#include "../cpu.h"

#ifdef HEX_HAVE_X86_LEVELS
#define HEX_REAL_IS_DOUBLE
#include "avx512.h"

#include "../core.h"
#endif
