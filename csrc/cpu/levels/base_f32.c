/* SPDX-License-Identifier: MIT */
/* The core for float, at the level of base.h. */
#include "../cpu.h"

#include "base.h"

#include "../core.h"
