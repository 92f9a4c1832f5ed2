/* SPDX-License-Identifier: MIT */
/* The CUDA core as the operators see it: its loading, and around each call torch's device guard,
 * torch's current stream and torch's allocator. See device.h. */
#define _GNU_SOURCE /* RTLD_NOLOAD's companions */
#include "device.h"
#include "glibc.h"

#include <dlfcn.h>
#include <stdio.h>

static const hex_cuda_table *cuda;
/* In libtorch_cuda.so, which is in the process where there are CUDA tensors; of no CPU build. */
static AOTITorchError (*current_stream)(int32_t device_index, void **stream);

const char *hex_load_cuda(const char *path)
{
    static char text[512];
    const hex_cuda_table *table = NULL;
    if (!path) {
        if (cuda && cuda->emulated)
            cuda = NULL;
        return NULL;
    }
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library)
        table = dlsym(library, "hex_cuda_core");
    if (!table || table->version != HEX_CUDA_VERSION) {
        snprintf(text, sizeof text, "%s",
                 table ? "hex/_cuda.so belongs to another version of hex-ssl" : dlerror());
        return text;
    }
    const int error = table->driver();
    if (error) {
        snprintf(text, sizeof text, "the CUDA driver answers with error %d%s", error,
                 error == 35 ? ": it is missing, or older than the CUDA of this build" : "");
        return text;
    }
    if (!table->emulated) {
        void *torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        if (torch_cuda) /* as POSIX has it, for ISO C knows no way from an object to a function */
            *(void **)&current_stream = dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
        if (!current_stream)
            return "the torch that is loaded has no CUDA";
    }
    cuda = table;
    return NULL;
}

int hex_probe_cuda(int device) { return cuda ? cuda->probe(device) : -1; }

bool hex_cuda_is_emulated(void) { return cuda && cuda->emulated; }

bool hex_place_of(AtenTensorHandle t, hex_place_t *place)
{
    return !aoti_torch_get_device_type(t, &place->type) &&
           !aoti_torch_get_device_index(t, &place->index);
}

bool hex_place_is_cuda(const hex_place_t *place)
{
    return cuda && place->type == (cuda->emulated ? aoti_torch_device_type_cpu()
                                                  : aoti_torch_device_type_cuda());
}

const char *hex_place_name(const hex_place_t *place)
{
    return place->type == aoti_torch_device_type_cpu() ? "CPU" : "CUDA";
}

/* ---- around a call ---- */

typedef struct {
    hex_device device;
    const hex_place_t *place;
    AtenTensorHandle workspace;
    DeviceGuardHandle guard;
} surroundings;

/* A core asks once in a call. The memory goes back to torch's allocator after the launches, which
 * hands it only to later work on the same stream. */
static void *allocate(void *context, int64_t bytes)
{
    surroundings *s = context;
    const int64_t size = bytes > 0 ? bytes : 1, stride = 1;
    void *data;
    if (s->workspace ||
        aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), s->place->type,
                                 s->place->index, &s->workspace) ||
        torch_get_mutable_data_ptr(s->workspace, &data))
        return NULL;
    return data;
}

static const char *enter(surroundings *s, const hex_place_t *place)
{
    s->place = place;
    s->device = (hex_device){NULL, allocate, s, place->allow_tf32};
    if (cuda->emulated)
        return NULL;
    if (aoti_torch_create_device_guard(place->index, &s->guard) ||
        current_stream(place->index, &s->device.stream))
        return "cannot get torch's current stream";
    return NULL;
}

static const char *leave(surroundings *s, const char *error)
{
    if (s->workspace)
        aoti_torch_delete_tensor_object(s->workspace);
    if (s->guard)
        aoti_torch_delete_device_guard(s->guard);
    return error;
}

#define RUN(function, ...)                                                                         \
    surroundings s = {0};                                                                          \
    if (!hex_place_is_cuda(place))                                                                 \
        return hex_cpu_##function(p, __VA_ARGS__);                                                 \
    const char *error = enter(&s, place);                                                          \
    return leave(&s, error ? error : cuda->function(p, &s.device, __VA_ARGS__))

const char *hex_run_forward(const hex_place_t *place, const hex_problem_t *p, void *loss,
                            void *stats)
{
    RUN(forward, loss, stats);
}

const char *hex_run_backward(const hex_place_t *place, const hex_problem_t *p,
                             const hex_gradient_t *g)
{
    RUN(backward, g);
}

const char *hex_run_threshold(const hex_place_t *place, const hex_problem_t *p, double quantile,
                              bool over_negatives, double *mean)
{
    RUN(threshold, quantile, over_negatives, mean);
}

const char *hex_cuda_adaptive(const hex_place_t *place, const hex_problem_t *p,
                              const hex_tracker_t *t, const hex_device_state_t *state, void *loss,
                              void *stats)
{
    surroundings s = {0};
    const char *error = enter(&s, place);
    return leave(&s, error ? error : cuda->adaptive(p, &s.device, t, state, loss, stats));
}

const char *hex_run_row_range(const hex_place_t *place, const hex_problem_t *p, void *low,
                              void *high)
{
    RUN(row_range, low, high);
}

const char *hex_run_row_quantiles(const hex_place_t *place, const hex_problem_t *p, double quantile,
                                  bool over_negatives, void *rows)
{
    RUN(row_quantiles, quantile, over_negatives, rows);
}

const char *hex_cuda_settle(const hex_place_t *place, const hex_matrix_t *q, const hex_tracker_t *t,
                            const hex_device_state_t *state)
{
    surroundings s = {0};
    const char *error = enter(&s, place);
    return leave(&s, error ? error : cuda->settle(&s.device, q, t, state));
}

const char *hex_cuda_total(const hex_place_t *place, const hex_matrix_t *x, double *sums)
{
    surroundings s = {0};
    const char *error = enter(&s, place);
    return leave(&s, error ? error : cuda->total(&s.device, x, sums));
}
