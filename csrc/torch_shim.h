/* SPDX-License-Identifier: MIT */
/* The part of libtorch's stable C ABI that this extension calls, restated in C, so that building
 * needs neither torch nor C++. tests/abi_check.cpp holds every line of it against the headers of
 * the installed torch.
 *
 * Everything here is exported by libtorch_cpu.so of torch 2.10 and of every later one, but for what
 * has a list of its own at the end and may be NULL. All functions are declared weak: where torch
 * lacks one the extension still loads, and PyInit__C can name it.
 *
 * An AOTITorchError of 0 is success. Only aoti_torch_check throws. */
#ifndef HEX_TORCH_SHIM_H
#define HEX_TORCH_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Whose conventions for the stack we follow: major in the first byte, minor in the second. */
#define HEX_TORCH_ABI ((uint64_t)2 << 56 | (uint64_t)10 << 48)

typedef int32_t AOTITorchError;
typedef uint64_t StableIValue; /* a tensor's handle, or the bits of an int64, a double, a bool */
typedef struct AtenTensorOpaque *AtenTensorHandle;
typedef struct TorchLibraryOpaque *TorchLibraryHandle;
typedef struct DeviceGuardOpaque *DeviceGuardHandle;

/* X(result, name, parameters), once for each function.
 *
 * Ownership: a kernel owns the tensors on its stack and what empty_strided gave it; it deletes
 * each, or leaves it on the stack as an output. "borrowed": valid as long as the tensor. A library
 * handle is the caller's; deleting it would take its registrations back. Strings are copied, but
 * for `file`, which must live as long as the library. */
/* clang-format off */
#define HEX_TORCH_FUNCTIONS(X)                                                                     \
    /* ---- registering operators ---- */                                                          \
    X(AOTITorchError, aoti_torch_library_init_def,                                                 \
      (const char *name, const char *file, uint32_t line, TorchLibraryHandle *library)) /* new */  \
    X(AOTITorchError, aoti_torch_library_init_impl,                                                \
      (const char *name, const char *dispatch_key, const char *file, uint32_t line,                \
       TorchLibraryHandle *library)) /* new */                                                     \
    X(AOTITorchError, aoti_torch_library_def, (TorchLibraryHandle library, const char *schema))    \
    X(AOTITorchError, torch_library_impl,                                                          \
      (TorchLibraryHandle library, const char *op,                                                 \
       void (*kernel)(StableIValue *stack, uint64_t arguments, uint64_t outputs), uint64_t abi))   \
    /* ---- reading a tensor ---- */                                                               \
    X(AOTITorchError, aoti_torch_get_dim, (AtenTensorHandle t, int64_t *dim))                      \
    X(AOTITorchError, aoti_torch_get_sizes, (AtenTensorHandle t, int64_t **sizes)) /* borrowed */  \
    X(AOTITorchError, aoti_torch_get_strides, (AtenTensorHandle t, int64_t **strides)) /* same */  \
    X(AOTITorchError, aoti_torch_get_dtype, (AtenTensorHandle t, int32_t *dtype))                  \
    X(AOTITorchError, aoti_torch_get_layout, (AtenTensorHandle t, int32_t *layout))                \
    X(AOTITorchError, aoti_torch_get_device_type, (AtenTensorHandle t, int32_t *device_type))      \
    X(AOTITorchError, aoti_torch_get_device_index, (AtenTensorHandle t, int32_t *device_index))    \
    X(AOTITorchError, aoti_torch_get_storage_offset, (AtenTensorHandle t, int64_t *elements))      \
    X(AOTITorchError, aoti_torch_get_storage_size, (AtenTensorHandle t, int64_t *bytes))           \
    X(AOTITorchError, torch_get_const_data_ptr,                                                    \
      (AtenTensorHandle t, const void **data)) /* borrowed; the storage offset is in it */         \
    X(AOTITorchError, torch_get_mutable_data_ptr, (AtenTensorHandle t, void **data)) /* same */    \
    /* ---- making and freeing one ---- */                                                         \
    X(AOTITorchError, aoti_torch_empty_strided,                                                    \
      (int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype,                   \
       int32_t device_type, int32_t device_index, AtenTensorHandle *t)) /* new */                  \
    X(AOTITorchError, aoti_torch_delete_tensor_object, (AtenTensorHandle t))                       \
    /* ---- the current device ---- */                                                             \
    X(AOTITorchError, aoti_torch_create_device_guard,                                              \
      (int32_t device_index, DeviceGuardHandle *guard)) /* new */                                  \
    X(AOTITorchError, aoti_torch_delete_device_guard, (DeviceGuardHandle guard))                   \
    /* ---- codes; their values may differ between releases ---- */                                \
    X(int32_t, aoti_torch_dtype_float64, (void))                                                   \
    X(int32_t, aoti_torch_dtype_float32, (void))                                                   \
    X(int32_t, aoti_torch_dtype_float16, (void))                                                   \
    X(int32_t, aoti_torch_dtype_bfloat16, (void))                                                  \
    X(int32_t, aoti_torch_dtype_int64, (void))                                                     \
    X(int32_t, aoti_torch_dtype_bool, (void))                                                      \
    X(int32_t, aoti_torch_dtype_uint8, (void))                                                     \
    X(int32_t, aoti_torch_layout_strided, (void))                                                  \
    X(int32_t, aoti_torch_device_type_cuda, (void))                                                \
    X(int32_t, aoti_torch_device_type_cpu, (void))                                                 \
    /* ---- threads and errors ---- */                                                             \
    X(AOTITorchError, torch_parallel_for,                                                          \
      (int64_t begin, int64_t end, int64_t grain,                                                  \
       void (*body)(int64_t begin, int64_t end, void *context), void *context))                    \
    X(void, aoti_torch_check, /* unless condition: throws, a RuntimeError with text in Python */   \
      (bool condition, const char *function, const char *file, uint32_t line, const char *text))
/* Those of torch 2.11, which is asked for them one by one. */
#define HEX_TORCH_FUNCTIONS_2_11(X)                                                                \
    X(AOTITorchError, torch_from_blob,                                                             \
      (void *data, int64_t dim, const int64_t *sizes, const int64_t *strides, int64_t offset,      \
       int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle *t,              \
       int32_t layout, const uint8_t *metadata, int64_t metadata_bytes,                            \
       void (*deleter)(void *data, void *context), void *context)) /* new */
/* clang-format on */

#define DECLARE(result, name, parameters) __attribute__((weak)) result name parameters;
HEX_TORCH_FUNCTIONS(DECLARE)
HEX_TORCH_FUNCTIONS_2_11(DECLARE)
#undef DECLARE

/* The name of a function that the loaded torch does not have, or NULL. */
static inline const char *hex_missing_symbol(void)
{
#define CHECK(result, name, parameters)                                                            \
    if (!name)                                                                                     \
        return #name;
    HEX_TORCH_FUNCTIONS(CHECK)
#undef CHECK
    return NULL;
}

#endif
