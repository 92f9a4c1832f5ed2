/* SPDX-License-Identifier: MIT */
/* What torch.h declares, and the functions of csrc/torch_shim.h. With -DTORCH_2_10 without those that
 * torch has since 2.11. */
#include "torch.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"

_Thread_local int64_t failing_call = -1, torch_calls;
_Atomic int64_t live_tensors;
_Atomic int threads = 1;
_Atomic int32_t home = CPU;
_Thread_local jmp_buf thrown;
_Thread_local char error_text[512];

/* ---- tensors ---- */

/* More than this nobody has: sizes that are drawn at random ask for it. */
#define MOST_BYTES ((size_t)256 << 20)

int64_t element_size(int32_t dtype)
{
    return dtype == COMPLEX || dtype == F64 || dtype == I64 ? 8
           : dtype == F32                                   ? 4
           : dtype == F16 || dtype == BF16                  ? 2
                                                            : 1;
}

static tensor_t *tensor_of(storage_t *storage, int32_t dtype, int64_t dim, const int64_t *size,
                           const int64_t *stride)
{
    tensor_t *t = malloc(sizeof *t);
    *t = (tensor_t){.dim = dim,
                    .dtype = dtype,
                    .layout = STRIDED,
                    .device = home,
                    .index = home == CUDA ? 0 : -1,
                    .storage = storage};
    for (int64_t d = 0; d < dim; d++)
        t->size[d] = size[d], t->stride[d] = stride[d];
    live_tensors++;
    return t;
}

static storage_t *storage_of(void *data, int64_t bytes, void (*deleter)(void *, void *))
{
    storage_t *s = malloc(sizeof *s);
    *s = (storage_t){1, bytes, data, deleter};
    return s;
}

static void free_data(void *data, void *context)
{
    (void)context;
    free(data);
}

tensor_t *new_tensor(int32_t dtype, int64_t room, int64_t dim, const int64_t *size,
                     const int64_t *stride)
{
    int64_t bytes;
    if (__builtin_mul_overflow(room, element_size(dtype), &bytes) || (size_t)bytes > MOST_BYTES)
        return NULL;
    void *data = malloc((size_t)bytes + 1);
    memset(data, 0xff, (size_t)bytes + 1);
    return tensor_of(storage_of(data, bytes, free_data), dtype, dim, size, stride);
}

tensor_t *another(const tensor_t *t)
{
    tensor_t *copy = tensor_of(t->storage, t->dtype, t->dim, t->size, t->stride);
    *copy = *t;
    t->storage->owners++;
    return copy;
}

void delete_tensor(tensor_t *t)
{
    if (--t->storage->owners == 0) {
        in_extension = t->storage->deleter != free_data;
        t->storage->deleter(t->storage->data, NULL);
        in_extension = false;
        free(t->storage);
    }
    free(t);
    live_tensors--;
}

/* NULL of a tensor without elements, as torch has it. */
void *data_of(const tensor_t *t)
{
    for (int64_t d = 0; d < t->dim; d++)
        if (t->size[d] == 0)
            return NULL;
    /* the offset may be any number */
    const uintptr_t begin = (uintptr_t)t->storage->data;
    return (void *)(begin + (uintptr_t)t->offset * (uintptr_t)element_size(t->dtype));
}

/* ---- torch's functions ---- */

bool call_fails(void) { return torch_calls++ == failing_call; }

#define READ(name, type, value)                                                                    \
    AOTITorchError name(AtenTensorHandle t, type *out)                                             \
    {                                                                                              \
        if (call_fails())                                                                          \
            return 1;                                                                              \
        *out = value;                                                                              \
        return 0;                                                                                  \
    }
READ(aoti_torch_get_dim, int64_t, t->dim)
READ(aoti_torch_get_sizes, int64_t *, t->size)
READ(aoti_torch_get_strides, int64_t *, t->stride)
READ(aoti_torch_get_dtype, int32_t, t->dtype)
READ(aoti_torch_get_layout, int32_t, t->layout)
READ(aoti_torch_get_device_type, int32_t, t->device)
READ(aoti_torch_get_device_index, int32_t, t->index)
READ(aoti_torch_get_storage_offset, int64_t, t->offset)
READ(aoti_torch_get_storage_size, int64_t, t->storage->bytes)
READ(torch_get_const_data_ptr, const void *, data_of(t))
READ(torch_get_mutable_data_ptr, void *, data_of(t))

#define CODE(name, value)                                                                          \
    int32_t name(void) { return value; }
CODE(aoti_torch_dtype_float64, F64)
CODE(aoti_torch_dtype_float32, F32)
CODE(aoti_torch_dtype_float16, F16)
CODE(aoti_torch_dtype_bfloat16, BF16)
CODE(aoti_torch_dtype_int64, I64)
CODE(aoti_torch_dtype_bool, BOOL)
CODE(aoti_torch_dtype_uint8, U8)
CODE(aoti_torch_layout_strided, STRIDED)
CODE(aoti_torch_device_type_cuda, CUDA)
CODE(aoti_torch_device_type_cpu, CPU)

static tensor_t *on(tensor_t *t, int32_t device, int32_t index)
{
    if (t)
        t->device = device, t->index = index;
    return t;
}

AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t *sizes, const int64_t *strides,
                                        int32_t dtype, int32_t device_type, int32_t device_index,
                                        AtenTensorHandle *t)
{
    int64_t room = 1;
    for (int64_t d = 0; d < dim; d++)
        if (sizes[d] < 0 || __builtin_mul_overflow(room, sizes[d], &room))
            return 1;
    if (call_fails())
        return 1;
    *t = on(new_tensor(dtype, room, dim, sizes, strides), device_type, device_index);
    return !*t;
}

#ifndef TORCH_2_10
/* Where torch fails here, it has freed the data already. */
AOTITorchError torch_from_blob(void *data, int64_t dim, const int64_t *sizes,
                               const int64_t *strides, int64_t offset, int32_t dtype,
                               int32_t device_type, int32_t device_index, AtenTensorHandle *t,
                               int32_t layout, const uint8_t *metadata, int64_t metadata_bytes,
                               void (*deleter)(void *data, void *context), void *context)
{
    (void)offset, (void)layout, (void)metadata, (void)metadata_bytes;
    if (call_fails()) {
        in_extension = true;
        deleter(data, context);
        in_extension = false;
        return 1;
    }
    int64_t bytes = element_size(dtype);
    for (int64_t d = 0; d < dim; d++)
        bytes *= sizes[d];
    *t = on(tensor_of(storage_of(data, bytes, deleter), dtype, dim, sizes, strides), device_type,
            device_index);
    return 0;
}
#endif

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t)
{
    delete_tensor(t);
    return 0;
}

AOTITorchError aoti_torch_create_device_guard(int32_t device_index, DeviceGuardHandle *guard)
{
    static char one;
    (void)device_index;
    if (call_fails())
        return 1;
    live_tensors++;
    *guard = (DeviceGuardHandle)&one;
    return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard)
{
    (void)guard;
    live_tensors--;
    return 0;
}

void aoti_torch_check(bool condition, const char *function, const char *file, uint32_t line,
                      const char *text)
{
    (void)function, (void)file, (void)line;
    if (condition)
        return;
    snprintf(error_text, sizeof error_text, "%s", text);
    longjmp(thrown, 1);
}

/* ---- threads ---- */

typedef struct {
    int64_t begin, end;
    void (*body)(int64_t begin, int64_t end, void *context);
    void *context;
} chunk_t;

static void *run(void *of)
{
    const chunk_t *c = of;
    c->body(c->begin, c->end, c->context);
    return NULL;
}

/* As torch's: at most one chunk for each thread, none shorter than the grain but the last, and the
 * first on the thread that calls. */
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                  void (*body)(int64_t begin, int64_t end, void *context),
                                  void *context)
{
    enum { MOST = 64 };
    pthread_t thread[MOST];
    chunk_t chunk[MOST];
    if (call_fails())
        return 1;
    if (begin >= end)
        return 0;
    const int64_t share = (end - begin + threads - 1) / threads,
                  step = share > grain ? share : grain;
    int count = 0;
    for (int64_t at = begin; at < end; at += step, count++) {
        chunk[count] = (chunk_t){at, at + step < end ? at + step : end, body, context};
        if (count > 0 && pthread_create(&thread[count], NULL, run, &chunk[count]))
            abort();
    }
    run(&chunk[0]);
    for (int k = 1; k < count; k++)
        pthread_join(thread[k], NULL);
    return 0;
}

/* ---- registration ---- */

static operator_t operators[16];
static int operator_count;

const operator_t *operator_named(const char *name)
{
    for (int k = 0; k < operator_count; k++)
        if (strcmp(operators[k].name, name) == 0)
            return &operators[k];
    return NULL;
}

AOTITorchError aoti_torch_library_init_def(const char *name, const char *file, uint32_t line,
                                           TorchLibraryHandle *library)
{
    (void)file, (void)line;
    if (call_fails() || strcmp(name, "hex") != 0)
        return 1;
    *library = NULL;
    return 0;
}

/* The handle of a library is its dispatch key. */
AOTITorchError aoti_torch_library_init_impl(const char *name, const char *dispatch_key,
                                            const char *file, uint32_t line,
                                            TorchLibraryHandle *library)
{
    (void)file, (void)line;
    if (call_fails() || strcmp(name, "hex") != 0)
        return 1;
    *library = (TorchLibraryHandle)(uintptr_t)dispatch_key;
    return 0;
}

AOTITorchError aoti_torch_library_def(TorchLibraryHandle library, const char *schema)
{
    (void)library;
    if (call_fails())
        return 1;
    operator_t o = {0};
    snprintf(o.schema, sizeof o.schema, "%s", schema);
    snprintf(o.name, sizeof o.name, "%.*s", (int)strcspn(schema, "("), schema);
    if (!operator_named(o.name))
        operators[operator_count++] = o;
    return 0;
}

AOTITorchError torch_library_impl(TorchLibraryHandle library, const char *op,
                                  void (*kernel)(StableIValue *stack, uint64_t arguments,
                                                 uint64_t outputs),
                                  uint64_t abi)
{
    const bool cuda = strcmp((const char *)library, "CUDA") == 0;
    operator_t *o = (operator_t *)operator_named(op);
    if (call_fails() || !o || abi != HEX_TORCH_ABI)
        return 1;
    *(cuda ? &o->cuda : &o->kernel) = kernel;
    return 0;
}
