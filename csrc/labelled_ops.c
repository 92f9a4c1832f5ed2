/* SPDX-License-Identifier: MIT */
/* Boxed kernels of the rows with classes: torch.ops.hex.labelled_* and logits_*. As ops.c, whose
 * helpers they use: arguments off the stack, checks for memory safety, outputs, a core. */
#include "hex.h"

#include <inttypes.h>
#include <stdlib.h>

#include "ops.h"

/* ---- tensors -> plain C ---- */

/* (rows,); or, where it may be left away, (0,). */
static bool read_ids(call *c, AtenTensorHandle t, const char *name, int64_t rows, bool optional,
                     hex_ids *out)
{
    view v;
    if (!read_dense(c, t, name, INTEGERS, &v))
        return false;
    if (v.dim != 1 || (v.size[0] != rows && !(optional && v.size[0] == 0)))
        return fail(c, "%s: expected %" PRId64 " labels in one dimension", name, rows);
    const bool there = v.size[0] > 0;
    *out = (hex_ids){there ? v.data : NULL, there ? v.stride[0] : 0};
    return true;
}

typedef enum { SELF, PAIR, QUEUE, PAIRINGS } pairing_t;

static bool read_mask(call *c, AtenTensorHandle t, const hex_problem *p, hex_mask *out)
{
    view v;
    if (!read_dense(c, t, "mask", BOOLEANS, &v))
        return false;
    if (v.dim != 2 || v.size[0] != v.size[1])
        return fail(c, "mask: expected a square matrix");
    if (v.size[0] == 0)
        return true;
    if (p->mode != HEX_NTXENT || p->B % v.size[0])
        return fail(c, "mask: expected self pairing and a part of its %" PRId64 " rows", p->B);
    *out = (hex_mask){v.data, v.size[0], v.stride[0], v.stride[1]};
    return true;
}

/* A matrix of `rows` rows (-1: any number). */
static bool read_matrix(call *c, AtenTensorHandle t, const char *name, int64_t rows, int64_t width,
                        hex_rows *out, int64_t *size)
{
    view v;
    if (!read_view(c, t, name, &v))
        return false;
    if (v.dim != 2 || (rows >= 0 && v.size[0] != rows) || (width >= 0 && v.size[1] != width))
        return fail(c, "%s: expected a matrix that fits the others", name);
    if (!check_sizes(c, name, &v))
        return false;
    *out = (hex_rows){.data = v.data,
                      .dtype = v.dtype,
                      .rows = v.size[0],
                      .inner = v.size[0] > 0 ? v.size[0] : 1,
                      .row = v.stride[0],
                      .col = v.stride[1]};
    size[0] = v.size[0];
    size[1] = v.size[1];
    return true;
}

/* The candidates' rows as z1 and negatives. */
static void split_rows(const hex_problem *p, hex_rows x[3])
{
    x[2] = x[1];
    x[2].data = (const char *)x[1].data + p->M * x[1].row * item_size(x[1].dtype);
    x[2].rows = x[2].inner = p->K;
    x[1].rows = x[1].inner = p->M;
}

static void split_ids(const hex_problem *p, hex_ids ids[3])
{
    if (p->mode == HEX_SHARED && ids[1].data)
        ids[2] = (hex_ids){ids[1].data + p->M * ids[1].stride, ids[1].stride};
}

/* x, y, ids, candidate_ids, mask = in[first..first + 5), and the pairing. */
static bool read_pairs(call *c, int first, int64_t pairing, hex_problem *p)
{
    int64_t size[2] = {0};
    const AtenTensorHandle *in = c->in + first;
    if (pairing < 0 || pairing >= PAIRINGS)
        return fail(c, "pairing: expected 0, 1 or 2");
    p->mode = pairing == SELF ? HEX_NTXENT : pairing == PAIR ? HEX_QUERY : HEX_SHARED;
    p->several = true;
    if (!read_matrix(c, in[0], "x", -1, -1, &p->input[0], size))
        return false;
    p->B = size[0];
    p->D = size[1];
    const bool self = pairing == SELF;
    if (!read_matrix(c, in[1], "y", self ? 0 : -1, p->D, &p->input[1], size))
        return false;
    p->M = size[0];
    if (pairing == QUEUE) {
        if (size[0] < p->B)
            return fail(c, "y: expected at least as many rows as x has, %" PRId64, p->B);
        p->M = p->B;
        p->K = size[0] - p->B;
        split_rows(p, p->input);
    }
    p->wide = p->input[0].dtype == HEX_F64 || (!self && p->input[1].dtype == HEX_F64);
    if (!read_mask(c, in[4], p, &p->mask) ||
        !read_ids(c, in[2], "ids", p->B, p->mask.data != NULL, &p->ids[0]) ||
        !read_ids(c, in[3], "candidate_ids", p->M + p->K, false, &p->ids[1]))
        return false;
    split_ids(p, p->ids);
    return true;
}

/* groups, candidate_groups, guide, candidate_guide = in[first..first + 4). */
static bool read_membership(call *c, int first, hex_problem *p)
{
    int64_t size[2] = {0};
    const AtenTensorHandle *in = c->in + first;
    const int64_t candidates = p->M + p->K;
    if (!read_ids(c, in[0], "groups", p->B, true, &p->groups[0]) ||
        !read_ids(c, in[1], "candidate_groups", p->groups[0].data || p->B == 0 ? candidates : 0,
                  p->B == 0, &p->groups[1]))
        return false;
    p->given = p->groups[0].data != NULL;
    split_ids(p, p->groups);
    if (!read_matrix(c, in[2], "guide", -1, -1, &p->guide[0], size))
        return false;
    p->G = size[0] > 0 ? size[1] : 0;
    if (p->G > 0 && size[0] != p->B)
        return fail(c, "guide: expected %" PRId64 " rows", p->B);
    if (p->G > 0 && p->given)
        return fail(c, "expected groups or a guide, not both");
    if (p->B == 0) /* whether there is a guide cannot be told, and does not matter */
        return read_matrix(c, in[3], "candidate_guide", -1, -1, &p->guide[1], size);
    if (!read_matrix(c, in[3], "candidate_guide", p->G == 0 ? 0 : candidates, p->G == 0 ? -1 : p->G,
                     &p->guide[1], size))
        return false;
    split_rows(p, p->guide);
    return true;
}

static bool read_rule(call *c, int64_t reduction, int64_t variant, int64_t positives, double beta,
                      double tau_plus, hex_problem *r)
{
    if (reduction < 0 || reduction >= HEX_REDUCTIONS)
        return fail(c, "reduction: expected 0, 1 or 2");
    if (variant < 0 || variant >= HEX_VARIANTS)
        return fail(c, "variant: expected 0 or 1");
    if (positives < 0 || positives >= HEX_POSITIVES)
        return fail(c, "positives: expected 0 or 1");
    if (!(beta >= 0) || !(tau_plus >= 0 && tau_plus < 1))
        return fail(c, "expected beta >= 0 and tau_plus in [0, 1)");
    r->reduction = (hex_reduction)reduction;
    r->variant = (hex_variant)variant;
    r->positives = (hex_positives)positives;
    r->beta = beta;
    r->tau_plus = tau_plus;
    return true;
}

/* logits, target = in[first], in[first + 1]. The targets are copied before they are checked:
 * another thread may write to the tensor, and a column that is none would be an address that is
 * none. */
static bool read_logits(call *c, int first, hex_problem *p)
{
    int64_t size[2] = {0};
    p->mode = HEX_LOGITS;
    p->several = true;
    if (!read_matrix(c, c->in[first], "logits", -1, -1, &p->input[0], size))
        return false;
    p->B = size[0];
    p->D = size[1];
    p->wide = p->input[0].dtype == HEX_F64;
    hex_ids given = {0};
    if (!read_ids(c, c->in[first + 1], "target", p->B, false, &given))
        return false;
    int64_t *columns = c->memory = malloc((size_t)(p->B + 1) * sizeof *columns);
    if (!columns)
        return fail(c, "out of memory");
    for (int64_t i = 0; i < p->B; i++) {
        const int64_t column = columns[i] =
            *(const volatile int64_t *)(given.data + i * given.stride);
        if (column < 0 || column >= p->D)
            return fail(c, "target: expected columns in [0, %" PRId64 "), got %" PRId64, p->D,
                        column);
    }
    p->ids[0] = (hex_ids){columns, 1};
    return true;
}

static bool read_score(call *c, AtenTensorHandle t, hex_problem *p)
{
    int64_t size[2] = {0};
    if (!read_matrix(c, t, "score", -1, -1, &p->guide[0], size))
        return false;
    p->G = size[0] ? size[1] : 0;
    if (size[0] && (size[0] != p->B || size[1] != p->D))
        return fail(c, "score: expected the shape of the logits");
    return true;
}

/* ---- outputs ---- */

static hex_dtype real_dtype(bool wide) { return wide ? HEX_F64 : HEX_F32; }

static bool add_rows(call *c, int64_t rows, bool wide, hex_reduction reduction, void **loss,
                     void **stats)
{
    const int64_t size[2] = {HEX_STATS_SEVERAL, rows};
    return add_output(c, reduction == HEX_NONE ? 1 : 0, &rows, real_dtype(wide), loss) &&
           add_output(c, 2, size, real_dtype(wide), stats);
}

static bool read_gradient(call *c, AtenTensorHandle grad, AtenTensorHandle stats, int64_t rows,
                          bool wide, hex_reduction reduction, hex_gradient *g)
{
    view v;
    if (!read_numbers(c, grad, "grad", reduction == HEX_NONE ? EACH_ROW : ONE, rows, &g->grad) ||
        !read_view(c, stats, "stats", &v))
        return false;
    if (v.dtype != real_dtype(wide) || v.dim != 2 || v.size[0] != HEX_STATS_SEVERAL ||
        v.size[1] != rows || (rows > 0 && (v.stride[0] != rows || (rows > 1 && v.stride[1] != 1))))
        return fail(c, "stats: expected the contiguous (statistics, rows) tensor of the forward");
    g->stats = v.data;
    return true;
}

/* The gradient of a matrix, or an empty tensor where it is not wanted. */
static bool add_gradient(call *c, bool wanted, const hex_rows *x, int64_t width, void **d)
{
    const int64_t size[2] = {wanted ? x->rows : 0, width};
    void *data;
    if (!add_output(c, wanted ? 2 : 1, size, x->dtype, &data))
        return false;
    *d = wanted && x->rows * width > 0 ? data : NULL;
    return true;
}

static bool add_dtau(call *c, bool wanted, hex_dtype dtype, void **out)
{
    const int64_t none = 0;
    return add_output(c, wanted ? 0 : 1, &none, dtype, out);
}

static void store_dtau(bool wanted, hex_dtype dtype, double dtau, void *out)
{
    if (wanted && dtype == HEX_F64)
        *(double *)out = dtau;
    else if (wanted)
        *(float *)out = (float)dtau;
}

/* ---- the operators ---- */

/* labelled_forward(x, y, ids, candidate_ids, mask, groups, candidate_groups, guide,
 * candidate_guide, eps, tau, pairing, reduction, variant, positives, beta, tau_plus) -> (loss,
 * stats) */
void hex_labelled_forward_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 11);
    hex_problem p = {0};
    void *loss, *stats;
    if (read_pairs(&c, 0, (int64_t)stack[11], &p) && read_membership(&c, 5, &p) &&
        read_rule(&c, (int64_t)stack[12], (int64_t)stack[13], (int64_t)stack[14],
                  to_double(stack[15]), to_double(stack[16]), &p) &&
        read_numbers(&c, c.in[9], "eps", ONE | EACH_ROW, p.B, &p.eps) &&
        read_numbers(&c, c.in[10], "tau", ONE, 0, &p.tau) &&
        add_rows(&c, p.B, p.wide, p.reduction, &loss, &stats))
        ok(&c, hex_cpu_forward(&p, loss, stats));
    finish(&c, stack, "labelled_forward");
}

/* labelled_backward(grad, x, y, ids, candidate_ids, mask, groups, candidate_groups, guide,
 * candidate_guide, tau, stats, pairing, reduction, beta, needs) -> (dx, dy, dtau) */
void hex_labelled_backward_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 12);
    hex_problem p = {0};
    hex_gradient g = {0};
    const int64_t needs = (int64_t)stack[15];
    if (read_pairs(&c, 1, (int64_t)stack[12], &p) && read_membership(&c, 6, &p) &&
        read_rule(&c, (int64_t)stack[13], HEX_PAPER, HEX_OUTSIDE, to_double(stack[14]), 0, &p) &&
        read_gradient(&c, c.in[0], c.in[11], p.B, p.wide, p.reduction, &g) &&
        read_numbers(&c, c.in[10], "tau", ONE, 0, &p.tau)) {
        const bool dy = needs & 2 && p.mode != HEX_NTXENT;
        hex_rows y = p.input[1];
        y.rows = p.M + p.K;
        double dtau = 0;
        void *out;
        if (add_gradient(&c, needs & 1, &p.input[0], p.D, &g.dz[0]) &&
            add_gradient(&c, dy, &y, p.D, &g.dz[1]) && add_dtau(&c, needs & 4, p.tau.dtype, &out)) {
            g.dtau = &dtau;
            if (g.dz[1] && p.mode == HEX_SHARED)
                g.dz[2] = (char *)g.dz[1] + p.M * p.D * item_size(y.dtype);
            if (ok(&c, hex_cpu_backward(&p, &g)))
                store_dtau(needs & 4, p.tau.dtype, dtau, out);
        }
    }
    finish(&c, stack, "labelled_backward");
}

/* labelled_threshold(x, y, ids, candidate_ids, mask, pairing, quantile, over_negatives) -> float64
 */
void hex_labelled_threshold_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 5);
    hex_problem p = {0};
    void *mean;
    const double quantile = to_double(stack[6]);
    if (!(quantile >= 0 && quantile <= 1))
        fail(&c, "quantile: expected a number in [0, 1]");
    else if (read_pairs(&c, 0, (int64_t)stack[5], &p) && add_output(&c, 0, NULL, HEX_F64, &mean))
        ok(&c, hex_cpu_threshold(&p, quantile, stack[7] & 1, mean));
    finish(&c, stack, "labelled_threshold");
}

/* labelled_row_range(x, y, ids, candidate_ids, mask, pairing) -> (low, high) */
void hex_labelled_row_range_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 5);
    hex_problem p = {0};
    void *low, *high;
    if (read_pairs(&c, 0, (int64_t)stack[5], &p) &&
        add_output(&c, 1, &p.B, real_dtype(p.wide), &low) &&
        add_output(&c, 1, &p.B, real_dtype(p.wide), &high))
        ok(&c, hex_cpu_row_range(&p, low, high));
    finish(&c, stack, "labelled_row_range");
}

/* logits_forward(logits, target, score, eps, tau, given, reduction, variant, beta, tau_plus) ->
 * (loss, stats) */
void hex_logits_forward_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 5);
    hex_problem p = {.given = stack[5] & 1};
    void *loss, *stats;
    if (read_logits(&c, 0, &p) && read_score(&c, c.in[2], &p) &&
        read_rule(&c, (int64_t)stack[6], (int64_t)stack[7], HEX_OUTSIDE, to_double(stack[8]),
                  to_double(stack[9]), &p) &&
        read_numbers(&c, c.in[3], "eps", ONE | EACH_ROW, p.B, &p.eps) &&
        read_numbers(&c, c.in[4], "tau", ONE, 0, &p.tau) &&
        add_rows(&c, p.B, p.wide, p.reduction, &loss, &stats))
        ok(&c, hex_cpu_forward(&p, loss, stats));
    finish(&c, stack, "logits_forward");
}

/* logits_backward(grad, logits, target, score, tau, stats, reduction, beta, needs) -> (dlogits,
 * dtau) */
void hex_logits_backward_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 6);
    hex_problem p = {0};
    hex_gradient g = {0};
    const int64_t needs = (int64_t)stack[8];
    if (read_logits(&c, 1, &p) && read_score(&c, c.in[3], &p) &&
        read_rule(&c, (int64_t)stack[6], HEX_PAPER, HEX_OUTSIDE, to_double(stack[7]), 0, &p) &&
        read_gradient(&c, c.in[0], c.in[5], p.B, p.wide, p.reduction, &g) &&
        read_numbers(&c, c.in[4], "tau", ONE, 0, &p.tau)) {
        double dtau = 0;
        void *out;
        if (add_gradient(&c, needs & 1, &p.input[0], p.D, &g.dz[0]) &&
            add_dtau(&c, needs & 2, p.tau.dtype, &out)) {
            g.dtau = &dtau;
            if (ok(&c, hex_cpu_backward(&p, &g)))
                store_dtau(needs & 2, p.tau.dtype, dtau, out);
        }
    }
    finish(&c, stack, "logits_backward");
}

/* logits_threshold(logits, target, tau, quantile, over_negatives, self_column) -> float64 */
void hex_logits_threshold_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 3);
    hex_problem p = {.self_column = stack[5] & 1};
    void *mean;
    const double quantile = to_double(stack[3]);
    if (!(quantile >= 0 && quantile <= 1))
        fail(&c, "quantile: expected a number in [0, 1]");
    else if (read_logits(&c, 0, &p) && read_numbers(&c, c.in[2], "tau", ONE, 0, &p.tau) &&
             add_output(&c, 0, NULL, HEX_F64, &mean))
        ok(&c, hex_cpu_threshold(&p, quantile, stack[4] & 1, mean));
    finish(&c, stack, "logits_threshold");
}

/* logits_row_range(logits, target, tau, self_column) -> (low, high) */
void hex_logits_row_range_boxed(StableIValue *stack, uint64_t arguments, uint64_t outputs)
{
    (void)arguments, (void)outputs;
    call c = begin(stack, 3);
    hex_problem p = {.self_column = stack[3] & 1};
    void *low, *high;
    if (read_logits(&c, 0, &p) && read_numbers(&c, c.in[2], "tau", ONE, 0, &p.tau) &&
        add_output(&c, 1, &p.B, real_dtype(p.wide), &low) &&
        add_output(&c, 1, &p.B, real_dtype(p.wide), &high))
        ok(&c, hex_cpu_row_range(&p, low, high));
    finish(&c, stack, "logits_row_range");
}
