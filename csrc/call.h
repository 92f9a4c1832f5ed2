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
    hex_place_t place;       /* of every tensor */
    hex_arithmetic_t before; /* the thread's own, see ieee.h */
    void *memory;            /* freed at the end, or NULL */
} call_t;

call_t begin(StableIValue *stack, int tensors); /* which come first */
void finish(call_t *c, const char *op);

/* Keeps the first error; returns false, so that checks can be chained with &&. */
__attribute__((format(printf, 2, 3))) bool fail(call_t *c, const char *format, ...);
bool ok(call_t *c, const char *core_error);

/* ---- arguments, each once and in order ---- */

AtenTensorHandle next_tensor(call_t *c);
int64_t next_int(call_t *c);
double next_float(call_t *c);
bool next_bool(call_t *c);

/* ---- tensors -> plain C ---- */

/* The embeddings' dtypes, int64, bool or uint8. */
typedef enum { FLOATS, INTEGERS, BYTES } element_t;

/* Rows or columns of a matrix. A tensor that is expanded may claim any number; with no more than
 * these no product of sizes leaves int64_t, of which the longest is the arithmetic of a loop's
 * item: 2 x 96 rows against 2^28 columns of 2^27 features. */
#define MOST_ROWS ((int64_t)1 << 27)

typedef struct {
    const void *data;
    hex_dtype_t dtype; /* of FLOATS */
    bool is_bool;      /* of BYTES */
    int64_t dim, *size, *stride;
} view_t;

/* Numbers in float32 or float64: one, one for each of `rows`, or either. */
typedef enum { ONE = 1, EACH_ROW = 2 } numbers_t;

bool read_dense(call_t *c, AtenTensorHandle t, const char *name, element_t kind, view_t *v);
bool read_view(call_t *c, AtenTensorHandle t, const char *name, view_t *v); /* of FLOATS */
bool read_numbers(call_t *c, AtenTensorHandle t, const char *name, numbers_t allowed, int64_t rows,
                  hex_vector_t *out);
bool check_sizes(call_t *c, const char *name, const view_t *v);
int64_t item_size(hex_dtype_t dtype);

/* ---- outputs ---- */

/* A new contiguous tensor as the next output; *data points to its first element. */
bool add_output(call_t *c, int64_t dim, const int64_t *size, hex_dtype_t dtype, void **data);

#endif
