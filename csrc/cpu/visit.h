/* SPDX-License-Identifier: MIT */
/* Every row of a problem, or of its block of anchors, handed to a function: some anchors at once
 * against all their candidates, cosines in scratch, or where they are kept, then row after row.
 * Negatives of each anchor's own are multiplied by it alone, and of logits a row is read. */
#ifndef HEX_VISIT_H
#define HEX_VISIT_H

#include "sets.h"

/* ---- which way a problem goes ---- */

/* Candidates of an anchor, itself and its positive among them where they are columns. */
static int64_t columns_of(const hex_problem_t *p)
{
    return p->mode == HEX_NTXENT ? p->B + p->M : p->mode == HEX_UNPAIRED ? p->K : p->M;
}

/* How many of them are no negatives, where positives are not several. */
static int64_t not_negatives(const hex_problem_t *p)
{
    return p->mode == HEX_NTXENT ? 2 : p->mode == HEX_UNPAIRED ? 0 : 1;
}

static bool enough(const hex_problem_t *p)
{
    return p->mode < HEX_PAIRED && !p->block && p->B >= 16 && columns_of(p) >= ENOUGH;
}

/* Whether a problem is done this way: enough cosines, sets that a tile can tell from codes, and the
 * shift of every row 1. */
static bool by_tiles(const hex_problem_t *p)
{
    const bool by_codes = !p->mask.data && p->G == 0 && !(p->several && p->by_group) &&
                          !(p->several && p->mode == HEX_UNPAIRED);
    return enough(p) && by_codes && may_have_one_shift(p);
}

/* ---- rows ---- */

/* How many of `rows` rows are multiplied at once by the `met` rows of `width` numbers that they meet,
 * with `columns` cosines each in scratch: as many as keep these in the second-level cache, or, where
 * the rows that are met come from memory, once for each block, in the third. A multiple of MR, by
 * which threads share the rows. */
static int64_t block_rows(int64_t rows, int64_t columns, int64_t met, int64_t width)
{
    const int64_t item = sizeof(real);
    const bool far = met > (8 << 20) / item / (width + 1);
    const int64_t fit = (far ? 16 << 20 : 1 << 20) / item / (columns + 1), some = far ? 192 : 96;
    const int64_t most = round_up(rows, MR) < some ? round_up(rows, MR) : some;
    return fit < MR ? MR : (fit < most ? fit : most) / MR * MR;
}

/* What goes row by row keeps its cosines as they are, row after row: from row to row room for whole
 * register tiles of any level, and an odd number of cache lines, see stride_of. */
#define KEPT_COLUMNS 32 /* a multiple of every NR */
#define KEPT_ROWS 12    /* and of every MR: as many more may be written after the last */
#define KEPT_LINE 16    /* numbers of a cache line, or of two */

static int64_t kept_stride(int64_t columns)
{
    return round_up(columns, KEPT_COLUMNS) + 64 / (int64_t)sizeof(real);
}

static bool keeps_cosines(const hex_problem_t *p) { return p->kept && !by_tiles(p); }

static int64_t kept_numbers(const hex_problem_t *p)
{
    const range_t met = met_by(p, 0);
    return (hex_block_anchors(p) + KEPT_ROWS) * kept_stride(met.end - met.begin);
}

/* Those that are kept of anchor i with `columns` candidates. */
static real *kept_row(const hex_problem_t *p, int64_t i, int64_t columns)
{
    return (real *)p->kept + hex_block_place(p, i) * kept_stride(columns);
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

/* Where row i and its partner stand among some rows, ascending in *first, *second; -1 where they do
 * not. */
static void places_of(const hex_problem_t *p, int64_t i, range_t among, int64_t *first,
                      int64_t *second)
{
    const int64_t q = partner(p, i), low = i < q ? i : q, high = i < q ? q : i;
    *first = low >= among.begin && low < among.end ? low - among.begin : -1;
    *second = high >= among.begin && high < among.end ? high - among.begin : -1;
}

/* ---- scratch of a thread ---- */

/* Rows of cosines, and `block` rows of the guide's, `ld` apart; of one row the scores by groups, and
 * its classes, as an anchor and as a candidate of the others. */
typedef struct {
    int64_t ld;
    real *c, *guide, *group, *kind, *column_kind;
} table_t;

static bool make_table(const hex_problem_t *p, int64_t rows, int64_t block, int64_t ld, table_t *t)
{
    t->ld = ld;
    t->c = allocate(rows, ld, sizeof(real));
    t->guide = allocate(p->G > 0 ? block : 0, ld, sizeof(real));
    t->group = allocate(is_classed(p) ? 3 : 0, ld, sizeof(real));
    if (!t->c || !t->guide || !t->group)
        return false;
    t->kind = t->group + ld;
    t->column_kind = t->kind + ld;
    return true;
}

static void free_table(table_t *t)
{
    release(t->c);
    release(t->guide);
    release(t->group);
}

/* The row of cosines v, of the unit row o with those it meets, k-th of a block: it has its classes
 * where it has any. */
static row_t table_row(const hex_problem_t *p, const inputs_t *in, const table_t *t, int64_t k,
                       int64_t o, range_t met, bool anchor, real *v)
{
    const int64_t n = met.end - met.begin;
    row_t r = {.v = v, .s = v, .n = n, .apart = !p->several};
    if (!is_classed(p))
        return r;
    fill_kinds(p, in, o, met, anchor, t->kind);
    r.kind = t->kind;
    if (p->by_group) {
        fill_groups(in->groups, o, met.begin, n, t->group);
        r.s = t->group;
    } else if (p->G > 0)
        r.s = t->guide + k * t->ld;
    return r;
}

/* ---- negatives of one anchor: a few rows used by it only, so no panels ---- */

typedef struct {
    int64_t width;
    real *u, *c;     /* (K, width) unit rows; K cosines, and room for the positive */
    double *inverse; /* K */
} paired_t;

static bool make_paired(const hex_problem_t *p, int64_t width, paired_t *own)
{
    own->width = width;
    own->u = allocate(p->K, width, sizeof(real));
    own->c = allocate(p->K + 1, 1, sizeof(real));
    own->inverse = allocate(p->K, 1, sizeof(double));
    return own->u && own->c && own->inverse;
}

static void free_paired(paired_t *own)
{
    release(own->u);
    release(own->c);
    release(own->inverse);
}

/* kind: their classes, if they have any; what is left out may hold any numbers, and 0 stands for
 * it. */
static void paired_cosines(const hex_problem_t *p, const hex_rows_t *negatives, int64_t D,
                           const unit_t *unit, int64_t i, const real *kind, paired_t *own)
{
    const real *anchor = unit->u + i * unit->stride;
    for (int64_t j = 0; j < p->K; j++) {
        real *u = own->u + j * own->width;
        if (kind && kind[j] == LEFT_OUT) {
            memset(u, 0, (size_t)own->width * sizeof(real));
            own->inverse[j] = 0;
            own->c[j] = 0;
            continue;
        }
        load(negatives, i * p->K + j, D, u);
        own->inverse[j] = normalize(u, D);
        own->c[j] = (real)dot_product(anchor, u, D);
    }
}

/* An anchor with its negatives, and their guide or groups. */
typedef struct {
    paired_t own, guide;
    table_t table; /* of one row, where there are classes */
} anchor_t;

static bool make_anchor(const hex_problem_t *p, const inputs_t *in, anchor_t *a)
{
    return make_paired(p, in->unit.width, &a->own) &&
           (p->G == 0 || make_paired(p, in->guide.width, &a->guide)) &&
           (!is_classed(p) || make_table(p, 0, 0, p->K + 1, &a->table));
}

static void free_anchor(anchor_t *a)
{
    free_paired(&a->own);
    free_paired(&a->guide);
    free_table(&a->table);
}

static row_t anchor_row(const hex_problem_t *p, const inputs_t *in, int64_t i, anchor_t *a)
{
    row_t r = {.v = a->own.c, .s = a->own.c, .n = p->K, .kind = a->table.kind, .apart = true};
    const uint8_t *codes = p->mask.data ? p->mask.data + i % p->mask.rows * p->mask.row : NULL;
    for (int64_t j = 0; r.kind && j < p->K; j++)
        a->table.kind[j] = codes && codes[j % p->mask.columns * p->mask.col] == HEX_CODE_LEFT_OUT
                               ? LEFT_OUT
                               : NEGATIVE;
    paired_cosines(p, &p->input[2], p->D, &in->unit, i, r.kind, &a->own);
    if (p->G > 0) {
        paired_cosines(p, &p->guide[2], p->G, &in->guide, i, r.kind, &a->guide);
        r.s = a->guide.c;
    } else if (p->by_group) {
        fill_groups(in->groups, i, p->B + p->M + i * p->K, p->K, a->table.group);
        r.s = a->table.group;
    }
    return r;
}

/* ---- logits: the cosine of a column is its logit times tau; a column of -Inf is left out, but for
 * the target's, whose loss is +Inf ---- */

/* Row i where it lies if it may be read there, else in `own`; room: see row_t. */
static row_t logits_row(const hex_problem_t *p, int64_t i, real tau, real *own, real *room)
{
    const hex_rows_t *x = &p->input[0];
    const bool there = x->col == 1 && x->dtype == (sizeof(real) == 8 ? HEX_F64 : HEX_F32);
    if (!there)
        load(x, i, p->D, own);
    return (row_t){.v = there ? (real *)x->data + row_offset(x, i) : own,
                   .s = room,
                   .n = p->D,
                   .logits = true,
                   .target = p->ids[0].data[i],
                   .tau = tau};
}

/* ---- every row of the anchors, handed to a row function ---- */

/* r: the row's candidates, in scratch it may change, with room for two more. Where it has no classes,
 * the positive and the row itself stand at r->v[first] and r->v[second] if they are among them (-1:
 * not). near: of the thread's rows so far. */
typedef void (*row_function_t)(void *context, int64_t i, row_t *r, int64_t first, int64_t second,
                               near_t *near);

typedef struct {
    const hex_problem_t *p;
    const inputs_t *in;
    range_t met;                    /* the candidates */
    const panels_t *panels, *guide; /* of them */
    const real *positive;           /* cosine of each image's two views in the block; or NULL */
    int64_t begin, end, block;      /* anchors [begin, end), a block at once, */
    const int64_t *some;            /* or, if not NULL, some[begin .. end): they have no guide */
    row_function_t row;
    void *context;
    atomic_bool no_memory;
} rows_context_t;

static real positive_cosine(const hex_problem_t *p, const unit_t *unit, int64_t i)
{
    return (real)dot_product(unit->u + i * unit->stride, unit->u + partner(p, i) * unit->stride,
                             p->D);
}

static double positive_of(const rows_context_t *c, int64_t i)
{
    const hex_problem_t *p = c->p;
    return (double)(c->positive ? c->positive[i - (i < p->B ? 0 : p->B) - p->first]
                                : positive_cosine(p, &c->in->unit, i));
}

/* Register tiles of rows [begin, end). */
static void rows_body(int64_t begin, int64_t end, void *context)
{
    rows_context_t *c = context;
    const hex_problem_t *p = c->p;
    const unit_t *unit = &c->in->unit;
    const range_t met = c->met;
    const int64_t n = met.end - met.begin, ld = round_up(n, NR) + NR;
    const bool keeps = keeps_cosines(p);
    table_t t = {0};
    near_t near = {0};
    unit_t copies = {0};
    if (!make_table(p, keeps ? 1 : c->block, c->block, ld, &t) || !make_near(&near, n) ||
        (c->some && !allocate_rows(&copies, c->block, unit->width, has_dots(unit))))
        c->no_memory = true;
    const int64_t last = c->begin + end * MR < c->end ? c->begin + end * MR : c->end;
    for (int64_t from = c->begin + begin * MR; from < last && !c->no_memory; from += c->block) {
        const int64_t rows = last - from < c->block ? last - from : c->block;
        for (int64_t i = 0; c->some && i < round_up(rows, MR); i++)
            copy_row(unit, c->some[i < rows ? from + i : from], &copies, i);
        real *table = keeps ? kept_row(p, from, n) : t.c;
        const int64_t stride = keeps ? kept_stride(n) : ld;
        if (!keeps || !p->filled)
            cosines(c->some ? &copies : unit, c->some ? 0 : from, rows, c->panels, 0, n, table,
                    stride);
        if (c->guide)
            cosines(&c->in->guide, from, rows, c->guide, 0, n, t.guide, ld);
        for (int64_t k = 0; k < rows; k++) {
            const int64_t i = c->some ? c->some[from + k] : from + k;
            int64_t first = -1, second = -1;
            real *v = table + k * stride;
            if (keeps) /* what is kept stays as it is */
                v = memcpy(t.c, v, (size_t)n * sizeof(real));
            row_t r = table_row(p, c->in, &t, k, i, met, true, v);
            if (r.apart) {
                r.cp = positive_of(c, i);
                places_of(p, i, met, &first, &second);
            }
            c->row(c->context, i, &r, first, second, &near);
        }
    }
    free_table(&t);
    release(near.list);
    free_unit(&copies);
}

static void paired_rows_body(int64_t begin, int64_t end, void *context)
{
    rows_context_t *c = context;
    anchor_t a = {0};
    near_t near = {0};
    if (make_anchor(c->p, c->in, &a) && make_near(&near, c->p->K))
        for (int64_t i = c->begin + begin; i < c->begin + end; i++) {
            row_t r = anchor_row(c->p, c->in, i, &a);
            r.cp = positive_of(c, i);
            c->row(c->context, i, &r, -1, -1, &near);
        }
    else
        c->no_memory = true;
    free_anchor(&a);
    release(near.list);
}

static void logits_rows_body(int64_t begin, int64_t end, void *context)
{
    rows_context_t *c = context;
    const real tau = (real)read_vector(c->p->tau, 0);
    real *scratch = allocate(c->p->D + 1, 2, sizeof(real));
    near_t near = {0};
    if (!make_near(&near, c->p->D) || !scratch)
        c->no_memory = true;
    for (int64_t i = c->begin + begin; i < c->begin + end && !c->no_memory; i++) {
        row_t r = logits_row(c->p, i, tau, scratch, scratch + c->p->D);
        c->row(c->context, i, &r, -1, -1, &near);
    }
    release(scratch);
    release(near.list);
}

/* The rows of a context, all but the block of which is set. */
static const char *visit_rows(rows_context_t *c)
{
    const hex_problem_t *p = c->p;
    const bool blocks = p->mode < HEX_PAIRED;
    const int64_t rows = c->end - c->begin;
    const int64_t columns = blocks ? c->met.end - c->met.begin : p->K;
    const int64_t share = blocks ? MR : 1; /* rows that go to one thread */
    int64_t work = 64 * p->D;              /* of a row of logits */
    if (blocks)
        c->block = block_rows(rows, p->G > 0 ? 2 * columns : columns, columns, c->in->unit.width);
    if (p->mode != HEX_LOGITS)
        work = 2 * share * columns * (c->in->unit.width + (p->G > 0 ? c->in->guide.width : 0) + 32);
    if (!hex_parallel_for((rows + share - 1) / share, work,
                          blocks                  ? rows_body
                          : p->mode == HEX_PAIRED ? paired_rows_body
                                                  : logits_rows_body,
                          c))
        return HEX_NO_THREADS;
    return c->no_memory ? HEX_NO_MEMORY : NULL;
}

/* What the rows of a problem are visited with. The first visit makes it, and others may follow. */
typedef struct {
    bool made;
    inputs_t in;
    panels_t panels, guide;
    real *positive; /* see rows_context_t */
} visit_t;

static void free_visit(visit_t *v)
{
    release(v->panels.data);
    release(v->guide.data);
    release(v->positive);
    free_inputs(&v->in);
}

typedef struct {
    const hex_problem_t *p;
    visit_t *v;
} views_context_t;

static void views_body(int64_t begin, int64_t end, void *context)
{
    const views_context_t *c = context;
    for (int64_t i = begin; i < end; i++)
        c->v->positive[i] = positive_cosine(c->p, &c->v->in.unit, c->p->first + i);
}

static const char *make_visit(const hex_problem_t *p, bool at_hand, visit_t *v)
{
    v->made = true;
    if (p->mode == HEX_LOGITS)
        return NULL;
    const char *error = make_inputs(p, at_hand ? ROWS_OF_BLOCK : ALL_ROWS, &v->in);
    if (error || p->several)
        return error;
    v->positive = allocate(p->count, 1, sizeof(real));
    if (!v->positive)
        return HEX_NO_MEMORY;
    views_context_t c = {p, v};
    return hex_parallel_for(p->count, 4 * p->D, views_body, &c) ? NULL : HEX_NO_THREADS;
}

static const char *for_each_row(const hex_problem_t *p, visit_t *v, row_function_t row,
                                void *context)
{
    const bool blocks = p->mode < HEX_PAIRED, at_hand = keeps_cosines(p) && p->filled;
    const char *error = v->made ? NULL : make_visit(p, at_hand, v);
    for (int input = 0; !error && input < 2; input++) {
        const range_t rows = block_of(p, input), met = met_by(p, input);
        rows_context_t c = {.p = p,
                            .in = &v->in,
                            .met = met,
                            .panels = &v->panels,
                            .guide = p->G > 0 && blocks ? &v->guide : NULL,
                            .positive = v->positive,
                            .begin = rows.begin,
                            .end = rows.end,
                            .row = row,
                            .context = context};
        if (input == 1 && !hex_both_anchors(p))
            break;
        if (blocks && !at_hand)
            error = make_panels(&v->in.unit, met.begin, met.end, &v->panels);
        if (!error && c.guide)
            error = make_panels(&v->in.guide, met.begin, met.end, &v->guide);
        if (!error)
            error = visit_rows(&c);
    }
    return error;
}

#endif
