/* SPDX-License-Identifier: MIT */
/* The loss of rows of logits that are given: one row at a time, in scratch of a few rows a thread.
 * What a row does is in class_row.h.
 *
 * The cosine of a column is its logit times tau, in [-1, 1] for the quantiles; a column of -Inf is
 * left out, but for the target's: its loss is +Inf. */
#ifndef HEX_CLASS_LOGITS_H
#define HEX_CLASS_LOGITS_H

#include "blocks.h"
#include "class_row.h"

typedef struct {
    const hex_logits *p;
    double tau;
    double *loss; /* forward */
    real *stats;
    class_coefficients_t k; /* backward */
    void *out;
    double quantile; /* thresholds */
    bool over_negatives, self_column, bounds;
    real *low, *high; /* of each row its quantile in low, or its bounds */
    atomic_bool no_memory;
} logits_context_t;

/* Row i and its classes. */
static void load_logits(const logits_context_t *c, int64_t i, real *v, real *restrict kind)
{
    const hex_logits *p = c->p;
    load(&p->logits, i, p->C, v);
    for (int64_t j = 0; j < p->C; j++)
        kind[j] = v[j] == -(real)INFINITY ? LEFT_OUT : NEGATIVE;
    kind[p->target[i]] = POSITIVE;
}

static void load_scores(const logits_context_t *c, int64_t i, const real *restrict v,
                        real *restrict s)
{
    if (c->p->score.data) {
        load(&c->p->score, i, c->p->C, s);
        return;
    }
    const real tau = (real)c->tau;
    for (int64_t j = 0; j < c->p->C; j++)
        s[j] = v[j] * tau;
}

/* A row's values, classes and scores, and one to write to. */
typedef struct {
    real *v, *kind, *s, *out;
} logits_row_t;

static bool make_row(logits_context_t *c, logits_row_t *r)
{
    const int64_t ld = c->p->C + 1; /* 1: the self column */
    r->v = allocate(ld, 4, sizeof(real));
    if (!r->v) {
        c->no_memory = true;
        return false;
    }
    r->kind = r->v + ld, r->s = r->kind + ld, r->out = r->s + ld;
    return true;
}

static const char *for_each_logits_row(logits_context_t *c, hex_body body)
{
    if (!hex_parallel_for(c->p->N, 64 * c->p->C, body, c))
        return HEX_NO_THREADS;
    return c->no_memory ? HEX_NO_MEMORY : NULL;
}

static void logits_forward_body(int64_t begin, int64_t end, void *context)
{
    logits_context_t *c = context;
    const hex_logits *p = c->p;
    logits_row_t r;
    if (!make_row(c, &r))
        return;
    for (int64_t i = begin; i < end; i++) {
        double stats[HEX_ROW_STATS];
        load_logits(c, i, r.v, r.kind);
        load_scores(c, i, r.v, r.s);
        c->loss[i] = class_forward(&p->rule, r.v, r.s, r.kind, p->C, read_vector(p->rule.eps, i),
                                   c->tau, true, stats);
        for (int k = 0; k < HEX_ROW_STATS; k++)
            c->stats[k * p->N + i] = (real)stats[k];
    }
    free(r.v);
}

static const char *logits_forward(const hex_logits *p, void *loss, void *stats)
{
    logits_context_t c = {.p = p, .tau = read_vector(p->rule.tau, 0), .stats = stats};
    c.loss = allocate(p->N, 1, sizeof(double));
    if (!c.loss)
        return HEX_NO_MEMORY;
    const char *error = for_each_logits_row(&c, logits_forward_body);
    if (!error)
        reduce(p->rule.reduction, c.loss, p->N, loss);
    free(c.loss);
    return error;
}

static void logits_backward_body(int64_t begin, int64_t end, void *context)
{
    logits_context_t *c = context;
    const hex_logits *p = c->p;
    logits_row_t r;
    const bool direct = p->logits.dtype == HEX_F32 || p->logits.dtype == HEX_F64; /* as real is */
    if (!make_row(c, &r))
        return;
    for (int64_t i = begin; i < end; i++) {
        load_logits(c, i, r.v, r.kind);
        load_scores(c, i, r.v, r.s);
        real *out = direct ? (real *)c->out + i * p->C : r.out;
        row_class_entries(r.v, r.s, r.kind, p->C, &c->k, i, false, false, out);
        if (!direct) /* rounded, nothing else */
            store(c->out, p->logits.dtype, i, p->C, out, r.kind, 0, 1);
    }
    free(r.v);
}

static const char *logits_backward(const hex_logits *p, const hex_row_gradient *g)
{
    real *k = allocate(p->N, HEX_ROW_POS + 1, sizeof(real));
    if (!k)
        return HEX_NO_MEMORY;
    logits_context_t c = {.p = p,
                          .tau = read_vector(p->rule.tau, 0),
                          .out = g->d[0],
                          .k = scale_rows(&p->rule, g, p->N, true, k)};
    const char *error = c.out ? for_each_logits_row(&c, logits_backward_body) : NULL;
    free(k);
    return error;
}

static void logits_threshold_body(int64_t begin, int64_t end, void *context)
{
    logits_context_t *c = context;
    const hex_logits *p = c->p;
    logits_row_t r;
    if (!make_row(c, &r))
        return;
    real *v = r.v;
    for (int64_t i = begin; i < end; i++) {
        double finite = 0;
        load_logits(c, i, v, r.kind);
        int64_t n = keep(v, r.kind, p->C, c->over_negatives, &finite);
        for (int64_t j = 0; j < n; j++) /* a product may be infinite, a cosine is not */
            v[j] = cosine(v[j] * (real)c->tau);
        if (c->self_column && !c->over_negatives)
            v[n++] = 1;
        if (c->bounds) {
            row_bounds(v, n, &c->low[i], &c->high[i]);
            if (finite != 0) /* +Inf is no cosine of 1 */
                c->low[i] = c->high[i] = (real)NAN;
        } else
            c->low[i] =
                finite == 0 && n == 0 ? (real)INFINITY : quantile_of(v, n, c->quantile, finite);
    }
    free(r.v);
}

static const char *logits_threshold(const hex_logits *p, double quantile, bool over_negatives,
                                    bool self_column, double *mean)
{
    logits_context_t c = {.p = p,
                          .tau = read_vector(p->rule.tau, 0),
                          .quantile = quantile,
                          .over_negatives = over_negatives,
                          .self_column = self_column,
                          .low = allocate(p->N, 1, sizeof(real))};
    const char *error = c.low ? for_each_logits_row(&c, logits_threshold_body) : HEX_NO_MEMORY;
    if (!error)
        *mean = mean_of_rows(c.low, p->N);
    free(c.low);
    return error;
}

static const char *logits_row_range(const hex_logits *p, bool self_column, void *low, void *high)
{
    logits_context_t c = {.p = p,
                          .tau = read_vector(p->rule.tau, 0),
                          .self_column = self_column,
                          .bounds = true,
                          .low = low,
                          .high = high};
    return for_each_logits_row(&c, logits_threshold_body);
}

#endif
