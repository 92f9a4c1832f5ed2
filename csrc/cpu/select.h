/* SPDX-License-Identifier: MIT */
/* A row's quantile, exactly, and its least and largest value. No threads. */
#ifndef HEX_SELECT_H
#define HEX_SELECT_H

#include "row_gradient.h"

/* Without what rounding took past 1, and without the sign of a zero, of which equal elements may have
 * either; NaN stays. */
static inline real cosine(real c) { return c > 1 ? 1 : c < -1 ? -1 : c + 0; }

#define BELOW_COSINES ((real) - 2)

/* The 'nearest' rank of a quantile among n, from below; halves to even. */
static inline int64_t rank(double quantile, int64_t n)
{
    return (int64_t)nearbyint(quantile * (double)(n - 1));
}

/* Least and largest of a row; NaN if it holds one or is empty. */
static void row_bounds(const real *restrict c, int64_t n, real *low, real *high)
{
    COUNT(WORK_COMPARED, n);
    vec_t least = (real)INFINITY - (vec_t){0}, largest = -least, sum = {0};
    for (int64_t j = 0; j < n; j += LANES) {
        const vec_t x = read_vec(c + j, n - j, c[0]);
        least = smaller(x, least);
        largest = larger(x, largest);
        sum += x * 0;
    }
    const bool finite = n && vec_sum(sum) == 0;
    *low = finite ? vec_least(least) : (real)NAN;
    *high = finite ? vec_largest(largest) : (real)NAN;
}

static inline int64_t count_up_to(const real *restrict c, int64_t n, real limit)
{
    COUNT(WORK_COMPARED, n);
    int64_t count = 0;
    for (int64_t from = 0; from < n; from += SLICE) {
        const int64_t to = n - from < SLICE ? n : from + SLICE;
        word slice = 0;
#pragma omp simd reduction(+ : slice)
        for (int64_t j = from; j < to; j++)
            slice += c[j] <= limit;
        count += (int64_t)slice;
    }
    return count;
}

/* The element of c[0..n) that is `above`-th from above, 1 the largest, which is `top`: pass by pass
 * down to it, equal elements at once. */
static real select_from_top(const real *restrict c, int64_t n, int64_t above, real top)
{
    const vec_t none = -(real)INFINITY - (vec_t){0}, one = 1 - (vec_t){0};
    while (above > 1) {
        COUNT(WORK_COMPARED, n);
        vec_t next = none, equal = {0};
        for (int64_t j = 0; j < n; j += LANES) {
            const vec_t x = read_vec(c + j, n - j, -(real)INFINITY), below = pick(x < top, x, none);
            next = larger(below, next);
            equal += where(x == top, one);
        }
        above -= (int64_t)vec_sum(equal);
        if (above > 0)
            top = vec_largest(next);
    }
    return top;
}

#define NEAR_TOP 5 /* so few passes are fewer than a bisection takes */

/* The element of rank `rank` (0 the least) of c[0..n), exactly: the value is bisected and each step
 * counts the elements below, which is one compare and one add a vector. Two more passes end it as
 * soon as the element stands alone in the bracket, some ten steps for a batch of cosines; equal
 * elements end it when the bracket holds no other number. NaN if the row holds one. The numbers are
 * cosines: the difference of any two is finite. */
static real row_select(const real *restrict c, int64_t n, int64_t rank)
{
    COUNT(WORK_SELECTED, n);
    real low, high;
    row_bounds(c, n, &low, &high);
    if (low != low || rank == n - 1)
        return high;
    if (n - rank <= NEAR_TOP)
        return select_from_top(c, n, n - rank, high);
    if (rank == 0 || low == high || count_up_to(c, n, low) > rank)
        return low;
    for (;;) { /* #(c <= low) <= rank < #(c <= high) */
        const real middle = low + (high - low) / 2;
        if (middle <= low || middle >= high)
            return high;
        const int64_t count = count_up_to(c, n, middle);
        if (count == rank + 1)
            return row_largest(c, n, middle);
        if (count == rank) { /* the least above */
            COUNT(WORK_COMPARED, n);
            const vec_t none = (real)INFINITY - (vec_t){0};
            vec_t least = none;
            for (int64_t j = 0; j < n; j += LANES) {
                const vec_t x = read_vec(c + j, n - j, (real)INFINITY);
                const vec_t above = pick(x > middle, x, none);
                least = smaller(above, least);
            }
            return vec_least(least);
        }
        if (count > rank)
            high = middle;
        else
            low = middle;
    }
}

/* ---- by lists of what is above a limit ---- */

/* Lists longer than this share of a row are no gain over a pass of its own. */
#define LONGEST_LIST 0.25

/* What of c[0..n) is above a row's limit goes to its list. Adds what equals the limit, and
 * everything. */
static void list_above(const real *c, int64_t n, real limit, list_t *list, int64_t *ties, real *all)
{
    COUNT(WORK_COMPARED, n);
    const vec_t one = 1 - (vec_t){0};
    vec_t sum = {0}, equal = {0};
    for (int64_t from = 0; from < n; from += 64) {
        const int64_t to = n - from < 64 ? n : from + 64;
        uint64_t picked = 0;
        for (int64_t j = from; j < to; j += LANES) {
            const vec_t x = read_vec(c + j, to - j, BELOW_COSINES);
            sum += x;
            equal += where(x == limit, one);
            picked |= list_lanes(list, x > limit, x, j - from);
        }
        list_rest(list, c + from, picked);
    }
    *ties += (int64_t)vec_sum(equal);
    *all += vec_sum(sum);
}

/* The rank'th from above of c[0..n) and of infinitely many `rest` below them. Writes up to LANES of
 * those behind c, for whole vectors. */
static real select_above(real *c, int64_t n, int64_t rank, real rest)
{
    const int64_t whole = round_up(n, LANES);
    if (rank > n)
        return rest;
    for (int64_t k = n; k < whole; k++)
        c[k] = rest;
    return row_select(c, whole, whole - rank);
}

/* A limit that goes with a thread from row to row, and room for a list. */
typedef struct {
    real limit; /* NaN: there is none yet */
    real *list;
    int64_t capacity;
} near_t;

static bool make_near(near_t *near, int64_t n)
{
    near->limit = (real)NAN;
    near->capacity = (int64_t)(LONGEST_LIST * (double)n);
    near->list = allocate(LIST_SPACE(near->capacity), 1, sizeof(real));
    return near->list;
}

/* row_select, of a row that is like the one before: what is above a limit that served that one holds
 * the element, most often, and is short. One pass where row_select makes a dozen. Where it does not
 * serve, a limit of this row's own does. */
static real select_near(const real *c, int64_t n, int64_t rank, near_t *near)
{
    const int64_t k = n - rank, wanted = 2 * k + 32; /* from above */
    if (2 * wanted > near->capacity)
        return row_select(c, n, rank);
    for (;;) {
        if (near->limit != near->limit)
            near->limit = row_select(c, n, n - wanted);
        int64_t ties = 0;
        real all = 0;
        list_t list = {near->list, 0, near->capacity};
        list_above(c, n, near->limit, &list, &ties, &all);
        if (all * 0 != 0)
            return (real)NAN;
        if (list_is_whole(&list) && list.length + ties >= k)
            return select_above(list.to, list.length, k, near->limit);
        near->limit = (real)NAN;
    }
}

/* ---- what it is taken over ---- */

/* Of a row of logits the cosines that its quantile is taken over, in its room, which they are then
 * read from; how many. *finite: as below. */
static int64_t keep_logits(row_t *r, bool over_negatives, double *finite)
{
    const real *v = r->v, none = -(real)INFINITY, tau = r->tau;
    const int64_t out = over_negatives ? r->target : -1; /* it does not count */
    real *to = r->s;
    int64_t kept = 0;
    for (int64_t from = 0; from < r->n; from += SLICE) {
        const int64_t end = r->n - from < SLICE ? r->n : from + SLICE;
        real seen = 0, left_out = 0;
#pragma omp simd reduction(+ : seen, left_out)
        for (int64_t j = from; j < end; j++) {
            seen += v[j] < (real)INFINITY ? 0 : (real)NAN;
            left_out += v[j] == none ? (real)1 : (real)0;
        }
        *finite += (double)seen;
        if (left_out == 0 && !(out >= from && out < end)) { /* as most slices are */
            real *restrict all = to + kept;
#pragma omp simd
            for (int64_t j = from; j < end; j++)
                all[j - from] = cosine(v[j] * tau); /* a product may be infinite */
            kept += end - from;
        } else
            for (int64_t j = from; j < end; j++)
                if (j != out && (v[j] != none || j == r->target))
                    to[kept++] = cosine(v[j] * tau);
    }
    r->v = to;
    return kept;
}

/* Keeps of the row what its quantile is taken over, in place; the new length. *finite gets NaN if a
 * value that is seen, kept or not, is NaN or +Inf. */
static int64_t keep(real *v, const real *kind, int64_t n, bool over_negatives, double *finite)
{
    const real least = over_negatives ? NEGATIVE : POSITIVE; /* of what is kept: see the classes */
    int64_t kept = 0;
    for (int64_t from = 0; from < n; from += SLICE) {
        const int64_t size = n - from < SLICE ? n - from : SLICE;
        const real *of = kind + from;
        real seen = 0, wanted = 0;
#pragma omp simd reduction(+ : seen, wanted)
        for (int64_t j = 0; j < size; j++) {
            const real value = v[from + j];
            seen += of[j] == LEFT_OUT || value < (real)INFINITY ? 0 : (real)NAN;
            wanted += of[j] >= least ? (real)1 : (real)0;
        }
        *finite += (double)seen;
        if (wanted == (real)size) { /* as most slices are */
            memmove(v + kept, v + from, (size_t)size * sizeof(real));
            kept += size;
        } else
            for (int64_t j = 0; j < size; j++) { /* without a branch: kept <= from + j */
                v[kept] = v[from + j];
                kept += of[j] >= least;
            }
    }
    return kept;
}

#endif
