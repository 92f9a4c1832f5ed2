/* SPDX-License-Identifier: MIT */
/* The core for double, at the level of neon.h. */
#include "../cpu.h"

#ifdef HEX_HAVE_NEON_LEVEL
#define HEX_REAL_IS_DOUBLE
#include "neon.h"

#include "../core.h"
#endif
