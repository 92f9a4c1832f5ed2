/* SPDX-License-Identifier: MIT */
/* The core's entry points: which way a problem goes. Enough shared candidates go by tiles (tiles.h,
 * onepass.h), everything else by blocks of rows (blocks.h). */
#ifndef HEX_ENTRY_H
#define HEX_ENTRY_H

#include "onepass_logits.h"

/* Whether the quantiles are taken from lists, which write no cosines. */
static bool by_lists(const hex_problem_t *p, int64_t capacity)
{
    return !p->several && !p->mask.data && enough(p) && columns_of(p) >= FEWEST_LISTED && capacity;
}

/* The quantile of each row; the same bits whichever way. */
static const char *quantiles(const hex_problem_t *p, visit_t *v, double quantile,
                             bool over_negatives, real *rows)
{
    double share;
    const int64_t k = rank_above(p, quantile, over_negatives, &share);
    const int64_t capacity = list_capacity(columns_of(p), share);
    hex_problem_t all = *p; /* of a block with all rows, whose cosines are not kept, too */
    if (p->count == p->B && !p->kept)
        all.block = false;
    if (!by_lists(&all, capacity))
        return quantiles_by_rows(p, v, quantile, over_negatives, rows);
    all.kept = NULL;
    batch_t s = {0};
    selection_t q = {0};
    const char *error = make_batch(&all, &s);
    if (!error)
        error = make_bound(&s, share, false);
    if (!error)
        error = make_selection(&s, quantile, over_negatives, k, rows, &q);
    for (int side = 0; !error && side < count_sides(p); side++)
        error = list_side(&q, side, capacity);
    error = end_selection(&q, error);
    free_batch(&s);
    return error;
}

/* Their mean. */
static const char *mean_quantile(const hex_problem_t *p, visit_t *v, double quantile,
                                 bool over_negatives, double *mean)
{
    const int64_t n = hex_anchors(p);
    real *rows = allocate(n, 1, sizeof(real));
    const char *error = rows ? quantiles(p, v, quantile, over_negatives, rows) : HEX_NO_MEMORY;
    if (!error)
        *mean = mean_of(rows, n);
    release(rows);
    return error;
}

static const char *row_quantiles(const hex_problem_t *p, double quantile, bool over_negatives,
                                 void *rows)
{
    visit_t v = {0};
    const char *error = quantiles(p, &v, quantile, over_negatives, rows);
    free_visit(&v);
    return error;
}

static const char *threshold(const hex_problem_t *p, double quantile, bool over_negatives,
                             double *mean)
{
    visit_t v = {0};
    const char *error = mean_quantile(p, &v, quantile, over_negatives, mean);
    free_visit(&v);
    return error;
}

static const char *row_range(const hex_problem_t *p, void *low, void *high)
{
    visit_t v = {0};
    threshold_context_t t = {p, 0, false, true, low, high};
    const char *error = for_each_row(p, &v, threshold_row, &t);
    free_visit(&v);
    return error;
}

/* v: of the rows, if they are visited. */
static const char *forward_by(const hex_problem_t *p, visit_t *v, void *loss, void *stats)
{
    if (!by_tiles(p))
        return forward_rows(p, v, loss, stats);
    batch_t s = {0};
    const char *error = make_batch(p, &s);
    if (!error)
        error = make_pass(&s);
    if (!error)
        error = split_rows(&s, p, loss, stats);
    free_batch(&s);
    return error;
}

static const char *forward(const hex_problem_t *p, void *loss, void *stats)
{
    visit_t v = {0};
    const char *error = forward_by(p, &v, loss, stats);
    free_visit(&v);
    return error;
}

/* Whether threshold and loss come from one pass over tiles, with room for such lists. Of several
 * positives a list holds no positive, so the quantile has to be over the negatives. */
static bool by_one_pass(const hex_problem_t *p, const hex_tracker_t *t, int64_t capacity)
{
    const bool listed = !p->several || (p->mode == HEX_NTXENT && t->over_negatives);
    return by_tiles(p) && listed && capacity &&
           capacity <= MOST_LIST_BYTES / (int64_t)sizeof(real) / hex_anchors(p);
}

static const char *adaptive(const hex_problem_t *p, hex_tracker_t *t, void *loss, void *stats)
{
    double share;
    const int64_t k = rank_above(p, t->quantile, t->over_negatives, &share);
    const int64_t capacity = list_capacity(columns_of(p), share);
    double candidate = NAN; /* not looked at in warm-up */
    hex_problem_t with = *p;
    with.eps = (hex_vector_t){&t->eps, HEX_F64, 0};
    if (!hex_is_warm_up(t) && by_one_pass(p, t, capacity)) {
        batch_t s = {0};
        const char *error = make_batch(p, &s);
        if (!error)
            error = make_pass(&s);
        if (!error)
            error = make_bound(&s, share, true);
        if (!error)
            error = make_lists(&s, capacity);
        if (!error)
            error = select_threshold(&s, t, k, &candidate);
        if (!error) {
            hex_track(t, candidate, hex_anchors(p));
            error = split_rows(&s, &with, loss, stats);
        }
        free_batch(&s);
        return error;
    }
    const int64_t room = hex_is_warm_up(t) ? 0 : logits_capacity(p, t->quantile);
    if (room)
        return adaptive_logits(p, t, room, loss, stats);
    visit_t v = {0};
    const char *error = NULL;
    if (!hex_is_warm_up(t)) {
        error = mean_quantile(p, &v, t->quantile, t->over_negatives, &candidate);
        with.filled = keeps_cosines(p) && !by_lists(p, capacity);
    }
    if (!error) {
        hex_track(t, candidate, hex_anchors(p));
        error = forward_by(&with, &v, loss, stats);
    }
    free_visit(&v);
    return error;
}

static const char *backward(const hex_problem_t *p, const hex_gradient_t *g)
{
    inputs_t in = {0};
    panels_t panels = {0};
    real *k = allocate(hex_anchors(p), hex_stats(p), sizeof(real));
    if (!k)
        return HEX_NO_MEMORY;
    backward_context_t c = {.p = p, .g = g, .in = &in, .panels = &panels};
    scale_stats(p, g, k, &c.k);
    const bool wanted = g->dz[0] || g->dz[1] || g->dz[2];
    const bool shared = p->mode < HEX_PAIRED; /* rows that many others meet */
    const char *error = NULL;
    if (wanted && p->mode != HEX_LOGITS)
        error = make_inputs(p, shared ? ROWS_AND_STRIPS : ALL_ROWS, &in);
    if (!error && wanted && shared && has_dots(&in.unit))
        error = make_pairs(p, &in.unit.dots, in.unit.count, in.unit.width);
    if (!error && wanted)
        error = by_tiles(p) ? backward_tiles(&c, &panels) : backward_rows(&c, &panels);
    release(k);
    release(panels.data);
    free_inputs(&in);
    return error;
}

#endif
