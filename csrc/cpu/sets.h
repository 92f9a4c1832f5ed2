/* SPDX-License-Identifier: MIT */
/* What a problem says of its pairs: who is a positive of whom, who is left out, and what is compared
 * with eps where that is not the cosine. Labels become codes, so that a vector of them can be
 * compared with a vector of numbers. */
#ifndef HEX_SETS_H
#define HEX_SETS_H

#include "select.h"

/* What is made of a problem's inputs once. */
typedef struct {
    unit_t unit, guide; /* guide.u NULL: there is none */
    word *ids, *groups; /* a code of every row of ../hex.h's index space; NULL: there are none */
} inputs_t;

static inline bool is_classed(const hex_problem_t *p)
{
    return p->several || p->mask.data || p->by_group || p->G > 0;
}

static int compare_labels(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Codes that are equal where the labels are: their distance from the least or, where that is too
 * much for a word, their rank. labels: of the three inputs. */
static const char *make_codes(const hex_problem_t *p, const hex_ids_t *labels, word **codes)
{
    int64_t n = 0;
    for (int k = 0; k < 3; k++)
        n += labels[k].data ? hex_input_rows(p, k) : 0;
    int64_t *all = allocate(n, 1, sizeof *all), *sorted = NULL;
    *codes = allocate(n + NR + LANES, 1, sizeof **codes);
    if (!all || !*codes) {
        release(all);
        return HEX_NO_MEMORY;
    }
    memset(*codes + n, 0, (NR + LANES) * sizeof **codes);
    int64_t least = INT64_MAX, most = INT64_MIN, at = 0;
    for (int k = 0; k < 3; k++)
        for (int64_t r = 0; labels[k].data && r < hex_input_rows(p, k); r++) {
            const int64_t label = labels[k].data[r * labels[k].stride];
            least = label < least ? label : least;
            most = label > most ? label : most;
            all[at++] = label;
        }
    const bool near = n == 0 || (uint64_t)most - (uint64_t)least <= (word)-1;
    if (!near) {
        sorted = allocate(n, 1, sizeof *sorted);
        if (!sorted) {
            release(all);
            return HEX_NO_MEMORY;
        }
        memcpy(sorted, all, (size_t)n * sizeof *sorted);
        qsort(sorted, (size_t)n, sizeof *sorted, compare_labels);
        int64_t different = 0;
        for (int64_t i = 0; i < n; i++)
            if (i == 0 || sorted[i] != sorted[i - 1])
                sorted[different++] = sorted[i];
        for (int64_t i = 0; i < n; i++)
            (*codes)[i] = (word)((int64_t *)bsearch(&all[i], sorted, (size_t)different,
                                                    sizeof *sorted, compare_labels) -
                                 sorted);
    } else
        for (int64_t i = 0; i < n; i++)
            (*codes)[i] = (word)((uint64_t)all[i] - (uint64_t)least);
    release(sorted);
    release(all);
    return NULL;
}

static const char *make_inputs(const hex_problem_t *p, wanted_t wanted, inputs_t *in)
{
    const char *error = make_unit(p, p->input, p->D, are_dots(p), wanted, &in->unit);
    if (!error && p->G > 0)
        error = make_unit(p, p->guide, p->G, false, ALL_ROWS, &in->guide);
    if (!error && p->several && p->ids[0].data)
        error = make_codes(p, p->ids, &in->ids);
    if (!error && p->by_group)
        error = make_codes(p, p->groups, &in->groups);
    return error;
}

static void free_inputs(inputs_t *in)
{
    free_unit(&in->unit);
    free_unit(&in->guide);
    release(in->ids);
    release(in->groups);
}

/* Adds to the classes of row o what the mask says of it and the rows from `from` on: `anchor` as
 * below. */
static void mark_kinds(const hex_problem_t *p, int64_t o, int64_t from, int64_t n, bool anchor,
                       real *restrict kind)
{
    const hex_mask_t *m = &p->mask;
    const int64_t step = anchor ? m->col : m->row, size = anchor ? m->columns : m->rows;
    const uint8_t *at =
        m->data + (anchor ? o % m->rows * m->row : hex_candidate(p, o) % m->columns * m->col);
    int64_t b = (anchor ? hex_candidate(p, from) : from) % size;
    for (int64_t j = 0; j < n; j++) {
        const uint8_t code = m->codes ? at[b * step] : at[b * step] != 0;
        if (code == HEX_CODE_POSITIVE && p->several)
            kind[j] = POSITIVE;
        else if (code == HEX_CODE_LEFT_OUT && kind[j] == NEGATIVE)
            kind[j] = LEFT_OUT;
        b = b + 1 == size ? 0 : b + 1;
    }
}

/* The classes of row o with the rows [among.begin, among.end) that it meets. `anchor`: it is the
 * anchor of the entries, or else each of the others is, which matters to a mask. */
static void fill_kinds(const hex_problem_t *p, const inputs_t *in, int64_t o, range_t among,
                       bool anchor, real *restrict kind)
{
    const int64_t n = among.end - among.begin, from = among.begin;
    if (in->ids) {
        const word id = in->ids[o], *restrict ids = in->ids + from;
        for (int64_t j = 0; j < n; j++)
            kind[j] = ids[j] == id ? POSITIVE : NEGATIVE;
    } else {
        for (int64_t j = 0; j < n; j++)
            kind[j] = NEGATIVE;
        /* the one positive stands apart */
        const int64_t q = !p->several && o < p->B + p->M ? partner(p, o) : -1;
        if (q >= from && q < among.end)
            kind[q - from] = LEFT_OUT;
    }
    if (p->mask.data)
        mark_kinds(p, o, from, n, anchor, kind);
    if (p->mode == HEX_NTXENT && o >= from && o < among.end)
        kind[o - from] = LEFT_OUT;
    if (p->mode == HEX_UNPAIRED && p->several) { /* a row of z1 is seen by its positives only */
        const int64_t z1 = p->B + p->M, end = anchor ? z1 - from : o < z1 ? n : 0;
        for (int64_t j = 0; j < (end < n ? end : n); j++)
            kind[j] = kind[j] == POSITIVE ? POSITIVE : LEFT_OUT;
    }
}

/* What is compared with 1/2 where H is given by groups: 1 in the same, else 0. */
static void fill_groups(const word *group, int64_t o, int64_t from, int64_t n, real *restrict s)
{
    const word own = group[o], *restrict other = group + from;
    for (int64_t j = 0; j < n; j++)
        s[j] = other[j] == own ? 1 : 0;
}

#endif
