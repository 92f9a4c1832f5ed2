/* SPDX-License-Identifier: MIT */
/* The portable level: whatever the compiler's default target has (SSE2 on x86-64, NEON on aarch64).
 * A level says how wide a vector is and how large a register tile: MR x 2 vectors of accumulators,
 * two of b and one of a have to fit the registers. */
#ifndef HEX_LEVEL
#define HEX_LEVEL base
#define MR 4
#define VEC_BYTES 16
#endif
