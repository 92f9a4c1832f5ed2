/* SPDX-License-Identifier: MIT */
/* The contract between the torch layer (ops.c) and the compute cores (cpu/, cuda/): notation, the
 * problem that a core is given, and the core's entry points. No torch types here.
 *
 *     B images, D features, K negatives      c_ij the cosine of anchor i and candidate j
 *     tau the temperature                    p = p(i) the positive of anchor i
 *     eps the threshold, a cosine            H(i) the negatives j with c_ij > eps, G(i) the others
 *     N_h = |H(i)|
 *
 *     d_j = (c_j - c_p) / tau      m = max(0, max_j d_j)     e_j = exp(d_j - m)      e_0 = exp(-m)
 *     b_j = exp(beta d_j), up to any common factor           r   = sum_H b e / sum_H b
 *     q   = N_h (r - tau_plus e_0) / (1 - tau_plus)          f   = N_h exp(-(1 + c_p) / tau - m)
 *     S   = max(q, f) + sum_G e
 *     L   = log(1 + S / e_0)                                 computed as log1p(S exp(m)), m <= 30
 *
 * Where positives may be several, P(i) of them, n_P, with l_ij = v_ij / t, v the cosines and t = tau,
 * or v logits that are given and t = 1, and e_0 gives way to
 *
 *     E = sum_P exp(l)      q = N_h (r - tau_plus E / n_P) / (1 - tau_plus)      D = E + S
 *     L = log D - mean_P l      positives outside the logarithm
 *     L = log D - log E         inside
 *
 * Decoupled, D = S. In the variant "excluded" H is left out, S = sum_G e.
 *
 * docs/math.md derives the gradient. Unit rows have one index space, whatever the mode:
 *
 *     [0, B) z0      [B, B + M) z1      [B + M, B + M + K) the shared negatives
 *     where positives are not given M = B, and the partner p(i) is i + B or i - B
 *
 *     ntxent      anchors z0 and z1, candidates the same without the anchor itself
 *     query       anchors z0, candidates z1
 *     cross       the same and, beside it, anchors z1, candidates z0
 *     unpaired    anchors z0, candidates the negatives and of z1 the positive
 *     paired      the same, where each anchor has K negatives of its own
 *     logits      rows of values that are given
 *
 * Anchors are always the first `hex_anchors()` rows of it. A call may be of a block of them alone,
 * those of one rank: rows [first, first + count) of z0 and, where rows of z1 are anchors too, the
 * same rows of z1. Then the quantiles and the forward are of each anchor of the block, in this
 * order; the backward is given the statistics of all anchors, for which the block's rows are
 * candidates, and has the gradient of the block's rows. The bits of a row do not depend on how the
 * batch is cut into blocks. */
#ifndef HEX_H
#define HEX_H

#include <stdbool.h>
#include <stdint.h>

typedef enum { HEX_F32, HEX_F64, HEX_F16, HEX_BF16 } hex_dtype_t;
typedef enum { HEX_NTXENT, HEX_QUERY, HEX_CROSS, HEX_UNPAIRED, HEX_PAIRED, HEX_LOGITS } hex_mode_t;
typedef enum { HEX_OUTSIDE, HEX_INSIDE, HEX_POSITIVES } hex_positives_t;
typedef enum { HEX_NONE, HEX_MEAN, HEX_SUM, HEX_REDUCTIONS } hex_reduction_t;
typedef enum { HEX_PAPER, HEX_RELEASED, HEX_EXCLUDED, HEX_VARIANTS } hex_variant_t;

/* What the forward keeps of each row, stats[kind][row] in the compute type. With
 * e = exp((c - shift) / tau) and b = e^beta a gradient entry of row i is
 *
 *     rest e                           on G(i)
 *     b (hard_e e - hard)              on H(i)
 *     pos_e (e - pos_mean) + positive  on P(i), where the shift is the positives' own
 *
 * The last three are there where positives may be several; one has e = pos_mean = 1. */
enum {
    HEX_STAT_EPS,   /* the threshold used, rounded down to the compute type */
    HEX_STAT_SHIFT, /* largest cosine of the row (of G(i) in the other variants than the paper's) */
    HEX_STAT_REST,  /* see above; these three carry 1 / tau */
    HEX_STAT_HARD_E,
    HEX_STAT_HARD,
    HEX_STAT_POSITIVE, /* of one positive dL_i / dc_p */
    HEX_STAT_DTAU,     /* dL_i / dtau */
    HEX_STAT_COUNT,    /* |H(i)| */
    HEX_STAT_SHARE,    /* the local term's share of the denominator */
    HEX_STATS,
    HEX_STAT_POS_SHIFT = HEX_STATS,
    HEX_STAT_POS_MEAN,
    HEX_STAT_POS_E,
    HEX_STATS_SEVERAL
};

/* A matrix of feature rows with any strides, in elements. Row r starts at
 * (r / inner) outer + (r % inner) row: inner = rows for a matrix, K for the (B, K, D) negatives. */
typedef struct {
    const void *data;
    hex_dtype_t dtype;
    int64_t rows, inner, outer, row, col;
} hex_rows_t;

/* A vector of float32 or float64 numbers; stride 0 repeats one. */
typedef struct {
    const void *data;
    hex_dtype_t dtype;
    int64_t stride;
} hex_vector_t;

/* A matrix of float32 or float64 numbers. */
typedef struct {
    const void *data;
    hex_dtype_t dtype;
    int64_t rows, columns, row, col; /* strides, in elements */
} hex_matrix_t;

/* Labels, one for each row; data NULL: there are none. */
typedef struct {
    const int64_t *data;
    int64_t stride;
} hex_ids_t;

/* What is said of anchor i and its candidate number j, from 0 on: the byte at (i % rows,
 * j % columns). Of booleans any byte but 0 marks a positive: a _Bool of another than 0 and 1 is
 * undefined, and torch has them. Of codes HEX_CODE_POSITIVE does, where positives may be several, and
 * HEX_CODE_LEFT_OUT marks what is left out, unless it is a positive; others say nothing. data NULL:
 * there are none. */
enum { HEX_CODE_POSITIVE = 1, HEX_CODE_LEFT_OUT = 2 };

typedef struct {
    const uint8_t *data;
    int64_t rows, columns, row, col;
    bool codes;
} hex_mask_t;

typedef struct {
    /* values */
    hex_mode_t mode;
    bool compute_f64;     /* compute in double instead of float */
    bool allow_bf16;      /* of the CPU: float rows may be rounded to bfloat16 */
    int64_t B, M, K, D;   /* rows of z0, of z1; negatives, of all or of one anchor; features */
    bool block;           /* a block of anchors alone, else the whole batch: (0, B) */
    int64_t first, count; /* the block */
    hex_rows_t input[3];  /* z0, z1, negatives; or logits (B, D) in the first */
    void *kept;  /* of the CPU: hex_cpu_kept() numbers, or NULL. The cosines go in them from the
                 * forward to the backward; of a block also from the quantiles to the forward */
    bool filled; /* they are there already; the backward's always are */
    /* sets */
    bool several;     /* positives are those of equal ids, and of the mask; else p(i) alone */
    hex_ids_t ids[3]; /* of the rows of each input; none beside a mask of booleans. Of logits the
                       * target, which is checked */
    hex_mask_t mask;  /* of none but logits */
    /* who decides H */
    bool by_group;         /* groups: eps plays no part */
    hex_ids_t groups[3];   /* of the rows of each input */
    int64_t G;             /* features of a guide, 0: there is none */
    hex_rows_t guide[3];   /* its rows, as those of the inputs */
    hex_vector_t eps, tau; /* tau has one element; adaptive finds its eps itself */
    /* the loss */
    hex_reduction_t reduction;
    hex_variant_t variant;
    hex_positives_t positives; /* outside the logarithm, or inside */
    double beta, tau_plus;
    bool decoupled;   /* the positives are not in the denominator; in the released variant never */
    bool self_column; /* of logits: each row's quantile has a cosine of 1 too, the anchor's own */
} hex_problem_t;

/* What the backward is given and fills. An input whose gradient is not wanted has a null pointer in
 * dz. */
typedef struct {
    hex_vector_t grad; /* of the loss: one number, or one a row */
    const void *stats; /* (hex_stats(), rows) from the forward, compute type */
    void *dz[3];       /* contiguous, in the dtype of the input */
    double *dtau;      /* one number, or null */
} hex_gradient_t;

/* The threshold over training (tracker.h): what the adaptive loss is given, what it does with the
 * batch's candidate, and the eps that comes of it. All numbers of the state are doubles, so that an
 * average of states is a state (hex/state.py says why); the counts are whole. */
enum {
    HEX_STATE_WEIGHT,    /* 1 when a candidate has been stored, 0 before; an average: in between */
    HEX_STATE_VALUE,     /* weight times the stored threshold */
    HEX_STATE_EPOCH,     /* 1 + the epoch, 0 before the first */
    HEX_STATE_UPDATES,   /* candidates stored */
    HEX_STATE_SKIPPED,   /* candidates that were not finite */
    HEX_STATE_SHORT,     /* candidates not stored, for their batch was short */
    HEX_STATE_MOST,      /* most anchors of a batch, in this window: an epoch or HEX_WINDOW calls */
    HEX_STATE_BEFORE,    /* the same of the window before */
    HEX_STATE_CALLS,     /* calls in this window, while no epoch is named */
    HEX_STATE_RUN,       /* short batches in a row */
    HEX_STATE_CANDIDATE, /* the last, stored or not; 2, which none is, if it was not finite */
    HEX_STATE
};
enum { HEX_WINDOW = 50, HEX_SHORT_RUN = 20 };

typedef struct {
    double quantile, momentum, warmup_threshold;
    int64_t warmup_epochs;
    bool over_negatives, monotonic, lagged;
    double state[HEX_STATE];
    double eps;
} hex_tracker_t;

static inline bool hex_both_anchors(const hex_problem_t *p)
{
    return p->mode == HEX_NTXENT || p->mode == HEX_CROSS;
}

/* All anchors of the batch. */
static inline int64_t hex_anchors(const hex_problem_t *p)
{
    return hex_both_anchors(p) ? p->B + p->M : p->B;
}

/* Rows of an input, which ids, groups and a guide are of; the paired negatives of all anchors. */
static inline int64_t hex_input_rows(const hex_problem_t *p, int input)
{
    return input == 0 ? p->B : input == 1 ? p->M : p->mode == HEX_PAIRED ? p->B * p->K : p->K;
}

/* Candidates that a mask has a column for: of one positive those beside its row of z1, where that is
 * no column of a matrix of cosines. */
static inline int64_t hex_candidates(const hex_problem_t *p)
{
    return p->mode == HEX_NTXENT    ? p->B + p->M
           : p->mode < HEX_UNPAIRED ? p->M
           : p->several             ? p->M + p->K
                                    : p->K;
}

/* The number of a unit row among the candidates of the anchors that meet it; on a device that is
 * candidate_of() in cuda/core.cuh. */
static inline int64_t hex_candidate(const hex_problem_t *p, int64_t j)
{
    const bool of_z0 = p->mode == HEX_NTXENT || (p->mode == HEX_CROSS && j < p->B);
    const int64_t first = of_z0 ? 0 : p->mode == HEX_UNPAIRED && !p->several ? p->B + p->M : p->B;
    return j - first;
}

/* Rows of an input that belong to the block. */
static inline int64_t hex_block_rows(const hex_problem_t *p, int input)
{
    const int64_t rows = hex_input_rows(p, input);
    if (!p->block || rows == 0 || (input == 2 && p->mode == HEX_UNPAIRED))
        return rows;
    return input == 2 ? p->count * p->K : p->count;
}

/* Anchors of the block, and the place among them of an anchor of the index space. */
static inline int64_t hex_block_anchors(const hex_problem_t *p)
{
    return p->count + (hex_both_anchors(p) ? hex_block_rows(p, 1) : 0);
}

static inline int64_t hex_block_place(const hex_problem_t *p, int64_t i)
{
    return i < p->B ? i - p->first : i - p->B - p->first + p->count;
}

/* How many of the statistics a row has. */
static inline int hex_stats(const hex_problem_t *p)
{
    return p->several ? HEX_STATS_SEVERAL : HEX_STATS;
}

/* Every core function returns NULL, or the text of an error after freeing all it took. Arguments
 * are already checked. */
const char *hex_cpu_forward(const hex_problem_t *p, void *loss, void *stats);
const char *hex_cpu_backward(const hex_problem_t *p, const hex_gradient_t *g);
const char *hex_cpu_threshold(const hex_problem_t *p, double quantile, bool over_negatives,
                              double *mean);
const char *hex_cpu_adaptive(const hex_problem_t *p, hex_tracker_t *t, void *loss, void *stats);
const char *hex_cpu_row_range(const hex_problem_t *p, void *low, void *high);
/* The quantile of each anchor of the block; +Inf of one that has no element. */
const char *hex_cpu_row_quantiles(const hex_problem_t *p, double quantile, bool over_negatives,
                                  void *rows);
/* Room, in numbers, for the cosines that are kept of such shapes; *used: whether the core has a use
 * for it. */
int64_t hex_cpu_kept(const hex_problem_t *p, bool *used);

/* Sums of all ranks' rows, in their order and without an instruction set, so that every rank has the
 * same bits (cpu/sums.c): of each row of a matrix; and the mean of one row of quantiles, of which
 * +Inf is none. */
void hex_sum_rows(const hex_matrix_t *x, double *sums);
double hex_mean(const hex_matrix_t *q);

/* Chooses the instruction set once: the best this CPU has, or what HEX_ISA asks for. Returns the
 * name in use and an explanation in *problem where HEX_ISA could not be followed (NULL name: it
 * names no level at all). */
const char *hex_cpu_select(const char *wanted, const char **problem);

/* The one service a core needs from outside (parallel.c): body over [0, n) in chunks, any order,
 * maybe one after another, so that no chunk may wait for another. `work`, roughly the arithmetic
 * operations of one item, keeps small loops on one thread. Returns false if it could not run. */
typedef void (*hex_body_t)(int64_t begin, int64_t end, void *context);
bool hex_parallel_for(int64_t n, int64_t work, hex_body_t body, void *context);

#endif
