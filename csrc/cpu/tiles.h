/* SPDX-License-Identifier: MIT */
/* What is done with a tile of cosines, of a block of anchors I with a block of candidates J:
 *
 *     sums         of a tile's rows go to the anchors of I, of its columns to those of J
 *     gradient     V_ij = g_ij + g_ji;  du_I += V u_J,  du_J += V^T u_I
 *
 * with the parts of J only where candidates are anchors too (ntxent, cross). The shift of every row
 * is 1, the largest cosine there can be, so one exponential serves both rows of a pair. */
#ifndef HEX_TILES_H
#define HEX_TILES_H

#include "schedule.h"

/* Where a row meets itself and its positive in the tile: neither is a negative. Positives that are
 * told by ids stay. */
static void mask_self(const hex_problem_t *p, const tile_t *t, real *c, real hole)
{
    const int64_t B = p->B, shift[3] = {0, B, -B}; /* row i with itself, i + B, i - B */
    for (int k = 0; k < (p->several ? 1 : 3); k++) {
        int64_t from = t->i, to = t->i + t->rows;
        if (k == 1 && to > B)
            to = B;
        if (k == 2 && from < B)
            from = B;
        if (from < t->j - shift[k])
            from = t->j - shift[k];
        if (to > t->j + t->columns - shift[k])
            to = t->j + t->columns - shift[k];
        for (int64_t i = from; i < to; i++)
            c[(i - t->i) * t->ld + i + shift[k] - t->j] = hole;
    }
}

/* What is no negative's cosine: columns that are no rows too. */
static void blank(const hex_problem_t *p, const tile_t *t, real hole)
{
    for (int64_t i = 0; i < t->rows; i++)
        for (int64_t j = t->columns; j < round_up(t->columns, NR); j++)
            t->c[i * t->ld + j] = hole;
    mask_self(p, t, t->c, hole);
}

/* ---- sums ---- */

/* Who decides about an entry: eps alone; or ids say that it is a positive; or groups that it is in
 * H. */
typedef enum { BY_EPS, BY_IDS, BY_GROUPS } decider_t;

typedef struct {
    const hex_problem_t *p;
    decider_t by;
    const word *codes; /* ids or groups of all rows */
    hex_split_t split;
    real scale, hole;  /* log2(e) / tau; a cosine whose exponential is nothing */
    const real *limit; /* of each row, and of a block more */
    double *sums;      /* sums[kind * rows + row] */
    int64_t rows, column_block;
    bool both;
    list_t *list; /* of each row, what is above its limit */
} pass_t;

/* Above every hole and below every cosine: what is no entry is in no set. */
#define ABOVE_HOLES ((real) - 2)

/* c[k] to the list of row j + k, for the bits k. */
static void list_columns(const pass_t *s, int64_t j, const real *c, uint64_t picked)
{
    for (; picked; picked &= picked - 1) {
        const int k = __builtin_ctzll(picked);
        list_t *l = &s->list[j + k];
        COUNT(WORK_LISTED, l->length < l->room);
        list_one(l, c[k]);
    }
}

/* columns: their sums too. */
INLINE void tile_sums(const pass_t *s, const tile_t *t, real *scratch, bool columns,
                      hex_split_t split, decider_t by, hex_power_t power)
{
    const bool lists = split == SPLIT_LIST || split == SPLIT_TIES;
    const int kinds = split == SPLIT_NONE   ? 2
                      : split == SPLIT_LIST ? 3
                      : split == SPLIT_TIES ? 4
                                            : SUM_KINDS;
    const int kind_x = split == SPLIT_NONE ? 1 : SUM_REST_X; /* all and rest are one there */
    const int more = by == BY_IDS ? SUM_KINDS_IDS - SUM_P : 0;
    const int64_t width = round_up(t->columns, NR), step = s->column_block / LANES;
    const real beta = (real)s->p->beta;
    real *positives = scratch + kinds * s->column_block; /* of columns, `more` kinds */
    if (columns)
        memset(scratch, 0, (size_t)((kinds + more) * s->column_block) * sizeof(real));
    for (int64_t i = 0; i < t->rows; i++) {
        const real *row = t->c + i * t->ld;
        const real own_limit = s->limit[t->i + i];
        const word own_code = by == BY_EPS ? 0 : s->codes[t->i + i];
        vec_t sum[SUM_KINDS_IDS] = {{0}};
        list_t list = lists ? s->list[t->i + i] : (list_t){0};
        for (int64_t from = 0; from < width; from += 64) {
            const int64_t to = width - from < 64 ? width : from + 64;
            uint64_t own_rest = 0, others = 0;
            for (int64_t j = from; j < to; j += LANES) {
                const vec_t one = 1 - (vec_t){0};
                const vec_t c = *(const vec_t *)(row + j), x = c - 1;
                const vec_t power_of_2 = x * s->scale;
                vec_t e = exp2_vec(power_of_2), xe = x * e;
                vec_t *out = (vec_t *)(scratch + j); /* out[kind * step] */
                mask_t same = ~(c <= ABOVE_HOLES);   /* a NaN is a candidate */
                if (by != BY_EPS) {
                    words_t codes;
                    memcpy(&codes, s->codes + t->j + j, sizeof codes);
                    same &= (mask_t)(codes == own_code);
                }
                if (by == BY_IDS) { /* they count apart, and are no negatives */
                    const vec_t of[] = {where(same, one), where(same, x), where(same, e),
                                        where(same, xe)};
                    for (int k = 0; k < more; k++) {
                        sum[SUM_P + k] += of[k];
                        if (columns)
                            *(vec_t *)(positives + k * s->column_block + j) += of[k];
                    }
                    e = where(~same, e), xe = where(~same, xe);
                }
                sum[SUM_ALL] += e;
                if (columns)
                    out[0] += e;
                if (split == SPLIT_NONE) {
                    sum[kind_x] += xe;
                    if (columns)
                        out[kind_x * step] += xe;
                    continue;
                }
                const vec_t other_limit =
                    columns ? *(const vec_t *)(s->limit + t->j + j) : (vec_t){0};
                const mask_t own = by == BY_EPS   ? c > own_limit
                                   : by == BY_IDS ? (c > own_limit) & ~same
                                                  : same,
                             other = by == BY_EPS   ? c > other_limit
                                     : by == BY_IDS ? (c > other_limit) & ~same
                                                    : same;
                sum[SUM_REST] += where(~own, e);
                sum[SUM_REST_X] += where(~own, xe);
                if (columns) {
                    out[SUM_REST * step] += where(~other, e);
                    out[SUM_REST_X * step] += where(~other, xe);
                }
                if (split == SPLIT_TIES) {
                    const mask_t of = by == BY_IDS ? ~same : c == c;
                    sum[SUM_COUNT] += where((c == own_limit) & of, one);
                    if (columns)
                        out[SUM_COUNT * step] += where((c == other_limit) & of, one);
                }
                if (lists) {
                    own_rest |= list_lanes(&list, own, c, j - from);
                    if (columns)
                        others |= (uint64_t)bits(other) << (j - from);
                    continue;
                }
                const vec_t b = power == POWER_0   ? one
                                : power == POWER_1 ? e
                                                   : exp2_vec(beta * power_of_2);
                const vec_t of[] = {one, b, b * e, b * x, b * xe};
                for (int k = 0; k < SUM_KINDS - SUM_COUNT; k++) {
                    sum[SUM_COUNT + k] += where(own, of[k]);
                    if (columns)
                        out[(SUM_COUNT + k) * step] += where(other, of[k]);
                }
            }
            list_rest(&list, row + from, own_rest);
            if (lists && others)
                list_columns(s, t->j + from, row + from, others);
        }
        if (lists) {
            COUNT(WORK_LISTED, list_held(&list) - list_held(&s->list[t->i + i]));
            s->list[t->i + i] = list;
        }
        for (int k = 0; k < kinds; k++)
            s->sums[(k == kind_x ? SUM_REST_X : k) * s->rows + t->i + i] += (double)vec_sum(sum[k]);
        for (int k = 0; k < more; k++)
            s->sums[(SUM_P + k) * s->rows + t->i + i] += (double)vec_sum(sum[SUM_P + k]);
    }
    for (int k = 0; k < kinds + more && columns; k++) {
        const int kind = k >= kinds ? SUM_P + k - kinds : k == kind_x ? SUM_REST_X : k;
        for (int64_t j = 0; j < t->columns; j++)
            s->sums[kind * s->rows + t->j + j] += (double)scratch[k * s->column_block + j];
    }
}

INLINE void sums_by(const pass_t *s, const tile_t *t, real *scratch, bool columns, decider_t by)
{
    const hex_power_t power = power_of(s->p->beta);
    const hex_split_t split = by == BY_GROUPS ? SPLIT_SUMS : s->split; /* groups need no eps */
    if (split == SPLIT_NONE)
        tile_sums(s, t, scratch, columns, SPLIT_NONE, by, POWER_0);
    else if (split == SPLIT_LIST)
        tile_sums(s, t, scratch, columns, SPLIT_LIST, by, POWER_0);
    else if (split == SPLIT_TIES)
        tile_sums(s, t, scratch, columns, SPLIT_TIES, by, POWER_0);
    else if (power == POWER_0)
        tile_sums(s, t, scratch, columns, SPLIT_SUMS, by, POWER_0);
    else if (power == POWER_1)
        tile_sums(s, t, scratch, columns, SPLIT_SUMS, by, POWER_1);
    else
        tile_sums(s, t, scratch, columns, SPLIT_SUMS, by, POWER_ANY);
}

INLINE void choose_sums(const pass_t *s, const tile_t *t, real *scratch, bool columns)
{
    if (s->by == BY_IDS)
        sums_by(s, t, scratch, columns, BY_IDS);
    else if (s->by == BY_GROUPS)
        sums_by(s, t, scratch, columns, BY_GROUPS);
    else
        sums_by(s, t, scratch, columns, BY_EPS);
}

static void sum_tile(void *context, const tile_t *t, real *scratch)
{
    const pass_t *s = context;
    blank(s->p, t, s->hole);
    if (s->both && t->i != t->j) /* a block with itself has all its pairs both ways */
        choose_sums(s, t, scratch, true);
    else
        choose_sums(s, t, scratch, false);
}

static const char *sum_tiles(const unit_t *unit, const panels_t *panels, const field_t *field,
                             real *kept, bool keep, pass_t *s)
{
    schedule_t t = {.unit = unit,
                    .panels = panels,
                    .field = *field,
                    .scratch = SUM_KINDS_IDS * field->column_block,
                    .visit = sum_tile,
                    .context = s,
                    .kept = kept,
                    .keep = keep};
    return for_each_tile(&t, 2 * unit->width + 64);
}

/* ---- gradient ---- */

typedef struct {
    const hex_problem_t *p;
    const unit_t *unit;
    field_t field;
    decider_t by;
    const word *codes;
    const coefficients_t *k;
    real *du[2]; /* of anchors, of candidates, in whole register tiles; NULL: not wanted */
} tile_gradient_t;

/* out_ij = g_ij, with g_ji where candidates are anchors too. */
INLINE void tile_entries(const tile_gradient_t *g, const tile_t *t, bool both, decider_t by,
                         hex_power_t power)
{
    const real *const *k = g->k->k;
    const int64_t jk = both ? t->j : 0;
    const real *ej = k[HEX_STAT_EPS] + jk, *rj = k[HEX_STAT_REST] + jk,
               *hej = k[HEX_STAT_HARD_E] + jk, *hj = k[HEX_STAT_HARD] + jk,
               *pej = k[HEX_STAT_POS_E] + jk, *mj = k[HEX_STAT_POS_MEAN] + jk,
               *pj = k[HEX_STAT_POSITIVE] + jk;
    const word *codes = by == BY_EPS ? NULL : g->codes + t->j;
    const real scale = g->k->scale, beta = (real)g->k->beta;
    for (int64_t i = 0; i < t->rows; i++) {
        const int64_t r = t->i + i;
        const real eps = k[HEX_STAT_EPS][r], rest = k[HEX_STAT_REST][r];
        const real hard_e = k[HEX_STAT_HARD_E][r], hard = k[HEX_STAT_HARD][r];
        const bool several = by == BY_IDS; /* else there are no such statistics */
        const real pos_e = several ? k[HEX_STAT_POS_E][r] : 0;
        const real mean = several ? k[HEX_STAT_POS_MEAN][r] : 0;
        const real positive = k[HEX_STAT_POSITIVE][r];
        const word code = by == BY_EPS ? 0 : g->codes[r];
        const real *c = t->c + i * t->ld;
        real *out = t->out + i * t->ld; /* maybe c, and each element depends on its own only */
#pragma omp simd
        for (int64_t j = 0; j < t->columns; j++) {
            const real x = (c[j] - 1) * scale, e = exp2_of(x), b = weight(power, x, e, beta);
            const bool same = by != BY_EPS && codes[j] == code;
            const bool hard_i = by == BY_GROUPS ? same : c[j] > eps;
            const bool hard_j = both && (by == BY_GROUPS ? same : c[j] > ej[j]);
            real own = hard_i ? b * (hard_e * e - hard) : rest * e;
            real other = !both ? 0 : hard_j ? b * (hej[j] * e - hj[j]) : rj[j] * e;
            if (by == BY_IDS) {
                own = same ? pos_e * (e - mean) + positive : own;
                other = both && same ? pej[j] * (e - mj[j]) + pj[j] : other;
            }
            out[j] = own + other;
        }
    }
}

INLINE void power_entries(const tile_gradient_t *g, const tile_t *t, bool both, decider_t by)
{
    switch (power_of(g->k->beta)) {
    case POWER_0:
        tile_entries(g, t, both, by, POWER_0);
        break;
    case POWER_1:
        tile_entries(g, t, both, by, POWER_1);
        break;
    default:
        tile_entries(g, t, both, by, POWER_ANY);
    }
}

INLINE void choose_tile_entries(const tile_gradient_t *g, const tile_t *t, bool both)
{
    if (g->by == BY_IDS)
        power_entries(g, t, both, BY_IDS);
    else if (g->by == BY_GROUPS)
        power_entries(g, t, both, BY_GROUPS);
    else
        power_entries(g, t, both, BY_EPS);
}

static void grad_tile(void *context, const tile_t *t, real *scratch)
{
    (void)scratch;
    const tile_gradient_t *g = context;
    const int64_t width = g->unit->width;
    const bool one = g->field.symmetric && t->i == t->j;
    if (g->field.both)
        choose_tile_entries(g, t, true);
    else
        choose_tile_entries(g, t, false);
    mask_self(g->p, t, t->out, 0);
    if (g->du[0])
        accumulate(g->unit, t->j, t->columns, t->out, t->ld, t->rows,
                   g->du[0] + (t->i - g->field.anchors.begin) * width);
    if (g->du[1] && !one)
        accumulate_transposed(g->unit, t->i, t->rows, t->out, t->ld, t->columns,
                              g->du[1] + (t->j - g->field.candidates.begin) * width);
}

/* du, from zero: the negatives' part of every row's gradient. */
static const char *grad_tiles(tile_gradient_t *g, const panels_t *panels, real *kept)
{
    schedule_t t = {.unit = g->unit,
                    .panels = panels,
                    .field = g->field,
                    .visit = grad_tile,
                    .context = g,
                    .kept = kept};
    return for_each_tile(&t, 6 * g->unit->width + 64);
}

static decider_t decider_of(const hex_problem_t *p)
{
    return p->several ? BY_IDS : p->by_group ? BY_GROUPS : BY_EPS;
}

static const word *codes_of(const hex_problem_t *p, const inputs_t *in)
{
    return p->several ? in->ids : in->groups;
}

/* All of du by tiles, then each row by itself. */
static void finish_body(int64_t begin, int64_t end, void *context)
{
    const backward_context_t *c = context;
    const int64_t first = rows_of(c->p, c->input).begin, width = c->in->unit.width;
    for (int64_t o = begin; o < end; o++)
        finish_row(c, first + o, c->du + o * width);
}

static const char *backward_tiles(backward_context_t *c, panels_t *panels)
{
    const hex_problem_t *p = c->p;
    const unit_t *unit = &c->in->unit;
    tile_gradient_t of = {.p = p,
                          .unit = unit,
                          .field = field_of(p),
                          .by = decider_of(p),
                          .codes = codes_of(p, c->in),
                          .k = &c->k};
    const range_t candidates = of.field.candidates;
    const int64_t width = unit->width, block = of.field.column_block;
    const bool joint = p->mode == HEX_NTXENT; /* z1's du follows z0's */
    real *du[3] = {NULL};                     /* of each input */
    const char *error = NULL;
    if (!p->kept) /* else no cosine is computed again */
        error = make_panels(unit, candidates.begin, candidates.end, panels);
    for (int input = 0; !error && input < 3; input++) {
        const range_t rows = rows_of(p, input);
        if (joint ? input > 0 : !c->g->dz[input])
            continue;
        const int64_t n = (joint ? p->B + p->M : rows.end - rows.begin) + block;
        du[input] = allocate(n, width, sizeof(real));
        if (du[input])
            memset(du[input], 0, (size_t)(n * width) * sizeof(real));
        else
            error = HEX_NO_MEMORY;
    }
    of.du[0] = du[0];
    of.du[1] = joint ? du[0] : p->mode == HEX_UNPAIRED ? du[2] : du[1];
    if (!error && (of.du[0] || of.du[1]))
        error = grad_tiles(&of, panels, p->kept);
    for (c->input = 0; !error && c->input < 3; c->input++) {
        const range_t rows = rows_of(p, c->input);
        c->du = joint ? du[0] + rows.begin * width : du[c->input];
        if (c->g->dz[c->input] &&
            !hex_parallel_for(rows.end - rows.begin, 8 * width, finish_body, c))
            error = HEX_NO_THREADS;
    }
    for (int input = 0; input < 3; input++)
        release(du[input]);
    return error;
}

#endif
