/* SPDX-License-Identifier: MIT */
/* The core for float, at the level of avx512.h. */
#include "../cpu.h"

#ifdef HEX_HAVE_X86_LEVELS
#include "avx512.h"

#include "../core.h"
#endif
