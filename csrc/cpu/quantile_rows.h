/* SPDX-License-Identifier: MIT */
/* The batch's threshold, and each row's bounds for the fixed schedules, of any problem, row by row:
 *
 *     eps = mean over the rows of the row's q-quantile, exact, by the nearest rank
 *
 * The row is what the table of modes in ../../docs/math.md says: the candidates, with the positive
 * and, in ntxent, the anchor itself (cosine exactly 1, or 0 for a row of zeros); or the negatives
 * alone. quantile.h does what is large by lists. */
#ifndef HEX_QUANTILE_ROWS_H
#define HEX_QUANTILE_ROWS_H

#include "visit.h"

typedef struct {
    const hex_problem_t *p;
    double quantile;
    bool over_negatives, bounds;
    real *low, *high; /* of each row its quantile in low, or its bounds */
} threshold_context_t;

/* One thread, in order. A row without an element holds +Inf. */
static double mean_of(const real *x, int64_t n)
{
    double sum = 0, count = 0;
    for (int64_t i = 0; i < n; i++) {
        const bool there = x[i] != (real)INFINITY;
        sum += there ? (double)x[i] : 0;
        count += there;
    }
    return sum / count; /* NaN where no row has any */
}

/* The elements of a row that its quantile is over, in place; the new length. *finite gets NaN if the
 * row has none because it holds a NaN. */
static int64_t keep_elements(const threshold_context_t *t, int64_t i, row_t *r, int64_t first,
                             int64_t second, real *finite)
{
    const hex_problem_t *p = t->p;
    const bool self = p->mode == HEX_NTXENT;
    real *c = r->v, cp = (real)r->cp;
    if (r->logits) {
        double seen = 0;
        int64_t n = keep_logits(r, t->over_negatives, &seen);
        if (p->self_column && !t->over_negatives)
            r->v[n++] = 1;
        *finite = (real)seen;
        return n;
    }
    if (r->kind) {
        const real own = self ? c[i] : 0;
        double seen = 0;
        int64_t n = keep(c, r->kind, r->n, t->over_negatives, &seen);
        if (self && !t->over_negatives) {
            seen += (double)own * 0;
            c[n++] = own == 0 ? 0 : 1; /* exactly 1, or 0 for a row of zeros */
        }
        if (r->apart) {
            seen += r->cp * 0; /* where the quantile is over the negatives, too */
            if (!t->over_negatives)
                c[n++] = cp;
        }
        *finite = (real)seen;
        return n;
    }
    *finite = cp * 0; /* also where the positive is not in the row: the batch is not finite */
    if (t->over_negatives)
        return drop(c, r->n, first, second);
    if (self) {
        const int64_t own = i < p->B ? first : second, positive = i < p->B ? second : first;
        c[positive] = cp;
        c[own] = c[own] != c[own] ? c[own] : c[own] == 0 ? 0 : 1;
        return r->n;
    }
    const int64_t at = first >= 0 ? first : second >= 0 ? second : r->n;
    c[at] = cp;
    return at == r->n ? r->n + 1 : r->n;
}

static void threshold_row(void *context, int64_t i, row_t *r, int64_t first, int64_t second,
                          near_t *near)
{
    const threshold_context_t *t = context;
    const int64_t at = hex_block_place(t->p, i);
    real finite;
    const int64_t n = keep_elements(t, i, r, first, second, &finite);
    if (t->bounds) {
        row_bounds(r->v, n, &t->low[at], &t->high[at]);
        t->low[at] = cosine(t->low[at]);
        t->high[at] = cosine(t->high[at]);
        if (finite != 0)
            t->low[at] = (real)NAN;
        if (finite != 0 && has_classes(r))
            t->high[at] = (real)NAN;
    } else if (finite != 0)
        t->low[at] = (real)NAN;
    else if (n == 0)
        t->low[at] = (real)INFINITY;
    else
        t->low[at] = cosine(select_near(r->v, n, rank(t->quantile, n), near));
}

static const char *quantiles_by_rows(const hex_problem_t *p, visit_t *v, double quantile,
                                     bool over_negatives, real *rows)
{
    threshold_context_t t = {p, quantile, over_negatives, false, rows, NULL};
    return for_each_row(p, v, threshold_row, &t);
}

#endif
