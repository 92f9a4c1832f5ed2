/* SPDX-License-Identifier: MIT */
/* Boxed kernels: take the arguments off torch's stack, check them for memory safety, allocate the
 * outputs, call a core, put the outputs back. The schemas are in module.c; what a user may pass is
 * checked in Python, with friendlier words; here every error becomes a RuntimeError.
 *
 * Ownership: the kernel owns every tensor handle on its stack and must free it. aoti_torch_check
 * throws a C++ exception through this frame, so it is called in one place, finish(), when nothing
 * is held any more. */
#include "ops.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

/* Keeps the first error; returns false, so that checks can be chained with &&. */
bool fail(call *c, const char *format, ...)
{
    if (!c->error[0]) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(c->error, sizeof c->error, format, arguments);
        va_end(arguments);
    }
    return false;
}

bool ok(call *c, const char *core_error) { return core_error ? fail(c, "%s", core_error) : true; }

call begin(StableIValue *stack, int tensors)
{
    call c = {.n_in = tensors, .before = hex_ieee_begin()};
    for (int i = 0; i < tensors; i++)
        c.in[i] = (AtenTensorHandle)(uintptr_t)stack[i];
    if (!hex_place_of(c.in[0], &c.place))
        fail(&c, SHIM_FAILED);
    return c;
}

void finish(call *c, StableIValue *stack, const char *op)
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
        stack[i] = (StableIValue)(uintptr_t)c->out[i];
}

double to_double(StableIValue v)
{
    double x;
    memcpy(&x, &v, sizeof x);
    return x;
}

/* ---- tensors -> plain C ---- */

static bool read_dtype(int32_t code, hex_dtype *dtype)
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

static int32_t torch_dtype(hex_dtype dtype)
{
    return dtype == HEX_F32   ? aoti_torch_dtype_float32()
           : dtype == HEX_F64 ? aoti_torch_dtype_float64()
           : dtype == HEX_F16 ? aoti_torch_dtype_float16()
                              : aoti_torch_dtype_bfloat16();
}

int64_t item_size(hex_dtype dtype) { return dtype == HEX_F64 ? 8 : dtype == HEX_F32 ? 4 : 2; }

/* Whether every element lies inside the storage. torch's own operators trust this and crash on a
 * tensor whose storage was freed or shrunk under it, as sharded training does. */
bool inside_storage(AtenTensorHandle t, const view *v, int64_t element)
{
    int64_t last, bytes;
    if (aoti_torch_get_storage_offset(t, &last) || aoti_torch_get_storage_size(t, &bytes))
        return false;
    for (int64_t d = 0; d < v->dim; d++) {
        int64_t step;
        if (v->size[d] == 0)
            return true;
        if (v->stride[d] < 0 || __builtin_mul_overflow(v->size[d] - 1, v->stride[d], &step) ||
            __builtin_add_overflow(last, step, &last))
            return false;
    }
    return last < bytes / element;
}

bool read_dense(call *c, AtenTensorHandle t, const char *name, element_kind kind, view *v)
{
    static const char *const wanted[] = {"float64, float32, bfloat16 or float16", "int64", "bool"};
    hex_place place;
    int32_t dtype, layout;
    if (!hex_place_of(t, &place) || aoti_torch_get_dtype(t, &dtype) ||
        aoti_torch_get_layout(t, &layout))
        return fail(c, SHIM_FAILED);
    const bool right = kind == FLOATS     ? read_dtype(dtype, &v->dtype)
                       : kind == INTEGERS ? dtype == aoti_torch_dtype_int64()
                                          : dtype == aoti_torch_dtype_bool();
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

bool read_view(call *c, AtenTensorHandle t, const char *name, view *v)
{
    return read_dense(c, t, name, FLOATS, v);
}

/* See MOST_ROWS. */
bool check_sizes(call *c, const char *name, const view *v)
{
    for (int64_t d = 0; d < v->dim; d++)
        if (v->size[d] > MOST_ROWS)
            return fail(c, "%s: expected at most %" PRId64 " rows and columns, got %" PRId64, name,
                        MOST_ROWS, v->size[d]);
    return true;
}

static bool read_state(call *c, AtenTensorHandle t, view *v)
{
    if (!read_view(c, t, "state", v))
        return false;
    return v->dtype == HEX_F64 && v->dim == 1 && v->size[0] == HEX_STATE
               ? true
               : fail(c, "state: expected float64 of shape (%d,)", HEX_STATE);
}

bool read_numbers(call *c, AtenTensorHandle t, const char *name, numbers allowed, int64_t rows,
                  hex_vector *out)
{
    static const char *const shapes[] = {"", "()", "(rows,)", "() or (rows,)"};
    view v;
    if (!read_view(c, t, name, &v))
        return false;
    const bool shape =
        v.dim == 0 ? allowed & ONE : v.dim == 1 && allowed & EACH_ROW && v.size[0] == rows;
    if ((v.dtype != HEX_F32 && v.dtype != HEX_F64) || !shape)
        return fail(c, "%s: expected float32 or float64 of shape %s", name, shapes[allowed]);
    *out = (hex_vector){v.data, v.dtype, v.dim == 1 ? v.stride[0] : 0};
    return true;
}

/* z0, z1, negatives = in[first..first + 3) and the mode. */
static bool read_inputs(call *c, int first, int64_t mode, hex_problem *p)
{
    static const char *const name[3] = {"z0", "z1", "negatives"};
    view v[3];
    c->place.one_product = mode >= 0 && mode & 8; /* hex_device's; the CPU has no use for it */
    mode = mode >= 0 ? mode & ~(int64_t)8 : mode;
    if (mode < 0 || mode >= HEX_LOGITS)
        return fail(c, "mode: expected 0 to 4");
    for (int k = 0; k < 3; k++) {
        const bool cube = k == 2 && mode == HEX_OWN;
        const int64_t dim = cube ? 3 : 2;
        if (!read_view(c, c->in[first + k], name[k], &v[k]))
            return false;
        const int64_t *size = v[k].size, *stride = v[k].stride;
        if (v[k].dim != dim)
            return fail(c, "%s: expected %" PRId64 " dimensions, got %" PRId64, name[k], dim,
                        v[k].dim);
        if (!check_sizes(c, name[k], &v[k]))
            return false;
        if (size[dim - 1] != v[0].size[1])
            return fail(c, "%s: expected D = %" PRId64 " features, got %" PRId64, name[k],
                        v[0].size[1], size[dim - 1]);
        const int64_t rows = cube ? size[0] * size[1] : size[0], inner = cube ? size[1] : rows;
        p->wide |= v[k].dtype == HEX_F64 && (k < 2 || mode >= HEX_SHARED);
        p->input[k] = (hex_rows){.data = v[k].data,
                                 .dtype = v[k].dtype,
                                 .rows = rows,
                                 .inner = inner > 0 ? inner : 1, /* it divides */
                                 .outer = cube ? stride[0] : 0,
                                 .row = stride[dim - 2],
                                 .col = stride[dim - 1]};
    }
    p->mode = (hex_mode)mode;
    p->B = p->M = v[0].size[0];
    p->D = v[0].size[1];
    p->K = mode == HEX_OWN ? v[2].size[1] : v[2].size[0];
    if (v[1].size[0] != p->B)
        return fail(c, "z1: expected as many rows as z0, %" PRId64 ", got %" PRId64, p->B,
                    v[1].size[0]);
    if (mode == HEX_OWN && v[2].size[0] != p->B)
        return fail(c, "negatives: expected (B, K, D) with the B of z0");
    if (mode < HEX_SHARED && p->K != 0)
        return fail(c, "negatives: expected none (0, D) in this mode");
    return true;
}

static bool read_choices(call *c, int64_t reduction, int64_t variant, double beta, double tau_plus,
                         hex_problem *p)
{
    if (reduction < 0 || reduction >= HEX_REDUCTIONS)
        return fail(c, "reduction: expected 0, 1 or 2");
    if (variant < 0 || variant >= HEX_VARIANTS)
        return fail(c, "variant: expected 0 or 1");
    if (!(beta >= 0) || !(tau_plus >= 0 && tau_plus < 1))
        return fail(c, "expected beta >= 0 and tau_plus in [0, 1)");
    p->reduction = (hex_reduction)reduction;
    p->variant = (hex_variant)variant;
    p->beta = beta;
    p->tau_plus = tau_plus;
    return true;
}

/* ---- outputs ---- */

/* A new contiguous tensor as the next output; *data points to its first element. */
bool add_output(call *c, int64_t dim, const int64_t *size, hex_dtype dtype, void **data)
{
    int64_t stride[3], step = 1;
    AtenTensorHandle t;
    for (int64_t d = dim - 1; d >= 0; d--) {
        stride[d] = step;
        step *= size[d] > 0 ? size[d] : 1;
    }
    if (aoti_torch_empty_strided(dim, size, stride, torch_dtype(dtype), c->place.type,
                                 c->place.index, &t))
        return fail(c, "cannot allocate an output");
    c->out[c->n_out++] = t;
    return torch_get_mutable_data_ptr(t, data) ? fail(c, SHIM_FAILED) : true;
}

static hex_dtype compute_dtype(const hex_problem *p) { return p->wide ? HEX_F64 : HEX_F32; }

/* ---- the operators ---- */

/* Room for the cosines that are kept for the backward, in numbers; *used: whether they are. */
static int64_t kept_room(const call *c, const hex_problem *p, bool *used)
{
    *used = false;
    return hex_place_is_cuda(&c->place) ? 0 : hex_cpu_kept(p, used);
}

/* The cosines for the backward as the next output: none if they are not wanted. */
static bool add_kept(call *c, hex_problem *p, bool wanted)
{
    bool used = false;
    const int64_t n = wanted ? kept_room(c, p, &used) : 0;
    void *data;
    if (!add_output(c, 1, &n, compute_dtype(p), &data))
        return false;
    p->kept = used ? data : NULL;
    return true;
}

/* forward(z0, z1, negatives, eps, tau, mode, reduction, variant, beta, tau_plus, keep)
 * -> (loss, stats, kept) */
void hex_forward_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 5);
    hex_problem p = {0};
    void *loss, *stats;
    if (read_inputs(&c, 0, (int64_t)stack[5], &p) &&
        read_choices(&c, (int64_t)stack[6], (int64_t)stack[7], to_double(stack[8]),
                     to_double(stack[9]), &p) &&
        read_numbers(&c, c.in[3], "eps", ONE | EACH_ROW, hex_anchors(&p), &p.eps) &&
        read_numbers(&c, c.in[4], "tau", ONE, 0, &p.tau)) {
        const int64_t shape[2] = {HEX_STATS, hex_anchors(&p)};
        if (add_output(&c, p.reduction == HEX_NONE, shape + 1, compute_dtype(&p), &loss) &&
            add_output(&c, 2, shape, compute_dtype(&p), &stats) && add_kept(&c, &p, stack[10] & 1))
            ok(&c, hex_run_forward(&c.place, &p, loss, stats));
    }
    finish(&c, stack, "forward");
}

/* adaptive(z0, z1, negatives, state, tau, mode, reduction, variant, beta, tau_plus, quantile,
 * over_negatives, momentum, monotonic, lagged, warmup_epochs, warmup_threshold, keep)
 * -> (loss, stats, eps, state, kept) */
void hex_adaptive_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 5);
    hex_problem p = {0};
    hex_tracker t = {.quantile = to_double(stack[10]),
                     .over_negatives = stack[11] & 1,
                     .momentum = to_double(stack[12]),
                     .monotonic = stack[13] & 1,
                     .lagged = stack[14] & 1,
                     .warmup_epochs = (int64_t)stack[15],
                     .warmup_threshold = to_double(stack[16])};
    void *loss, *stats, *eps, *state;
    view v;
    if (!(t.quantile >= 0 && t.quantile <= 1))
        fail(&c, "quantile: expected a number in [0, 1]");
    else if (read_inputs(&c, 0, (int64_t)stack[5], &p) &&
             read_choices(&c, (int64_t)stack[6], (int64_t)stack[7], to_double(stack[8]),
                          to_double(stack[9]), &p) &&
             read_state(&c, c.in[3], &v) && read_numbers(&c, c.in[4], "tau", ONE, 0, &p.tau)) {
        const int64_t shape[2] = {HEX_STATS, hex_anchors(&p)}, states = HEX_STATE;
        if (add_output(&c, p.reduction == HEX_NONE, shape + 1, compute_dtype(&p), &loss) &&
            add_output(&c, 2, shape, compute_dtype(&p), &stats) &&
            add_output(&c, 0, NULL, HEX_F64, &eps) && add_output(&c, 1, &states, HEX_F64, &state) &&
            add_kept(&c, &p, stack[17] & 1)) {
            const hex_device_state on_device = {v.data, v.stride[0], state, eps};
            if (hex_place_is_cuda(&c.place))
                ok(&c, hex_cuda_adaptive(&c.place, &p, &t, &on_device, loss, stats));
            else {
                for (int k = 0; k < HEX_STATE; k++)
                    t.state[k] = on_device.state[k * on_device.stride];
                if (ok(&c, hex_cpu_adaptive(&p, &t, loss, stats))) {
                    *(double *)eps = t.eps;
                    memcpy(state, t.state, sizeof t.state);
                }
            }
        }
    }
    finish(&c, stack, "adaptive");
}

/* backward(grad, z0, z1, negatives, tau, stats, kept, mode, reduction, beta, needs) -> (dz0, dz1,
 * dnegatives, dtau) */
void hex_backward_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 7);
    hex_problem p = {0};
    hex_gradient g = {0};
    view stats, kept;
    const int64_t needs = (int64_t)stack[10];
    if (read_inputs(&c, 1, (int64_t)stack[7], &p) &&
        read_choices(&c, (int64_t)stack[8], HEX_PAPER, to_double(stack[9]), 0, &p) &&
        read_numbers(&c, c.in[0], "grad", p.reduction == HEX_NONE ? EACH_ROW : ONE, hex_anchors(&p),
                     &g.grad) &&
        read_numbers(&c, c.in[4], "tau", ONE, 0, &p.tau) &&
        read_view(&c, c.in[5], "stats", &stats) && read_view(&c, c.in[6], "kept", &kept)) {
        const int64_t rows = hex_anchors(&p), none = 0;
        if (stats.dtype != compute_dtype(&p) || stats.dim != 2 || stats.size[0] != HEX_STATS ||
            stats.size[1] != rows ||
            (rows > 0 && (stats.stride[0] != rows || (rows > 1 && stats.stride[1] != 1))))
            fail(&c, "stats: expected the contiguous (statistics, rows) tensor of the forward");
        g.stats = stats.data;
        bool used;
        const int64_t room = kept_room(&c, &p, &used);
        if (kept.dtype != compute_dtype(&p) || kept.dim != 1 ||
            (kept.size[0] != 0 && (kept.size[0] != room || (room > 1 && kept.stride[0] != 1))))
            fail(&c, "kept: expected the contiguous tensor of the forward");
        p.kept = used && kept.size[0] ? (void *)kept.data : NULL;
        for (int k = 0; k < 3; k++) {
            int64_t size[3] = {k == 2 && p.mode != HEX_OWN ? p.K : p.B, p.D, 0};
            if (k == 2 && p.mode == HEX_OWN)
                size[1] = p.K, size[2] = p.D;
            const bool wanted = needs >> k & 1;
            void *data = NULL;
            if (!c.error[0] && add_output(&c,
                                          !wanted                       ? 1
                                          : k == 2 && p.mode == HEX_OWN ? 3
                                                                        : 2,
                                          wanted ? size : &none, p.input[k].dtype, &data))
                g.dz[k] = wanted && p.input[k].rows * p.D > 0 ? data : NULL;
        }
        double dtau = 0;
        void *out = NULL;
        if (!c.error[0] && add_output(&c, needs & 8 ? 0 : 1, &none, p.tau.dtype, &out)) {
            const bool cuda = hex_place_is_cuda(&c.place);
            g.dtau = !cuda ? &dtau : needs & 8 ? out : NULL;
            if (ok(&c, hex_run_backward(&c.place, &p, &g)) && !cuda && needs & 8) {
                if (p.tau.dtype == HEX_F64)
                    *(double *)out = dtau;
                else
                    *(float *)out = (float)dtau;
            }
        }
    }
    finish(&c, stack, "backward");
}

/* threshold(z0, z1, negatives, mode, quantile, over_negatives) -> float64 scalar */
void hex_threshold_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 3);
    hex_problem p = {0};
    void *mean;
    const double quantile = to_double(stack[4]);
    if (!(quantile >= 0 && quantile <= 1))
        fail(&c, "quantile: expected a number in [0, 1]");
    else if (read_inputs(&c, 0, (int64_t)stack[3], &p) && add_output(&c, 0, NULL, HEX_F64, &mean))
        ok(&c, hex_run_threshold(&c.place, &p, quantile, stack[5] & 1, mean));
    finish(&c, stack, "threshold");
}

/* row_range(z0, z1, negatives, mode) -> (low, high) */
void hex_row_range_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 3);
    hex_problem p = {0};
    void *low, *high;
    if (read_inputs(&c, 0, (int64_t)stack[3], &p)) {
        const int64_t rows = hex_anchors(&p);
        if (add_output(&c, 1, &rows, compute_dtype(&p), &low) &&
            add_output(&c, 1, &rows, compute_dtype(&p), &high))
            ok(&c, hex_run_row_range(&c.place, &p, low, high));
    }
    finish(&c, stack, "row_range");
}
