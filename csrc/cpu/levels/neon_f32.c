/* SPDX-License-Identifier: MIT */
/* The core for float, at the level of neon.h. */
#include "../cpu.h"

#ifdef HEX_HAVE_NEON_LEVEL
#include "neon.h"

#include "../core.h"
#endif
