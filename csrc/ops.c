/* SPDX-License-Identifier: MIT */
/* The four operators of torch.ops.hex: a call's arguments become a problem (hex.h), a core solves it,
 * the outputs go back. The schemas are in module.c, the layouts of all losses as this problem in
 * hex/problem.py, reading and throwing in call.c. */
#include "ops.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "call.h"

/* ---- the problem ---- */

/* The tensors that every operator has, in the order of the schemas. */
typedef struct {
    AtenTensorHandle z[3], ids, mask, groups, guide;
} tensors_t;

/* z0, z1, negatives, ids, mask, groups, guide; the last two where there is a choice of H. */
static tensors_t next_tensors(call_t *c, bool chosen)
{
    tensors_t t = {0};
    for (int k = 0; k < 3; k++)
        t.z[k] = next_tensor(c);
    t.ids = next_tensor(c);
    t.mask = next_tensor(c);
    if (chosen) {
        t.groups = next_tensor(c);
        t.guide = next_tensor(c);
    }
    return t;
}

/* How many positives an anchor has: its partner; or all of the same id, outside the logarithm or
 * inside. */
enum { ONE_POSITIVE, SEVERAL_OUTSIDE, SEVERAL_INSIDE };

static bool read_inputs(call_t *c, const tensors_t *t, int64_t mode, bool several, hex_problem_t *p)
{
    static const char *const name[3] = {"z0", "z1", "negatives"};
    view_t v[3];
    if (mode < 0 || mode > HEX_LOGITS)
        return fail(c, "mode: expected 0 to 5");
    p->mode = (hex_mode_t)mode;
    p->several = several;
    for (int k = 0; k < 3; k++) {
        const bool cube = k == 2 && mode == HEX_PAIRED;
        const int64_t dim = cube ? 3 : 2;
        if (!read_view(c, t->z[k], name[k], &v[k]))
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
        const bool used = k < 2 || mode == HEX_UNPAIRED || mode == HEX_PAIRED;
        p->compute_f64 |= v[k].dtype == HEX_F64 && used;
        p->input[k] = (hex_rows_t){.data = v[k].data,
                                   .dtype = v[k].dtype,
                                   .rows = rows,
                                   .inner = inner > 0 ? inner : 1, /* it divides */
                                   .outer = cube ? stride[0] : 0,
                                   .row = stride[dim - 2],
                                   .col = stride[dim - 1]};
    }
    p->B = p->count = v[0].size[0];
    p->M = v[1].size[0];
    p->D = v[0].size[1];
    p->K = mode == HEX_PAIRED ? v[2].size[1] : v[2].size[0];
    if (mode == HEX_LOGITS ? !several : several && (mode == HEX_CROSS || mode == HEX_PAIRED))
        return fail(c, "mode: %d is for anchors with %s", (int)mode,
                    several ? "one positive" : "several positives");
    if (mode == HEX_LOGITS && p->M != 0)
        return fail(c, "z1: expected none (0, D) in this mode");
    if ((!several || mode == HEX_UNPAIRED) && p->M != p->B)
        return fail(c, "z1: expected as many rows as z0, %" PRId64 ", got %" PRId64, p->B, p->M);
    if (mode == HEX_PAIRED && v[2].size[0] != p->B)
        return fail(c, "negatives: expected (B, K, D) with the B of z0");
    if ((mode < HEX_UNPAIRED || mode == HEX_LOGITS) && p->K != 0)
        return fail(c, "negatives: expected none (0, D) in this mode");
    return true;
}

/* The block of anchors; count -1: all that follow. */
static bool read_block(call_t *c, int64_t first, int64_t count, hex_problem_t *p)
{
    if (first < 0 || first > p->B || count < -1 || count > p->B - first)
        return fail(c,
                    "first, count: expected a block of %" PRId64 " rows, got %" PRId64 ", %" PRId64,
                    p->B, first, count);
    p->first = first;
    p->count = count < 0 ? p->B - first : count;
    if (!hex_is_whole(p) && p->M != 0 && p->M != p->B)
        return fail(c, "first, count: expected all rows of z0, for z1 has another number of them");
    return true;
}

/* Rows of all inputs. */
static int64_t input_rows(const hex_problem_t *p)
{
    return hex_input_rows(p, 0) + hex_input_rows(p, 1) + hex_input_rows(p, 2);
}

/* A label of every row, all inputs' in one tensor; or none. */
static bool read_labels(call_t *c, AtenTensorHandle t, const char *name, const hex_problem_t *p,
                        hex_ids_t out[3], bool *there)
{
    view_t v;
    const int64_t n = input_rows(p);
    if (!read_dense(c, t, name, INTEGERS, &v))
        return false;
    if (v.dim != 1 || (v.size[0] != n && v.size[0] != 0))
        return fail(c, "%s: expected %" PRId64 " labels in one dimension", name, n);
    *there = v.size[0] > 0;
    const int64_t *data = v.data;
    for (int k = 0; *there && k < 3; k++) {
        out[k] = (hex_ids_t){data, v.stride[0]};
        data += hex_input_rows(p, k) * v.stride[0];
    }
    return true;
}

/* The targets of logits. They are copied before they are checked: another thread may write to the
 * tensor, and a column that is none would be an address that is none. */
static bool read_target(call_t *c, AtenTensorHandle t, hex_problem_t *p)
{
    view_t v;
    if (!read_dense(c, t, "ids", INTEGERS, &v))
        return false;
    if (v.dim != 1 || v.size[0] != p->B)
        return fail(c, "ids: expected %" PRId64 " targets in one dimension", p->B);
    int64_t *columns = c->memory = malloc((size_t)(p->B + 1) * sizeof *columns);
    if (!columns)
        return fail(c, "out of memory");
    for (int64_t i = 0; i < p->B; i++) {
        const int64_t column = columns[i] = *((const volatile int64_t *)v.data + i * v.stride[0]);
        if (column < 0 || column >= p->D)
            return fail(c, "target: expected columns in [0, %" PRId64 "), got %" PRId64, p->D,
                        column);
    }
    p->ids[0] = (hex_ids_t){columns, 1};
    return true;
}

static bool read_mask(call_t *c, AtenTensorHandle t, hex_problem_t *p)
{
    view_t v;
    if (!read_dense(c, t, "mask", BOOLEANS, &v))
        return false;
    if (v.dim != 2 || v.size[0] != v.size[1])
        return fail(c, "mask: expected a square matrix");
    if (v.size[0] == 0)
        return true;
    if (p->mode != HEX_NTXENT || !p->several || (p->B + p->M) % v.size[0])
        return fail(c, "mask: expected rows among themselves and a part of their %" PRId64,
                    p->B + p->M);
    p->mask = (hex_mask_t){v.data, v.size[0], v.stride[0], v.stride[1]};
    return true;
}

/* Who is a positive of whom. */
static bool read_positives(call_t *c, const tensors_t *t, hex_problem_t *p)
{
    bool labelled = false;
    if (p->mode == HEX_LOGITS)
        return read_target(c, t->ids, p) && read_mask(c, t->mask, p);
    if (!read_mask(c, t->mask, p) || !read_labels(c, t->ids, "ids", p, p->ids, &labelled))
        return false;
    if (p->several ? !labelled && !p->mask.data && p->B + p->M + p->K > 0 : labelled)
        return fail(c, "ids: expected %s", p->several ? "labels, or a mask" : "none");
    return true;
}

/* Who decides H, if not eps on the cosines themselves. */
static bool read_decider(call_t *c, const tensors_t *t, hex_problem_t *p)
{
    view_t v;
    if (!read_labels(c, t->groups, "groups", p, p->groups, &p->by_group) ||
        !read_view(c, t->guide, "guide", &v) || !check_sizes(c, "guide", &v))
        return false;
    const int64_t n = input_rows(p);
    if (v.dim != 2 || (v.size[0] != 0 && v.size[0] != n))
        return fail(c, "guide: expected a row for each of %" PRId64, n);
    p->G = v.size[0] > 0 ? v.size[1] : 0;
    if ((p->G > 0 && p->by_group) || ((p->G > 0 || p->by_group) && p->mode == HEX_LOGITS))
        return fail(c, "groups, guide: expected one of them at most, and none with logits");
    const char *data = v.data;
    for (int k = 0; p->G > 0 && k < 3; k++) {
        const int64_t rows = hex_input_rows(p, k);
        p->guide[k] = (hex_rows_t){.data = data,
                                   .dtype = v.dtype,
                                   .rows = rows,
                                   .inner = rows > 0 ? rows : 1,
                                   .row = v.stride[0],
                                   .col = v.stride[1]};
        data += rows * v.stride[0] * item_size(v.dtype);
    }
    return true;
}

static bool read_rule(call_t *c, int64_t reduction, int64_t variant, int64_t positives, double beta,
                      double tau_plus, hex_problem_t *p)
{
    if (reduction < 0 || reduction >= HEX_REDUCTIONS)
        return fail(c, "reduction: expected 0, 1 or 2");
    if (variant < 0 || variant >= HEX_VARIANTS)
        return fail(c, "variant: expected 0 or 1");
    if (positives < ONE_POSITIVE || positives > SEVERAL_INSIDE)
        return fail(c, "positives: expected 0, 1 or 2");
    if (!(beta >= 0))
        return fail(c, "beta: expected a number from 0 on");
    if (!(tau_plus >= 0 && tau_plus < 1))
        return fail(c, "tau_plus: expected a number in [0, 1)");
    p->reduction = (hex_reduction_t)reduction;
    p->variant = (hex_variant_t)variant;
    p->positives = positives == SEVERAL_INSIDE ? HEX_INSIDE : HEX_OUTSIDE;
    p->beta = beta;
    p->tau_plus = tau_plus;
    return true;
}

/* The CUDA core has kernels for whole batches of views and negatives, compared with eps themselves. */
static bool check_place(call_t *c, const hex_problem_t *p)
{
    if (hex_place_is_cuda(&c->place) && (p->several || p->by_group || p->G > 0))
        return fail(
            c, "positives, groups, guide: expected one positive and none of the others on CUDA");
    if (hex_place_is_cuda(&c->place) && !hex_is_whole(p))
        return fail(c, "first, count: expected all rows of z0 on CUDA");
    return true;
}

/* ---- outputs ---- */

static hex_dtype_t compute_dtype(const hex_problem_t *p)
{
    return p->compute_f64 ? HEX_F64 : HEX_F32;
}

/* loss and stats */
static bool add_rows(call_t *c, const hex_problem_t *p, void **loss, void **stats)
{
    const int64_t shape[2] = {hex_stats(p), hex_block_anchors(p)};
    return add_output(c, p->reduction == HEX_NONE, shape + 1, compute_dtype(p), loss) &&
           add_output(c, 2, shape, compute_dtype(p), stats);
}

/* Room for the cosines that are kept for the backward, in numbers; *used: whether they are. */
static int64_t kept_room(const call_t *c, const hex_problem_t *p, bool *used)
{
    *used = false;
    return hex_place_is_cuda(&c->place) ? 0 : hex_cpu_kept(p, used);
}

/* They as the next output: none if they are not wanted. */
static bool add_kept(call_t *c, hex_problem_t *p, bool wanted)
{
    bool used = false;
    const int64_t n = wanted ? kept_room(c, p, &used) : 0;
    void *data;
    if (!add_output(c, 1, &n, compute_dtype(p), &data))
        return false;
    p->kept = used ? data : NULL;
    return true;
}

/* The gradient of input k, or an empty tensor where it is not wanted. */
static bool add_gradient(call_t *c, const hex_problem_t *p, int k, bool wanted, hex_gradient_t *g)
{
    const bool cube = k == 2 && p->mode == HEX_PAIRED;
    const int64_t none = 0;
    const int64_t size[3] = {cube ? p->count : hex_block_rows(p, k), cube ? p->K : p->D, p->D};
    void *data;
    if (!add_output(c, !wanted ? 1 : cube ? 3 : 2, wanted ? size : &none, p->input[k].dtype, &data))
        return false;
    g->dz[k] = wanted && p->input[k].rows * p->D > 0 ? data : NULL;
    return true;
}

/* ---- the operators ---- */

/* forward(z0, z1, negatives, ids, mask, groups, guide, eps, tau, mode, reduction, variant, positives,
 * beta, tau_plus, keep, allow_tf32, first, count) -> (loss, stats, kept) */
void hex_forward_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 9);
    const tensors_t t = next_tensors(&c, true);
    const AtenTensorHandle eps = next_tensor(&c), tau = next_tensor(&c);
    const int64_t mode = next_int(&c), reduction = next_int(&c), variant = next_int(&c),
                  positives = next_int(&c);
    const double beta = next_float(&c), tau_plus = next_float(&c);
    const bool keep = next_bool(&c);
    c.place.allow_tf32 = next_bool(&c);
    const int64_t first = next_int(&c), count = next_int(&c);
    hex_problem_t p = {0};
    void *loss, *stats;
    if (read_inputs(&c, &t, mode, positives != ONE_POSITIVE, &p) &&
        read_block(&c, first, count, &p) && read_positives(&c, &t, &p) &&
        read_decider(&c, &t, &p) &&
        read_rule(&c, reduction, variant, positives, beta, tau_plus, &p) &&
        read_numbers(&c, eps, "eps", ONE | EACH_ROW, hex_block_anchors(&p), &p.eps) &&
        read_numbers(&c, tau, "tau", ONE, 0, &p.tau) && check_place(&c, &p) &&
        add_rows(&c, &p, &loss, &stats) && add_kept(&c, &p, keep))
        ok(&c, hex_run_forward(&c.place, &p, loss, stats));
    finish(&c, "forward");
}

static bool read_state(call_t *c, AtenTensorHandle t, view_t *v)
{
    if (!read_view(c, t, "state", v))
        return false;
    return v->dtype == HEX_F64 && v->dim == 1 && v->size[0] == HEX_STATE
               ? true
               : fail(c, "state: expected float64 of shape (%d,)", HEX_STATE);
}

static bool check_no_decider(call_t *c, const hex_problem_t *p)
{
    return p->by_group || p->G > 0 ? fail(c, "expected no groups and no guide") : true;
}

static bool check_quantile(call_t *c, double quantile)
{
    return quantile >= 0 && quantile <= 1 ? true : fail(c, "quantile: expected a number in [0, 1]");
}

/* adaptive(z0, z1, negatives, ids, mask, groups, guide, state, tau, mode, reduction, variant,
 * positives, beta, tau_plus, keep, allow_tf32, self_column, quantile, over_negatives, momentum,
 * monotonic, lagged, warmup_epochs, warmup_threshold) -> (loss, stats, kept, eps, new_state) */
void hex_adaptive_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 9);
    const tensors_t t = next_tensors(&c, true);
    const AtenTensorHandle old = next_tensor(&c), tau = next_tensor(&c);
    const int64_t mode = next_int(&c), reduction = next_int(&c), variant = next_int(&c),
                  positives = next_int(&c);
    const double beta = next_float(&c), tau_plus = next_float(&c);
    const bool keep = next_bool(&c);
    c.place.allow_tf32 = next_bool(&c);
    hex_problem_t p = {.self_column = next_bool(&c)};
    hex_tracker_t tracker = {.quantile = next_float(&c)};
    tracker.over_negatives = next_bool(&c);
    tracker.momentum = next_float(&c);
    tracker.monotonic = next_bool(&c);
    tracker.lagged = next_bool(&c);
    tracker.warmup_epochs = next_int(&c);
    tracker.warmup_threshold = next_float(&c);
    void *loss, *stats, *eps, *state;
    view_t v;
    if (check_quantile(&c, tracker.quantile) &&
        read_inputs(&c, &t, mode, positives != ONE_POSITIVE, &p) && read_positives(&c, &t, &p) &&
        read_decider(&c, &t, &p) && check_no_decider(&c, &p) &&
        read_rule(&c, reduction, variant, positives, beta, tau_plus, &p) &&
        read_state(&c, old, &v) && read_numbers(&c, tau, "tau", ONE, 0, &p.tau) &&
        check_place(&c, &p) && add_rows(&c, &p, &loss, &stats) && add_kept(&c, &p, keep) &&
        add_output(&c, 0, NULL, HEX_F64, &eps) &&
        add_output(&c, 1, (int64_t[]){HEX_STATE}, HEX_F64, &state)) {
        const hex_device_state_t on_device = {v.data, v.stride[0], state, eps};
        if (hex_place_is_cuda(&c.place))
            ok(&c, hex_cuda_adaptive(&c.place, &p, &tracker, &on_device, loss, stats));
        else {
            for (int k = 0; k < HEX_STATE; k++)
                tracker.state[k] = on_device.state[k * on_device.stride];
            if (ok(&c, hex_cpu_adaptive(&p, &tracker, loss, stats))) {
                *(double *)eps = tracker.eps;
                memcpy(state, tracker.state, sizeof tracker.state);
            }
        }
    }
    finish(&c, "adaptive");
}

/* The forward's statistics. */
static bool read_stats(call_t *c, AtenTensorHandle t, hex_problem_t *p, hex_gradient_t *g)
{
    view_t v;
    const int64_t rows = hex_anchors(p);
    if (!read_view(c, t, "stats", &v))
        return false;
    if (v.dtype != compute_dtype(p) || v.dim != 2 || v.size[0] != hex_stats(p) ||
        v.size[1] != rows || (rows > 0 && (v.stride[0] != rows || (rows > 1 && v.stride[1] != 1))))
        return fail(c, "stats: expected the contiguous (statistics, rows) tensor of the forward");
    g->stats = v.data;
    return true;
}

static bool read_kept(call_t *c, AtenTensorHandle t, hex_problem_t *p)
{
    view_t v;
    bool used;
    const int64_t room = kept_room(c, p, &used);
    if (!read_view(c, t, "kept", &v))
        return false;
    if (v.dtype != compute_dtype(p) || v.dim != 1 ||
        (v.size[0] != 0 && (v.size[0] != room || (room > 1 && v.stride[0] != 1))))
        return fail(c, "kept: expected the contiguous tensor of the forward");
    p->kept = used && v.size[0] ? (void *)v.data : NULL;
    return true;
}

/* backward(grad, z0, z1, negatives, ids, mask, groups, guide, tau, stats, kept, mode, reduction,
 * positives, beta, allow_tf32, needs, first, count) -> (dz0, dz1, dnegatives, dtau); needs: a bit
 * for each. Of a block: the loss of all anchors and their statistics, the gradient of its rows. */
void hex_backward_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 11);
    const AtenTensorHandle grad = next_tensor(&c);
    const tensors_t t = next_tensors(&c, true);
    const AtenTensorHandle tau = next_tensor(&c), stats = next_tensor(&c), kept = next_tensor(&c);
    const int64_t mode = next_int(&c), reduction = next_int(&c), positives = next_int(&c);
    const double beta = next_float(&c);
    c.place.allow_tf32 = next_bool(&c);
    const int64_t needs = next_int(&c), first = next_int(&c), count = next_int(&c);
    hex_problem_t p = {0};
    hex_gradient_t g = {0};
    void *out = NULL;
    if (read_inputs(&c, &t, mode, positives != ONE_POSITIVE, &p) &&
        read_block(&c, first, count, &p) && read_positives(&c, &t, &p) &&
        read_decider(&c, &t, &p) && read_rule(&c, reduction, HEX_PAPER, positives, beta, 0, &p) &&
        read_numbers(&c, grad, "grad", p.reduction == HEX_NONE ? EACH_ROW : ONE, hex_anchors(&p),
                     &g.grad) &&
        read_numbers(&c, tau, "tau", ONE, 0, &p.tau) && check_place(&c, &p) &&
        read_stats(&c, stats, &p, &g) && read_kept(&c, kept, &p) &&
        add_gradient(&c, &p, 0, needs & 1, &g) && add_gradient(&c, &p, 1, needs & 2, &g) &&
        add_gradient(&c, &p, 2, needs & 4, &g) &&
        add_output(&c, needs & 8 ? 0 : 1, (int64_t[]){0}, p.tau.dtype, &out)) {
        const bool cuda = hex_place_is_cuda(&c.place), wanted = needs & 8;
        double dtau = 0;
        g.dtau = !cuda ? &dtau : wanted ? out : NULL;
        if (ok(&c, hex_run_backward(&c.place, &p, &g)) && !cuda && wanted) {
            if (p.tau.dtype == HEX_F64)
                *(double *)out = dtau;
            else
                *(float *)out = (float)dtau;
        }
    }
    finish(&c, "backward");
}

/* quantile(z0, z1, negatives, ids, mask, tau, mode, several, allow_tf32, self_column, quantile,
 * over_negatives, bounds, first, count) -> (mean, low, high): the mean over rows of the row's quantile; or, with
 * `bounds`, each row's least and greatest cosine. What is not asked for is empty. */
void hex_quantile_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 6);
    const tensors_t t = next_tensors(&c, false);
    const AtenTensorHandle tau = next_tensor(&c);
    const int64_t mode = next_int(&c);
    const bool several = next_bool(&c);
    c.place.allow_tf32 = next_bool(&c);
    hex_problem_t p = {.self_column = next_bool(&c)};
    const double quantile = next_float(&c);
    const bool over_negatives = next_bool(&c), bounds = next_bool(&c);
    const int64_t first = next_int(&c), count = next_int(&c);
    void *mean, *low, *high;
    if (check_quantile(&c, quantile) && read_inputs(&c, &t, mode, several, &p) &&
        read_block(&c, first, count, &p) && read_positives(&c, &t, &p) &&
        read_numbers(&c, tau, "tau", ONE, 0, &p.tau) && check_place(&c, &p)) {
        const int64_t rows = bounds ? hex_block_anchors(&p) : 0;
        if (add_output(&c, bounds, (int64_t[]){0}, HEX_F64, &mean) &&
            add_output(&c, 1, &rows, compute_dtype(&p), &low) &&
            add_output(&c, 1, &rows, compute_dtype(&p), &high))
            ok(&c, bounds ? hex_run_row_range(&c.place, &p, low, high)
                          : hex_run_threshold(&c.place, &p, quantile, over_negatives, mean));
    }
    finish(&c, "quantile");
}
