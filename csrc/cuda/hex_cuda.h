/* SPDX-License-Identifier: MIT */
/* The contract between the torch layer (ops.c) and the CUDA core, hex/_cuda.so: one exported table,
 * hex_cuda_core. Plain C, no torch and no CUDA types, so that either side is built without the
 * other's headers. The problem and the statistics are those of ../hex.h, with device pointers. */
#ifndef HEX_CUDA_H
#define HEX_CUDA_H

#include "../hex.h"

#define HEX_CUDA_VERSION 6

/* What a call runs on. Device memory comes from `allocate` (NULL: there is none), 256-byte aligned;
 * the caller frees it when the call is back, which is right for an allocator that is ordered by the
 * stream. */
typedef struct {
    void *stream;
    void *(*allocate)(void *context, int64_t bytes);
    void *context;
    bool allow_tf32; /* float32 may be rounded to 11 bits before it is multiplied */
} hex_device;

/* A tracker's state on the device, before a step and after it, and the eps that comes of it. */
typedef struct {
    const double *state;
    int64_t stride;
    double *next; /* contiguous */
    double *eps;
} hex_device_state_t;

/* As hex_cpu_*: NULL, or the text of an error. Nothing waits for the device. `mean` is on the
 * device; so is g->dtau, in the dtype of tau, or NULL where it is not wanted. */
typedef struct {
    int32_t version;
    bool emulated; /* runs on the CPU, on CPU memory: for tests */
    const char *(*forward)(const hex_problem_t *p, const hex_device *d, void *loss, void *stats);
    const char *(*backward)(const hex_problem_t *p, const hex_device *d, const hex_gradient_t *g);
    const char *(*threshold)(const hex_problem_t *p, const hex_device *d, double quantile,
                             bool over_negatives, double *mean);
    /* *t is the rule; its state and its eps are not looked at, those of *s are. */
    const char *(*adaptive)(const hex_problem_t *p, const hex_device *d, const hex_tracker_t *t,
                            const hex_device_state_t *s, void *loss, void *stats);
    const char *(*row_range)(const hex_problem_t *p, const hex_device *d, void *low, void *high);
    const char *(*row_quantiles)(const hex_problem_t *p, const hex_device *d, double quantile,
                                 bool over_negatives, void *rows);
    /* The step of a tracker with the mean of the rows' quantiles; and the sums, also on the device. */
    const char *(*settle)(const hex_device *d, const hex_matrix_t *q, const hex_tracker_t *t,
                          const hex_device_state_t *s);
    const char *(*total)(const hex_device *d, const hex_matrix_t *x, double *sums);
    int (*driver)(void); /* 0, or the CUDA error that there is without a launch (35: no driver) */
    int (*probe)(int device); /* 0, or the CUDA error of every launch there (209: no code for it) */
} hex_cuda_table;

#endif
