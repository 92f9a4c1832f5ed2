/* SPDX-License-Identifier: MIT */
/* What module.c registers: the boxed kernels of ops.c and labelled_ops.c, and the hook of
 * parallel.c that is set once at import; and what ops.c has for every boxed kernel: a call, its
 * tensors read and made, its one throwing point. */
#ifndef HEX_OPS_H
#define HEX_OPS_H

#include <stdbool.h>
#include <stdint.h>

#include "device.h"
#include "ieee.h"

void hex_forward_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_adaptive_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_backward_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_threshold_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_row_range_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);

void hex_labelled_forward_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_labelled_backward_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_labelled_threshold_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_labelled_row_range_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_logits_forward_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_logits_backward_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_logits_threshold_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_logits_row_range_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);

bool hex_watch_forks(void);

/* ---- a boxed kernel's call ---- */

#define ERROR_SIZE 256
#define SHIM_FAILED "a libtorch call failed"

typedef struct {
    char error[ERROR_SIZE];
    AtenTensorHandle in[12], out[5]; /* as many as an operator has */
    int n_in, n_out;
    hex_place place;       /* of every tensor */
    hex_arithmetic before; /* the thread's own, see ieee.h */
    void *memory;          /* freed at the end, or NULL */
} call;

__attribute__((format(printf, 2, 3))) bool fail(call *c, const char *format, ...);
bool ok(call *c, const char *core_error);
call begin(StableIValue *stack, int tensors);
void finish(call *c, StableIValue *stack, const char *op);
double to_double(StableIValue v);

/* The embeddings' dtypes, int64, bool. */
typedef enum { FLOATS, INTEGERS, BOOLEANS } element_kind;

/* Rows or columns of a matrix. A tensor that is expanded may claim any number; with no more than
 * these no product of sizes leaves int64_t, of which the longest is the arithmetic of a loop's
 * item: 2 x 96 rows against 2^28 columns of 2^27 features. */
#define MOST_ROWS ((int64_t)1 << 27)

typedef struct {
    const void *data;
    hex_dtype dtype; /* of FLOATS */
    int64_t dim, *size, *stride;
} view;

/* Numbers in float32 or float64: one, one for each of `rows`, or either. */
typedef enum { ONE = 1, EACH_ROW = 2 } numbers;

int64_t item_size(hex_dtype dtype);
bool inside_storage(AtenTensorHandle t, const view *v, int64_t element);
bool read_dense(call *c, AtenTensorHandle t, const char *name, element_kind kind, view *v);
bool read_view(call *c, AtenTensorHandle t, const char *name, view *v); /* of FLOATS */
bool read_numbers(call *c, AtenTensorHandle t, const char *name, numbers allowed, int64_t rows,
                  hex_vector *out);
bool check_sizes(call *c, const char *name, const view *v);
bool add_output(call *c, int64_t dim, const int64_t *size, hex_dtype dtype, void **data);

#endif
