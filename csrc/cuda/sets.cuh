// SPDX-License-Identifier: MIT
// What a problem says of its pairs: who is a positive of whom, who is left out, and what is compared
// with eps where that is not the cosine. As ../cpu/sets.h, whose words these are.
//
// hex_run has a code of every unit row, in `ids` and in `groups`: its label; where a mask says who is
// a positive of whom, its row in the mask.
#pragma once
#include "core.cuh"

// Whether there is more to say than that the row's partner is its positive and eps decides.
static inline bool has_sets(const hex_problem_t &p) { return p.several || p.by_group || p.G > 0; }

typedef enum { LEFT_OUT, POSITIVE, NEGATIVE } hex_kind_t;

// Whether candidate j is a positive of anchor i, where positives may be several.
SHARED_DEVICE bool is_positive(const hex_problem_t &p, int64_t id_i, int64_t id_j)
{
    return p.mask.data ? p.mask.data[id_i * p.mask.row + id_j * p.mask.col] != 0 : id_i == id_j;
}

// What unit row j is to anchor i. Of each anchor's own negatives there is nothing to ask.
SHARED_DEVICE hex_kind_t kind_of(const hex_problem_t &p, const hex_run &r, int64_t i, int64_t j)
{
    const int64_t views = p.B + p.M;
    if (!p.several)
        return j == i || (i < views && j == partner_of(i, p.B)) ? LEFT_OUT : NEGATIVE;
    if (p.mode == HEX_NTXENT && i == j)
        return LEFT_OUT;
    if (is_positive(p, r.ids[i], r.ids[j]))
        return POSITIVE;
    // A row of z1 before a queue is seen by its positives only.
    return p.mode == HEX_UNPAIRED && j < views ? LEFT_OUT : NEGATIVE;
}
