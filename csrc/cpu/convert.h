/* SPDX-License-Identifier: MIT */
/* bfloat16 and IEEE half as storage types: bits <-> float on uint16_t, in plain C that vectorises
 * on every ISA (gcc 12 has no __bf16 in C, and needs library calls for _Float16 at the x86-64
 * baseline). */
#ifndef HEX_CONVERT_H
#define HEX_CONVERT_H

#include <stdint.h>
#include <string.h>

static inline float hex_from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t hex_to_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float hex_bf16_to_float(uint16_t h) { return hex_from_bits((uint32_t)h << 16); }

/* Round to nearest even; a NaN stays a NaN (quiet, payload dropped). */
static inline uint16_t hex_float_to_bf16(float x)
{
    const uint32_t b = hex_to_bits(x);
    return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u
                                           : (uint16_t)((b + 0x7fffu + (b >> 16 & 1u)) >> 16);
}

/* The exponent's bias is 112 more, of Inf and NaN twice that. A subnormal's digits are taken for
 * those behind 2^-14, which is then subtracted: no operand is a subnormal float, which would cost
 * 150 cycles. */
static inline float hex_f16_to_float(uint16_t h)
{
    const uint32_t a = (uint32_t)(h & 0x7fffu) << 13;
    const uint32_t tiny = hex_to_bits(hex_from_bits(a + 0x38800000u) - 0x1p-14f);
    const uint32_t other = a + (a >= 0x0f800000u ? 0x70000000u : 0x38000000u);
    return hex_from_bits((a < 0x00800000u ? tiny : other) | (uint32_t)(h & 0x8000u) << 16);
}

/* Round to nearest even, to subnormals and to Inf as IEEE does. Below 2^-14 the float adder does
 * the rounding: 0.5f has the ulp 2^-24 of a half subnormal. */
static inline uint16_t hex_float_to_f16(float x)
{
    const uint32_t b = hex_to_bits(x), a = b & 0x7fffffffu;
    const uint16_t sign = (uint16_t)(b >> 16 & 0x8000u);
    if (a > 0x7f800000u)
        return sign | 0x7e00u;
    if (a >= 0x477ff000u) /* 65520 rounds to Inf */
        return sign | 0x7c00u;
    if (a < 0x38800000u)
        return sign | (uint16_t)(hex_to_bits(hex_from_bits(a) + 0.5f) - 0x3f000000u);
    return sign | (uint16_t)((a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13);
}

#endif
