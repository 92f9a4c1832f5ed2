/* SPDX-License-Identifier: MIT */
/* From a call's arguments to the problem of hex.h: what the operators of ops.c have in common, each
 * part with the words of the schema that it reads. The layouts of all losses as this problem are in
 * hex/problem.py. */
#ifndef HEX_PROBLEM_H
#define HEX_PROBLEM_H

#include <inttypes.h>
#include <stdlib.h>

#include "call.h"

/* The tensors that every operator has, in the order of its schema. */
#define TENSORS "Tensor z0, Tensor z1, Tensor negatives, Tensor ids, Tensor mask, "
#define DECIDERS "Tensor groups, Tensor guide, "

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
    p->allow_bf16 = c->place.allow_tf32; /* of the CPU, which rounds to this */
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

/* The block of anchors that a call is of; (0, -1): the whole batch. */
#define BLOCK "SymInt first, SymInt count"
#define BLOCK_OR_WHOLE "SymInt first=0, SymInt count=-1"

typedef struct {
    int64_t first, count;
} block_t;

static const block_t whole = {0, -1};

static block_t next_block(call_t *c)
{
    block_t b = {.first = next_int(c)};
    b.count = next_int(c);
    return b;
}

static bool read_block(call_t *c, block_t block, hex_problem_t *p)
{
    const int64_t first = block.first, count = block.count;
    if (first == whole.first && count == whole.count)
        return true;
    if (first < 0 || first > p->B || count < 0 || count > p->B - first)
        return fail(c,
                    "first, count: expected a block of %" PRId64 " rows, got %" PRId64 ", %" PRId64,
                    p->B, first, count);
    if (p->M != 0 && p->M != p->B)
        return fail(c, "first, count: expected none, for z1 has another number of rows than z0");
    p->block = true;
    p->first = first;
    p->count = count;
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
 * tensor, and a column that is none would be an address that is none. On a device the kernels look at
 * each, for the host does not wait for what is there. */
static bool read_target(call_t *c, AtenTensorHandle t, hex_problem_t *p)
{
    view_t v;
    if (!read_dense(c, t, "ids", INTEGERS, &v))
        return false;
    if (v.dim != 1 || v.size[0] != p->B)
        return fail(c, "ids: expected %" PRId64 " targets in one dimension", p->B);
    if (hex_place_is_cuda(&c->place)) {
        p->ids[0] = (hex_ids_t){v.data, v.stride[0]};
        return true;
    }
    int64_t *columns = c->memory = malloc((size_t)(p->B + 1) * sizeof *columns);
    if (!columns)
        return fail(c, "out of memory");
    for (int64_t i = 0; i < p->B; i++) {
        const int64_t column = columns[i] = *((const volatile int64_t *)v.data + i * v.stride[0]);
        if (column < 0 || column >= p->D)
            return fail(c, "target: got %" PRId64 ", wanted a column in [0, %" PRId64 ")", column,
                        p->D);
    }
    p->ids[0] = (hex_ids_t){columns, 1};
    return true;
}

static bool read_mask(call_t *c, AtenTensorHandle t, hex_problem_t *p)
{
    view_t v;
    const int64_t anchors = hex_anchors(p), candidates = hex_candidates(p);
    if (!read_dense(c, t, "mask", BYTES, &v))
        return false;
    if (v.dim != 2)
        return fail(c, "mask: expected a matrix");
    if (v.size[0] == 0 || v.size[1] == 0)
        return true;
    if (p->mode == HEX_LOGITS)
        return fail(c, "mask: expected none with logits");
    if (v.is_bool && !p->several)
        return fail(c, "mask: expected uint8, for anchors with one positive");
    if (anchors % v.size[0] || candidates % v.size[1])
        return fail(c, "mask: expected parts of %" PRId64 " anchors and %" PRId64 " candidates",
                    anchors, candidates);
    p->mask = (hex_mask_t){v.data, v.size[0], v.size[1], v.stride[0], v.stride[1], !v.is_bool};
    return true;
}

/* Who is a positive of whom, and who is left out. */
static bool read_positives(call_t *c, const tensors_t *t, hex_problem_t *p)
{
    bool labelled = false;
    if (p->mode == HEX_LOGITS)
        return read_target(c, t->ids, p) && read_mask(c, t->mask, p);
    if (!read_mask(c, t->mask, p) || !read_labels(c, t->ids, "ids", p, p->ids, &labelled))
        return false;
    if (p->several ? !labelled && !p->mask.data && p->B + p->M + p->K > 0 : labelled)
        return fail(c, "ids: expected %s", p->several ? "labels, or a mask" : "none");
    for (int k = 0; k < 3 && p->mask.data && !p->mask.codes; k++)
        p->ids[k].data = NULL; /* the mask says all */
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

/* What is computed: what both directions look at, and what only the forward does, for the
 * statistics that it leaves say the rest. */
#define RULE "int mode, int reduction, int positives, float beta, "
#define FORWARD_RULE RULE "int variant, float tau_plus, bool decoupled, "

typedef struct {
    int64_t mode, reduction, positives, variant;
    double beta, tau_plus;
    bool decoupled;
} rule_t;

static rule_t next_rule(call_t *c, bool forward)
{
    rule_t r = {.mode = next_int(c)}; /* one after another, which an initialiser does not promise */
    r.reduction = next_int(c);
    r.positives = next_int(c);
    r.beta = next_float(c);
    if (!forward)
        return r;
    r.variant = next_int(c);
    r.tau_plus = next_float(c);
    r.decoupled = next_bool(c);
    return r;
}

static bool read_rule(call_t *c, const rule_t *r, hex_problem_t *p)
{
    if (r->reduction < 0 || r->reduction >= HEX_REDUCTIONS)
        return fail(c, "reduction: expected 0, 1 or 2");
    if (r->variant < 0 || r->variant >= HEX_VARIANTS)
        return fail(c, "variant: expected 0, 1 or 2");
    if (r->positives < ONE_POSITIVE || r->positives > SEVERAL_INSIDE)
        return fail(c, "positives: expected 0, 1 or 2");
    if (!(r->beta >= 0))
        return fail(c, "beta: expected a number from 0 on");
    if (!(r->tau_plus >= 0 && r->tau_plus < 1))
        return fail(c, "tau_plus: expected a number in [0, 1)");
    p->reduction = (hex_reduction_t)r->reduction;
    p->variant = (hex_variant_t)r->variant;
    p->positives = r->positives == SEVERAL_INSIDE ? HEX_INSIDE : HEX_OUTSIDE;
    p->beta = r->beta;
    p->tau_plus = r->tau_plus;
    p->decoupled = r->decoupled;
    return true;
}

/* All but eps, tau and what the forward has left. */
static bool read_problem(call_t *c, const tensors_t *t, const rule_t *r, block_t block,
                         hex_problem_t *p)
{
    return read_inputs(c, t, r->mode, r->positives != ONE_POSITIVE, p) && read_block(c, block, p) &&
           read_positives(c, t, p) && read_decider(c, t, p) && read_rule(c, r, p);
}

#endif
