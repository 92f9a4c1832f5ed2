/* SPDX-License-Identifier: MIT */
/* The contract between the torch layer (labelled_ops.c) and the CPU core for rows in which every
 * entry has a class of its own: several positives by labels or a mask, H(i) by groups or by a
 * guide's cosines, and logits given instead of embeddings. hex.h has the rest of the notation.
 *
 *     P(i) the positives, n_P of them     H(i), G(i) the negatives, hard and not
 *     the other entries are left out
 *
 *     l_ij = v_ij / t      v the cosines and t = tau; of logits, v the logits and t = 1
 *     E = sum_P exp(l)
 *     q = (R - tau_plus N_h E / n_P) / (1 - tau_plus)
 *     D = E + max(q, N_h exp(-1/tau)) + sum_G exp(l)
 *     L = log D - mean_P l      positives outside the logarithm
 *     L = log D - log E         inside
 *
 * docs/math.md has the difference form and the gradient. */
#ifndef HEX_LABELLED_H
#define HEX_LABELLED_H

#include "hex.h"

/* Anchors and candidates. SELF: the candidates are the anchors, each row without itself. PAIR: all
 * of y. QUEUE: of the first N rows of y a row sees only its positive; all others are negatives. */
typedef enum { HEX_SELF, HEX_PAIR, HEX_QUEUE, HEX_PAIRINGS } hex_pairing;
typedef enum { HEX_OUTSIDE, HEX_INSIDE, HEX_POSITIVES } hex_positives;

/* What the forward keeps of each row, stats[kind][row] in the compute type. With
 * e = exp((v - shift) / t) and b = e^beta a gradient entry dL_i / dv is
 *
 *     rest e                     on G(i)
 *     b (hard_e e - hard)        on H(i)
 *     pos_e (e - pos_mean) - pos on P(i), where shift is the positives' own */
enum {
    HEX_ROW_EPS,   /* what a score is compared with, rounded down to the compute type */
    HEX_ROW_SHIFT, /* largest v of the negatives that count */
    HEX_ROW_POS_SHIFT,
    HEX_ROW_POS_MEAN,
    HEX_ROW_REST, /* from here on times the grad_output in the backward */
    HEX_ROW_HARD_E,
    HEX_ROW_HARD,
    HEX_ROW_POS_E,
    HEX_ROW_POS,
    HEX_ROW_DTAU,
    HEX_ROW_COUNT,
    HEX_ROW_SHARE,
    HEX_ROW_STATS
};

/* Labels, one for each row; data NULL: there are none. */
typedef struct {
    const int64_t *data;
    int64_t stride;
} hex_ids;

/* Booleans, any byte but 0 is true: a _Bool of another than 0 and 1 is undefined, and torch has
 * them. data NULL: there are none. */
typedef struct {
    const uint8_t *data;
    int64_t rows, row, col;
} hex_mask;

typedef struct {
    hex_reduction reduction;
    hex_variant variant;
    hex_positives positives;
    bool given; /* H(i) is given, by groups: eps plays no part */
    double beta, tau_plus;
    hex_vector eps, tau;
} hex_rule;

typedef struct {
    hex_rule rule;
    hex_pairing pairing;
    bool wide;                 /* compute in double instead of float */
    int64_t N, M, D, guide_D;  /* anchors, candidates, features; M = N in SELF */
    hex_rows x, y, guide[2];   /* y and guide[1] unused in SELF; guides where guide_D > 0 */
    hex_ids ids[2], groups[2]; /* of anchors, of candidates */
    hex_mask mask;             /* P(i) where given: rows i modulo its rows, columns the same */
} hex_labelled;

typedef struct {
    hex_rule rule;
    bool wide;
    int64_t N, C;
    hex_rows logits, score; /* score.data NULL: the cosines, logits times tau */
    const int64_t *target;  /* columns, checked, that nobody else can write to */
} hex_logits;

/* What a backward is given and fills; a gradient that is not wanted is a null pointer. */
typedef struct {
    hex_vector grad;   /* of the loss: one number, or one a row */
    const void *stats; /* (HEX_ROW_STATS, rows) from the forward, compute type */
    void *d[2];        /* of x and y, or of the logits; contiguous, in the dtype of the input */
    double *dtau;
} hex_row_gradient;

const char *hex_cpu_labelled_forward(const hex_labelled *p, void *loss, void *stats);
const char *hex_cpu_labelled_backward(const hex_labelled *p, const hex_row_gradient *g);
/* The mean of the rows' quantiles over the rows that have an element. */
const char *hex_cpu_labelled_threshold(const hex_labelled *p, double quantile, bool over_negatives,
                                       double *mean);
/* The bounds of each row. */
const char *hex_cpu_labelled_row_range(const hex_labelled *p, void *low, void *high);

const char *hex_cpu_logits_forward(const hex_logits *p, void *loss, void *stats);
const char *hex_cpu_logits_backward(const hex_logits *p, const hex_row_gradient *g);
/* self_column: a cosine of 1, the anchor's own, is added to each row. */
const char *hex_cpu_logits_threshold(const hex_logits *p, double quantile, bool over_negatives,
                                     bool self_column, double *mean);
const char *hex_cpu_logits_row_range(const hex_logits *p, bool self_column, void *low, void *high);

#endif
