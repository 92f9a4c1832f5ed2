/* SPDX-License-Identifier: MIT */
/* The CPU core alone, one level on one thread without torch, to be timed (core.py): the loss with its
 * gradient, and beside it the product of two blocks in cache by the core's own register tile, which is
 * the most that it could reach. LEVEL_FILE names a float file of csrc/cpu/levels: one unit, so that
 * -fwhole-program leaves out what is not called. */
#include <stdio.h>
#include <time.h>

#ifdef __linux__
#include <malloc.h>
#endif

#include LEVEL_FILE

#define APART __attribute__((noinline)) static    /* a name of its own in a profile */
#define WIDE (2 * VEC_BYTES / (int)sizeof(float)) /* NR of float */

/* Rows and columns of the blocks: a multiple of every MR and NR; and a slice of the core deep. */
enum { SIDE = 96, DEEP = 256 };

bool hex_parallel_for(int64_t n, int64_t work, hex_body_t body, void *context)
{
    (void)work;
    if (n > 0)
        body(0, n, context);
    return true;
}

/* Multiplies two blocks `times` times. Returns the floating-point operations of it. */
APART double product(int64_t times)
{
    static _Alignas(64) float a[SIDE * DEEP], b[SIDE * DEEP], c[SIDE * SIDE];
    for (int64_t k = 0; k < SIDE * DEEP && a[0] == 0; k++)
        a[k] = b[k] = 1.0f / (float)(1 + k % 7);
    for (int64_t n = 0; n < times; n++)
        for (int64_t j = 0; j < SIDE; j += WIDE)
            for (int64_t i = 0; i < SIDE; i += MR)
                tile(DEEP, a + i * DEEP, DEEP, b + j * DEEP, WIDE, c + i * SIDE + j, SIDE, 0);
    return 2.0 * SIDE * SIDE * DEEP * (double)times;
}

/* ---- a batch, as batches.py has them: no normal numbers, but as clustered ---- */

typedef struct {
    int64_t B, D;
    float *z, *dz; /* (2B, D) */
    float *stats;
    int64_t *ids; /* (2B): the class; of logits the target */
} batch;

/* What the rows are: two views; the same with labels, of which the class is one; logits, the first
 * B of them. */
typedef enum { VIEWS, LABELS, LOGITS } kind_t;

static float noise(uint64_t *state) /* of mean 0 and variance 1 */
{
    float sum = 0;
    for (int n = 0; n < 3; n++) {
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(*state >> 40) * 0x1p-23f - 1;
    }
    return sum;
}

/* Images of `classes` classes; in each feature one lies `spread` from its class, a view `moved`
 * from its image. */
static batch make(int64_t B, int64_t D, int classes, float spread, float moved)
{
    batch x = {B,
               D,
               malloc((size_t)(2 * B * D) * sizeof(float)),
               malloc((size_t)(2 * B * D) * sizeof(float)),
               malloc((size_t)(2 * B * HEX_STATS_SEVERAL) * sizeof(float)),
               malloc((size_t)(2 * B) * sizeof(int64_t))};
    float *centres = malloc((size_t)(classes * D) * sizeof(float));
    uint64_t state = 1;
    for (int64_t k = 0; k < classes * D; k++)
        centres[k] = noise(&state);
    for (int64_t i = 0; i < B; i++)
        for (int64_t k = 0; k < D; k++) {
            const float image = centres[i % classes * D + k] + spread * noise(&state);
            x.z[i * D + k] = image + moved * noise(&state);
            x.z[(B + i) * D + k] = image + moved * noise(&state);
        }
    for (int64_t i = 0; i < 2 * B; i++)
        x.ids[i] = i % B % classes;
    release(centres);
    return x;
}

/* Forward with the threshold of the batch, and backward: 2B rows, tau = 0.1, beta = 1, the mean. */
APART bool loss(const batch *x, kind_t kind)
{
    static const double tau = 0.1, one = 1;
    const int64_t B = x->B, D = x->D;
    const hex_rows_t z0 = {x->z, HEX_F32, B, B, B * D, D, 1},
                     z1 = {x->z + B * D, HEX_F32, B, B, B * D, D, 1};
    hex_problem_t p = {.mode = kind == LOGITS ? HEX_LOGITS : HEX_NTXENT,
                       .reduction = HEX_MEAN,
                       .several = kind != VIEWS,
                       .B = B,
                       .count = B,
                       .M = kind == LOGITS ? 0 : B,
                       .D = D,
                       .input = {z0, z1},
                       .ids = {{x->ids, 1}, {x->ids + B, 1}},
                       .tau = {&tau, HEX_F64, 0},
                       .beta = 1,
                       .tau_plus = 0.1};
    const hex_gradient_t g = {
        .grad = {&one, HEX_F64, 0}, .stats = x->stats, .dz = {x->dz, p.M ? x->dz + B * D : NULL}};
    hex_tracker_t t = {.quantile = 0.99};
    bool used;
    const int64_t room = kept_room(&p, &used);
    p.kept = used ? allocate(room, 1, sizeof(float)) : NULL;
    float value;
    const bool done = !adaptive(&p, &t, &value, x->stats) && !backward(&p, &g);
    release(p.kept);
    return done && isfinite(value) && value > 0;
}

/* ---- the program ---- */

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* core B D CLASSES SPREAD MOVED TURNS prints the best CPU time of the loss and of 4 (2B)^2 D
 * operations in products, in seconds, by turns; with a word more of the loss alone, which "labels" and
 * "logits" name. */
int main(int count, char **words)
{
    if (count != 7 && count != 8)
        return 2;
#ifdef __GLIBC__ /* what is freed stays, or trimming the heap's end would cost by chance */
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, -1);
#endif
    const kind_t kind = count == 7                        ? VIEWS
                        : strcmp(words[7], "labels") == 0 ? LABELS
                        : strcmp(words[7], "logits") == 0 ? LOGITS
                                                          : VIEWS;
    const batch x = make(atoll(words[1]), atoll(words[2]), atoi(words[3]), (float)atof(words[4]),
                         (float)atof(words[5]));
    const double ideal = 16.0 * (double)(x.B * x.B) * (double)x.D, one = product(1);
    double best[2] = {1e9, 1e9};
    for (int turn = atoi(words[6]); turn > 0; turn--) {
        const double start = seconds();
        if (!loss(&x, kind))
            return 1;
        const double middle = seconds(),
                     done = product(count == 7 ? (int64_t)(ideal / one) + 1 : 1);
        best[0] = fmin(best[0], middle - start);
        best[1] = fmin(best[1], (seconds() - middle) * ideal / done);
    }
    printf("%g %g\n", best[0], count == 7 ? best[1] : 0);
    release(x.z);
    release(x.dz);
    release(x.stats);
    release(x.ids);
    return 0;
}
