/* SPDX-License-Identifier: MIT */
/* What call.h declares. */
#include "call.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memory.h"

/* ---- begin and end ---- */

/* Keeps the first error; returns false, so that checks can be chained with &&. */
bool fail(call_t *c, const char *format, ...)
{
    if (!c->error[0]) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(c->error, sizeof c->error, format, arguments);
        va_end(arguments);
    }
    return false;
}

bool ok(call_t *c, const char *core_error) { return core_error ? fail(c, "%s", core_error) : true; }

call_t begin(StableIValue *stack, int tensors)
{
    call_t c = {.stack = stack, .n_in = tensors, .before = hex_ieee_begin()};
    for (int i = 0; i < tensors; i++)
        c.in[i] = (AtenTensorHandle)(uintptr_t)stack[i];
    if (!hex_place_of(c.in[0], &c.place))
        fail(&c, SHIM_FAILED);
    return c;
}

void finish(call_t *c, const char *op)
{
    for (int i = 0; i < c->n_in; i++)
        aoti_torch_delete_tensor_object(c->in[i]);
    free(c->memory);
    hex_ieee_end(c->before);
    if (c->error[0]) {
        char text[ERROR_SIZE + 64];
        for (int i = 0; i < c->n_out; i++)
            aoti_torch_delete_tensor_object(c->out[i]);
        snprintf(text, sizeof text, "hex::%s: %s", op, c->error);
        aoti_torch_check(false, op, __FILE__, __LINE__, text); /* throws */
        return;
    }
    for (int i = 0; i < c->n_out; i++)
        c->stack[i] = (StableIValue)(uintptr_t)c->out[i];
}

/* ---- arguments ---- */

AtenTensorHandle next_tensor(call_t *c) { return c->in[c->next++]; }

int64_t next_int(call_t *c) { return (int64_t)c->stack[c->next++]; }

double next_float(call_t *c)
{
    double x;
    memcpy(&x, &c->stack[c->next++], sizeof x);
    return x;
}

bool next_bool(call_t *c) { return c->stack[c->next++] & 1; }

/* ---- tensors -> plain C ---- */

static bool read_dtype(int32_t code, hex_dtype_t *dtype)
{
    if (code == aoti_torch_dtype_float32())
        *dtype = HEX_F32;
    else if (code == aoti_torch_dtype_float64())
        *dtype = HEX_F64;
    else if (code == aoti_torch_dtype_float16())
        *dtype = HEX_F16;
    else if (code == aoti_torch_dtype_bfloat16())
        *dtype = HEX_BF16;
    else
        return false;
    return true;
}

static int32_t torch_dtype(hex_dtype_t dtype)
{
    return dtype == HEX_F32   ? aoti_torch_dtype_float32()
           : dtype == HEX_F64 ? aoti_torch_dtype_float64()
           : dtype == HEX_F16 ? aoti_torch_dtype_float16()
                              : aoti_torch_dtype_bfloat16();
}

int64_t item_size(hex_dtype_t dtype) { return dtype == HEX_F64 ? 8 : dtype == HEX_F32 ? 4 : 2; }

/* Whether every element lies inside the storage. torch's own operators trust this and crash on a
 * tensor whose storage was freed or shrunk under it, as sharded training does. */
static bool inside_storage(AtenTensorHandle t, view_t *v, int64_t element)
{
    /* Of a tensor without elements: any strides are allowed, and with these no row is outside the
     * memory that is not there. No operator reads more than 3. */
    static int64_t no_strides[3];
    int64_t last, bytes;
    if (aoti_torch_get_storage_offset(t, &last) || aoti_torch_get_storage_size(t, &bytes))
        return false;
    for (int64_t d = 0; d < v->dim; d++)
        if (v->size[d] == 0) {
            v->stride = no_strides;
            return true;
        }
    for (int64_t d = 0; d < v->dim; d++) {
        int64_t step;
        if (v->stride[d] < 0 || __builtin_mul_overflow(v->size[d] - 1, v->stride[d], &step) ||
            __builtin_add_overflow(last, step, &last))
            return false;
    }
    return last < bytes / element;
}

bool read_dense(call_t *c, AtenTensorHandle t, const char *name, element_t kind, view_t *v)
{
    static const char *const wanted[] = {"float64, float32, bfloat16 or float16", "int64",
                                         "bool or uint8"};
    hex_place_t place;
    int32_t dtype, layout;
    if (!hex_place_of(t, &place) || aoti_torch_get_dtype(t, &dtype) ||
        aoti_torch_get_layout(t, &layout))
        return fail(c, SHIM_FAILED);
    v->is_bool = dtype == aoti_torch_dtype_bool();
    const bool right = kind == FLOATS     ? read_dtype(dtype, &v->dtype)
                       : kind == INTEGERS ? dtype == aoti_torch_dtype_int64()
                                          : v->is_bool || dtype == aoti_torch_dtype_uint8();
    if (place.type != c->place.type || layout != aoti_torch_layout_strided() || !right)
        return fail(c, "%s: expected a dense %s tensor of %s", name, hex_place_name(&c->place),
                    wanted[kind]);
    if (place.index != c->place.index)
        return fail(c, "%s: expected a tensor on device %d, got one on %d", name, c->place.index,
                    place.index);
    if (aoti_torch_get_dim(t, &v->dim) || aoti_torch_get_sizes(t, &v->size) ||
        aoti_torch_get_strides(t, &v->stride) || torch_get_const_data_ptr(t, &v->data))
        return fail(c, SHIM_FAILED);
    if (!inside_storage(t, v, kind == FLOATS ? item_size(v->dtype) : kind == INTEGERS ? 8 : 1))
        return fail(c, "%s: its storage is smaller than its shape says (freed or resized?)", name);
    return true;
}

bool read_view(call_t *c, AtenTensorHandle t, const char *name, view_t *v)
{
    return read_dense(c, t, name, FLOATS, v);
}

/* See MOST_ROWS. */
bool check_sizes(call_t *c, const char *name, const view_t *v)
{
    for (int64_t d = 0; d < v->dim; d++)
        if (v->size[d] > MOST_ROWS)
            return fail(c, "%s: expected at most %" PRId64 " rows and columns, got %" PRId64, name,
                        MOST_ROWS, v->size[d]);
    return true;
}

bool read_numbers(call_t *c, AtenTensorHandle t, const char *name, numbers_t allowed, int64_t rows,
                  hex_vector_t *out)
{
    static const char *const shapes[] = {"", "()", "(rows,)", "() or (rows,)"};
    view_t v;
    if (!read_view(c, t, name, &v))
        return false;
    const bool shape =
        v.dim == 0 ? allowed & ONE : v.dim == 1 && allowed & EACH_ROW && v.size[0] == rows;
    if ((v.dtype != HEX_F32 && v.dtype != HEX_F64) || !shape)
        return fail(c, "%s: expected float32 or float64 of shape %s", name, shapes[allowed]);
    *out = (hex_vector_t){v.data, v.dtype, v.dim == 1 ? v.stride[0] : 0};
    return true;
}

/* ---- outputs ---- */

/* CPU tensors of so many bytes are of allocate(), for the reason given there, if torch can make a
 * tensor of what others allocated (2.11). */
#define MUCH_MEMORY ((int64_t)128 << 10)

static void release_data(void *data, void *context)
{
    (void)context;
    release(data);
}

static bool empty_tensor(const call_t *c, int64_t dim, const int64_t *size, const int64_t *stride,
                         hex_dtype_t dtype, int64_t bytes, AtenTensorHandle *t)
{
    const int32_t type = torch_dtype(dtype), device = c->place.type, index = c->place.index;
    if (!torch_from_blob || hex_place_is_cuda(&c->place) || bytes < MUCH_MEMORY)
        return !aoti_torch_empty_strided(dim, size, stride, type, device, index, t);
    void *data = allocate(bytes, 1, 1); /* torch's from here on, also if it fails */
    return data && !torch_from_blob(data, dim, size, stride, 0, type, device, index, t,
                                    aoti_torch_layout_strided(), NULL, 0, release_data, NULL);
}

/* A new contiguous tensor as the next output; *data points to its first element. */
bool add_output(call_t *c, int64_t dim, const int64_t *size, hex_dtype_t dtype, void **data)
{
    int64_t stride[3], step = 1, bytes = item_size(dtype);
    AtenTensorHandle t;
    for (int64_t d = dim - 1; d >= 0; d--) {
        stride[d] = step;
        if (__builtin_mul_overflow(step, size[d] > 0 ? size[d] : 1, &step) ||
            __builtin_mul_overflow(bytes, size[d], &bytes))
            return fail(c, "cannot allocate an output");
    }
    if (!empty_tensor(c, dim, size, stride, dtype, bytes, &t))
        return fail(c, "cannot allocate an output");
    c->out[c->n_out++] = t;
    return torch_get_mutable_data_ptr(t, data) ? fail(c, SHIM_FAILED) : true;
}
