/* SPDX-License-Identifier: MIT */
/* The core's entry points: which way a problem goes. Enough shared candidates go by tiles (tiles.h,
 * onepass.h), everything else by blocks of rows (blocks.h). */
#ifndef HEX_ENTRY_H
#define HEX_ENTRY_H

#include "onepass.h"

static const char *threshold(const hex_problem *p, double quantile, bool over_negatives,
                             double *mean)
{
    double share;
    const int64_t k = rank_above(p, quantile, over_negatives, &share);
    const int64_t capacity = list_capacity(columns_of(p), share);
    if (!enough(p) || columns_of(p) < FEWEST_LISTED || !capacity)
        return threshold_rows(p, quantile, over_negatives, mean);
    batch_t s = {0};
    selection_t q = {0};
    const char *error = make_batch(p, &s);
    if (!error)
        error = make_bound(&s, share, false);
    if (!error)
        error = make_selection(&s, quantile, over_negatives, k, &q);
    for (int side = 0; !error && side < count_sides(p); side++)
        error = list_side(&q, side, capacity);
    error = end_selection(&q, error, mean);
    free_batch(&s);
    return error;
}

static const char *row_range(const hex_problem *p, void *low, void *high)
{
    threshold_context_t t = {p, 0, false, true, low, high};
    return for_each_row(p, threshold_row, &t);
}

static const char *forward(const hex_problem *p, void *loss, void *stats)
{
    if (!by_tiles(p))
        return forward_rows(p, loss, stats);
    batch_t s = {0};
    const char *error = make_batch(p, &s);
    if (!error)
        error = make_pass(&s);
    if (!error)
        error = split_rows(&s, p, loss, stats);
    free_batch(&s);
    return error;
}

static const char *adaptive(const hex_problem *p, hex_tracker *t, void *loss, void *stats)
{
    double share;
    const int64_t k = rank_above(p, t->quantile, t->over_negatives, &share);
    const int64_t capacity = list_capacity(columns_of(p), share);
    double candidate = NAN; /* not looked at in warm-up */
    hex_problem with = *p;
    with.eps = (hex_vector){&t->eps, HEX_F64, 0};
    if (by_tiles(p) && !hex_is_warm_up(t) && capacity &&
        capacity <= MOST_LIST_BYTES / (int64_t)sizeof(real) / hex_anchors(p)) {
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
    const char *error =
        hex_is_warm_up(t) ? NULL : threshold(p, t->quantile, t->over_negatives, &candidate);
    if (error)
        return error;
    hex_track(t, candidate, hex_anchors(p));
    return forward(&with, loss, stats);
}

static const char *backward(const hex_problem *p, const hex_gradient *g)
{
    const int64_t rows = hex_anchors(p);
    unit_t unit = {0};
    panels_t panels = {0};
    real *k = allocate(rows, HEX_STAT_POSITIVE + 1, sizeof(real));
    if (!k)
        return HEX_NO_MEMORY;
    const bool local = scale_stats(p, g, k);
    const char *error = g->dz[0] || g->dz[1] || g->dz[2] ? make_unit(p, &unit) : NULL;
    backward_context_t c = {
        .p = p,
        .g = g,
        .unit = &unit,
        .panels = &panels,
        .k = {k, k + HEX_STAT_SHIFT * rows, k + HEX_STAT_REST * rows, k + HEX_STAT_HARD_E * rows,
              k + HEX_STAT_HARD * rows},
        .positive = k + HEX_STAT_POSITIVE * rows,
        .scale = (real)(M_LOG2E / read_vector(p->tau, 0)),
        .beta = local ? p->beta : 0, /* InfoNCE has one path, whatever beta would have been */
    };
    if (!error && has_dots(&unit))
        error = make_pairs(p, &unit.dots, unit.count, unit.width);
    const bool tiles = by_tiles(p);
    if (!error && tiles && unit.u)
        error = backward_tiles(&c, &panels);
    for (c.input = 0; !error && !tiles && c.input < 3; c.input++) {
        /* an anchor and its own negatives are done together, in the pass of whichever is wanted
         * first */
        const bool own = p->mode == HEX_OWN && c.input != 1;
        if (!g->dz[c.input] || (own && c.input == 2 && g->dz[0]))
            continue;
        c.owners = own ? rows_of(p, 0) : rows_of(p, c.input);
        c.met = met_by(p, c.input);
        c.block = own ? 1 : block_rows(c.owners.end - c.owners.begin, 0);
        error = make_panels(&unit, c.met.begin, c.met.end, &panels);
        const int64_t blocks = (c.owners.end - c.owners.begin + c.block - 1) / c.block;
        const int64_t columns = own ? p->K : c.met.end - c.met.begin + 1; /* + 1: the partner */
        if (!error && !hex_parallel_for(blocks, 4 * c.block * columns * (unit.width + 32),
                                        own ? paired_backward_body : backward_body, &c))
            error = HEX_NO_THREADS;
        if (!error && c.no_memory)
            error = HEX_NO_MEMORY;
    }
    free(k);
    free(panels.data);
    free_unit(&unit);
    return error;
}

#endif
