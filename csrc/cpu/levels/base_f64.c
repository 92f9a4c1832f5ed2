/* SPDX-License-Identifier: MIT */
/* The core for double, at the level of base.h. */
#include "../cpu.h"

#define HEX_REAL_IS_DOUBLE
#include "base.h"

#include "../core.h"
