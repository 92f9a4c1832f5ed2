/* SPDX-License-Identifier: MIT */
/* A stand-in for hex/_cuda.so, to see how the extension calls it: no kernel runs. Each function asks
 * for memory, and once more, which is refused, and leaves its outputs as they are. Compiled with -DEMULATED it is one of the kind
 * that takes the CPU's place; with -DANOTHER_VERSION, one of another release; -DDRIVER=35, one whose
 * driver answers so. The one with -DTORCH_CUDA has what the extension asks of libtorch_cuda.so. */
#include <stddef.h>

#include "../../csrc/cuda/hex_cuda.h"

#ifdef EMULATED
#define IS_EMULATED true
#else
#define IS_EMULATED false
#endif
#ifdef ANOTHER_VERSION
#define VERSION (HEX_CUDA_VERSION + 1)
#else
#define VERSION HEX_CUDA_VERSION
#endif
#ifndef DRIVER
#define DRIVER 0
#endif

#define PUBLIC __attribute__((visibility("default")))

static const char *run(const hex_device *d)
{
    if (!d->allocate(d->context, 1000))
        return "out of memory";
    return d->allocate(d->context, 0) ? "asked twice, and not refused" : NULL;
}

static const char *forward(const hex_problem_t *p, const hex_device *d, void *loss, void *stats)
{
    (void)p, (void)loss, (void)stats;
    return run(d);
}

static const char *backward(const hex_problem_t *p, const hex_device *d, const hex_gradient_t *g)
{
    (void)p, (void)g;
    return run(d);
}

static const char *threshold(const hex_problem_t *p, const hex_device *d, double quantile,
                             bool over_negatives, double *mean)
{
    (void)p, (void)quantile, (void)over_negatives, (void)mean;
    return run(d);
}

static const char *adaptive(const hex_problem_t *p, const hex_device *d, const hex_tracker_t *t,
                            const hex_device_state_t *s, void *loss, void *stats)
{
    (void)p, (void)t, (void)s, (void)loss, (void)stats;
    return run(d);
}

static const char *row_range(const hex_problem_t *p, const hex_device *d, void *low, void *high)
{
    (void)p, (void)low, (void)high;
    return run(d);
}

static const char *row_quantiles(const hex_problem_t *p, const hex_device *d, double quantile,
                                 bool over_negatives, void *rows)
{
    (void)p, (void)quantile, (void)over_negatives, (void)rows;
    return run(d);
}

static const char *settle(const hex_device *d, const hex_matrix_t *q, const hex_tracker_t *t,
                          const hex_device_state_t *s)
{
    (void)q, (void)t, (void)s;
    return run(d);
}

static const char *total(const hex_device *d, const hex_matrix_t *x, double *sums)
{
    (void)x, (void)sums;
    return run(d);
}

static int driver(void) { return DRIVER; }

static int probe(int device) { return device; }

PUBLIC const hex_cuda_table hex_cuda_core = {
    .version = VERSION,
    .emulated = IS_EMULATED,
    .forward = forward,
    .backward = backward,
    .threshold = threshold,
    .adaptive = adaptive,
    .row_range = row_range,
    .row_quantiles = row_quantiles,
    .settle = settle,
    .total = total,
    .driver = driver,
    .probe = probe,
};

#ifdef TORCH_CUDA
bool call_fails(void); /* the program's, see torch.h */

PUBLIC int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void **stream)
{
    (void)device_index;
    *stream = NULL;
    return call_fails();
}
#endif
