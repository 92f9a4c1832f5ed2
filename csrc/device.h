/* SPDX-License-Identifier: MIT */
/* Where a call runs: on the CPU's core or on the CUDA core, which is loaded when the first CUDA
 * tensor comes (hex/ops.py). An operator that has kernels on one of them only does not need this
 * file. */
#ifndef HEX_DEVICE_H
#define HEX_DEVICE_H

#include "cuda/hex_cuda.h"
#include "torch_shim.h"

/* The device of a call's tensors. */
typedef struct {
    int32_t type, index;
    bool allow_tf32; /* see hex_device */
} hex_place_t;

bool hex_place_of(AtenTensorHandle t, hex_place_t *place);
/* Whether calls there are for the CUDA core; the functions below choose by it. */
bool hex_place_is_cuda(const hex_place_t *place);
/* "CPU" or "CUDA" */
const char *hex_place_name(const hex_place_t *place);

/* As the functions of a core. On the CUDA core, dtau and mean are on the device; see hex_cuda.h. */
const char *hex_run_forward(const hex_place_t *place, const hex_problem_t *p, void *loss,
                            void *stats);
const char *hex_run_backward(const hex_place_t *place, const hex_problem_t *p,
                             const hex_gradient_t *g);
const char *hex_run_threshold(const hex_place_t *place, const hex_problem_t *p, double quantile,
                              bool over_negatives, double *mean);
const char *hex_run_row_range(const hex_place_t *place, const hex_problem_t *p, void *low,
                              void *high);
const char *hex_run_row_quantiles(const hex_place_t *place, const hex_problem_t *p, double quantile,
                                  bool over_negatives, void *rows);

/* On the CUDA core alone: the tracker's state stays on the device, which the CPU's core reads. */
const char *hex_cuda_adaptive(const hex_place_t *place, const hex_problem_t *p,
                              const hex_tracker_t *t, const hex_device_state_t *state, void *loss,
                              void *stats);

const char *hex_cuda_settle(const hex_place_t *place, const hex_matrix_t *q, const hex_tracker_t *t,
                            const hex_device_state_t *state);
const char *hex_cuda_total(const hex_place_t *place, const hex_matrix_t *x, double *sums);

/* Loads hex/_cuda.so and returns NULL, or what is in the way. A core that is emulated on the CPU
 * (tests/emulation) takes the place of the CPU's until NULL is loaded. */
const char *hex_load_cuda(const char *path);
bool hex_cuda_is_emulated(void);
/* 0, or the CUDA error that keeps the core that is loaded from a device (209: it has no code for
 * such a GPU); -1: none is loaded. */
int hex_probe_cuda(int device);

#endif
