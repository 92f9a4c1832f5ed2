/* SPDX-License-Identifier: MIT */
/* The loss and its gradient by blocks of rows, which serves any problem.
 *
 * Forward: row after row (visit.h). Backward: every row accumulates its own gradient, so nothing is
 * ever added by two threads and no order can matter. With g_ij = dL_i / dc_ij,
 *
 *     du_o = sum_t (g_ot [o is an anchor] + g_to [t is one]) u_t      over the rows t that o meets
 *            + (g_op [o is an anchor] + g_po [p is one]) u_p          its partner, if that is the
 *                                                                     only positive
 *
 * where the cosines are computed again, a slice of COLUMNS at a time. */
#ifndef HEX_BLOCKS_H
#define HEX_BLOCKS_H

#include "visit.h"

#define COLUMNS 512

/* ---- forward ---- */

typedef struct {
    const hex_problem_t *p;
    int64_t rows;
    double tau;
    real *stats;
    double *loss;
} forward_context_t;

static void write_stats(const hex_problem_t *p, const double *of, int64_t i, int64_t rows,
                        real *stats)
{
    for (int k = 0; k < hex_stats(p); k++)
        stats[k * rows + i] = (real)of[k];
}

static void forward_row(void *context, int64_t i, row_t *r, int64_t first, int64_t second,
                        near_t *near)
{
    (void)near;
    const forward_context_t *f = context;
    double stats[HEX_STATS_SEVERAL];
    if (!has_classes(r))
        r->n = drop(r->v, r->n, first, second);
    const int64_t at = hex_block_place(f->p, i);
    f->loss[at] = row_forward(f->p, r, read_vector(f->p->eps, at), f->tau, stats);
    write_stats(f->p, stats, at, f->rows, f->stats);
}

/* The rows' losses to what the caller wants of them: one thread, in the order of the rows. */
static void reduce(hex_reduction_t reduction, const double *rows, int64_t n, real *out)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += rows[i];
        if (reduction == HEX_NONE)
            out[i] = (real)rows[i];
    }
    if (reduction != HEX_NONE)
        *out = (real)(reduction == HEX_MEAN && n ? sum / (double)n : sum);
}

static const char *forward_rows(const hex_problem_t *p, visit_t *v, void *loss, void *stats)
{
    const int64_t rows = hex_block_anchors(p);
    forward_context_t f = {p, rows, read_vector(p->tau, 0), stats,
                           allocate(rows, 1, sizeof(double))};
    if (!f.loss)
        return HEX_NO_MEMORY;
    const char *error = for_each_row(p, v, forward_row, &f);
    if (!error)
        reduce(p->reduction, f.loss, rows, loss);
    release(f.loss);
    return error;
}

/* ---- backward ---- */

typedef struct {
    const hex_problem_t *p;
    const hex_gradient_t *g;
    const inputs_t *in;
    const panels_t *panels, *guide;
    int input;
    range_t owners, met;
    int64_t block;
    coefficients_t k;
    real *du;
    atomic_bool no_memory;
} backward_context_t;

/* The partner's part of du, then the projection and the rounding to the input's dtype. */
static void finish_row(const backward_context_t *c, int64_t o, real *du)
{
    const hex_problem_t *p = c->p;
    const unit_t *unit = &c->in->unit;
    const real *u = unit->u + o * unit->stride;
    int64_t row;
    const int input = source(p, o, &row);
    if (input < 2 && !p->several) {
        const int64_t q = partner(p, o), anchors = hex_anchors(p);
        const real *uq = unit->u + q * unit->stride, *positive = c->k.k[HEX_STAT_POSITIVE];
        const real by = (o < anchors ? positive[o] : 0) + (q < anchors ? positive[q] : 0);
        for (int64_t d = 0; d < p->D; d++)
            du[d] += by * uq[d];
    }
    store(c->g->dz[input], p->input[input].dtype, row - (input < 2 ? p->first : 0), p->D, du, u,
          dot_product(du, u, p->D), unit->inverse[o]);
}

/* Whether the owners are anchors whose cosines were kept. */
static bool at_hand(const backward_context_t *c)
{
    return keeps_cosines(c->p) && c->owners.begin < hex_anchors(c->p);
}

/* Register tiles of owners [begin, end). */
static void backward_body(int64_t begin, int64_t end, void *context)
{
    backward_context_t *c = context;
    const hex_problem_t *p = c->p;
    const unit_t *unit = &c->in->unit;
    const int64_t width = unit->width, n = c->met.end - c->met.begin, anchors = hex_anchors(p);
    const bool column_terms = c->met.begin < anchors, row_terms = c->owners.begin < anchors;
    const bool kept = at_hand(c);
    table_t t = {0};
    real *du = allocate(c->block, width, sizeof(real));
    const bool ready = make_table(p, c->block, c->block, COLUMNS, &t) && du;
    const int64_t first_row = c->owners.begin + begin * MR, after = c->owners.begin + end * MR;
    const int64_t last = after < c->owners.end ? after : c->owners.end;
    for (int64_t from = first_row; ready && from < last; from += c->block) {
        const int64_t rows = last - from < c->block ? last - from : c->block;
        memset(du, 0, (size_t)(c->block * width) * sizeof(real));
        for (int64_t at = 0; at < n; at += COLUMNS) {
            const int64_t columns = n - at < COLUMNS ? n - at : COLUMNS;
            const range_t slice = {c->met.begin + at, c->met.begin + at + columns};
            if (kept) /* rows that fill the last register tile: of any numbers, but of fast ones */
                memset(t.c + rows * COLUMNS, 0,
                       (size_t)((round_up(rows, MR) - rows) * COLUMNS) * sizeof(real));
            else
                cosines(unit, from, rows, c->panels, at, columns, t.c, COLUMNS);
            if (c->guide)
                cosines(&c->in->guide, from, rows, c->guide, at, columns, t.guide, COLUMNS);
            for (int64_t o = from; o < from + rows; o++) {
                real *v = t.c + (o - from) * COLUMNS;
                if (kept)
                    memcpy(v, kept_row(p, o, n) + at, (size_t)columns * sizeof(real));
                const row_t r = table_row(p, c->in, &t, o - from, o, slice, row_terms, v);
                terms_t of = {row_terms ? o : -1, column_terms ? slice.begin : -1, r.kind, r.kind};
                if (p->mask.data && row_terms && column_terms) { /* it need not be symmetric */
                    fill_kinds(p, c->in, o, slice, false, t.column_kind);
                    of.column_kind = t.column_kind;
                }
                row_entries(r.v, r.s, columns, &c->k, of);
                int64_t first = -1, second = -1;
                if (!r.kind && c->input < 2)
                    places_of(p, o, slice, &first, &second);
                if (first >= 0)
                    r.v[first] = 0;
                if (second >= 0)
                    r.v[second] = 0;
            }
            accumulate(unit, slice.begin, columns, t.c, COLUMNS, rows, du);
        }
        for (int64_t o = from; o < from + rows; o++)
            finish_row(c, o, du + (o - from) * width);
    }
    if (!ready)
        c->no_memory = true;
    free_table(&t);
    release(du);
}

/* Anchor i with its own negatives: dz of the anchor, and of each negative
 * dn_j = g_ij (u_i - c_ij n_j) / |n_j|. */
static void paired_backward_body(int64_t begin, int64_t end, void *context)
{
    backward_context_t *c = context;
    const hex_problem_t *p = c->p;
    const unit_t *unit = &c->in->unit;
    const int64_t width = unit->width;
    anchor_t a = {0};
    real *du = allocate(width, 1, sizeof(real)), *g = allocate(p->K, 1, sizeof(real));
    const bool ready = make_anchor(p, c->in, &a) && du && g;
    for (int64_t i = c->owners.begin + begin; ready && i < c->owners.begin + end; i++) {
        const real *u = unit->u + i * unit->stride;
        const row_t r = anchor_row(p, c->in, i, &a);
        memcpy(g, r.v, (size_t)p->K * sizeof(real));
        row_entries(g, r.s, p->K, &c->k, (terms_t){i, -1, r.kind, r.kind});
        memset(du, 0, (size_t)width * sizeof(real));
        for (int64_t j = 0; j < p->K; j++) {
            const real *nj = a.own.u + j * width;
            if (c->g->dz[0])
                for (int64_t d = 0; d < p->D; d++)
                    du[d] += g[j] * nj[d];
            if (c->g->dz[2])
                store(c->g->dz[2], p->input[2].dtype, (i - p->first) * p->K + j, p->D, u, nj,
                      (double)a.own.c[j], a.own.inverse[j] * (double)g[j]);
        }
        if (c->g->dz[0])
            finish_row(c, i, du);
    }
    if (!ready)
        c->no_memory = true;
    free_anchor(&a);
    release(du);
    release(g);
}

static void logits_backward_body(int64_t begin, int64_t end, void *context)
{
    backward_context_t *c = context;
    const hex_problem_t *p = c->p;
    const real tau = (real)read_vector(p->tau, 0);
    const hex_dtype_t dtype = p->input[0].dtype;
    const bool narrow = dtype != (sizeof(real) == sizeof(double) ? HEX_F64 : HEX_F32);
    real *scratch = allocate(p->D, 2, sizeof(real)), *zeros = scratch ? scratch + p->D : NULL;
    if (scratch)
        memset(zeros, 0, (size_t)p->D * sizeof(real));
    else
        c->no_memory = true;
    for (int64_t i = c->owners.begin + begin; scratch && i < c->owners.begin + end; i++) {
        const row_t r = logits_row(p, i, tau, scratch, NULL);
        real *out = narrow ? scratch : (real *)c->g->dz[0] + (i - p->first) * p->D;
        logits_entries(&r, out, &c->k, i);
        if (narrow) /* rounded, nothing else */
            store(c->g->dz[0], dtype, i - p->first, p->D, out, zeros, 0, 1);
    }
    release(scratch);
}

/* The coefficients of every row, those from REST on times its grad_output, into `out` of
 * (hex_stats(), rows). */
static void scale_stats(const hex_problem_t *p, const hex_gradient_t *g, real *out,
                        coefficients_t *c)
{
    const int64_t rows = hex_anchors(p);
    const real *stats = g->stats;
    double dtau = 0;
    bool local = false, one_shift = true;
    for (int64_t i = 0; i < rows; i++) {
        double go = read_vector(g->grad, i);
        if (p->reduction == HEX_MEAN)
            go /= (double)rows;
        for (int k = 0; k < hex_stats(p); k++) {
            const double s = (double)stats[k * rows + i];
            const bool itself =
                k < HEX_STAT_REST || k == HEX_STAT_POS_SHIFT || k == HEX_STAT_POS_MEAN;
            out[k * rows + i] = (real)(itself ? s : go * s);
        }
        local |= stats[HEX_STAT_HARD_E * rows + i] != 0;
        one_shift &= stats[HEX_STAT_SHIFT * rows + i] == 1;
        dtau += go * (double)stats[HEX_STAT_DTAU * rows + i];
    }
    if (g->dtau)
        *g->dtau = dtau;
    for (int k = 0; k < HEX_STATS_SEVERAL; k++) /* of one positive the last are not looked at */
        c->k[k] = out + (k < hex_stats(p) ? k : HEX_STAT_EPS) * rows;
    c->scale = (real)(M_LOG2E / (p->mode == HEX_LOGITS ? 1 : read_vector(p->tau, 0)));
    c->one_shift = one_shift;
    c->beta = local ? p->beta : 0; /* InfoNCE has one path, whatever beta would have been */
}

static const char *backward_rows(backward_context_t *c, panels_t *panels)
{
    const hex_problem_t *p = c->p;
    const bool blocks = p->mode < HEX_PAIRED;
    const char *error = NULL;
    panels_t guide = {0};
    for (c->input = 0; !error && c->input < 3; c->input++) {
        /* an anchor and its own negatives are done together, in the pass of whichever is wanted
         * first */
        const bool own = p->mode == HEX_PAIRED && c->input != 1;
        if (!c->g->dz[c->input] || (own && c->input == 2 && c->g->dz[0]))
            continue;
        c->owners = block_of(p, own ? 0 : c->input);
        c->met = met_by(p, c->input);
        c->block = block_rows(c->owners.end - c->owners.begin, COLUMNS, c->met.end - c->met.begin,
                              c->in->unit.width);
        if (p->mode != HEX_LOGITS && !at_hand(c)) /* else no cosine is computed again */
            error = make_panels(&c->in->unit, c->met.begin, c->met.end, panels);
        if (!error && blocks && p->G > 0) {
            error = make_panels(&c->in->guide, c->met.begin, c->met.end, &guide);
            c->guide = &guide;
        }
        const int64_t share =
            own || p->mode == HEX_LOGITS ? 1 : MR; /* rows that go to one thread */
        const int64_t count = (c->owners.end - c->owners.begin + share - 1) / share;
        const int64_t columns = own ? p->K : c->met.end - c->met.begin + 1; /* + 1: the partner */
        const int64_t width = c->in->unit.width + (p->G > 0 ? c->in->guide.width : 0) + 32;
        const int64_t work = p->mode == HEX_LOGITS ? 64 * p->D : 4 * share * columns * width;
        if (!error && !hex_parallel_for(count, work,
                                        own                     ? paired_backward_body
                                        : p->mode == HEX_LOGITS ? logits_backward_body
                                                                : backward_body,
                                        c))
            error = HEX_NO_THREADS;
        if (!error && c->no_memory)
            error = HEX_NO_MEMORY;
    }
    release(guide.data);
    return error;
}

#endif
