/* SPDX-License-Identifier: MIT */
/* What the files of the CPU core share: the table of entry points that each instruction set fills
 * once, and the few helpers that need neither a compute type nor an instruction set. */
#ifndef HEX_CPU_H
#define HEX_CPU_H

#include <float.h>
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "../hex.h"
#include "../memory.h"
#include "../tracker.h"
#include "convert.h"

/* The levels of x86-64 are there by gcc's pragma for a target or clang's, that of aarch64 without one;
 * elsewhere the portable level is all there is. */
#if defined(__x86_64__) && defined(__GNUC__)
#define HEX_HAVE_X86_LEVELS 1
#if __GNUC__ >= 10 || (defined(__clang__) && __clang_major__ >= 9)
#define HEX_HAVE_BF16_LEVEL 1
#endif
/* Linux lets a process use tiles if it asks (dispatch.c). */
#if defined(__linux__) && (__GNUC__ >= 11 || (defined(__clang__) && __clang_major__ >= 12))
#define HEX_HAVE_AMX_LEVEL 1
#endif
#endif
#ifdef __aarch64__
#define HEX_HAVE_NEON_LEVEL 1
#endif

typedef struct {
    const char *(*forward)(const hex_problem_t *, void *, void *);
    const char *(*backward)(const hex_problem_t *, const hex_gradient_t *);
    const char *(*adaptive)(const hex_problem_t *, hex_tracker_t *, void *, void *);
    const char *(*threshold)(const hex_problem_t *, double, bool, double *);
    const char *(*row_range)(const hex_problem_t *, void *, void *);
    const char *(*row_quantiles)(const hex_problem_t *, double, bool, void *);
    int64_t (*kept)(const hex_problem_t *, bool *);
} hex_cpu_entry_t;

/* One of each file of levels/. */
extern const hex_cpu_entry_t hex_cpu_base_f32, hex_cpu_base_f64;
extern const hex_cpu_entry_t hex_cpu_avx2_f32, hex_cpu_avx2_f64;
extern const hex_cpu_entry_t hex_cpu_avx512_f32, hex_cpu_avx512_f64;
extern const hex_cpu_entry_t hex_cpu_avx512_bf16_f32, hex_cpu_avx512_amx_f32;
extern const hex_cpu_entry_t hex_cpu_neon_f32, hex_cpu_neon_f64;

#define HEX_NO_MEMORY "out of memory"
#define HEX_NO_THREADS "the thread pool could not run the loop"

#define INLINE static inline __attribute__((always_inline))

/* Around the functions of a level. gcc has its target by a pragma, in the headers of levels/; clang's
 * is LEVEL_TARGET, an attribute that has to end where it began. */
#ifdef __clang__
#define LEVEL_PRAGMA(text) _Pragma(#text)
#define LEVEL_PUSH(isa)                                                                            \
    LEVEL_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define LEVEL_BEGIN LEVEL_PUSH(LEVEL_TARGET)
#define LEVEL_END _Pragma("clang attribute pop")
#else
#define LEVEL_BEGIN
#define LEVEL_END
#endif

/* What tests/test_work.py has the core count, in a build of its own with HEX_COUNT_WORK; in any
 * other, nothing. A loop that counts must not be compiled with -fopenmp-simd. */
enum {
    WORK_PRODUCTS,     /* multiply-adds of register tiles, with their padding */
    WORK_DOTS,         /* of dot products by themselves */
    WORK_ROWS,         /* rows that were normalised */
    WORK_EXPONENTIALS, /* with the padding of vectors */
    WORK_COMPARED,     /* values that a pass without exponentials has read */
    WORK_SELECTED,     /* values among which one was selected by its rank */
    WORK_LISTED,       /* values put on lists */
    WORK_AGAIN,        /* rows computed again whole, with the padding of register tiles */
    WORK_KINDS
};
#ifdef HEX_COUNT_WORK
extern _Atomic int64_t hex_work[WORK_KINDS];
#define COUNT(kind, n) ((void)atomic_fetch_add(&hex_work[kind], n))
#else
#define COUNT(kind, n) ((void)0)
#endif

/* The exponent of the hard-negative weight, as the row kernels are specialised for it. */
typedef enum { POWER_0, POWER_1, POWER_ANY } hex_power_t;

static inline hex_power_t power_of(double beta)
{
    return beta == 0 ? POWER_0 : beta == 1 ? POWER_1 : POWER_ANY;
}

/* ---- fixed shift: tiles.h ---- */

/* What is summed of a row, over its negatives, with x = c - 1, e = exp(x / tau), b = e^beta. All of
 * them in every case, so that a row with H empty has the bits of InfoNCE. */
enum {
    SUM_ALL,
    SUM_REST,
    SUM_REST_X,
    SUM_COUNT,
    SUM_B,
    SUM_BE,
    SUM_BX,
    SUM_BEX,
    SUM_KINDS,
    /* and where positives are told by ids, over them: how many, x, e, x e */
    SUM_P = SUM_KINDS,
    SUM_PX,
    SUM_PE,
    SUM_PXE,
    SUM_KINDS_IDS
};

/* How the sums split at the row's limit: not at all; what is above goes to the row's list and the
 * sums of the rest are made; the same, and what equals the limit is counted; or all of the sums. */
typedef enum { SPLIT_NONE, SPLIT_LIST, SPLIT_TIES, SPLIT_SUMS } hex_split_t;

/* eps >= 1 means H empty, though rounding takes some cosines past 1: then none may reach it. +inf
 * stays, for it also means InfoNCE in the released variant. */
static inline bool is_out_of_reach(double eps) { return eps >= 1 && eps < INFINITY; }

static inline double within_reach(double eps) { return is_out_of_reach(eps) ? 2 : eps; }

static inline double read_vector(hex_vector_t v, int64_t i)
{
    return v.dtype == HEX_F64 ? ((const double *)v.data)[i * v.stride]
                              : (double)((const float *)v.data)[i * v.stride];
}

static inline int64_t row_offset(const hex_rows_t *x, int64_t r)
{
    return r / x->inner * x->outer + r % x->inner * x->row;
}

#endif
