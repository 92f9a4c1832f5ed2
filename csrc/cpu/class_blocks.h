/* SPDX-License-Identifier: MIT */
/* The loss of embeddings whose pairs have classes: blocks of rows, threads, workspace. What a row
 * does is in class_row.h; normalisation and products are those of unit.h and product.h.
 *
 * Forward: a block of anchors against all candidates, cosines (and the guide's) in scratch of block
 * x M, the class of each entry in one vector. Backward: every embedding gathers its own gradient,
 *
 *     du_o = sum_t (g_ot [o is an anchor] + g_to [o is a candidate]) u_t
 *
 * from the cosines computed again, a slice of COLUMNS at a time: the same bits from either side, so
 * that an entry has one class and no sum depends on the threads. */
#ifndef HEX_CLASS_BLOCKS_H
#define HEX_CLASS_BLOCKS_H

#include "blocks.h"
#include "class_row.h"

typedef struct {
    unit_t u[2], guide[2]; /* of anchors, of candidates; in SELF the second is the first */
    panels_t panels, guide_panels;
} sides_t;

static const char *make_side(const hex_rows *x, int64_t rows, int64_t D, unit_t *unit)
{
    const hex_problem p = {.mode = HEX_SHARED, .K = rows, .D = D, .input[2] = *x};
    return make_unit(&p, unit);
}

static const char *make_sides(const hex_labelled *p, sides_t *s)
{
    const bool two = p->pairing != HEX_SELF, guided = p->guide_D > 0;
    const char *error = make_side(&p->x, p->N, p->D, &s->u[0]);
    if (!error && two)
        error = make_side(&p->y, p->M, p->D, &s->u[1]);
    if (!error && guided)
        error = make_side(&p->guide[0], p->N, p->guide_D, &s->guide[0]);
    if (!error && guided && two)
        error = make_side(&p->guide[1], p->M, p->guide_D, &s->guide[1]);
    if (!two)
        s->u[1] = s->u[0], s->guide[1] = s->guide[0];
    return error;
}

static void free_sides(sides_t *s)
{
    free(s->panels.data);
    free(s->guide_panels.data);
    for (int k = 0; k < 2; k++) {
        if (k == 0 || s->u[1].u != s->u[0].u)
            free_unit(&s->u[k]);
        if (k == 0 || s->guide[1].u != s->guide[0].u)
            free_unit(&s->guide[k]);
    }
}

/* Panels of the rows that the owners of `side` meet. */
static const char *face(const hex_labelled *p, sides_t *s, int side)
{
    const int64_t met = side == 0 ? p->M : p->N;
    free(s->panels.data);
    free(s->guide_panels.data);
    s->panels.data = s->guide_panels.data = NULL;
    const char *error = make_panels(&s->u[1 - side], 0, met, &s->panels);
    if (!error && p->guide_D > 0)
        error = make_panels(&s->guide[1 - side], 0, met, &s->guide_panels);
    return error;
}

/* The classes of owner o with the rows [from, from + n) it meets; side 0: o is the anchor. */
static void kinds(const hex_labelled *p, int side, int64_t o, int64_t from, int64_t n,
                  real *restrict kind)
{
    if (p->mask.data) {
        const hex_mask *m = &p->mask;
        const int64_t step = side == 0 ? m->col : m->row;
        const uint8_t *at = m->data + o % m->rows * (side == 0 ? m->row : m->col);
        int64_t b = from % m->rows;
        for (int64_t j = 0; j < n; j++) {
            kind[j] = at[b * step] ? POSITIVE : NEGATIVE;
            b = b + 1 == m->rows ? 0 : b + 1;
        }
    } else {
        const int64_t id = p->ids[side].data[o * p->ids[side].stride],
                      step = p->ids[1 - side].stride;
        const int64_t *restrict ids = p->ids[1 - side].data + from * step;
        if (step == 1)
            for (int64_t j = 0; j < n; j++)
                kind[j] = ids[j] == id ? POSITIVE : NEGATIVE;
        else
            for (int64_t j = 0; j < n; j++)
                kind[j] = ids[j * step] == id ? POSITIVE : NEGATIVE;
    }
    if (p->pairing == HEX_SELF && o >= from && o < from + n)
        kind[o - from] = LEFT_OUT;
    if (p->pairing == HEX_QUEUE) {
        const int64_t end = side == 0 ? p->N - from : o < p->N ? n : 0;
        for (int64_t j = 0; j < (end < n ? end : n); j++)
            kind[j] = kind[j] == POSITIVE ? POSITIVE : LEFT_OUT;
    }
}

/* What is compared with eps where it is not the cosine: 1 for a row of the same group, 0 else. */
static void same_group(const hex_labelled *p, int side, int64_t o, int64_t from, int64_t n,
                       real *restrict s)
{
    const hex_ids own = p->groups[side], other = p->groups[1 - side];
    const int64_t id = own.data[o * own.stride];
    for (int64_t j = 0; j < n; j++)
        s[j] = other.data[(from + j) * other.stride] == id ? 1 : 0;
}

/* Scratch of a chunk: `ld` columns of `block` rows of cosines and of the guide's, and of one row
 * the classes, the groups, and one to write to. */
typedef struct {
    real *c, *guide, *kind, *group, *out;
} table_t;

static bool make_table(const hex_labelled *p, int64_t block, int64_t ld, table_t *t)
{
    t->c = allocate(block, ld, sizeof(real));
    t->guide = allocate(p->guide_D > 0 ? block : 0, ld, sizeof(real));
    t->kind = allocate(3, ld, sizeof(real));
    if (!t->c || !t->guide || !t->kind)
        return false;
    t->group = t->kind + ld;
    t->out = t->group + ld;
    return true;
}

static void free_table(table_t *t)
{
    free(t->c);
    free(t->guide);
    free(t->kind);
}

static void fill_table(const sides_t *s, int side, int64_t from, int64_t rows, int64_t at,
                       int64_t columns, int64_t ld, bool guided, table_t *t)
{
    cosines(&s->u[side], from, rows, &s->panels, at, columns, t->c, ld);
    if (guided)
        cosines(&s->guide[side], from, rows, &s->guide_panels, at, columns, t->guide, ld);
}

static const real *scores(const hex_labelled *p, const table_t *t, int64_t row, int64_t ld)
{
    return p->groups[0].data ? t->group : (p->guide_D > 0 ? t->guide : t->c) + row * ld;
}

/* ---- every row, for the forward and the thresholds ---- */

typedef struct labelled_context_t labelled_context_t;
typedef void (*labelled_row_t)(labelled_context_t *, int64_t i, real *c, const real *s,
                               const real *kind);

struct labelled_context_t {
    const hex_labelled *p;
    sides_t sides;
    int64_t block;
    labelled_row_t row;
    double *loss; /* forward */
    real *stats;
    double quantile; /* thresholds */
    bool over_negatives, bounds;
    real *low, *high; /* of each row its quantile in low, or its bounds */
    atomic_bool no_memory;
};

static void labelled_body(int64_t begin, int64_t end, void *context)
{
    labelled_context_t *c = context;
    const hex_labelled *p = c->p;
    const int64_t ld = round_up(p->M, NR) + NR;
    table_t t = {0};
    if (!make_table(p, c->block, ld, &t))
        c->no_memory = true;
    else
        for (int64_t q = begin; q < end; q++) {
            const int64_t from = q * c->block,
                          rows = p->N - from < c->block ? p->N - from : c->block;
            fill_table(&c->sides, 0, from, rows, 0, p->M, ld, p->guide_D > 0, &t);
            for (int64_t i = from; i < from + rows; i++) {
                kinds(p, 0, i, 0, p->M, t.kind);
                if (p->groups[0].data)
                    same_group(p, 0, i, 0, p->M, t.group);
                c->row(c, i, t.c + (i - from) * ld, scores(p, &t, i - from, ld), t.kind);
            }
        }
    free_table(&t);
}

static const char *for_each_labelled_row(labelled_context_t *c)
{
    const hex_labelled *p = c->p;
    const char *error = make_sides(p, &c->sides);
    if (!error)
        error = face(p, &c->sides, 0);
    c->block = block_rows(p->N, p->guide_D > 0 ? 2 * p->M : p->M);
    const int64_t blocks = (p->N + c->block - 1) / c->block;
    const int64_t work = 2 * c->block * p->M * (p->D + p->guide_D + 64);
    if (!error && !hex_parallel_for(blocks, work, labelled_body, c))
        error = HEX_NO_THREADS;
    if (!error && c->no_memory)
        error = HEX_NO_MEMORY;
    free_sides(&c->sides);
    return error;
}

static void labelled_forward_row(labelled_context_t *c, int64_t i, real *v, const real *s,
                                 const real *kind)
{
    const hex_labelled *p = c->p;
    double stats[HEX_ROW_STATS];
    c->loss[i] = class_forward(&p->rule, v, s, kind, p->M, read_vector(p->rule.eps, i),
                               read_vector(p->rule.tau, 0), false, stats);
    for (int k = 0; k < HEX_ROW_STATS; k++)
        c->stats[k * p->N + i] = (real)stats[k];
}

static const char *labelled_forward(const hex_labelled *p, void *loss, void *stats)
{
    labelled_context_t c = {.p = p, .row = labelled_forward_row, .stats = stats};
    c.loss = allocate(p->N, 1, sizeof(double));
    if (!c.loss)
        return HEX_NO_MEMORY;
    const char *error = for_each_labelled_row(&c);
    if (!error)
        reduce(p->rule.reduction, c.loss, p->N, loss);
    free(c.loss);
    return error;
}

static void labelled_threshold_row(labelled_context_t *c, int64_t i, real *v, const real *s,
                                   const real *kind)
{
    const hex_labelled *p = c->p;
    double finite = 0;
    real self = v[i < p->M ? i : 0];
    (void)s;
    int64_t n = keep(v, kind, p->M, c->over_negatives, &finite);
    if (p->pairing == HEX_SELF && !c->over_negatives) {
        finite += (double)self * 0;
        v[n++] = self == 0 ? 0 : 1; /* exactly 1, or 0 for a row of zeros */
    }
    if (c->bounds) {
        row_bounds(v, n, &c->low[i], &c->high[i]);
        c->low[i] = cosine(c->low[i]);
        c->high[i] = cosine(c->high[i]);
    } else
        c->low[i] = finite == 0 && n == 0 ? (real)INFINITY : quantile_of(v, n, c->quantile, finite);
}

static const char *labelled_threshold(const hex_labelled *p, double quantile, bool over_negatives,
                                      double *mean)
{
    labelled_context_t c = {.p = p,
                            .row = labelled_threshold_row,
                            .quantile = quantile,
                            .over_negatives = over_negatives,
                            .low = allocate(p->N, 1, sizeof(real))};
    const char *error = c.low ? for_each_labelled_row(&c) : HEX_NO_MEMORY;
    if (!error)
        *mean = mean_of_rows(c.low, p->N);
    free(c.low);
    return error;
}

static const char *labelled_row_range(const hex_labelled *p, void *low, void *high)
{
    labelled_context_t c = {
        .p = p, .row = labelled_threshold_row, .bounds = true, .low = low, .high = high};
    return for_each_labelled_row(&c);
}

/* ---- backward ---- */

typedef struct {
    const hex_labelled *p;
    sides_t sides;
    int side; /* whose gradient: 0 the anchors', 1 the candidates' */
    int64_t block;
    class_coefficients_t k;
    void *out;
    atomic_bool no_memory;
} labelled_backward_context_t;

static void labelled_backward_body(int64_t begin, int64_t end, void *context)
{
    labelled_backward_context_t *c = context;
    const hex_labelled *p = c->p;
    const unit_t *owner = &c->sides.u[c->side];
    const int64_t owners = c->side == 0 ? p->N : p->M, met = c->side == 0 ? p->M : p->N;
    const int64_t width = owner->width;
    const hex_dtype dtype = c->side == 0 ? p->x.dtype : p->y.dtype;
    table_t t = {0};
    real *du = allocate(c->block, width, sizeof(real));
    const bool ready = make_table(p, c->block, COLUMNS, &t) && du;
    for (int64_t q = begin; ready && q < end; q++) {
        const int64_t from = q * c->block;
        const int64_t rows = owners - from < c->block ? owners - from : c->block;
        memset(du, 0, (size_t)(c->block * width) * sizeof(real));
        for (int64_t at = 0; at < met; at += COLUMNS) {
            const int64_t n = met - at < COLUMNS ? met - at : COLUMNS;
            fill_table(&c->sides, c->side, from, rows, at, n, COLUMNS, p->guide_D > 0, &t);
            for (int64_t o = from; o < from + rows; o++) {
                real *v = t.c + (o - from) * COLUMNS;
                const real *s = scores(p, &t, o - from, COLUMNS);
                if (p->groups[0].data)
                    same_group(p, c->side, o, at, n, t.group);
                kinds(p, c->side, o, at, n, t.kind);
                row_class_entries(v, s, t.kind, n, &c->k, c->side == 0 ? o : at, c->side == 1,
                                  false, t.out);
                if (p->pairing == HEX_SELF) { /* o as a candidate of the others */
                    if (p->mask.data)
                        kinds(p, 1, o, at, n, t.kind);
                    row_class_entries(v, s, t.kind, n, &c->k, at, true, true, t.out);
                }
                memcpy(v, t.out, (size_t)n * sizeof(real));
            }
            accumulate(&c->sides.u[1 - c->side], at, n, t.c, COLUMNS, rows, du);
        }
        for (int64_t o = from; o < from + rows; o++) {
            const real *u = owner->u + o * owner->stride, *d = du + (o - from) * width;
            store(c->out, dtype, o, p->D, d, u, dot_product(d, u, p->D), owner->inverse[o]);
        }
    }
    if (!ready)
        c->no_memory = true;
    free_table(&t);
    free(du);
}

static const char *labelled_backward(const hex_labelled *p, const hex_row_gradient *g)
{
    real *k = allocate(p->N, HEX_ROW_POS + 1, sizeof(real));
    if (!k)
        return HEX_NO_MEMORY;
    labelled_backward_context_t c = {.p = p, .k = scale_rows(&p->rule, g, p->N, false, k)};
    const char *error = g->d[0] || g->d[1] ? make_sides(p, &c.sides) : NULL;
    for (c.side = 0; !error && c.side < 2; c.side++) {
        if (!(c.out = g->d[c.side]))
            continue;
        const int64_t owners = c.side == 0 ? p->N : p->M, met = c.side == 0 ? p->M : p->N;
        error = face(p, &c.sides, c.side);
        c.block = block_rows(owners, 0);
        if (!error && !hex_parallel_for((owners + c.block - 1) / c.block,
                                        4 * c.block * met * (p->D + p->guide_D + 64),
                                        labelled_backward_body, &c))
            error = HEX_NO_THREADS;
        if (!error && c.no_memory)
            error = HEX_NO_MEMORY;
    }
    free(k);
    free_sides(&c.sides);
    return error;
}

#endif
