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
} tensors;

/* z0, z1, negatives, ids, mask, groups, guide; the last two where there is a choice of H. */
static tensors next_tensors(call *c, bool chosen)
{
    tensors t = {0};
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

static bool read_inputs(call *c, const tensors *t, int64_t mode, bool several, hex_problem *p)
{
    static const char *const name[3] = {"z0", "z1", "negatives"};
    view v[3];
    if (mode < 0 || mode > HEX_LOGITS)
        return fail(c, "mode: expected 0 to 5");
    p->mode = (hex_mode)mode;
    p->several = several;
    for (int k = 0; k < 3; k++) {
        const bool cube = k == 2 && mode == HEX_OWN;
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
        const bool used = k < 2 || mode == HEX_SHARED || mode == HEX_OWN;
        p->wide |= v[k].dtype == HEX_F64 && used;
        p->input[k] = (hex_rows){.data = v[k].data,
                                 .dtype = v[k].dtype,
                                 .rows = rows,
                                 .inner = inner > 0 ? inner : 1, /* it divides */
                                 .outer = cube ? stride[0] : 0,
                                 .row = stride[dim - 2],
                                 .col = stride[dim - 1]};
    }
    p->B = v[0].size[0];
    p->M = v[1].size[0];
    p->D = v[0].size[1];
    p->K = mode == HEX_OWN ? v[2].size[1] : v[2].size[0];
    if (mode == HEX_LOGITS ? !several : several && (mode == HEX_CROSS || mode == HEX_OWN))
        return fail(c, "positives: expected others in this mode");
    if (mode == HEX_LOGITS && p->M != 0)
        return fail(c, "z1: expected none (0, D) in this mode");
    if ((!several || mode == HEX_SHARED) && p->M != p->B)
        return fail(c, "z1: expected as many rows as z0, %" PRId64 ", got %" PRId64, p->B, p->M);
    if (mode == HEX_OWN && v[2].size[0] != p->B)
        return fail(c, "negatives: expected (B, K, D) with the B of z0");
    if ((mode < HEX_SHARED || mode == HEX_LOGITS) && p->K != 0)
        return fail(c, "negatives: expected none (0, D) in this mode");
    return true;
}

/* Rows of z0, z1 and negatives. */
static void count_rows(const hex_problem *p, int64_t rows[3])
{
    rows[0] = p->B;
    rows[1] = p->M;
    rows[2] = p->mode == HEX_OWN ? p->B * p->K : p->K;
}

/* A label of every row, all inputs' in one tensor; or none. */
static bool read_labels(call *c, AtenTensorHandle t, const char *name, const hex_problem *p,
                        hex_ids out[3], bool *there)
{
    view v;
    int64_t rows[3];
    count_rows(p, rows);
    const int64_t n = rows[0] + rows[1] + rows[2];
    if (!read_dense(c, t, name, INTEGERS, &v))
        return false;
    if (v.dim != 1 || (v.size[0] != n && v.size[0] != 0))
        return fail(c, "%s: expected %" PRId64 " labels in one dimension", name, n);
    *there = v.size[0] > 0;
    const int64_t *data = v.data;
    for (int k = 0; *there && k < 3; k++) {
        out[k] = (hex_ids){data, v.stride[0]};
        data += rows[k] * v.stride[0];
    }
    return true;
}

/* The targets of logits. They are copied before they are checked: another thread may write to the
 * tensor, and a column that is none would be an address that is none. */
static bool read_target(call *c, AtenTensorHandle t, hex_problem *p)
{
    view v;
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
    p->ids[0] = (hex_ids){columns, 1};
    return true;
}

static bool read_mask(call *c, AtenTensorHandle t, hex_problem *p)
{
    view v;
    if (!read_dense(c, t, "mask", BOOLEANS, &v))
        return false;
    if (v.dim != 2 || v.size[0] != v.size[1])
        return fail(c, "mask: expected a square matrix");
    if (v.size[0] == 0)
        return true;
    if (p->mode != HEX_NTXENT || !p->several || (p->B + p->M) % v.size[0])
        return fail(c, "mask: expected rows among themselves and a part of their %" PRId64,
                    p->B + p->M);
    p->mask = (hex_mask){v.data, v.size[0], v.stride[0], v.stride[1]};
    return true;
}

/* Who is a positive of whom. */
static bool read_positives(call *c, const tensors *t, hex_problem *p)
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
static bool read_decider(call *c, const tensors *t, hex_problem *p)
{
    view v;
    int64_t rows[3];
    if (!read_labels(c, t->groups, "groups", p, p->groups, &p->given) ||
        !read_view(c, t->guide, "guide", &v) || !check_sizes(c, "guide", &v))
        return false;
    count_rows(p, rows);
    const int64_t n = rows[0] + rows[1] + rows[2];
    if (v.dim != 2 || (v.size[0] != 0 && v.size[0] != n))
        return fail(c, "guide: expected a row for each of %" PRId64, n);
    p->G = v.size[0] > 0 ? v.size[1] : 0;
    if ((p->G > 0 && p->given) || ((p->G > 0 || p->given) && p->mode == HEX_LOGITS))
        return fail(c, "expected groups or a guide, not both, and neither with logits");
    const char *data = v.data;
    for (int k = 0; p->G > 0 && k < 3; k++) {
        p->guide[k] = (hex_rows){.data = data,
                                 .dtype = v.dtype,
                                 .rows = rows[k],
                                 .inner = rows[k] > 0 ? rows[k] : 1,
                                 .row = v.stride[0],
                                 .col = v.stride[1]};
        data += rows[k] * v.stride[0] * item_size(v.dtype);
    }
    return true;
}

static bool read_rule(call *c, int64_t reduction, int64_t variant, int64_t positives, double beta,
                      double tau_plus, hex_problem *p)
{
    if (reduction < 0 || reduction >= HEX_REDUCTIONS)
        return fail(c, "reduction: expected 0, 1 or 2");
    if (variant < 0 || variant >= HEX_VARIANTS)
        return fail(c, "variant: expected 0 or 1");
    if (positives < ONE_POSITIVE || positives > SEVERAL_INSIDE)
        return fail(c, "positives: expected 0, 1 or 2");
    if (!(beta >= 0) || !(tau_plus >= 0 && tau_plus < 1))
        return fail(c, "expected beta >= 0 and tau_plus in [0, 1)");
    p->reduction = (hex_reduction)reduction;
    p->variant = (hex_variant)variant;
    p->positives = positives == SEVERAL_INSIDE ? HEX_INSIDE : HEX_OUTSIDE;
    p->beta = beta;
    p->tau_plus = tau_plus;
    return true;
}

/* The CUDA core has kernels for views and negatives, compared with eps themselves. */
static bool check_place(call *c, const hex_problem *p)
{
    if (hex_place_is_cuda(&c->place) && (p->several || p->given || p->G > 0))
        return fail(c, "expected one positive, no groups and no guide on CUDA");
    return true;
}

/* ---- outputs ---- */

static hex_dtype compute_dtype(const hex_problem *p) { return p->wide ? HEX_F64 : HEX_F32; }

/* loss and stats */
static bool add_rows(call *c, const hex_problem *p, void **loss, void **stats)
{
    const int64_t shape[2] = {hex_stats(p), hex_anchors(p)};
    return add_output(c, p->reduction == HEX_NONE, shape + 1, compute_dtype(p), loss) &&
           add_output(c, 2, shape, compute_dtype(p), stats);
}

/* Room for the cosines that are kept for the backward, in numbers; *used: whether they are. */
static int64_t kept_room(const call *c, const hex_problem *p, bool *used)
{
    *used = false;
    return hex_place_is_cuda(&c->place) ? 0 : hex_cpu_kept(p, used);
}

/* They as the next output: none if they are not wanted. */
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

/* The gradient of input k, or an empty tensor where it is not wanted. */
static bool add_gradient(call *c, const hex_problem *p, int k, bool wanted, hex_gradient *g)
{
    const bool cube = k == 2 && p->mode == HEX_OWN;
    const int64_t none = 0, rows = k == 0 ? p->B : k == 1 ? p->M : p->K;
    const int64_t size[3] = {cube ? p->B : rows, cube ? p->K : p->D, p->D};
    void *data;
    if (!add_output(c, !wanted ? 1 : cube ? 3 : 2, wanted ? size : &none, p->input[k].dtype, &data))
        return false;
    g->dz[k] = wanted && p->input[k].rows * p->D > 0 ? data : NULL;
    return true;
}

/* ---- the operators ---- */

/* forward(z0, z1, negatives, ids, mask, groups, guide, eps, tau, mode, reduction, variant, positives,
 * beta, tau_plus, keep, allow_tf32) -> (loss, stats, kept) */
void hex_forward_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 9);
    const tensors t = next_tensors(&c, true);
    const AtenTensorHandle eps = next_tensor(&c), tau = next_tensor(&c);
    const int64_t mode = next_int(&c), reduction = next_int(&c), variant = next_int(&c),
                  positives = next_int(&c);
    const double beta = next_float(&c), tau_plus = next_float(&c);
    const bool keep = next_bool(&c);
    c.place.one_product = next_bool(&c);
    hex_problem p = {0};
    void *loss, *stats;
    if (read_inputs(&c, &t, mode, positives != ONE_POSITIVE, &p) && read_positives(&c, &t, &p) &&
        read_decider(&c, &t, &p) &&
        read_rule(&c, reduction, variant, positives, beta, tau_plus, &p) &&
        read_numbers(&c, eps, "eps", ONE | EACH_ROW, hex_anchors(&p), &p.eps) &&
        read_numbers(&c, tau, "tau", ONE, 0, &p.tau) && check_place(&c, &p) &&
        add_rows(&c, &p, &loss, &stats) && add_kept(&c, &p, keep))
        ok(&c, hex_run_forward(&c.place, &p, loss, stats));
    finish(&c, "forward");
}

static bool read_state(call *c, AtenTensorHandle t, view *v)
{
    if (!read_view(c, t, "state", v))
        return false;
    return v->dtype == HEX_F64 && v->dim == 1 && v->size[0] == HEX_STATE
               ? true
               : fail(c, "state: expected float64 of shape (%d,)", HEX_STATE);
}

static bool check_no_decider(call *c, const hex_problem *p)
{
    return p->given || p->G > 0 ? fail(c, "expected no groups and no guide") : true;
}

static bool check_quantile(call *c, double quantile)
{
    return quantile >= 0 && quantile <= 1 ? true : fail(c, "quantile: expected a number in [0, 1]");
}

/* adaptive(z0, z1, negatives, ids, mask, groups, guide, state, tau, mode, reduction, variant,
 * positives, beta, tau_plus, keep, allow_tf32, self_column, quantile, over_negatives, momentum,
 * monotonic, lagged, warmup_epochs, warmup_threshold) -> (loss, stats, kept, eps, new_state) */
void hex_adaptive_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 9);
    const tensors t = next_tensors(&c, true);
    const AtenTensorHandle old = next_tensor(&c), tau = next_tensor(&c);
    const int64_t mode = next_int(&c), reduction = next_int(&c), variant = next_int(&c),
                  positives = next_int(&c);
    const double beta = next_float(&c), tau_plus = next_float(&c);
    const bool keep = next_bool(&c);
    c.place.one_product = next_bool(&c);
    hex_problem p = {.self_column = next_bool(&c)};
    hex_tracker tracker = {.quantile = next_float(&c)};
    tracker.over_negatives = next_bool(&c);
    tracker.momentum = next_float(&c);
    tracker.monotonic = next_bool(&c);
    tracker.lagged = next_bool(&c);
    tracker.warmup_epochs = next_int(&c);
    tracker.warmup_threshold = next_float(&c);
    void *loss, *stats, *eps, *state;
    view v;
    if (check_quantile(&c, tracker.quantile) &&
        read_inputs(&c, &t, mode, positives != ONE_POSITIVE, &p) && read_positives(&c, &t, &p) &&
        read_decider(&c, &t, &p) && check_no_decider(&c, &p) &&
        read_rule(&c, reduction, variant, positives, beta, tau_plus, &p) &&
        read_state(&c, old, &v) && read_numbers(&c, tau, "tau", ONE, 0, &p.tau) &&
        check_place(&c, &p) && add_rows(&c, &p, &loss, &stats) && add_kept(&c, &p, keep) &&
        add_output(&c, 0, NULL, HEX_F64, &eps) &&
        add_output(&c, 1, (int64_t[]){HEX_STATE}, HEX_F64, &state)) {
        const hex_device_state on_device = {v.data, v.stride[0], state, eps};
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
static bool read_stats(call *c, AtenTensorHandle t, hex_problem *p, hex_gradient *g)
{
    view v;
    const int64_t rows = hex_anchors(p);
    if (!read_view(c, t, "stats", &v))
        return false;
    if (v.dtype != compute_dtype(p) || v.dim != 2 || v.size[0] != hex_stats(p) ||
        v.size[1] != rows || (rows > 0 && (v.stride[0] != rows || (rows > 1 && v.stride[1] != 1))))
        return fail(c, "stats: expected the contiguous (statistics, rows) tensor of the forward");
    g->stats = v.data;
    return true;
}

static bool read_kept(call *c, AtenTensorHandle t, hex_problem *p)
{
    view v;
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
 * positives, beta, allow_tf32, needs) -> (dz0, dz1, dnegatives, dtau); needs: a bit for each */
void hex_backward_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 11);
    const AtenTensorHandle grad = next_tensor(&c);
    const tensors t = next_tensors(&c, true);
    const AtenTensorHandle tau = next_tensor(&c), stats = next_tensor(&c), kept = next_tensor(&c);
    const int64_t mode = next_int(&c), reduction = next_int(&c), positives = next_int(&c);
    const double beta = next_float(&c);
    c.place.one_product = next_bool(&c);
    const int64_t needs = next_int(&c);
    hex_problem p = {0};
    hex_gradient g = {0};
    void *out = NULL;
    if (read_inputs(&c, &t, mode, positives != ONE_POSITIVE, &p) && read_positives(&c, &t, &p) &&
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
 * over_negatives, bounds) -> (mean, low, high): the mean over rows of the row's quantile; or, with
 * `bounds`, each row's least and greatest cosine. What is not asked for is empty. */
void hex_quantile_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 6);
    const tensors t = next_tensors(&c, false);
    const AtenTensorHandle tau = next_tensor(&c);
    const int64_t mode = next_int(&c);
    const bool several = next_bool(&c);
    c.place.one_product = next_bool(&c);
    hex_problem p = {.self_column = next_bool(&c)};
    const double quantile = next_float(&c);
    const bool over_negatives = next_bool(&c), bounds = next_bool(&c);
    void *mean, *low, *high;
    if (check_quantile(&c, quantile) && read_inputs(&c, &t, mode, several, &p) &&
        read_positives(&c, &t, &p) && read_numbers(&c, tau, "tau", ONE, 0, &p.tau) &&
        check_place(&c, &p)) {
        const int64_t rows = bounds ? hex_anchors(&p) : 0;
        if (add_output(&c, bounds, (int64_t[]){0}, HEX_F64, &mean) &&
            add_output(&c, 1, &rows, compute_dtype(&p), &low) &&
            add_output(&c, 1, &rows, compute_dtype(&p), &high))
            ok(&c, bounds ? hex_run_row_range(&c.place, &p, low, high)
                          : hex_run_threshold(&c.place, &p, quantile, over_negatives, mean));
    }
    finish(&c, "quantile");
}
