/* SPDX-License-Identifier: MIT */
/* The arithmetic that every result here is computed with: IEEE 754's own, numbers below the
 * smallest normal one among them, whatever the thread is set to. torch.set_flush_denormal sets the
 * calling thread alone, and a batch of which some threads flush would depend on how its rows are
 * shared out.
 */
#ifndef HEX_IEEE_H
#define HEX_IEEE_H

#ifdef __SSE2__
#include <xmmintrin.h>

typedef unsigned hex_arithmetic_t; /* of a thread */

static inline hex_arithmetic_t hex_ieee_begin(void)
{
    const hex_arithmetic_t before = _mm_getcsr();
    _mm_setcsr(0x1f80); /* as a program starts */
    return before;
}

static inline void hex_ieee_end(hex_arithmetic_t before) { _mm_setcsr(before); }

#else
#include <fenv.h>

typedef fenv_t hex_arithmetic_t;

static inline hex_arithmetic_t hex_ieee_begin(void)
{
    hex_arithmetic_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    return before;
}

static inline void hex_ieee_end(hex_arithmetic_t before) { fesetenv(&before); }
#endif

#endif
