// SPDX-License-Identifier: MIT
// How the emulated tensor cores add: c plus sixteen products of fp16 numbers, which are exact.
//
// Hardware does not round as IEEE does. NVIDIA does not say what it does; measured on Hopper, by
// others, it aligns the seventeen terms to the largest exponent among them, keeps two bits more
// than float32 has, cuts off the rest, adds, and cuts the sum off to float32. So every addition
// errs towards 0, and the errors of a long sum add up instead of cancelling. `extra` is the number
// of bits more; negative: the sum is rounded as IEEE has it, term by term.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace emu
{
inline int extra = -1;

inline float add_rounded(float c, const float *x, const float *y)
{
    float sum = 0;
    for (int k = 0; k < 16; k++)
        sum += x[k] * y[k];
    return c + sum;
}

inline float add_truncated(float c, const float *x, const float *y)
{
    double term[17], largest = fabs((double)c);
    term[16] = c;
    bool finite = fabs((double)c) < INFINITY; // a NaN is not
    for (int k = 0; k < 16; k++) {
        term[k] = (double)x[k] * (double)y[k];
        if (fabs(term[k]) > largest)
            largest = fabs(term[k]);
        finite = finite && fabs(term[k]) < INFINITY;
    }
    if (!finite || largest == 0) { // nothing to align
        for (int k = 0; k < 16; k++)
            term[16] += term[k];
        return (float)term[16];
    }
    int exponent;
    frexp(largest, &exponent); // largest < 2^exponent
    const double scale = ldexp(1, 24 + extra - exponent);
    int64_t sum = 0; // in units of the last bit that is kept
    for (double t : term)
        sum += (int64_t)(t * scale);
    const double exact = (double)sum / scale;
    uint64_t bits;
    memcpy(&bits, &exact, sizeof bits);
    bits &= ~(uint64_t)0 << 29; // the 24 bits of a float
    double cut;
    memcpy(&cut, &bits, sizeof cut);
    return (float)cut;
}

inline float add(float c, const float *x, const float *y)
{
    return extra < 0 ? add_rounded(c, x, y) : add_truncated(c, x, y);
}
} // namespace emu
