/* SPDX-License-Identifier: MIT */
/* The loss and its gradient: blocks of rows, threads, workspace.
 *
 * Forward: a block of anchors against all its candidates, cosines in scratch of block x N, then one
 * row kernel each. Backward: every row gathers its own gradient, so nothing is ever added by two
 * threads and no order can matter. With g_ij = dL_i / dc_ij,
 *
 *     du_o = sum_t (g_ot [o is an anchor] + g_to [t is one]) u_t      over the rows t that o meets
 *            + (g_op [o is an anchor] + g_po [p is one]) u_p          its partner
 *
 * where the cosines are computed again, a slice of COLUMNS at a time. Nothing is N x N in either
 * direction. */
#ifndef HEX_BLOCKS_H
#define HEX_BLOCKS_H

#include "row.h"

#define COLUMNS 512
#define BLOCK (4 * MR)

/* Rows of a block: as many as keep its cosines in the second-level cache, and enough blocks to
 * share out. Never a function of the number of threads. */
static int64_t block_rows(int64_t rows, int64_t columns)
{
    const int64_t fit = (1 << 20) / (int64_t)sizeof(real) / (columns + 1) / MR * MR;
    const int64_t block = rows < 16 * BLOCK ? 2 * MR : BLOCK;
    return fit < MR ? MR : fit < block ? fit : block;
}

/* Drops the elements with the (up to two, ascending, -1: none) indices and returns the new length.
 */
static int64_t drop(real *c, int64_t n, int64_t first, int64_t second)
{
    if (second >= 0)
        c[second] = c[--n];
    if (first >= 0)
        c[first] = c[--n];
    return n;
}

/* Where row i and its partner stand among the rows [begin, end), ascending in *first, *second; -1
 * where they do not. */
static void places_of(const hex_problem *p, int64_t i, range_t among, int64_t *first,
                      int64_t *second)
{
    const int64_t q = partner(p, i), low = i < q ? i : q, high = i < q ? q : i;
    *first = low >= among.begin && low < among.end ? low - among.begin : -1;
    *second = high >= among.begin && high < among.end ? high - among.begin : -1;
}

/* ---- per-anchor negatives: a few rows used by one anchor only, so no panels ---- */

typedef struct {
    int64_t width;
    real *u, *c;     /* (K, width) unit rows; K cosines, and room for the positive */
    double *inverse; /* K */
} paired_t;

static bool make_paired(const hex_problem *p, int64_t width, paired_t *own)
{
    own->width = width;
    own->u = allocate(p->K, width, sizeof(real));
    own->c = allocate(p->K + 1, 1, sizeof(real));
    own->inverse = allocate(p->K, 1, sizeof(double));
    return own->u && own->c && own->inverse;
}

static void free_paired(paired_t *own)
{
    free(own->u);
    free(own->c);
    free(own->inverse);
}

static void paired_cosines(const hex_problem *p, const unit_t *unit, int64_t i, paired_t *own)
{
    const real *anchor = unit->u + i * unit->stride;
    for (int64_t j = 0; j < p->K; j++) {
        real *u = own->u + j * own->width;
        load(&p->input[2], i * p->K + j, p->D, u);
        own->inverse[j] = normalize(u, p->D);
        own->c[j] = (real)dot_product(anchor, u, p->D);
    }
}

/* ---- every row of cosines of the anchors, handed to a row function ---- */

/* c: the row's n candidates, in scratch it may change, with room for two more; the positive and the
 * row itself stand at c[first] and c[second] where they are among them (-1: not). cp: its positive.
 */
typedef void (*row_function_t)(void *context, int64_t i, real *c, int64_t n, int64_t first,
                               int64_t second, real cp);

typedef struct {
    const hex_problem *p;
    const unit_t *unit;
    const panels_t *panels;
    int64_t begin, end, block; /* anchors [begin, end), */
    const int64_t *some;       /* or, if not NULL, some[begin .. end) */
    row_function_t row;
    void *context;
    atomic_bool no_memory;
} rows_context_t;

static real positive_cosine(const hex_problem *p, const unit_t *unit, int64_t i)
{
    return (real)dot_product(unit->u + i * unit->stride, unit->u + partner(p, i) * unit->stride,
                             p->D);
}

static void rows_body(int64_t begin, int64_t end, void *context)
{
    rows_context_t *c = context;
    const range_t met = {c->panels->begin, c->panels->end};
    const int64_t n = met.end - met.begin, ld = round_up(n, NR) + NR;
    real *scratch = allocate(c->block, ld, sizeof(real));
    unit_t copies = {0};
    if (!scratch ||
        (c->some && !allocate_rows(&copies, c->block, c->unit->width, has_dots(c->unit))))
        c->no_memory = true;
    for (int64_t q = begin; q < end && !c->no_memory; q++) {
        const int64_t from = c->begin + q * c->block;
        const int64_t rows = c->end - from < c->block ? c->end - from : c->block;
        for (int64_t i = 0; c->some && i < c->block; i++) /* whole register tiles of them */
            copy_row(c->unit, c->some[i < rows ? from + i : from], &copies, i);
        cosines(c->some ? &copies : c->unit, c->some ? 0 : from, rows, c->panels, 0, n, scratch,
                ld);
        for (int64_t k = 0; k < rows; k++) {
            const int64_t i = c->some ? c->some[from + k] : from + k;
            int64_t first, second;
            places_of(c->p, i, met, &first, &second);
            c->row(c->context, i, scratch + k * ld, n, first, second,
                   positive_cosine(c->p, c->unit, i));
        }
    }
    free(scratch);
    free_unit(&copies);
}

static void paired_rows_body(int64_t begin, int64_t end, void *context)
{
    rows_context_t *c = context;
    paired_t own = {0};
    if (make_paired(c->p, c->unit->width, &own))
        for (int64_t i = begin; i < end; i++) {
            paired_cosines(c->p, c->unit, i, &own);
            c->row(c->context, i, own.c, c->p->K, -1, -1, positive_cosine(c->p, c->unit, i));
        }
    else
        c->no_memory = true;
    free_paired(&own);
}

/* The rows of a context, all but the block of which is set. */
static const char *visit_rows(rows_context_t *c)
{
    const bool own = c->p->mode == HEX_OWN;
    const int64_t rows = c->end - c->begin;
    const int64_t columns = own ? c->p->K : c->panels->end - c->panels->begin;
    c->block = own ? 1 : block_rows(rows, columns);
    const int64_t blocks = (rows + c->block - 1) / c->block;
    if (!hex_parallel_for(blocks, 2 * c->block * columns * (c->unit->width + 32),
                          own ? paired_rows_body : rows_body, c))
        return HEX_NO_THREADS;
    return c->no_memory ? HEX_NO_MEMORY : NULL;
}

static const char *for_each_row(const hex_problem *p, row_function_t row, void *context)
{
    unit_t unit = {0};
    panels_t panels = {0};
    const char *error = make_unit(p, &unit);
    for (int input = 0; !error && input < 2; input++) {
        const range_t rows = rows_of(p, input), met = met_by(p, input);
        rows_context_t c = {p, &unit, &panels, rows.begin, rows.end, 0, NULL, row, context, false};
        if (rows.begin >= hex_anchors(p))
            break;
        if (p->mode != HEX_OWN)
            error = make_panels(&unit, met.begin, met.end, &panels);
        if (!error)
            error = visit_rows(&c);
    }
    free(panels.data);
    free_unit(&unit);
    return error;
}

/* ---- forward ---- */

typedef struct {
    const hex_problem *p;
    int64_t rows;
    double tau;
    real *stats;
    double *loss;
} forward_context_t;

static void forward_row(void *context, int64_t i, real *c, int64_t n, int64_t first, int64_t second,
                        real cp)
{
    const forward_context_t *f = context;
    double stats[HEX_STATS];
    n = drop(c, n, first, second);
    f->loss[i] = row_forward(f->p, c, n, (double)cp, read_vector(f->p->eps, i), f->tau, stats);
    for (int k = 0; k < HEX_STATS; k++)
        f->stats[k * f->rows + i] = (real)stats[k];
}

/* The rows' losses to what the caller wants of them: one thread, in the order of the rows. */
static void reduce(hex_reduction reduction, const double *rows, int64_t n, real *out)
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

static const char *forward_rows(const hex_problem *p, void *loss, void *stats)
{
    const int64_t rows = hex_anchors(p);
    forward_context_t f = {p, rows, read_vector(p->tau, 0), stats,
                           allocate(rows, 1, sizeof(double))};
    if (!f.loss)
        return HEX_NO_MEMORY;
    const char *error = for_each_row(p, forward_row, &f);
    if (!error)
        reduce(p->reduction, f.loss, rows, loss);
    free(f.loss);
    return error;
}

/* ---- backward ---- */

typedef struct {
    const hex_problem *p;
    const hex_gradient *g;
    const unit_t *unit;
    const panels_t *panels;
    int input;
    range_t owners, met;
    int64_t block;
    coefficients_t k;
    const real *positive; /* g_ip of every anchor, like k times its grad_output */
    real scale, *du;
    double beta;
    atomic_bool no_memory;
} backward_context_t;

/* The partner's part of du, then the projection and the rounding to the input's dtype. */
static void finish_row(const backward_context_t *c, int64_t o, real *du)
{
    const hex_problem *p = c->p;
    const int64_t q = partner(p, o), anchors = hex_anchors(p);
    const real *u = c->unit->u + o * c->unit->stride;
    int64_t row;
    const int input = source(p, o, &row);
    if (input < 2) {
        const real *uq = c->unit->u + q * c->unit->stride;
        const real weight = (o < anchors ? c->positive[o] : 0) + (q < anchors ? c->positive[q] : 0);
        for (int64_t d = 0; d < p->D; d++)
            du[d] += weight * uq[d];
    }
    store(c->g->dz[input], p->input[input].dtype, row, p->D, du, u, dot_product(du, u, p->D),
          c->unit->inverse[o]);
}

static void backward_body(int64_t begin, int64_t end, void *context)
{
    backward_context_t *c = context;
    const int64_t width = c->unit->width, n = c->met.end - c->met.begin,
                  anchors = hex_anchors(c->p);
    const bool column_terms = c->met.begin < anchors, row_terms = c->owners.begin < anchors;
    real *v = allocate(c->block, COLUMNS, sizeof(real)),
         *du = allocate(c->block, width, sizeof(real));
    for (int64_t block = begin; v && du && block < end; block++) {
        const int64_t from = c->owners.begin + block * c->block;
        const int64_t rows = c->owners.end - from < c->block ? c->owners.end - from : c->block;
        memset(du, 0, (size_t)(c->block * width) * sizeof(real));
        for (int64_t at = 0; at < n; at += COLUMNS) {
            const int64_t columns = n - at < COLUMNS ? n - at : COLUMNS;
            const range_t slice = {c->met.begin + at, c->met.begin + at + columns};
            cosines(c->unit, from, rows, c->panels, at, columns, v, COLUMNS);
            for (int64_t o = from; o < from + rows; o++) {
                real *row = v + (o - from) * COLUMNS;
                int64_t first, second;
                row_entries(row, columns, &c->k, row_terms ? o : -1,
                            column_terms ? slice.begin : -1, c->scale, c->beta);
                places_of(c->p, o, slice, &first, &second);
                if (c->input < 2 && first >= 0)
                    row[first] = 0;
                if (c->input < 2 && second >= 0)
                    row[second] = 0;
            }
            accumulate(c->unit, slice.begin, columns, v, COLUMNS, rows, du);
        }
        for (int64_t o = from; o < from + rows; o++)
            finish_row(c, o, du + (o - from) * width);
    }
    if (!v || !du)
        c->no_memory = true;
    free(v);
    free(du);
}

/* Anchor i with its own negatives: dz of the anchor, and of each negative dn_j = g_ij (u_i - c_ij
 * n_j) / |n_j|. */
static void paired_backward_body(int64_t begin, int64_t end, void *context)
{
    backward_context_t *c = context;
    const hex_problem *p = c->p;
    const int64_t width = c->unit->width;
    paired_t own = {0};
    real *du = allocate(width, 1, sizeof(real)), *g = allocate(p->K, 1, sizeof(real));
    const bool ready = make_paired(p, width, &own) && du && g;
    for (int64_t i = begin; ready && i < end; i++) {
        const real *u = c->unit->u + i * c->unit->stride;
        paired_cosines(p, c->unit, i, &own);
        memcpy(g, own.c, (size_t)p->K * sizeof(real));
        row_entries(g, p->K, &c->k, i, -1, c->scale, c->beta);
        memset(du, 0, (size_t)width * sizeof(real));
        for (int64_t j = 0; j < p->K; j++) {
            const real *nj = own.u + j * width;
            if (c->g->dz[0])
                for (int64_t d = 0; d < p->D; d++)
                    du[d] += g[j] * nj[d];
            if (c->g->dz[2])
                store(c->g->dz[2], p->input[2].dtype, i * p->K + j, p->D, u, nj, (double)own.c[j],
                      own.inverse[j] * (double)g[j]);
        }
        if (c->g->dz[0])
            finish_row(c, i, du);
    }
    if (!ready)
        c->no_memory = true;
    free_paired(&own);
    free(du);
    free(g);
}

/* The coefficients times grad_output: five rows that the element kernels read, and the positive's.
 * Returns whether any row repels its H. */
static bool scale_stats(const hex_problem *p, const hex_gradient *g, real *out)
{
    const int64_t rows = hex_anchors(p);
    const real *stats = g->stats;
    double dtau = 0;
    bool local = false;
    for (int64_t i = 0; i < rows; i++) {
        double go = read_vector(g->grad, i);
        if (p->reduction == HEX_MEAN)
            go /= (double)rows;
        for (int k = 0; k <= HEX_STAT_POSITIVE; k++) {
            const double s = (double)stats[k * rows + i];
            out[k * rows + i] = (real)(k < HEX_STAT_REST ? s : go * s);
        }
        local |= stats[HEX_STAT_HARD_E * rows + i] != 0;
        dtau += go * (double)stats[HEX_STAT_DTAU * rows + i];
    }
    if (g->dtau)
        *g->dtau = dtau;
    return local;
}

#endif
