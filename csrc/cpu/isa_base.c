/* SPDX-License-Identifier: MIT */
/* The portable level: whatever the compiler's default target has (SSE2 on x86-64, NEON on aarch64).
 */
#define LEVEL base
#define MR 4
#define VEC_BYTES 16
#include "isa.inc"
