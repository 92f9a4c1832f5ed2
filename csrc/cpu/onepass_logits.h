/* SPDX-License-Identifier: MIT */
/* The threshold of many columns of logits and their loss from one reading of each row.
 *
 *   1. Bound. Some of a row's cosines give a limit that its quantile lies above.
 *   2. Pass. What is above the limit goes to the row's list; of the rest the sums are made.
 *   3. Select. The row's quantile from its list, exactly; eps is the mean.
 *   4. Split. The list's logits above eps are H, the others go to the sums.
 *
 * A row that this does not serve is read again, for its quantile, or for its loss: one whose list
 * is too long or too short, whose limit turns out above eps, that has no H or no number for a loss.
 * Which these are depends on the row and eps alone, and so do the bits. */
#ifndef HEX_ONEPASS_LOGITS_H
#define HEX_ONEPASS_LOGITS_H

#include "onepass.h"

/* Rows with fewer columns are read often enough from the cache. */
#define FEWEST_COLUMNS 4096

/* The sample of a row: so many pieces of so many neighbours, for a line of memory costs the same
 * whether one number of it is read or a few. */
#define PIECES 128
#define PIECE 8

typedef struct {
    sets_t of; /* of.rest: the largest of all negatives */
    sums_t sums;
    real limit;
    list_t list; /* logits above it */
    bool again;
} listed_t;

typedef struct {
    threshold_context_t threshold; /* quantiles go to threshold.low */
    int64_t capacity;
    real *numbers; /* of the lists */
    listed_t *rows;
    forward_context_t forward; /* its p has the eps, once that is known */
    atomic_bool no_memory;
} logits_pass_t;

/* ---- bound ---- */

/* A limit that the row's quantile, which has a share of the row above it, is most often above; NaN
 * where all of the sample is left out. */
static real sampled_limit(const row_t *r, double share)
{
    real sample[PIECES * PIECE + LANES];
    uint32_t random = 1;
    int64_t m = 0;
    for (int q = 0; q < PIECES; q++) { /* any will do; always the same, for the bits' sake */
        random = random * 1664525u + 1013904223u;
        const real *at = r->v + ((uint64_t)random * (uint64_t)(r->n - PIECE + 1) >> 32);
        for (int k = 0; k < PIECE; k++) {
            sample[m] = cosine(at[k] * r->tau);
            m += at[k] != -(real)INFINITY; /* most often it is 1 */
        }
    }
    return m > 0 ? row_select(sample, m, m - sample_rank(m, share, SIGMA_LIMIT)) : (real)NAN;
}

/* ---- pass ---- */

/* The sets of a row, all negatives in G, and the list of those above the limit. *ties: how many
 * negatives equal it. */
static sets_t list_logits(const row_t *r, listed_t *l, int64_t *ties)
{
    COUNT(WORK_COMPARED, r->n);
    const vec_t none = -(real)INFINITY - (vec_t){0}, one = 1 - (vec_t){0};
    vec_t top = none;
    sets_t of = {.positives = 1,
                 .sum = (double)r->v[r->target],
                 .largest = (double)r->v[r->target],
                 .shift = (double)r->v[r->target]};
    list_t above = l->list;
    for (int64_t from = 0; from < r->n; from += SLICE) {
        const int64_t end = r->n - from < SLICE ? r->n : from + SLICE;
        vec_t count = {0}, equal = {0}, finite = {0};
        for (int64_t some = from; some < end; some += 64) {
            const int64_t to = end - some < 64 ? end : some + 64;
            uint64_t picked = 0;
            for (int64_t j = some; j < to; j += LANES) {
                const entries_t at = read_entries(r, j, to - j, true);
                const vec_t x = pick(at.is_n, at.value, none);
                top = larger(x, top);
                count += where(at.is_n, one);
                equal += where(at.is_n & (at.score == l->limit), one);
                finite += where(at.is_p | at.is_n, at.value * 0);
                picked |= list_lanes(&above, at.is_n & (at.score > l->limit), at.value, j - some);
            }
            list_rest(&above, r->v + some, picked);
        }
        of.negatives += (double)vec_sum(count);
        of.finite += (double)vec_sum(finite);
        *ties += (int64_t)vec_sum(equal);
    }
    of.rest = (double)vec_largest(top);
    COUNT(WORK_LISTED, list_held(&above));
    l->list = above;
    return of;
}

/* ---- select ---- */

/* The quantile from the list, or NaN; room: for the list, two more, and a vector. */
static real listed_quantile(const threshold_context_t *t, const row_t *r, const listed_t *l,
                            int64_t ties, real *room)
{
    const bool all = !t->over_negatives, with_self = all && t->p->self_column;
    const real cp = cosine(r->v[r->target] * r->tau);
    const int64_t n = (int64_t)l->of.negatives + all + with_self, k = n - rank(t->quantile, n);
    int64_t m = l->list.length;
    for (int64_t j = 0; j < m; j++)
        room[j] = cosine(l->list.to[j] * r->tau);
    if (all && cp > l->limit)
        room[m++] = cp;
    if (with_self && 1 > l->limit)
        room[m++] = 1;
    ties += (all && cp == l->limit) + (with_self && 1 == l->limit);
    return m + ties < k ? (real)NAN : cosine(select_above(room, m, k, l->limit));
}

static void list_body(int64_t begin, int64_t end, void *context)
{
    logits_pass_t *c = context;
    const hex_problem_t *p = c->threshold.p;
    const double share = 1 - c->threshold.quantile;
    const real tau = (real)c->forward.tau;
    real *own = allocate(p->D + 1, 2, sizeof(real));
    real *room = allocate(LIST_SPACE(c->capacity + 2), 1, sizeof(real));
    near_t near = {0};
    if (!make_near(&near, p->D) || !own || !room)
        c->no_memory = true;
    for (int64_t i = begin; i < end && !c->no_memory; i++) {
        row_t r = logits_row(p, i, tau, own, own + p->D);
        real *quantile = &c->threshold.low[i];
        listed_t *l = &c->rows[i];
        int64_t ties = 0;
        l->limit = sampled_limit(&r, share);
        l->list = (list_t){c->numbers + i * LIST_SPACE(c->capacity), 0, c->capacity};
        l->of = list_logits(&r, l, &ties);
        l->again = l->of.finite != 0 || l->of.negatives == 0 || !list_is_whole(&l->list);
        *quantile = l->again ? (real)NAN : listed_quantile(&c->threshold, &r, l, ties, room);
        if (!l->again)
            l->sums = row_sums(&r, l->of.rest, l->of.shift, l->limit, (real)M_LOG2E, 0, HARD_NONE,
                               true, true);
        if (*quantile != *quantile)
            threshold_row(&c->threshold, i, &r, -1, -1, &near);
    }
    release(own);
    release(room);
    release(near.list);
}

/* ---- split ---- */

/* A row's loss and statistics from its sums and its list; false if they do not serve. */
static bool split_list(const logits_pass_t *c, int64_t i, double *loss, double *stats)
{
    const hex_problem_t *p = c->forward.p;
    const listed_t *l = &c->rows[i];
    const real eps = row_eps(p, read_vector(p->eps, i));
    if (l->again || !(eps >= l->limit))
        return false;
    const row_t r = {.v = l->list.to,
                     .n = l->list.length,
                     .logits = true,
                     .target = -1, /* it is not in the list */
                     .tau = (real)c->forward.tau};
    sums_t s = row_sums(&r, l->of.rest, 0, eps, (real)M_LOG2E, p->beta, HARD_SOME, true, true);
    if (s.count == 0 || !row_begin(eps, c->forward.tau, stats))
        return false;
    s.rest += l->sums.rest, s.rest_x += l->sums.rest_x;
    s.e = l->sums.e, s.x = l->sums.x, s.ex = l->sums.ex;
    *loss = classed_scalars(p, s, &l->of, NULL, l->of.rest, eps, c->forward.tau, stats);
    return !is_lost(s.rest, l->of.negatives);
}

static void split_logits_body(int64_t begin, int64_t end, void *context)
{
    logits_pass_t *c = context;
    const hex_problem_t *p = c->forward.p;
    real *own = allocate(p->D + 1, 2, sizeof(real));
    if (!own)
        c->no_memory = true;
    for (int64_t i = begin; i < end && own; i++) {
        double stats[HEX_STATS_SEVERAL];
        if (split_list(c, i, &c->forward.loss[i], stats)) {
            write_stats(p, stats, i, c->forward.rows, c->forward.stats);
            continue;
        }
        row_t r = logits_row(p, i, (real)c->forward.tau, own, own + p->D);
        forward_row(&c->forward, i, &r, -1, -1, NULL);
    }
    release(own);
}

/* ---- both ---- */

/* Room in the list of a row of logits whose quantile has a share of it above; 0: this way is not worth
 * it. */
static int64_t logits_capacity(const hex_problem_t *p, double quantile)
{
    const double share = 1 - quantile, m = PIECES * PIECE;
    const double most = share + SIGMA_CAPACITY * sqrt(share * (1 - share) / m);
    if (p->mode != HEX_LOGITS || p->D < FEWEST_COLUMNS || p->variant != HEX_PAPER ||
        most > LONGEST_LIST)
        return 0;
    const int64_t room = round_up((int64_t)(most * (double)p->D) + 16, 16);
    return room <= MOST_LIST_BYTES / (int64_t)sizeof(real) / (p->B + 1) ? room : 0;
}

static const char *adaptive_logits(const hex_problem_t *p, hex_tracker_t *t, int64_t capacity,
                                   void *loss, void *stats)
{
    hex_problem_t with = *p;
    with.eps = (hex_vector_t){&t->eps, HEX_F64, 0};
    real *quantiles = allocate(p->B, 1, sizeof(real));
    logits_pass_t c = {
        .threshold = {p, t->quantile, t->over_negatives, false, quantiles, NULL},
        .capacity = capacity,
        .numbers = allocate(p->B, LIST_SPACE(capacity), sizeof(real)),
        .rows = allocate(p->B, 1, sizeof(listed_t)),
        .forward = {&with, p->B, read_vector(p->tau, 0), stats, allocate(p->B, 1, sizeof(double))}};
    const char *error = quantiles && c.numbers && c.rows && c.forward.loss ? NULL : HEX_NO_MEMORY;
    if (!error && !hex_parallel_for(p->B, 64 * p->D, list_body, &c))
        error = HEX_NO_THREADS;
    if (!error && c.no_memory)
        error = HEX_NO_MEMORY;
    if (!error) {
        hex_track(t, mean_of(quantiles, p->B), p->B);
        if (!hex_parallel_for(p->B, 64 * capacity, split_logits_body, &c))
            error = HEX_NO_THREADS;
        else if (c.no_memory)
            error = HEX_NO_MEMORY;
        else
            reduce(p->reduction, c.forward.loss, p->B, loss);
    }
    release(quantiles);
    release(c.numbers);
    release(c.rows);
    release(c.forward.loss);
    return error;
}

#undef PIECES
#undef PIECE

#endif
