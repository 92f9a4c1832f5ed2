/* SPDX-License-Identifier: MIT */
/* A stand-in for libtorch: what csrc/torch_shim.h names, in plain C, with tensors that are counted,
 * calls that can be made to fail one by one, and threads whose number is set. Tensors have their
 * memory on the host whatever their device says. Everything may be used by several threads at once. */
#ifndef ALONE_TORCH_H
#define ALONE_TORCH_H

#include <setjmp.h>

#include "../../csrc/torch_shim.h"

enum { MOST_DIM = 4 };
enum { CPU = 0, CUDA = 1 };       /* devices */
enum { STRIDED = 0, SPARSE = 1 }; /* layouts */
enum { U8 = 0, I64 = 4, F16 = 5, F32 = 6, F64 = 7, COMPLEX = 9, BOOL = 11, BF16 = 15 };

/* Memory that tensors share. */
typedef struct {
    _Atomic int64_t owners;
    int64_t bytes;
    char *data;
    void (*deleter)(void *data, void *context);
} storage_t;

struct AtenTensorOpaque {
    int64_t dim, size[MOST_DIM], stride[MOST_DIM], offset; /* in elements */
    int32_t dtype, layout, device, index;
    storage_t *storage;
};
typedef struct AtenTensorOpaque tensor_t;

/* Where new tensors are. */
extern _Atomic int32_t home;

int64_t element_size(int32_t dtype);
/* A tensor of `room` elements of new memory, which nothing has written. NULL: there is no memory. */
tensor_t *new_tensor(int32_t dtype, int64_t room, int64_t dim, const int64_t *size,
                     const int64_t *stride);
/* Another handle of the same memory, as an operator gets one. */
tensor_t *another(const tensor_t *t);
void delete_tensor(tensor_t *t);
void *data_of(const tensor_t *t);

/* ---- what happens to calls ---- */

/* The number of a call of this thread that fails, or -1; and how many calls there were. */
extern _Thread_local int64_t failing_call, torch_calls;
bool call_fails(void); /* counts one */
/* In use, and guards of a device. */
extern _Atomic int64_t live_tensors;
/* Of a parallel loop. */
extern _Atomic int threads;
/* Where this thread goes on when an operator throws, and with which words. */
extern _Thread_local jmp_buf thrown;
extern _Thread_local char error_text[512];

/* ---- what was registered ---- */

typedef struct {
    char name[32], schema[1000];
    void (*kernel)(StableIValue *stack, uint64_t arguments, uint64_t outputs); /* of the CPU */
    void (*cuda)(StableIValue *stack, uint64_t arguments, uint64_t outputs);
} operator_t;

const operator_t *operator_named(const char *name);

#endif
