/* SPDX-License-Identifier: MIT */
/* The NEON level, of every aarch64: 12 x 2 accumulators, two of b, one of a, of 32 registers. That is
 * what it has more than base.h, which compiles to the same instructions with 4 x 2. */
#ifndef HEX_LEVEL
#define HEX_LEVEL neon
#define MR 12
#define VEC_BYTES 16

#include <arm_neon.h>

/* Or gcc 12 loads all of a before it multiplies, and some accumulators have to wait in memory. It
 * does so on no x86, and clang never does. */
#ifndef __clang__
#pragma GCC optimize("no-schedule-insns")
#endif

#define LEVEL_HAS_MASK_BITS /* of each lane its own, added up */
#define MASK_BITS_F32(m) vaddvq_u32((uint32x4_t)(m) & (uint32x4_t){1, 2, 4, 8})
#define MASK_BITS_F64(m) vaddvq_u64((uint64x2_t)(m) & (uint64x2_t){1, 2})
#endif
