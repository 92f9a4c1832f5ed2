/* SPDX-License-Identifier: MIT */
/* The threshold of a large batch, with the results of quantile_rows.h, from short lists:
 *
 *   1. Bound. Each row's cosines with some sampled rows give a limit that the row's quantile lies
 *      above, and that a few per cent of the row are above; and a low estimate of eps, the mean of
 *      the quantiles. The limit is lowered to that estimate where the row stays short enough.
 *   2. Lists. What is above a row's limit: of all rows at once, from the pass that makes the sums
 *      of the loss (onepass.h), or of a block of rows at a time, for a threshold by itself.
 *   3. Select. A row's quantile is an element of its list, exactly; eps is their mean.
 *
 * The bound decides about time only. What equals the limit is counted too, where that is many, as
 * in a collapsed batch. A row whose list is too short or too long for its quantile is computed
 * again whole. */
#ifndef HEX_QUANTILE_H
#define HEX_QUANTILE_H

#include "quantile_rows.h"
#include "tiles.h"

/* How many rows are sampled, and the sigmas of the binomial count by which the limit is lower than
 * the quantile, may be lowered further, and by which a list may be longer than expected. The sample
 * says of a share p only p +- sqrt(p (1 - p) / SAMPLES). */
#define SAMPLES(candidates) ((candidates) <= 1024 ? 128 : 256)
#define SIGMA_LIMIT 4.0
#define SIGMA_LOWEST 6.0
#define SIGMA_CAPACITY 11.0
#define SIGMA_EPS 1.5

/* Where one row in so many has its limit many times, that is counted for all. */
#define FEW_TIES 16

/* Rows with fewer candidates are searched whole, in a threshold by itself. */
#define FEWEST_LISTED 6144

typedef struct {
    const hex_problem_t *p;
    field_t field;
    inputs_t in;
    panels_t panels; /* of the field's candidates */
    pass_t pass;
    double tau, *cp;       /* the positive cosine of every row */
    int64_t rows;          /* anchors */
    real *limit, *numbers; /* of the lists */
    bool kept;             /* p->kept holds the cosines already */
} batch_t;

/* In cross the anchors of z1 have the rows of z0 as their candidates; else all anchors have the
 * field's. */
static int count_sides(const hex_problem_t *p) { return p->mode == HEX_CROSS ? 2 : 1; }

static range_t anchors_of(const batch_t *s, int side)
{
    return side == 0 ? s->field.anchors : s->field.candidates;
}

static range_t candidates_of(const batch_t *s, int side)
{
    return side == 0 ? s->field.candidates : s->field.anchors;
}

static void free_batch(batch_t *s)
{
    release(s->panels.data);
    release(s->cp);
    release(s->limit);
    release(s->pass.sums);
    release(s->pass.list);
    release(s->numbers);
    free_inputs(&s->in);
}

static void positive_body(int64_t begin, int64_t end, void *context)
{
    batch_t *s = context;
    for (int64_t i = begin; i < end; i++) {
        s->cp[i] = (double)positive_cosine(s->p, &s->in.unit, i);
        if (s->rows > s->p->B)
            s->cp[i + s->p->B] = s->cp[i];
    }
}

/* All but the pass. */
static const char *make_batch(const hex_problem_t *p, batch_t *s)
{
    s->p = p;
    s->field = field_of(p);
    const char *error = make_inputs(p, ALL_ROWS, &s->in);
    if (!error)
        error = make_panels(&s->in.unit, s->field.candidates.begin, s->field.candidates.end,
                            &s->panels);
    if (error)
        return error;
    const int64_t whole = hex_anchors(p) + s->field.column_block;
    s->rows = hex_anchors(p);
    s->cp = allocate(s->rows, 1, sizeof(double));
    s->limit = allocate(whole, 1, sizeof(real));
    if (!s->cp || !s->limit)
        return HEX_NO_MEMORY;
    for (int64_t i = 0; i < whole; i++)
        s->limit[i] = (real)INFINITY;
    if (p->several) /* the sums find them */
        return NULL;
    return hex_parallel_for(p->B, 2 * p->D, positive_body, s) ? NULL : HEX_NO_THREADS;
}

/* Room in the list of a row of n candidates, of which a share is above the quantile; 0: lists are
 * not worth it. */
static int64_t list_capacity(int64_t n, double share)
{
    const double m = (double)SAMPLES(n);
    const double most = share + SIGMA_CAPACITY * sqrt(share * (1 - share) / m);
    return most <= LONGEST_LIST ? round_up((int64_t)(most * (double)n) + 16, 16) : 0;
}

/* ---- bound ---- */

/* Ranks up to this are found for a vector of rows at once. */
#define MOST_AT_ONCE 16

typedef struct {
    batch_t *s;
    range_t anchors;
    unit_t sampled;
    const word *codes;                   /* ids of all rows, where positives are told by them; */
    word *of_sampled;                    /* and of those sampled */
    panels_t panels;                     /* of the anchors, or of the sampled candidates */
    int64_t samples, limit, lowest, eps; /* ranks among a row's samples, from above */
    real *low, *guess;                   /* the lowest limit, the low estimate of the quantile */
    atomic_bool no_memory;
} bound_t;

/* The MOST_AT_ONCE largest of each column of c, downwards. Always so many, for they stay in
 * registers then. */
INLINE void largest_of_columns(const real *c, int64_t rows, int64_t ld, vec_t *top)
{
#pragma GCC unroll 16
    for (int k = 0; k < MOST_AT_ONCE; k++)
        top[k] = -(real)INFINITY - (vec_t){0};
    for (int64_t i = 0; i < rows; i++) {
        vec_t x = *(const vec_t *)(c + i * ld);
#pragma GCC unroll 16
        for (int k = 0; k < MOST_AT_ONCE; k++) {
            const vec_t y = top[k];
            top[k] = larger(x, y);
            x = smaller(y, x);
        }
    }
}

/* A positive is none of the numbers that the quantile is taken over, which the sample stands for. */
static inline real unless_positive(const bound_t *b, int64_t i, int64_t q, real c)
{
    return b->codes[i] == b->of_sampled[q] ? BELOW_COSINES : c;
}

/* By panels of anchors, which are the columns here. */
static void bound_at_once_body(int64_t begin, int64_t end, void *context)
{
    bound_t *b = context;
    const int64_t m = b->samples, n = b->anchors.end - b->anchors.begin;
    real *c = allocate(round_up(m, MR), NR, sizeof(real));
    for (int64_t from = begin * NR; c && from < n && from < end * NR; from += NR) {
        cosines(&b->sampled, 0, m, &b->panels, from, NR, c, NR);
        for (int64_t q = 0; b->codes && q < m; q++)
            for (int64_t i = 0; i < NR; i++) /* codes has as many more */
                c[q * NR + i] = unless_positive(b, b->anchors.begin + from + i, q, c[q * NR + i]);
        for (int64_t side = 0; side < NR; side += LANES) {
            const int64_t at = b->anchors.begin + from + side, left = n - from - side;
            vec_t top[MOST_AT_ONCE];
            largest_of_columns(c + side, m, NR, top);
            for (int64_t i = 0; i < LANES && i < left; i++) {
                COUNT(WORK_SELECTED, m);
                b->low[at + i] = top[b->lowest - 1][i];
                b->s->limit[at + i] = top[b->limit - 1][i];
                b->guess[at + i] = top[b->eps - 1][i];
            }
        }
    }
    if (!c)
        b->no_memory = true;
    release(c);
}

/* By register tiles of anchors, which are the rows. */
static void bound_body(int64_t begin, int64_t end, void *context)
{
    bound_t *b = context;
    const int64_t m = b->samples, ld = round_up(m, NR);
    real *c = allocate(MR, ld + LANES, sizeof(real));
    for (int64_t block = begin; c && block < end; block++) {
        const int64_t from = b->anchors.begin + block * MR, left = b->anchors.end - from;
        const int64_t rows = left < MR ? left : MR;
        cosines(&b->s->in.unit, from, rows, &b->panels, 0, m, c, ld);
        for (int64_t i = 0; i < rows; i++) {
            real *row = c + i * ld;
            for (int64_t q = 0; b->codes && q < m; q++)
                row[q] = unless_positive(b, from + i, q, row[q]);
            const real low = row_select(row, m, m - b->lowest);
            int64_t n = 0; /* the others are among what is above */
            for (int64_t k = 0; k < m; k++) {
                row[n] = row[k];
                n += row[k] > low;
            }
            b->low[from + i] = low;
            b->s->limit[from + i] = select_above(row, n, b->limit, low);
            b->guess[from + i] = select_above(row, n, b->eps, low);
        }
    }
    if (!c)
        b->no_memory = true;
    release(c);
}

/* The rank from above that `sigmas` deviations more than a share of the samples reach. */
static int64_t sample_rank(int64_t samples, double share, double sigmas)
{
    const double m = (double)samples;
    const double rank = ceil(m * share + sigmas * sqrt(m * share * (1 - share)));
    return rank < 1 ? 1 : rank > m ? samples : (int64_t)rank;
}

static const char *sample_rows(bound_t *b, range_t of)
{
    const unit_t *unit = &b->s->in.unit;
    const int64_t m = b->samples;
    b->of_sampled = allocate(m, 1, sizeof *b->of_sampled);
    if (!b->of_sampled || !allocate_rows(&b->sampled, m, unit->width, has_dots(unit)))
        return HEX_NO_MEMORY;
    uint32_t random = 1;
    for (int64_t q = 0; q < m; q++) { /* any will do; always the same, for the bits' sake */
        random = random * 1664525u + 1013904223u;
        const int64_t row =
            of.begin + (int64_t)((uint64_t)random * (uint64_t)(of.end - of.begin) >> 32);
        copy_row(unit, row, &b->sampled, q);
        b->of_sampled[q] = b->codes ? b->codes[row] : 0;
    }
    return NULL;
}

/* The bound of one side's anchors. */
static const char *sample_side(bound_t *b, int side)
{
    const unit_t *unit = &b->s->in.unit;
    const int64_t m = b->samples;
    const bool at_once = b->lowest <= MOST_AT_ONCE;
    b->sampled = (unit_t){0};
    const char *error = sample_rows(b, candidates_of(b->s, side));
    b->anchors = anchors_of(b->s, side);
    panels_t own = {0};
    const panels_t *at_hand = &b->s->panels;
    if (!error) {
        if (!at_once)
            error = make_panels(&b->sampled, 0, m, &own);
        else if (at_hand->begin != b->anchors.begin || at_hand->end != b->anchors.end)
            error = make_panels(unit, b->anchors.begin, b->anchors.end, &own);
    }
    b->panels = own.data ? own : *at_hand;
    const int64_t share = at_once ? NR : MR, n = b->anchors.end - b->anchors.begin;
    if (!error && !hex_parallel_for((n + share - 1) / share, 2 * share * m * unit->width,
                                    at_once ? bound_at_once_body : bound_body, b))
        error = HEX_NO_THREADS;
    release(own.data);
    release(b->of_sampled);
    free_unit(&b->sampled);
    return error ? error : b->no_memory ? HEX_NO_MEMORY : NULL;
}

/* Limits for rows whose quantile has a share of them above; `reach`: and eps, where that costs
 * little. */
static const char *make_bound(batch_t *s, double share, bool reach)
{
    const int64_t rows = s->rows, m = SAMPLES(columns_of(s->p));
    bound_t b = {.s = s,
                 .codes = s->p->several ? s->in.ids : NULL,
                 .samples = m,
                 .low = allocate(rows, 1, sizeof(real)),
                 .guess = allocate(rows, 1, sizeof(real)),
                 .limit = sample_rank(m, share, SIGMA_LIMIT),
                 .lowest = sample_rank(m, share, SIGMA_LOWEST),
                 .eps = sample_rank(m, share, SIGMA_EPS)};
    const char *error = b.low && b.guess ? NULL : HEX_NO_MEMORY;
    for (int side = 0; !error && side < count_sides(s->p); side++)
        error = sample_side(&b, side);
    if (!error) {
        double sum = 0, count = 0;
        for (int64_t i = 0; i < rows; i++) { /* but of those whose sample has too few negatives */
            const bool known = !(b.guess[i] <= BELOW_COSINES);
            sum += known ? (double)b.guess[i] : 0;
            count += known;
        }
        const real guess = (real)(sum / count);
        int64_t ties = 0;
        for (int64_t i = 0; i < rows; i++) {
            ties += s->limit[i] == b.low[i] && s->limit[i] > BELOW_COSINES;
            if (reach && guess < s->limit[i])
                s->limit[i] = guess > b.low[i] ? guess : b.low[i];
        }
        s->pass.split = ties > rows / FEW_TIES ? SPLIT_TIES : SPLIT_LIST;
    }
    release(b.low);
    release(b.guess);
    return error;
}

/* ---- select ---- */

typedef struct {
    batch_t *s;
    threshold_context_t threshold; /* quantiles go to threshold.low */
    int64_t k;                     /* the quantile's rank from above, 1 the largest: of every row,
                                    * unless positives are several */
    bool *again;                   /* rows that their list does not serve */
    atomic_bool no_memory;
} selection_t;

/* Row i's quantile, k-th from above, from the list of what is above its limit, which has space for
 * two and a vector more; at least `ties` candidates equal the limit. */
static void select_row(const selection_t *q, int64_t i, int64_t k, list_t list, int64_t ties,
                       bool finite)
{
    const batch_t *s = q->s;
    const real cp = s->p->several ? 0 : (real)s->cp[i], limit = s->limit[i],
               self = s->in.unit.inverse[i] != 0;
    const bool all = !q->threshold.over_negatives, with_self = all && s->field.symmetric;
    q->again[i] = false;
    if (!finite || cp != cp) {
        q->threshold.low[i] = (real)NAN;
        return;
    }
    if (k == 0) { /* it has no element */
        q->threshold.low[i] = (real)INFINITY;
        return;
    }
    if (!list_is_whole(&list)) {
        q->again[i] = true;
        return;
    }
    if (with_self && self > limit)
        list.to[list.length++] = self;
    if (all && cp > limit)
        list.to[list.length++] = cp;
    ties += (with_self && self == limit) + (all && cp == limit);
    q->again[i] = list.length + ties < k;
    if (!q->again[i])
        q->threshold.low[i] = cosine(select_above(list.to, list.length, k, limit));
}

/* The rows with a flag, each by itself and whole. */
static const char *visit_again(batch_t *s, const bool *again, row_function_t row, void *context)
{
    int64_t *some = allocate(s->rows, 1, sizeof *some);
    const char *error = some ? NULL : HEX_NO_MEMORY;
    for (int side = 0; !error && side < count_sides(s->p); side++) {
        const range_t anchors = anchors_of(s, side), of = candidates_of(s, side);
        panels_t other = {0};
        int64_t count = 0;
        for (int64_t i = anchors.begin; i < anchors.end; i++)
            if (again[i])
                some[count++] = i;
        COUNT(WORK_AGAIN, round_up(count, MR));
        if (count && side == 1)
            error = make_panels(&s->in.unit, of.begin, of.end, &other);
        rows_context_t c = {.p = s->p,
                            .in = &s->in,
                            .met = of,
                            .panels = side ? &other : &s->panels,
                            .end = count,
                            .some = some,
                            .row = row,
                            .context = context};
        if (count && !error)
            error = visit_rows(&c);
        release(other.data);
    }
    release(some);
    return error;
}

/* rows: where each row's quantile goes. */
static const char *make_selection(batch_t *s, double quantile, bool over_negatives, int64_t k,
                                  real *rows, selection_t *q)
{
    q->s = s;
    q->k = k;
    q->again = allocate(s->rows, 1, sizeof(bool));
    q->threshold = (threshold_context_t){s->p, quantile, over_negatives, false, rows, NULL};
    return q->again ? NULL : HEX_NO_MEMORY;
}

/* Does the rows that are left whole; frees the selection. */
static const char *end_selection(selection_t *q, const char *error)
{
    if (!error && q->no_memory)
        error = HEX_NO_MEMORY;
    if (!error)
        error = visit_again(q->s, q->again, threshold_row, &q->threshold);
    release(q->again);
    return error;
}

/* ---- the threshold by itself: a block of rows and their lists at a time ---- */

#define LISTED 96 /* rows of a block, a multiple of every MR */

typedef struct {
    selection_t *q;
    range_t anchors;
    const panels_t *panels;
    int64_t capacity;
} listing_t;

static void listing_body(int64_t begin, int64_t end, void *context)
{
    const listing_t *l = context;
    const batch_t *s = l->q->s;
    const int64_t width = s->field.column_block, ld = tile_stride(&s->field);
    const int64_t space = LIST_SPACE(l->capacity + 2), n = l->panels->end - l->panels->begin;
    real *c = allocate(LISTED, ld, sizeof(real)), *to = allocate(LISTED, space, sizeof(real));
    for (int64_t block = begin; c && to && block < end; block++) {
        const int64_t first = l->anchors.begin + block * LISTED, left = l->anchors.end - first;
        tile_t t = {.i = first, .rows = left < LISTED ? left : LISTED, .ld = ld, .c = c};
        list_t lists[LISTED];
        int64_t ties[LISTED] = {0};
        real sum[LISTED] = {0};
        for (int64_t i = 0; i < t.rows; i++)
            lists[i] = (list_t){to + i * space, 0, l->capacity};
        for (int64_t from = 0; from < n; from += width) {
            const int64_t columns = n - from < width ? n - from : width;
            t.j = l->panels->begin + from;
            t.columns = columns;
            cosines(&s->in.unit, first, t.rows, l->panels, from, columns, c, ld);
            blank(s->p, &t, -2); /* below every cosine, and every limit */
            for (int64_t i = 0; i < t.rows; i++)
                list_above(c + i * ld, round_up(columns, NR), s->limit[first + i], &lists[i],
                           &ties[i], &sum[i]);
        }
        for (int64_t i = 0; i < t.rows; i++)
            select_row(l->q, first + i, l->q->k, lists[i], ties[i], sum[i] == sum[i]);
    }
    if (!c || !to)
        l->q->no_memory = true;
    release(c);
    release(to);
}

static const char *list_side(selection_t *q, int side, int64_t capacity)
{
    batch_t *s = q->s;
    const range_t anchors = anchors_of(s, side), of = candidates_of(s, side);
    panels_t other = {0};
    const char *error = side ? make_panels(&s->in.unit, of.begin, of.end, &other) : NULL;
    listing_t l = {q, anchors, side ? &other : &s->panels, capacity};
    const int64_t blocks = (anchors.end - anchors.begin + LISTED - 1) / LISTED;
    const int64_t work = 2 * LISTED * (of.end - of.begin) * (s->in.unit.width + 4);
    if (!error && !hex_parallel_for(blocks, work, listing_body, &l))
        error = HEX_NO_THREADS;
    release(other.data);
    return error;
}

#undef LISTED

/* The rank of the quantile in a row from above, 1 the largest, and the share of the row from there
 * on. */
static int64_t rank_above(const hex_problem_t *p, double quantile, bool over_negatives,
                          double *share)
{
    const int64_t columns = columns_of(p);
    const int64_t n =
        over_negatives ? columns - not_negatives(p) : columns + (p->mode == HEX_UNPAIRED);
    const int64_t k = n - rank(quantile, n);
    *share = (double)k / (double)(n > 0 ? n : 1);
    return k;
}

#endif
