/* SPDX-License-Identifier: MIT */
/* A boxed kernel's call: the arguments off torch's stack, in the order of the schema; tensors read and
 * checked for memory safety; outputs made; and the one place that throws. What a user may pass is
 * checked in Python, with friendlier words; here every error becomes a RuntimeError.
 *
 * Ownership: the kernel owns every tensor handle on its stack and must free it. aoti_torch_check
 * throws a C++ exception through this frame, so it is called in one place, finish(), when nothing
 * is held any more. */
#ifndef HEX_CALL_H
#define HEX_CALL_H

#include <stdbool.h>
#include <stdint.h>

#include "device.h"
#include "ieee.h"

#define ERROR_SIZE 256
#define SHIM_FAILED "a libtorch call failed"

enum { MOST_IN = 13, MOST_OUT = 5 }; /* tensors of an operator */

typedef struct {
    char error[ERROR_SIZE];
    StableIValue *stack;
    int next; /* the argument that is taken next */
    AtenTensorHandle in[MOST_IN], out[MOST_OUT];
    int n_in, n_out;
    hex_place place;       /* of every tensor */
    hex_arithmetic before; /* the thread's own, see ieee.h */
    void *memory;          /* freed at the end, or NULL */
} call;

call begin(StableIValue *stack, int tensors); /* which come first */
void finish(call *c, const char *op);

/* Keeps the first error; returns false, so that checks can be chained with &&. */
__attribute__((format(printf, 2, 3))) bool fail(call *c, const char *format, ...);
bool ok(call *c, const char *core_error);

/* ---- arguments, each once and in order ---- */

AtenTensorHandle next_tensor(call *c);
int64_t next_int(call *c);
double next_float(call *c);
bool next_bool(call *c);

/* ---- tensors -> plain C ---- */

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

bool read_dense(call *c, AtenTensorHandle t, const char *name, element_kind kind, view *v);
bool read_view(call *c, AtenTensorHandle t, const char *name, view *v); /* of FLOATS */
bool read_numbers(call *c, AtenTensorHandle t, const char *name, numbers allowed, int64_t rows,
                  hex_vector *out);
bool check_sizes(call *c, const char *name, const view *v);
int64_t item_size(hex_dtype dtype);

/* ---- outputs ---- */

/* A new contiguous tensor as the next output; *data points to its first element. */
bool add_output(call *c, int64_t dim, const int64_t *size, hex_dtype dtype, void **data);

#endif
