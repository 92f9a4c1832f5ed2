/* SPDX-License-Identifier: MIT */
/* The operators of csrc/ops.c as a program without torch and Python, so that an emulator can run them
 * as another machine's compiler made them (other_machine.py): calls come on stdin, answers go to
 * stdout. It is linked with all of csrc but module.c, and has in libtorch's place what csrc calls.
 * Both ends have 64 bits, little-endian. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "hex.h"
#include "ops.h"
#include "torch_shim.h"

/* ---- in libtorch's place: dense tensors of the CPU ---- */

enum { WORD, F32, F64, F16, BF16, I64, BOOL }; /* what is sent: a number, or a tensor of a dtype */
enum { MOST_DIM = 3, MOST_ARGUMENTS = 32, ERROR_SIZE = 512 };

struct AtenTensorOpaque {
    int64_t dtype, dim, size[MOST_DIM], stride[MOST_DIM], bytes;
    void *data;
};

static char error[ERROR_SIZE];

#define READ(name, type, value)                                                                    \
    AOTITorchError name(AtenTensorHandle t, type *out)                                             \
    {                                                                                              \
        (void)t;                                                                                   \
        *out = value;                                                                              \
        return 0;                                                                                  \
    }
READ(aoti_torch_get_dim, int64_t, t->dim)
READ(aoti_torch_get_sizes, int64_t *, t->size)
READ(aoti_torch_get_strides, int64_t *, t->stride)
READ(aoti_torch_get_dtype, int32_t, (int32_t)t->dtype)
READ(aoti_torch_get_layout, int32_t, 0)
READ(aoti_torch_get_device_type, int32_t, 0)
READ(aoti_torch_get_device_index, int32_t, 0)
READ(aoti_torch_get_storage_offset, int64_t, 0)
READ(aoti_torch_get_storage_size, int64_t, t->bytes)
READ(torch_get_const_data_ptr, const void *, t->data)
READ(torch_get_mutable_data_ptr, void *, t->data)

#define CODE(name, value)                                                                          \
    int32_t name(void) { return value; }
CODE(aoti_torch_dtype_float64, F64)
CODE(aoti_torch_dtype_float32, F32)
CODE(aoti_torch_dtype_float16, F16)
CODE(aoti_torch_dtype_bfloat16, BF16)
CODE(aoti_torch_dtype_int64, I64)
CODE(aoti_torch_dtype_bool, BOOL)
CODE(aoti_torch_layout_strided, 0)
CODE(aoti_torch_device_type_cpu, 0)
CODE(aoti_torch_device_type_cuda, 1)

AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t *size, const int64_t *stride,
                                        int32_t dtype, int32_t device, int32_t index,
                                        AtenTensorHandle *t)
{
    static const int64_t items[] = {0, 4, 8, 2, 2, 8, 1};
    int64_t numbers = 1;
    (void)device, (void)index;
    *t = calloc(1, sizeof **t);
    for (int64_t d = 0; d < dim; d++) {
        (*t)->size[d] = size[d];
        (*t)->stride[d] = stride[d];
        numbers *= size[d];
    }
    (*t)->dtype = dtype;
    (*t)->dim = dim;
    (*t)->bytes = numbers * items[dtype];
    (*t)->data = malloc((size_t)(*t)->bytes + 1);
    return 0;
}

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t)
{
    free(t->data);
    free(t);
    return 0;
}

/* Throws nothing: it is called last. */
void aoti_torch_check(bool condition, const char *function, const char *file, uint32_t line,
                      const char *text)
{
    (void)function, (void)file, (void)line;
    if (!condition)
        snprintf(error, sizeof error, "%s", text);
}

typedef struct {
    int64_t begin, end;
    void (*body)(int64_t, int64_t, void *);
    void *context;
} half_t;

static void *run(void *of)
{
    const half_t *h = of;
    h->body(h->begin, h->end, h->context);
    return NULL;
}

/* On two threads, if there are as many items. */
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                  void (*body)(int64_t, int64_t, void *), void *context)
{
    const int64_t middle = (begin + end) / 2;
    half_t first = {begin, middle, body, context}, second = {middle, end, body, context};
    pthread_t other;
    (void)grain;
    if (begin < middle && pthread_create(&other, NULL, run, &first))
        return 1;
    run(&second);
    return begin < middle && pthread_join(other, NULL);
}

/* ---- calls ---- */

static void get(void *to, int64_t bytes)
{
    if (fread(to, 1, (size_t)bytes, stdin) != (size_t)bytes)
        exit(0); /* no more calls */
}

static void put(const void *from, int64_t bytes) { fwrite(from, 1, (size_t)bytes, stdout); }

static StableIValue get_argument(void)
{
    int64_t kind, dim, size[MOST_DIM], stride[MOST_DIM], step = 1;
    StableIValue value;
    get(&kind, sizeof kind);
    if (kind == WORD) {
        get(&value, sizeof value);
        return value;
    }
    get(&dim, sizeof dim);
    get(size, dim * (int64_t)sizeof *size);
    for (int64_t d = dim - 1; d >= 0; d--) {
        stride[d] = step;
        step *= size[d] > 0 ? size[d] : 1;
    }
    AtenTensorHandle t;
    aoti_torch_empty_strided(dim, size, stride, (int32_t)kind, 0, 0, &t);
    get(t->data, t->bytes);
    return (StableIValue)(uintptr_t)t;
}

static void put_output(StableIValue value)
{
    const AtenTensorHandle t = (AtenTensorHandle)(uintptr_t)value;
    put(&t->dtype, sizeof t->dtype);
    put(&t->dim, sizeof t->dim);
    put(t->size, t->dim * (int64_t)sizeof *t->size);
    put(t->data, t->bytes);
    aoti_torch_delete_tensor_object(t);
}

/* Says which level is in use; then for each call: which operator, how many arguments and outputs, the
 * arguments; the answer is an error's text, or an empty one and the outputs. */
int main(void)
{
    const char *problem, *level = hex_cpu_select(getenv("HEX_ISA"), &problem);
    snprintf(error, sizeof error, "%s", problem ? problem : level);
    put(error, sizeof error);
    for (;;) {
        int64_t head[3]; /* operator, arguments, outputs */
        StableIValue stack[MOST_ARGUMENTS];
        fflush(stdout);
        get(head, sizeof head);
        for (int64_t k = 0; k < head[1]; k++)
            stack[k] = get_argument();
        memset(error, 0, sizeof error);
        hex_operators[head[0]].kernel(stack, (uint64_t)head[1], (uint64_t)head[2]);
        put(error, sizeof error);
        for (int64_t k = 0; !error[0] && k < head[2]; k++)
            put_output(stack[k]);
    }
}
