/* SPDX-License-Identifier: MIT */
/* The type that one unit of the core computes in, and what there is of it: the number `real`, its
 * vectors, and 2^x. Each file of levels/ is such a unit: an instruction set and a type. Read by
 * itself, as an editor reads it, this is float at the portable level. */
#ifndef HEX_REAL_H
#define HEX_REAL_H

#include "cpu.h"
#ifndef HEX_LEVEL
#include "levels/base.h"
#endif

/* real; word, the unsigned integer of its size; DOTS, whether bfloat16 rows are multiplied as they
 * are (dot_product.h); EXP2_*, the numbers of exp2_of below. Where the level has instructions for
 * them, OF_TYPE names the one of this type: MASK_BITS, the bits of a comparison; LARGER(x, y), which
 * is x > y ? x : y, and SMALLER; PACK, the lanes of a vector that bits name, one after the other. */
#ifdef HEX_REAL_IS_DOUBLE
#define OF_TYPE(name) name##_F64
typedef double real;
typedef uint64_t word;
#define DOTS 0
#define EXP2_LOWEST (-500.0)
#define EXP2_ROUND (0x1.8p52 + 1023)
#define EXP2_MANTISSA 52
#define EXP2_LAST 0x1.e9d3fe3952179p-32
#define EXP2_HORNER(y, t)                                                                          \
    y = y * t + 0x1.e6063f7217bc6p-28, y = y * t + 0x1.b524fae627834p-24,                          \
    y = y * t + 0x1.62bfd47773353p-20;                                                             \
    y = y * t + 0x1.ffcbfc670dcd4p-17, y = y * t + 0x1.430913096fd9fp-13,                          \
    y = y * t + 0x1.5d87fe78a5276p-10;                                                             \
    y = y * t + 0x1.3b2ab6fba1ddap-7, y = y * t + 0x1.c6b08d704a0c2p-5,                            \
    y = y * t + 0x1.ebfbdff82c598p-3;                                                              \
    y = y * t + 0x1.62e42fefa39efp-1;
#else
#define OF_TYPE(name) name##_F32
typedef float real;
typedef uint32_t word;
#ifdef LEVEL_HAS_DOTS
#define DOTS 1
#else
#define DOTS 0
#endif
#define EXP2_LOWEST (-60.0f)
#define EXP2_ROUND (0x1.8p23f + 127)
#define EXP2_MANTISSA 23
#define EXP2_LAST 0x1.441388p-13f
#define EXP2_HORNER(y, t)                                                                          \
    y = y * t + 0x1.5f0890p-10f, y = y * t + 0x1.3b2a54p-7f, y = y * t + 0x1.c6af6cp-5f;           \
    y = y * t + 0x1.ebfbe0p-3f, y = y * t + 0x1.62e430p-1f;
#endif

#define LANES (VEC_BYTES / (int)sizeof(real)) /* numbers of a vector */
#define NR (2 * LANES)                        /* columns of a register tile; MR rows: levels/ */

/* For a number c: c > eps exactly when c > round_down(eps). */
static inline real round_down(double eps)
{
    const double limit = within_reach(eps);
#ifdef HEX_REAL_IS_DOUBLE
    return limit;
#else
    const float near = (float)limit;
    return (double)near > limit ? nextafterf(near, -INFINITY) : near;
#endif
}

/* From row to row an odd number of cache lines, so that a column of a matrix, read row after row by
 * a product, falls into all sets of the first-level cache. With D = 128 and no padding it falls
 * into one in eight, and is loaded again for every register tile. */
static int64_t stride_of(int64_t width)
{
    const int64_t line = 64 / (int64_t)sizeof(real), lines = (width + line - 1) / line;
    return (lines | 1) * line;
}

/* ---- vectors ---- */

typedef real vec_t __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real)), may_alias));
typedef word words_t __attribute__((vector_size(VEC_BYTES)));
typedef __typeof__((vec_t){0} < (vec_t){0}) mask_t;

INLINE vec_t where(mask_t m, vec_t x) { return (vec_t)((mask_t)x & m); }

INLINE vec_t pick(mask_t m, vec_t x, vec_t y)
{
    return (vec_t)(((mask_t)x & m) | ((mask_t)y & ~m));
}

/* x > y ? x : y and x < y ? x : y, so y where either is NaN. */
INLINE vec_t larger(vec_t x, vec_t y)
{
#ifdef LEVEL_HAS_LARGER
    return (vec_t)OF_TYPE(LARGER)(x, y);
#else
    return pick(x > y, x, y);
#endif
}

INLINE vec_t smaller(vec_t x, vec_t y)
{
#ifdef LEVEL_HAS_LARGER
    return (vec_t)OF_TYPE(SMALLER)(x, y);
#else
    return pick(x < y, x, y);
#endif
}

/* x[0..n), and `rest` where that is no whole vector. */
INLINE vec_t read_vec(const real *x, int64_t n, real rest)
{
    if (n >= LANES)
        return *(const vec_t *)x;
    vec_t v = rest - (vec_t){0};
    memcpy(&v, x, (size_t)n * sizeof(real));
    return v;
}

/* The first n lanes, or all. */
INLINE mask_t lanes_below(int64_t n)
{
    vec_t place;
    for (int l = 0; l < LANES; l++)
        place[l] = (real)l;
    return n >= LANES ? place == place : place < (real)n;
}

/* Those of a, or of b as a second half, that the places name. */
INLINE vec_t shuffle(vec_t a, vec_t b, words_t places)
{
#ifdef __clang__ /* which makes one instruction of this */
    vec_t x;
    for (int l = 0; l < LANES; l++)
        x[l] = places[l] < LANES ? a[places[l] % LANES] : b[places[l] % LANES];
    return x;
#else
    return __builtin_shuffle(a, b, places);
#endif
}

/* Of every two lanes that are LANES >> (step + 1) apart, combine(x, y) in both; x is v, and y v with
 * the two changed. With steps 0 to 3 every lane has the result of all. */
#define BY_HALVES(v, combine)                                                                      \
    _Pragma("GCC unroll 4") for (int step = 0; step < 4; step++)                                   \
    {                                                                                              \
        const int half = LANES >> (step + 1);                                                      \
        words_t other = {0};                                                                       \
        for (int l = 0; l < LANES; l++)                                                            \
            other[l] = (word)(l ^ half);                                                           \
        const vec_t x = v, y = shuffle(v, v, other);                                               \
        if (half)                                                                                  \
            v = combine;                                                                           \
    }

/* By halves: the sum, and the largest and the least of lanes of which none is NaN. */
INLINE real vec_sum(vec_t v)
{
    BY_HALVES(v, x + y)
    return v[0];
}

INLINE real vec_largest(vec_t v)
{
    BY_HALVES(v, larger(x, y))
    return v[0];
}

INLINE real vec_least(vec_t v)
{
    BY_HALVES(v, smaller(x, y))
    return v[0];
}

/* LANES vectors, whose lanes become the vectors. */
INLINE void transpose(vec_t *v)
{
#pragma GCC unroll 4
    for (int step = 0; step < 4; step++) {
        const int half = LANES >> (step + 1); /* of a square block, whose corners change places */
        words_t left = {0}, right = {0};
        for (int l = 0; l < LANES; l++) {
            left[l] = (word)(l & half ? LANES + l - half : l);
            right[l] = (word)(l & half ? LANES + l : l + half);
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & half || !half)
                continue;
            const vec_t a = v[i], b = v[i + half];
            v[i] = shuffle(a, b, left);
            v[i + half] = shuffle(a, b, right);
        }
    }
}

/* A bit for each lane of a comparison. */
INLINE uint32_t bits(mask_t m)
{
#ifdef LEVEL_HAS_MASK_BITS
    return (uint32_t)OF_TYPE(MASK_BITS)(m);
#else
    uint32_t bits = 0;
    for (int l = 0; l < LANES; l++)
        bits |= (uint32_t)(m[l] & 1) << l;
    return bits;
#endif
}

INLINE bool any(mask_t m) { return bits(m) != 0; }

/* ---- lists of numbers that a comparison picks ---- */

/* How many were picked, in their order, and where the first `room` of them are: with space behind
 * them for a whole vector. */
typedef struct {
    real *to;
    int64_t length, room;
} list_t;

#define LIST_SPACE(room) ((room) + LANES)

static inline bool list_is_whole(const list_t *l) { return l->length <= l->room; }

static inline int64_t list_held(const list_t *l)
{
    return l->length < l->room ? l->length : l->room;
}

/* The lanes of x = c[place ..], of up to 64 numbers c, that m picks. Without an instruction it is
 * done for all of c by list_rest(c, what this returned for any of them). */
INLINE uint64_t list_lanes(list_t *l, mask_t m, vec_t x, int64_t place)
{
#ifdef LEVEL_HAS_PACK
    const uint32_t picked = bits(m);
    *(vec_t *)(l->to + list_held(l)) = (vec_t)OF_TYPE(PACK)(x, picked);
    l->length += __builtin_popcount(picked);
    (void)place;
    return 0;
#else
    (void)l, (void)x;
    return (uint64_t)bits(m) << place;
#endif
}

static inline void list_one(list_t *l, real c)
{
    if (l->length < l->room)
        l->to[l->length] = c;
    l->length++;
}

INLINE void list_rest(list_t *l, const real *c, uint64_t picked)
{
    for (; picked; picked &= picked - 1)
        list_one(l, c[__builtin_ctzll(picked)]);
}

/* ---- 2^x ---- */

/* 2^x for x <= 0, in plain C that is vectorised: x = n + t with |t| <= 1/2, 2^t by a polynomial
 * (docs/fit_exp2.py; 5e-9 for float, 8e-18 for double, so rounding dominates). Adding EXP2_ROUND,
 * 1.5 * 2^23 (2^52) and the exponent's bias, rounds x to an integer that then stands in the low
 * bits of the sum, biased, which shifted are those of 2^n; -ffast-math would delete that. Below
 * 2^-60 (2^-500) the result is that bound: no sum that holds the row's largest term, 1, can notice,
 * and the product of two of them is not yet subnormal (each would cost 150 cycles).
 *
 * A NaN passes through both comparisons and makes 2^t one. 2^n is any number then, and has to be a
 * factor: added to the exponent of 2^t as an integer it would make a number of many a NaN. It is
 * one of t and of the 1 apart, which changes no bit and does not wait for the polynomial. */
static inline real exp2_of(real x)
{
    COUNT(WORK_EXPONENTIALS, 1);
    x = x > 0 ? 0 : x;
    x = x < EXP2_LOWEST ? EXP2_LOWEST : x;
    const real shifted = x + EXP2_ROUND;
    const real t = x - (shifted - EXP2_ROUND);
    real y = EXP2_LAST;
    EXP2_HORNER(y, t)
    word bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits <<= EXP2_MANTISSA;
    real power;
    memcpy(&power, &bits, sizeof power);
    return y * (t * power) + power;
}

/* The same of a vector whose lanes are in range already; and of any. */
INLINE vec_t exp2_lanes(vec_t x)
{
    const vec_t shifted = x + EXP2_ROUND, t = x - (shifted - EXP2_ROUND);
    vec_t y = EXP2_LAST - (vec_t){0};
    EXP2_HORNER(y, t)
    const vec_t power = (vec_t)((words_t)shifted << EXP2_MANTISSA);
    return y * (t * power) + power;
}

INLINE vec_t exp2_vec(vec_t x)
{
    COUNT(WORK_EXPONENTIALS, LANES);
    return exp2_lanes(x);
}

INLINE vec_t exp2_below(vec_t x)
{
    const vec_t zero = {0};
    return exp2_lanes(larger(EXP2_LOWEST - zero, smaller(zero, x)));
}

#endif
