// SPDX-License-Identifier: MIT
// What a problem says of its pairs: who is a positive of whom, who is left out, and what is compared
// with eps where that is not the cosine. As ../cpu/sets.h, whose words these are.
//
// hex_run has a code of every unit row, in `ids` and in `groups`: its label. Where there is a mask, it
// has in `places` the row's row and column there: what is said of it as an anchor and as a candidate.
#pragma once
#include "core.cuh"

// Whether there is more to say than that the row's partner is its positive and eps decides.
static inline bool has_sets(const hex_problem_t &p)
{
    return p.several || p.mask.data || p.by_group || p.G > 0;
}

// Whether each row shows how long it is only when it has been counted.
static inline bool are_uneven(const hex_problem_t &p) { return p.several || p.mask.data; }

typedef enum { LEFT_OUT, POSITIVE, NEGATIVE } hex_kind_t;

// A row and a column of the mask as one number.
SHARED_DEVICE int64_t place_in_mask(int64_t row, int64_t column) { return row | column << 32; }

// The code of the candidate with one place for the anchor with another.
SHARED_DEVICE int code_in_mask(const hex_mask_t &m, int64_t anchor, int64_t candidate)
{
    const int code = m.data[(anchor & 0xffffffff) * m.row + (candidate >> 32) * m.col];
    return m.codes ? code : code != 0;
}

// What negative j of anchor i's own is to it.
SHARED_DEVICE hex_kind_t own_kind_of(const hex_problem_t &p, int64_t i, int64_t j)
{
    const hex_mask_t &m = p.mask;
    if (!m.data)
        return NEGATIVE;
    const int code = m.data[i % m.rows * m.row + j % m.columns * m.col];
    return code == HEX_CODE_LEFT_OUT ? LEFT_OUT : NEGATIVE;
}

// What unit row j is to anchor i, whose negatives are none of its own.
SHARED_DEVICE hex_kind_t kind_of(const hex_problem_t &p, const hex_run &r, int64_t i, int64_t j)
{
    const int64_t views = p.B + p.M;
    const int code = r.places ? code_in_mask(p.mask, r.places[i], r.places[j]) : 0;
    if (!p.several)
        return j == i || (i < views && j == partner_of(i, p.B)) || code == HEX_CODE_LEFT_OUT
                   ? LEFT_OUT
                   : NEGATIVE;
    if (p.mode == HEX_NTXENT && i == j)
        return LEFT_OUT;
    if ((r.ids && r.ids[i] == r.ids[j]) || code == HEX_CODE_POSITIVE)
        return POSITIVE;
    // A row of z1 before a queue is seen by its positives only.
    return (p.mode == HEX_UNPAIRED && j < views) || code == HEX_CODE_LEFT_OUT ? LEFT_OUT : NEGATIVE;
}
