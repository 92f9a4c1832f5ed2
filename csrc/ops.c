/* SPDX-License-Identifier: MIT */
/* The operators of torch.ops.hex, each a schema and its kernel: a call's arguments become a
 * problem (problem.h), a core solves it, the outputs go back. Reading and throwing are in call.c,
 * registration in module.c.
 *
 * eps and tau are tensors, never numbers: a number that changes every step would recompile a
 * compiled graph, and one read from a tensor would wait for the device. No str and no optional in a
 * schema: torch leaks the one and frees the other only from 2.13 on. */
#include "ops.h"

#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "problem.h"
#include "tracker.h"

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

/* Fresh memory is then handed out by 2 MiB where the kernel leaves that to programs: of small pages
 * it takes as long as a product. */
static void prefer_large_pages(void *data, int64_t bytes)
{
#ifdef MADV_HUGEPAGE
    const uintptr_t large = (uintptr_t)2 << 20,
                    begin = ((uintptr_t)data + large - 1) / large * large;
    const uintptr_t end = ((uintptr_t)data + (uintptr_t)bytes) / large * large;
    if (begin < end)
        madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* if it fails, they are small */
#else
    (void)data, (void)bytes;
#endif
}

/* What is not kept, for it would be too much, has so many numbers: sizes of 0 and 1 torch.compile and
 * torch.export would make a case of their own. */
#define NONE_KEPT 2

/* They as the next output: NONE_KEPT where they take more than `most` bytes, and with 0 bytes
 * empty. */
static bool add_kept(call_t *c, hex_problem_t *p, int64_t most)
{
    bool used = false;
    int64_t n = most > 0 ? kept_room(c, p, &used) : 0;
    void *data;
    if (n > most / item_size(compute_dtype(p))) {
        used = false;
        n = NONE_KEPT;
    }
    if (!add_output(c, 1, &n, compute_dtype(p), &data))
        return false;
    p->kept = used ? data : NULL;
    if (used)
        prefer_large_pages(data, n * item_size(compute_dtype(p)));
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

/* keep: how many bytes the cosines may take that are kept for a backward; 0: there will be none. */
static const char forward_schema[] =
    "forward(" TENSORS DECIDERS "Tensor eps, Tensor tau, " FORWARD_RULE
    "int keep, bool allow_tf32) -> (Tensor loss, Tensor stats, Tensor kept)";

static void forward(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 9);
    const tensors_t t = next_tensors(&c, true);
    const AtenTensorHandle eps = next_tensor(&c), tau = next_tensor(&c);
    const rule_t rule = next_rule(&c, true);
    const int64_t keep = next_int(&c);
    c.place.allow_tf32 = next_bool(&c);
    hex_problem_t p = {0};
    void *loss, *stats;
    if (read_problem(&c, &t, &rule, whole, &p) &&
        read_numbers(&c, eps, "eps", ONE | EACH_ROW, hex_anchors(&p), &p.eps) &&
        read_numbers(&c, tau, "tau", ONE, 0, &p.tau) && add_rows(&c, &p, &loss, &stats) &&
        add_kept(&c, &p, keep))
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

/* Of the CPU: before the tracker's step, and after it. */
static void load_state(const hex_device_state_t *from, hex_tracker_t *t)
{
    for (int k = 0; k < HEX_STATE; k++)
        t->state[k] = from->state[k * from->stride];
}

static void store_state(const hex_tracker_t *t, const hex_device_state_t *to)
{
    memcpy(to->next, t->state, sizeof t->state);
    *to->eps = t->eps;
}

static bool check_no_decider(call_t *c, const hex_problem_t *p)
{
    return p->by_group || p->G > 0 ? fail(c, "expected no groups and no guide") : true;
}

static bool check_quantile(call_t *c, double quantile)
{
    return quantile >= 0 && quantile <= 1 ? true : fail(c, "quantile: expected a number in [0, 1]");
}

/* The threshold of the batch, the tracker's step and the forward at the eps that comes of it. */
static const char adaptive_schema[] =
    "adaptive(" TENSORS DECIDERS "Tensor state, Tensor tau, " FORWARD_RULE
    "int keep, bool allow_tf32, bool self_column, float quantile, bool over_negatives, "
    "float momentum, bool monotonic, bool lagged, int warmup_epochs, float warmup_threshold) "
    "-> (Tensor loss, Tensor stats, Tensor kept, Tensor eps, Tensor new_state)";

static void adaptive(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 9);
    const tensors_t t = next_tensors(&c, true);
    const AtenTensorHandle old = next_tensor(&c), tau = next_tensor(&c);
    const rule_t rule = next_rule(&c, true);
    const int64_t keep = next_int(&c);
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
    if (check_quantile(&c, tracker.quantile) && read_problem(&c, &t, &rule, whole, &p) &&
        check_no_decider(&c, &p) && read_state(&c, old, &v) &&
        read_numbers(&c, tau, "tau", ONE, 0, &p.tau) && add_rows(&c, &p, &loss, &stats) &&
        add_kept(&c, &p, keep) && add_output(&c, 0, NULL, HEX_F64, &eps) &&
        add_output(&c, 1, (int64_t[]){HEX_STATE}, HEX_F64, &state)) {
        const hex_device_state_t on_device = {v.data, v.stride[0], state, eps};
        if (hex_place_is_cuda(&c.place))
            ok(&c, hex_cuda_adaptive(&c.place, &p, &tracker, &on_device, loss, stats));
        else {
            load_state(&on_device, &tracker);
            if (ok(&c, hex_cpu_adaptive(&p, &tracker, loss, stats)))
                store_state(&tracker, &on_device);
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

/* *given: whether the tensor is of an operator that was to keep them, though they may be too many. */
static bool read_kept(call_t *c, AtenTensorHandle t, hex_problem_t *p, bool *given)
{
    view_t v;
    bool used;
    const int64_t room = kept_room(c, p, &used);
    if (!read_view(c, t, "kept", &v))
        return false;
    if (v.dtype != compute_dtype(p) || v.dim != 1 ||
        (v.size[0] != 0 && v.size[0] != NONE_KEPT && (v.size[0] != room || v.stride[0] != 1)))
        return fail(c, "kept: expected the contiguous tensor of the forward");
    p->kept = used && v.size[0] > NONE_KEPT ? (void *)v.data : NULL;
    p->filled = p->kept != NULL;
    *given = v.size[0] > 0;
    return true;
}

/* needs: a bit for each output. Of a block: grad and stats are of all anchors, the gradient is of the
 * block's rows. */
static const char backward_schema[] =
    "backward(Tensor grad, " TENSORS DECIDERS "Tensor tau, Tensor stats, Tensor kept, " RULE
    "bool allow_tf32, int needs, " BLOCK_OR_WHOLE
    ") -> (Tensor dz0, Tensor dz1, Tensor dnegatives, Tensor dtau)";

static void backward(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 11);
    const AtenTensorHandle grad = next_tensor(&c);
    const tensors_t t = next_tensors(&c, true);
    const AtenTensorHandle tau = next_tensor(&c), stats = next_tensor(&c), kept = next_tensor(&c);
    const rule_t rule = next_rule(&c, false);
    c.place.allow_tf32 = next_bool(&c);
    const int64_t needs = next_int(&c);
    const block_t block = next_block(&c);
    hex_problem_t p = {0};
    hex_gradient_t g = {0};
    void *out = NULL;
    bool given;
    if (read_problem(&c, &t, &rule, block, &p) &&
        read_numbers(&c, grad, "grad", p.reduction == HEX_NONE ? EACH_ROW : ONE, hex_anchors(&p),
                     &g.grad) &&
        read_numbers(&c, tau, "tau", ONE, 0, &p.tau) && read_stats(&c, stats, &p, &g) &&
        read_kept(&c, kept, &p, &given) && add_gradient(&c, &p, 0, needs & 1, &g) &&
        add_gradient(&c, &p, 1, needs & 2, &g) && add_gradient(&c, &p, 2, needs & 4, &g) &&
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

/* What is measured of a batch: its rows' quantiles; or, with `bounds`, each row's least and greatest
 * cosine. */
#define MEASURED                                                                                   \
    TENSORS "Tensor tau, int mode, bool several, bool allow_tf32, bool self_column, "              \
            "float quantile, bool over_negatives, bool bounds"

typedef struct {
    tensors_t tensors;
    AtenTensorHandle tau;
    int64_t mode;
    bool several, over_negatives, bounds;
    double quantile;
} measured_t;

static measured_t next_measured(call_t *c, hex_problem_t *p)
{
    measured_t m = {.tensors = next_tensors(c, false)};
    m.tau = next_tensor(c);
    m.mode = next_int(c);
    m.several = next_bool(c);
    c->place.allow_tf32 = next_bool(c);
    p->self_column = next_bool(c);
    m.quantile = next_float(c);
    m.over_negatives = next_bool(c);
    m.bounds = next_bool(c);
    return m;
}

/* block: NULL of all anchors. */
static bool read_measured(call_t *c, const measured_t *m, const block_t *block, hex_problem_t *p)
{
    return check_quantile(c, m->quantile) && read_inputs(c, &m->tensors, m->mode, m->several, p) &&
           (!block || read_block(c, *block, p)) && read_positives(c, &m->tensors, p) &&
           read_numbers(c, m->tau, "tau", ONE, 0, &p->tau);
}

/* The mean of the quantiles, or the bounds. What is not asked for is empty. */
static const char quantile_schema[] =
    "quantile(" MEASURED ") -> (Tensor mean, Tensor low, Tensor high)";

static void quantile(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 6);
    hex_problem_t p = {0};
    const measured_t m = next_measured(&c, &p);
    void *mean, *low, *high;
    if (read_measured(&c, &m, NULL, &p)) {
        const int64_t rows = m.bounds ? hex_anchors(&p) : 0;
        if (add_output(&c, m.bounds, (int64_t[]){0}, HEX_F64, &mean) &&
            add_output(&c, 1, &rows, compute_dtype(&p), &low) &&
            add_output(&c, 1, &rows, compute_dtype(&p), &high))
            ok(&c, m.bounds ? hex_run_row_range(&c.place, &p, low, high)
                            : hex_run_threshold(&c.place, &p, m.quantile, m.over_negatives, mean));
    }
    finish(&c, "quantile");
}

/* ---- the operators of many ranks: each has a block of anchors, and all have all rows' numbers ---- */

/* low: of each anchor of the block the quantile of its row, +inf where that has no element; or, with
 * `bounds`, low and high as in quantile. keep: as in forward, from here on to block_forward. */
static const char block_quantiles_schema[] =
    "block_quantiles(" MEASURED ", int keep, " BLOCK ") -> (Tensor low, Tensor high, Tensor kept)";

static void block_quantiles(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 6);
    hex_problem_t p = {0};
    const measured_t m = next_measured(&c, &p);
    const int64_t keep = next_int(&c);
    const block_t block = next_block(&c);
    void *low, *high;
    if (read_measured(&c, &m, &block, &p)) {
        const int64_t rows = hex_block_anchors(&p), none = 0;
        if (add_output(&c, 1, &rows, compute_dtype(&p), &low) &&
            add_output(&c, 1, m.bounds ? &rows : &none, compute_dtype(&p), &high) &&
            add_kept(&c, &p, keep))
            ok(&c, m.bounds
                       ? hex_run_row_range(&c.place, &p, low, high)
                       : hex_run_row_quantiles(&c.place, &p, m.quantile, m.over_negatives, low));
    }
    finish(&c, "block_quantiles");
}

/* The loss of each anchor of the block. eps: one, or one for each of these. kept: that of
 * block_quantiles; or, where that has none, the output is for the backward, as in forward. */
static const char block_forward_schema[] =
    "block_forward(" TENSORS DECIDERS "Tensor eps, Tensor tau, Tensor kept, " FORWARD_RULE
    "int keep, bool allow_tf32, " BLOCK ") -> (Tensor loss, Tensor stats, Tensor new_kept)";

static void block_forward(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 10);
    const tensors_t t = next_tensors(&c, true);
    const AtenTensorHandle eps = next_tensor(&c), tau = next_tensor(&c), kept = next_tensor(&c);
    rule_t rule = next_rule(&c, true);
    const int64_t keep = next_int(&c);
    c.place.allow_tf32 = next_bool(&c);
    const block_t block = next_block(&c);
    hex_problem_t p = {0};
    void *loss, *stats, *none;
    bool given;
    rule.reduction = HEX_NONE;
    if (read_problem(&c, &t, &rule, block, &p) &&
        read_numbers(&c, eps, "eps", ONE | EACH_ROW, hex_block_anchors(&p), &p.eps) &&
        read_numbers(&c, tau, "tau", ONE, 0, &p.tau) && read_kept(&c, kept, &p, &given) &&
        add_rows(&c, &p, &loss, &stats) &&
        (given ? add_output(&c, 1, (int64_t[]){0}, compute_dtype(&p), &none)
               : add_kept(&c, &p, keep)))
        ok(&c, hex_run_forward(&c.place, &p, loss, stats));
    finish(&c, "block_forward");
}

/* A matrix of float32 or float64 numbers, or as one row a vector. */
static bool read_matrix(call_t *c, AtenTensorHandle t, const char *name, int64_t dim,
                        hex_matrix_t *out)
{
    view_t v;
    if (!read_view(c, t, name, &v) || !check_sizes(c, name, &v))
        return false;
    if ((v.dtype != HEX_F32 && v.dtype != HEX_F64) || v.dim != dim)
        return fail(c, "%s: expected float32 or float64 in %d dimensions", name, (int)dim);
    *out = (hex_matrix_t){v.data,
                          v.dtype,
                          dim == 1 ? 1 : v.size[0],
                          v.size[dim - 1],
                          dim == 1 ? 0 : v.stride[0],
                          v.stride[dim - 1]};
    return true;
}

/* rows: the quantile of every row of all ranks. The tracker's step with their mean. */
static const char settle_schema[] =
    "settle(Tensor rows, Tensor state, float momentum, bool monotonic, bool lagged, "
    "int warmup_epochs, float warmup_threshold) -> (Tensor eps, Tensor new_state)";

static void settle(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 2);
    const AtenTensorHandle rows = next_tensor(&c), old = next_tensor(&c);
    hex_tracker_t tracker = {.momentum = next_float(&c)};
    tracker.monotonic = next_bool(&c);
    tracker.lagged = next_bool(&c);
    tracker.warmup_epochs = next_int(&c);
    tracker.warmup_threshold = next_float(&c);
    hex_matrix_t q;
    void *eps, *state;
    view_t v;
    if (read_matrix(&c, rows, "rows", 1, &q) && read_state(&c, old, &v) &&
        add_output(&c, 0, NULL, HEX_F64, &eps) &&
        add_output(&c, 1, (int64_t[]){HEX_STATE}, HEX_F64, &state)) {
        const hex_device_state_t step = {v.data, v.stride[0], state, eps};
        if (hex_place_is_cuda(&c.place))
            ok(&c, hex_cuda_settle(&c.place, &q, &tracker, &step));
        else {
            load_state(&step, &tracker);
            hex_track(&tracker, hex_mean(&q), q.columns);
            store_state(&tracker, &step);
        }
    }
    finish(&c, "settle");
}

/* The sum of each row of a matrix, in the order of its columns. */
static const char total_schema[] = "total(Tensor rows) -> Tensor";

static void total(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call_t c = begin(stack, 1);
    const AtenTensorHandle rows = next_tensor(&c);
    hex_matrix_t x;
    void *sums;
    if (read_matrix(&c, rows, "rows", 2, &x) && add_output(&c, 1, &x.rows, HEX_F64, &sums))
        hex_place_is_cuda(&c.place) ? (void)ok(&c, hex_cuda_total(&c.place, &x, sums))
                                    : hex_sum_rows(&x, sums);
    finish(&c, "total");
}

const hex_operator_t hex_operators[HEX_OPERATORS] = {
    {"forward", forward_schema, forward},
    {"adaptive", adaptive_schema, adaptive},
    {"backward", backward_schema, backward},
    {"quantile", quantile_schema, quantile},
    {"block_quantiles", block_quantiles_schema, block_quantiles},
    {"block_forward", block_forward_schema, block_forward},
    {"settle", settle_schema, settle},
    {"total", total_schema, total},
};
