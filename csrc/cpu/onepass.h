/* SPDX-License-Identifier: MIT */
/* The batch's threshold and the loss from one pass over the cosines. The passes are those of tiles.h,
 * bound and selection those of quantile.h.
 *
 *   1. Bound. A limit for each row, below its quantile and, where that costs little, below eps.
 *   2. Pass. Every tile once: sums of what is below a row's limit, a list of what is above.
 *   3. Select. Each row's quantile from its list; eps is their mean.
 *   4. Split. The list's elements above eps are H, the others go to the sums.
 *
 * If a row's limit turns out above eps, or its list too long, its H is not known. Few such rows are
 * computed again whole; of more, one more pass makes all sums of all rows, at the eps that is now
 * known. */
#ifndef HEX_ONEPASS_H
#define HEX_ONEPASS_H

#include "quantile.h"

/* One row in so many may be computed by itself; of more, a pass of all is sooner done: it makes two
 * rows of each cosine, and none of the cosines that are kept. Where none are, one in three would be
 * better; but what is kept is to change no bit. */
#define FEW_AGAIN 16

/* Lists of all rows in bytes: beyond, the threshold has a pass of its own, which keeps the lists of
 * a block of rows at a time. */
#define MOST_LIST_BYTES ((int64_t)256 << 20)

static const char *make_pass(batch_t *s)
{
    const int64_t whole = s->rows + s->field.column_block;
    s->tau = read_vector(s->p->tau, 0);
    const real scale = (real)(M_LOG2E / s->tau);
    s->pass = (pass_t){.p = s->p,
                       .by = decider_of(s->p),
                       .codes = codes_of(s->p, &s->in),
                       .scale = scale,
                       .hole = 1 + 2 * EXP2_LOWEST / scale,
                       .limit = s->limit,
                       .rows = whole,
                       .column_block = s->field.column_block,
                       .both = s->field.both,
                       .sums = allocate(SUM_KINDS_IDS, whole, sizeof(double))};
    if (!s->pass.sums)
        return HEX_NO_MEMORY;
    memset(s->pass.sums, 0, (size_t)(SUM_KINDS_IDS * whole) * sizeof(double));
    return NULL;
}

static const char *sum_batch(batch_t *s)
{
    const bool keep = !s->kept;
    s->kept = true;
    return sum_tiles(&s->in.unit, &s->panels, &s->field, s->p->kept, keep, &s->pass);
}

static const char *make_lists(batch_t *s, int64_t capacity)
{
    const int64_t space = LIST_SPACE(capacity);
    s->numbers = allocate(s->rows, space, sizeof(real));
    s->pass.list = allocate(s->rows, 1, sizeof(list_t));
    if (!s->numbers || !s->pass.list)
        return HEX_NO_MEMORY;
    for (int64_t i = 0; i < s->rows; i++)
        s->pass.list[i] = (list_t){s->numbers + i * space, 0, capacity};
    return NULL;
}

/* ---- select ---- */

static void select_body(int64_t begin, int64_t end, void *context)
{
    selection_t *q = context;
    const batch_t *s = q->s;
    const pass_t *pass = &s->pass;
    real *numbers = allocate(LIST_SPACE(pass->list->room + 2), 1, sizeof(real));
    for (int64_t i = begin; numbers && i < end; i++) {
        double sum = pass->sums[SUM_ALL * pass->rows + i];
        int64_t k = q->k;
        if (s->p->several) { /* a row has its own number of negatives */
            const int64_t n =
                columns_of(s->p) - s->field.symmetric - (int64_t)pass->sums[SUM_P * pass->rows + i];
            sum += pass->sums[SUM_PX * pass->rows + i];
            k = n > 0 ? n - rank(q->threshold.quantile, n) : 0;
        }
        const double ties =
            pass->split == SPLIT_TIES ? pass->sums[SUM_COUNT * pass->rows + i] : 0; /* unknown */
        list_t list = pass->list[i]; /* as it is, it is needed once more */
        if (list_is_whole(&list))
            list.to = memcpy(numbers, list.to, (size_t)list.length * sizeof(real));
        select_row(q, i, k, list, (int64_t)ties, sum == sum);
    }
    if (!numbers)
        q->no_memory = true;
    release(numbers);
}

/* The batch's threshold, from lists; the sums of the rest are made on the way. */
static const char *select_threshold(batch_t *s, const hex_tracker_t *t, int64_t k, double *mean)
{
    selection_t q = {0};
    real *rows = allocate(s->rows, 1, sizeof(real));
    const char *error = rows ? NULL : HEX_NO_MEMORY;
    if (!error)
        error = make_selection(s, t->quantile, t->over_negatives, k, rows, &q);
    if (!error)
        error = sum_batch(s);
    if (!error && !hex_parallel_for(s->rows, 16 * s->pass.list->room, select_body, &q))
        error = HEX_NO_THREADS;
    error = end_selection(&q, error);
    if (!error)
        *mean = mean_of(rows, s->rows);
    release(rows);
    return error;
}

/* ---- split ---- */

typedef struct {
    batch_t *s;
    const hex_problem_t *p; /* with its eps */
    bool *again;            /* rows whose H is not all in their list */
    bool listed;            /* the sums are of the rest only, H is in the lists */
    int64_t negatives;      /* of a row */
    double *loss;
    real *stats;
} splitting_t;

/* What the sums say of a row's sets. All exponentials are taken by 1. */
static sets_t sets_of(const splitting_t *f, int64_t i)
{
    const batch_t *s = f->s;
    const double *sums = s->pass.sums + i, all = sums[SUM_ALL * s->pass.rows];
    if (!f->p->several)
        return (sets_t){.positives = 1,
                        .negatives = (double)f->negatives,
                        .sum = s->cp[i],
                        .largest = s->cp[i],
                        .finite = (s->cp[i] + all) * 0};
    const double positives = sums[SUM_P * s->pass.rows];
    const double others = (double)(columns_of(f->p) - s->field.symmetric);
    return (sets_t){.positives = positives,
                    .negatives = others - positives,
                    .sum = sums[SUM_PX * s->pass.rows] + positives,
                    .largest = 1,
                    .shift = 1,
                    .finite = (sums[SUM_PX * s->pass.rows] + all) * 0};
}

/* A row's loss and statistics from its sums. A row with H empty takes the sum that InfoNCE has. */
static void write_row(const splitting_t *f, int64_t i, sums_t sums)
{
    const batch_t *s = f->s;
    const hex_problem_t *p = f->p;
    const real eps = row_eps(p, read_vector(p->eps, i));
    const sets_t of = sets_of(f, i);
    double stats[HEX_STATS_SEVERAL];
    if (sums.count == 0)
        sums.rest = s->pass.sums[SUM_ALL * s->pass.rows + i];
    if (!row_begin(eps, s->tau, stats))
        f->loss[i] = NAN;
    else if (p->several)
        f->loss[i] = classed_scalars(p, sums, &of, NULL, 1, eps, s->tau, stats);
    else
        f->loss[i] = plain_scalars(p, sums, &of, NULL, 1, eps, s->tau, stats);
    write_stats(p, stats, i, s->rows, f->stats);
}

static void split_body(int64_t begin, int64_t end, void *context)
{
    const splitting_t *f = context;
    const batch_t *s = f->s;
    const pass_t *pass = &s->pass;
    for (int64_t i = begin; i < end; i++) {
        if (f->again && f->again[i])
            continue;
        const double *of = pass->sums + i;
        const int64_t n = pass->rows;
        sums_t sums = {of[SUM_REST * n], of[SUM_REST_X * n], of[SUM_COUNT * n], of[SUM_B * n],
                       of[SUM_BE * n],   of[SUM_BX * n],     of[SUM_BEX * n],   of[SUM_PE * n],
                       of[SUM_PX * n],   of[SUM_PXE * n]};
        if (f->listed) {
            const sums_t others = sums;
            sums = plain_sums(pass->list[i].to, pass->list[i].length, 1,
                              round_down(read_vector(f->p->eps, i)), pass->scale, f->p->beta);
            sums.rest += others.rest, sums.rest_x += others.rest_x;
            sums.e = others.e, sums.x = others.x, sums.ex = others.ex;
        }
        write_row(f, i, sums);
    }
}

/* A row function. All exponentials are taken by 1, as of the other rows, also those of positives. */
static void split_row(void *context, int64_t i, row_t *r, int64_t first, int64_t second,
                      near_t *near)
{
    (void)near;
    const splitting_t *f = context;
    const real eps = round_down(read_vector(f->p->eps, i)), scale = f->s->pass.scale;
    if (has_classes(r)) {
        write_row(f, i, classed_sums(r, 1, 1, eps, scale, f->p->beta, true));
        return;
    }
    r->n = drop(r->v, r->n, first, second);
    write_row(f, i, plain_sums(r->v, r->n, 1, eps, scale, f->p->beta));
}

/* All sums of all rows, split at their eps. */
static const char *sum_again(batch_t *s, const hex_problem_t *p)
{
    bool any = false;
    for (int64_t i = 0; i < s->rows; i++) {
        const real eps = row_eps(p, read_vector(p->eps, i));
        s->limit[i] = eps < ABOVE_HOLES ? ABOVE_HOLES : eps;
        any |= eps < (real)INFINITY;
    }
    memset(s->pass.sums, 0, (size_t)(SUM_KINDS_IDS * s->pass.rows) * sizeof(double));
    s->pass.split = any ? SPLIT_SUMS : SPLIT_NONE;
    return sum_batch(s);
}

/* Loss and statistics, where the eps of p is known. */
static const char *split_rows(batch_t *s, const hex_problem_t *p, void *loss, void *stats)
{
    splitting_t f = {.s = s,
                     .p = p,
                     .listed = s->pass.list != NULL,
                     .negatives = columns_of(p) - not_negatives(p),
                     .stats = stats,
                     .loss = allocate(s->rows, 1, sizeof(double))};
    const char *error = f.loss ? NULL : HEX_NO_MEMORY;
    if (!error && f.listed) {
        int64_t count = 0;
        f.again = allocate(s->rows, 1, sizeof(bool));
        for (int64_t i = 0; f.again && i < s->rows; i++) {
            f.again[i] = !list_is_whole(&s->pass.list[i]) ||
                         !(round_down(read_vector(p->eps, i)) >= s->limit[i]);
            count += f.again[i];
        }
        if (!f.again)
            error = HEX_NO_MEMORY;
        else if (count <= s->rows / FEW_AGAIN)
            error = visit_again(s, f.again, split_row, &f);
        else {
            f.listed = false;
            release(f.again);
            f.again = NULL;
        }
    }
    if (!error && !f.listed)
        error = sum_again(s, p);
    if (!error && !hex_parallel_for(s->rows, 256, split_body, &f))
        error = HEX_NO_THREADS;
    if (!error)
        reduce(p->reduction, f.loss, s->rows, loss);
    release(f.again);
    release(f.loss);
    return error;
}

#endif
