/* SPDX-License-Identifier: MIT */
/* The core for float, at the level of avx2.h. */
#include "../cpu.h"

#ifdef HEX_HAVE_X86_LEVELS
#include "avx2.h"

#include "../core.h"
#endif
