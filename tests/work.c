/* SPDX-License-Identifier: MIT */
/* The CPU core alone, one level without torch, built to count its work (test_work.py): one problem
 * forward and backward, and what was done for each. It is compiled with the units of LEVEL from
 * csrc/cpu/levels, of which LEVEL_FILE names the header. */
#include <pthread.h>

#include LEVEL_FILE
#include CPU_FILE

_Atomic int64_t hex_work[WORK_KINDS];

#define PUBLIC __attribute__((visibility("default")))

/* ---- threads ---- */

static int64_t threads;

typedef struct {
    int64_t begin, end;
    hex_body_t body;
    void *context;
} chunk;

static void *run(void *of)
{
    const chunk *c = of;
    c->body(c->begin, c->end, c->context);
    return NULL;
}

/* In as many chunks as there are threads, whatever the work: small problems are shared out too. */
bool hex_parallel_for(int64_t n, int64_t work, hex_body_t body, void *context)
{
    enum { MOST = 8 };
    (void)work;
    pthread_t thread[MOST];
    chunk chunks[MOST];
    int64_t started = 0;
    for (int64_t k = 0; k < threads && k < MOST; k++) {
        chunks[k] = (chunk){n * k / threads, n * (k + 1) / threads, body, context};
        if (chunks[k].begin == chunks[k].end)
            continue;
        if (pthread_create(&thread[started], NULL, run, &chunks[k]))
            return false;
        started++;
    }
    for (int64_t k = 0; k < started; k++)
        pthread_join(thread[k], NULL);
    return true;
}

/* ---- problems, as test_work.py writes them ---- */

/* What is wanted of the forward: the loss at the eps given, or at the batch's, or of a block with its
 * quantiles; or that alone, or the rows' bounds alone, and then no backward. */
enum { GIVEN, ADAPTIVE, BLOCK, THRESHOLD, ROW_RANGE };

typedef struct {
    int64_t what, mode, several, positives, dtype, over_negatives, B, M, K, D, guide_D, threads,
        keep, first, images, dz[3]; /* images: of BLOCK, from the first on */
    double eps, tau, beta, tau_plus, quantile;
    const void *z[3], *guide[2];
    const int64_t *ids[2], *groups[2]; /* of the anchors, and of z1's rows */
} request;

static void take(int64_t *counts)
{
    for (int k = 0; k < WORK_KINDS; k++)
        counts[k] = atomic_exchange(&hex_work[k], 0);
}

static hex_rows_t matrix(const void *data, int64_t dtype, int64_t rows, int64_t D)
{
    return (hex_rows_t){data, (hex_dtype_t)dtype, rows, rows ? rows : 1, rows * D, D, 1};
}

/* MR and NR of the level, by width of the compute type. */
PUBLIC void tile_sides(int64_t wide, int64_t *mr, int64_t *nr)
{
    *mr = MR;
    *nr = 2 * VEC_BYTES / (wide ? 8 : 4);
}

#define JOIN_(a, b, c) a##b##c
#define JOIN(a, b, c) JOIN_(a, b, c)
static const hex_cpu_entry_t *const levels[] = {
    &JOIN(hex_cpu_, HEX_LEVEL, _f32),
#ifndef FLOAT_ONLY
    &JOIN(hex_cpu_, HEX_LEVEL, _f64),
#endif
};

static hex_problem_t problem(const request *r)
{
    const bool paired = r->mode == HEX_PAIRED;
    const int64_t rows[3] = {r->B, r->M, paired ? r->B * r->K : r->K};
    hex_problem_t p = {.mode = (hex_mode_t)r->mode,
                       .reduction = HEX_MEAN,
                       .positives = (hex_positives_t)r->positives,
                       .compute_f64 = r->dtype == HEX_F64,
                       .several = r->several,
                       .by_group = r->groups[0] != NULL,
                       .B = r->B,
                       .count = r->B,
                       .M = r->M,
                       .K = r->K,
                       .D = r->D,
                       .G = r->guide_D,
                       .eps = {&r->eps, HEX_F64, 0},
                       .tau = {&r->tau, HEX_F64, 0},
                       .beta = r->beta,
                       .tau_plus = r->tau_plus};
    for (int k = 0; k < 3; k++)
        p.input[k] = matrix(r->z[k], r->dtype, rows[k], r->D);
    if (paired)
        p.input[2].inner = r->K, p.input[2].outer = r->K * r->D;
    for (int k = 0; k < 2; k++) {
        p.guide[k] = matrix(r->guide[k], r->dtype, rows[k], r->guide_D);
        p.ids[k] = (hex_ids_t){r->ids[k], 1};
        p.groups[k] = (hex_ids_t){r->groups[k], 1};
    }
    return p;
}

/* The quantiles of a block's anchors, and their loss at the eps given. */
static const char *block_forward(const hex_cpu_entry_t *level, const request *r, hex_problem_t *p,
                                 double *rows, void *stats)
{
    p->reduction = HEX_NONE;
    const char *error = level->row_quantiles(p, r->quantile, r->over_negatives, rows);
    p->filled = true;
    return error ? error : level->forward(p, rows, stats);
}

/* Fills counts[0] of the forward and counts[1] of the backward. Returns NULL, or an error. */
PUBLIC const char *count(const request *r, int64_t counts[2][WORK_KINDS])
{
    static const double one = 1;
    hex_problem_t p = problem(r);
    hex_tracker_t t = {.quantile = r->quantile, .over_negatives = r->over_negatives};
    const hex_cpu_entry_t *level = levels[p.compute_f64];
    const int64_t size = p.compute_f64 ? 8 : 4, anchors = hex_anchors(&p);
    hex_gradient_t g = {.grad = {&one, HEX_F64, 0},
                        .stats = allocate(hex_stats(&p), anchors, (size_t)size)};
    void *dz[3], *stats = (void *)g.stats;
    for (int k = 0; k < 3; k++) {
        dz[k] = allocate(p.input[k].rows, r->D, sizeof(double));
        g.dz[k] = r->dz[k] && r->z[k] ? dz[k] : NULL;
    }
    threads = r->threads;
    double value, *bounds = allocate(2, anchors, sizeof(double));
    void *of_block = allocate(hex_stats(&p), anchors, (size_t)size);
    const char *error = NULL;
    if (r->what == BLOCK) { /* the backward wants the statistics of all */
        error = level->forward(&p, &value, stats);
        p.block = true, p.first = r->first, p.count = r->images;
    }
    bool used = false;
    const int64_t room = r->keep ? level->kept(&p, &used) : 0;
    p.kept = used ? allocate(room, 1, (size_t)size) : NULL;
    take(counts[0]);
    if (!error)
        error = r->what == ADAPTIVE ? level->adaptive(&p, &t, &value, stats)
                : r->what == BLOCK  ? block_forward(level, r, &p, bounds, of_block)
                : r->what == THRESHOLD
                    ? level->threshold(&p, r->quantile, r->over_negatives, &value)
                : r->what == ROW_RANGE ? level->row_range(&p, bounds, bounds + anchors)
                                       : level->forward(&p, &value, stats);
    take(counts[0]);
    if (!error && r->what <= BLOCK)
        error = level->backward(&p, &g);
    take(counts[1]);
    for (int k = 0; k < 3; k++)
        release(dz[k]);
    release(stats);
    release(of_block);
    release(p.kept);
    release(bounds);
    return error;
}
