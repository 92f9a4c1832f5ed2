// SPDX-License-Identifier: MIT
// What the kernels share beside the tiles: how the work is cut, unit rows, the sums of a row and
// what becomes of them. Notation: ../hex.h; the formulas are those of ../cpu/row.h.
//
// The sums over G and over H each have a shift of their own, the largest cosine of the set, and are
// rescaled when a larger one comes. So one pass is right at every temperature; in particular a row
// whose local term is at its floor need not sum G again.
#pragma once
#include <float.h>
#include <math.h>

#include "hex_cuda.h"
#include "ptx.cuh"

#define HEX_LOG2E 1.4426950408889634
#define HEX_LOWEST (-2.f) // below every cosine

struct hex_unit {         // rows of length one; see ../hex.h for their order
    int64_t count, width; // width = D rounded up to 64
    uint16_t *tiles;      // fp16, laid out by place_of; rows up to a multiple of 64 are zeros
    bool split;           // with the low parts too: for three products
    void *plain;          // instead, for plain.cu: float or double, width = D
    double *inverse;      // 1 / |z|; 0 for a row of zeros, NaN for one that is not finite
    double *positive;     // cosine of image b's two views; in the backward see HEX_SUMMED
};

// Of so many rows each the backward has one part of dL/dtau, in the place of the positives.
#define HEX_SUMMED 128

struct hex_span { // of unit rows
    int64_t begin, end;
};
static inline hex_span common(hex_span a, hex_span b)
{
    return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// A rectangle of cosines, rows [row0, row1) against columns [col0, col1), cut in blocks of rows and
// slices of `tiles` tiles of columns. Its CUDA blocks are numbered from first_block on, the slices
// of one block of rows row_blocks apart.
struct hex_part {
    int64_t row0, row1, col0, col1;
    int64_t first_block, row_blocks, slices, tiles;
    int64_t first_row; // of its rows among those of all parts: where they stand in memory by row
};
struct hex_parts {
    hex_part part[3];
    int count;
    int64_t blocks, row_blocks, rows; // of all parts
};

// The coefficients of every unit row, times its grad_output; 0 where it is no anchor. Those that
// end in 0 are those before on a scale that all rows share (backward.cu), COMMON further on.
enum {
    K_EPS,
    K_SHIFT,
    K_REST,
    K_HARD_E,
    K_HARD,
    K_REST0,
    K_HARD_E0,
    K_HARD0,
    K_ROWS,
    K_COMMON = K_REST0 - K_REST,
    K_POSITIVE = K_ROWS,
    K_ALL
};

// The threshold in about one pass (bracket.cu): a sample of the columns (sample.cu) gives every row
// a bracket.
struct hex_bracket {
    int warps;    // 0: two passes
    int step;     // one tile of so many is sampled
    int depth;    // the places in a thread's list
    int64_t most; // those in a row's, where its columns are in slices
    hex_parts sample, tiles;
    unsigned *tickets; // of the sample, of the tiles, two counts of each row where in slices
};

// The weights of a band, if they go through memory (weights.cu). Of 16 rows and a tile of columns
// there are first 16 bytes of each of 32 lanes, as the left operand of a product has them, then
// those of the next product, four times; the same of the low parts, where u is split. Scales: of 16
// rows.
struct hex_weights {
    uint4 *halves;
    float *scales;
    int64_t tiles; // of columns that there is memory for
    bool more;     // the rows' sums over other columns are in memory
};

// ---- kernels, each launched by a function that returns NULL or the text of an error ----

struct hex_run {
    cudaStream_t stream;
    int processors, shared_limit;
    bool hopper;    // compute capability 9.0: kernels with more warps, and more shared memory
    int block_rows; // a multiple of 64
    hex_unit unit;
    hex_parts parts;
    unsigned *tickets;  // one a block of rows and one more, 0
    void *coefficients; // of 64 rows K_ALL x 64, compute type; rows up to a multiple of 64
    uint32_t *counts;   // threshold: anchors x 256, 0; two to a word where `narrow`
    bool narrow;        // no row has more negatives than 16 bits can count
    void *partial;
    hex_weights weights;
    hex_bracket bracket;
};

// What is chosen of each row, and what becomes of it.
struct hex_choice {
    int64_t rank; // -1: the rows are empty
    bool negatives;
    hex_tracker_t rule;
    hex_device_state_t to; // what becomes of the mean; without state: eps is the mean itself
    void *each;            // or, of a block of anchors, no mean: each row's, compute type
};

const char *hex_launched(const char *kernel);
const char *hex_unit_rows(const hex_problem_t &p, const hex_run &r, int64_t zeros,
                          const hex_gradient_t *g);
const char *hex_tile_forward(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                             void *stats);
const char *hex_tile_threshold(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                               double *rows);
hex_bracket hex_plan_bracket(const hex_problem_t &p, const hex_run &r, const hex_choice &choice);
int64_t hex_sample_bytes(int warps); // of shared memory, beside the panels
const char *hex_sample_tiles(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                             uint32_t *brackets);
const char *hex_bracket_tiles(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                              const uint32_t *brackets, int *chosen, uint16_t *lists);
const char *hex_threshold_of_nothing(const hex_run &r, const hex_choice &choice);
const char *hex_tile_range(const hex_problem_t &p, const hex_run &r, void *low, void *high);
bool hex_holds_tiles(const hex_run &r); // and so gathers, else weighs and multiplies
const char *hex_tile_gather(const hex_problem_t &p, const hex_run &r);
int64_t hex_bytes_of_weights(const hex_run &r); // 128 rows of a tile of columns
int64_t hex_most_weights(const hex_run &r);     // so many of these are in memory at a time
int hex_weights_at_a_time(const hex_run &r);    // so many CUDA blocks run at a time
const char *hex_weigh_tiles(const hex_problem_t &p, const hex_run &r);
int64_t hex_product_chunks(const hex_run &r); // CUDA blocks for each block of rows
const char *hex_multiply_tiles(const hex_run &r);
const char *hex_project(const hex_problem_t &p, const hex_run &r, const hex_gradient_t &g,
                        hex_span band);
const char *hex_settle_rows(cudaStream_t stream, const hex_matrix_t &q, const hex_choice &choice);
const char *hex_sum_matrix(cudaStream_t stream, const hex_matrix_t &x, double *sums);
cudaError_t hex_find_code(void); // of one kernel, and so of all, on the current device
const char *hex_plain_forward(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                              void *stats);
const char *hex_plain_threshold(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                                double *rows);
const char *hex_plain_range(const hex_problem_t &p, const hex_run &r, void *low, void *high);
const char *hex_plain_gather(const hex_problem_t &p, const hex_run &r, const hex_gradient_t &g);

// ---- numbers ----

#define SHARED_DEVICE static inline __device__ __attribute__((unused))

#define HEX_TRACKER SHARED_DEVICE
#define HEX_TRACKER_MUL __dmul_rn
#define HEX_TRACKER_ADD __dadd_rn
#include "../tracker.h"

SHARED_DEVICE float pow2(float x) { return ex2(x); }
SHARED_DEVICE double pow2(double x) { return exp2(x); }
SHARED_DEVICE float larger(float a, float b) { return fmaxf(a, b); } // a NaN is passed over
SHARED_DEVICE double larger(double a, double b) { return fmax(a, b); }

SHARED_DEVICE double read_vector(const hex_vector_t &v, int64_t i)
{
    return v.dtype == HEX_F64 ? ((const double *)v.data)[i * v.stride]
                              : (double)((const float *)v.data)[i * v.stride];
}

// The threshold of the row in this place as the compute type compares with it: H is empty from 1 on
// and holds all below -1, though rounding takes some cosines past either.
template <class real> SHARED_DEVICE real row_threshold(const hex_problem_t &p, int64_t at)
{
    const double eps = read_vector(p.eps, at);
    const double reach = eps >= 1 && eps < (double)INFINITY ? 2 : eps < -1 ? -2 : eps;
    const real rounded = (real)reach;
    return (double)rounded > reach ? (real)nextafterf((float)rounded, -INFINITY) : rounded;
}

SHARED_DEVICE double read_number(const void *data, hex_dtype_t dtype, int64_t i)
{
    switch (dtype) {
    case HEX_F32:
        return (double)((const float *)data)[i];
    case HEX_F64:
        return ((const double *)data)[i];
    case HEX_F16:
        return (double)f16_to_float(((const uint16_t *)data)[i]);
    default:
        return (double)bf16_to_float(((const uint16_t *)data)[i]);
    }
}

SHARED_DEVICE void write_number(void *data, hex_dtype_t dtype, int64_t i, double x)
{
    if (dtype == HEX_F32)
        ((float *)data)[i] = (float)x;
    else if (dtype == HEX_F64)
        ((double *)data)[i] = x;
    else
        ((uint16_t *)data)[i] = dtype == HEX_F16 ? float_to_f16((float)x) : float_to_bf16((float)x);
}

// Where a row's 16-byte chunk of 8 features stands in a panel of 64 rows and 64 features.
SHARED_DEVICE int swizzle(int row, int chunk) { return row * 64 + (((chunk ^ row) & 7) << 3); }

// Where the high part of u_id stands; its low part, if there is one, 4096 further on. All panels of
// 64 rows follow one another.
SHARED_DEVICE int64_t place_of(const hex_unit &u, int64_t i, int64_t d)
{
    const int64_t panel = (i >> 6) * (u.width >> 6) + (d >> 6);
    return (panel << (u.split ? 13 : 12)) + swizzle((int)i & 63, (int)(d & 63) >> 3) + (d & 7);
}

SHARED_DEVICE __host__ int64_t padded(int64_t count) { return (count + 63) / 64 * 64; }

// Where coefficient k of unit row i stands.
SHARED_DEVICE int64_t coefficient(int k, int64_t i)
{
    return ((i >> 6) * K_ALL + k) * 64 + (i & 63);
}

// Where row j stands, of set i if there are sets (the per-anchor negatives).
SHARED_DEVICE int64_t row_start(const hex_rows_t &x, int64_t j, int64_t i = 0)
{
    return i * x.outer + j * x.row;
}

SHARED_DEVICE __host__ int64_t partner_of(int64_t i, int64_t B) { return i < B ? i + B : i - B; }
SHARED_DEVICE int64_t image_of(int64_t i, int64_t B) { return i < B ? i : i - B; } // of view i

// The sum of x over the warp, on every lane, in one order.
template <class real> SHARED_DEVICE real warp_sum(real x)
{
    for (int k = 16; k > 0; k >>= 1)
        x += __shfl_xor_sync(~0u, x, k);
    return x;
}

struct length {
    double scale, inverse; // u = z scale inverse
};

// By a warp: of the row that starts at `at`.
SHARED_DEVICE length norm_of(const hex_rows_t &x, int64_t at, int64_t D)
{
    const int lane = (int)threadIdx.x & 31;
    double largest = 0, finite = 0, sum = 0;
    for (int64_t d = lane; d < D; d += 32) {
        const double v = fabs(read_number(x.data, x.dtype, at + d * x.col));
        largest = fmax(largest, v);
        finite += v * 0;
    }
    for (int k = 16; k > 0; k >>= 1)
        largest = fmax(largest, __shfl_xor_sync(~0u, largest, k));
    finite = warp_sum(finite);
    if (!(finite == 0) || largest == 0)
        return {1, finite}; // NaN or 0
    int exponent;
    frexp(largest, &exponent);
    const double scale = ldexp(1.0, exponent > -1000 ? -exponent : 1000); // largest scale < 1
    for (int64_t d = lane; d < D; d += 32) {
        const double v = read_number(x.data, x.dtype, at + d * x.col) * scale;
        sum += v * v;
    }
    return {scale, 1 / sqrt(warp_sum(sum))};
}

// The sum of all threads' x, in one order, on every thread; `scratch` holds a number for each warp.
SHARED_DEVICE double block_sum(double x, double *scratch)
{
    x = warp_sum(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        scratch[threadIdx.x >> 5] = x;
    __syncthreads();
    x = 0;
    for (unsigned k = 0; k < blockDim.x / 32; k++)
        x += scratch[k];
    return x;
}

// The same of x[0..n), which other blocks wrote.
SHARED_DEVICE double block_sum_of(const double *x, int64_t n, double *scratch)
{
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x)
        sum += __ldcg(x + i);
    return block_sum(sum, scratch);
}

// Whether this block is the last of `total` to come here; if so, it sees what the others wrote.
SHARED_DEVICE bool last_to_arrive(unsigned *ticket, int64_t total, unsigned *shared)
{
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
        *shared = (int64_t)atomicAdd(ticket, 1u) == total - 1;
    __syncthreads();
    const bool last = *shared != 0;
    if (last)
        __threadfence();
    return last;
}

SHARED_DEVICE int part_of_block(const hex_parts &parts, int64_t block)
{
    int k = 0;
    while (k + 1 < parts.count && block >= parts.part[k + 1].first_block)
        k++;
    return k;
}

// The n-th of the rows of all parts, as a unit row.
SHARED_DEVICE int64_t nth_row(const hex_parts &parts, int64_t n)
{
    int k = 0;
    while (n >= parts.part[k].row1 - parts.part[k].row0)
        n -= parts.part[k].row1 - parts.part[k].row0, k++;
    return parts.part[k].row0 + n;
}

// ---- the sums of a row ----

// With t = (c - largest) log2(e) / tau, e = 2^t, b = 2^(beta t): over G of e and t e, over H the
// count, b, b e, t b and t b e.
enum {
    SUM_TOP,
    SUM_REST,
    SUM_REST_T,
    SUM_HARD_TOP,
    SUM_COUNT,
    SUM_B,
    SUM_BE,
    SUM_BT,
    SUM_BET,
    SUMS
};

template <class real> struct hex_sums {
    real v[SUMS];

    __device__ __forceinline__ void clear()
    {
        for (int k = 0; k < SUMS; k++)
            v[k] = 0;
        v[SUM_TOP] = v[SUM_HARD_TOP] = HEX_LOWEST;
    }

    __device__ __forceinline__ void raise_rest(real top, real scale)
    {
        const real d = (v[SUM_TOP] - top) * scale, f = pow2(d);
        v[SUM_REST_T] = f * (v[SUM_REST_T] + d * v[SUM_REST]);
        v[SUM_REST] *= f;
        v[SUM_TOP] = top;
    }

    __device__ __forceinline__ void raise_hard(real top, real scale, real beta)
    {
        const real d = (v[SUM_HARD_TOP] - top) * scale, fb = pow2(beta * d), fbe = fb * pow2(d);
        v[SUM_BT] = fb * (v[SUM_BT] + d * v[SUM_B]);
        v[SUM_BET] = fbe * (v[SUM_BET] + d * v[SUM_BE]);
        v[SUM_B] *= fb;
        v[SUM_BE] *= fbe;
        v[SUM_HARD_TOP] = top;
    }

    __device__ __forceinline__ void add_rest(real c, real scale)
    {
        if (c > v[SUM_TOP])
            raise_rest(c, scale);
        const real t = (c - v[SUM_TOP]) * scale, e = pow2(t);
        v[SUM_REST] += e;
        v[SUM_REST_T] += t * e;
    }

    __device__ __forceinline__ void add_hard(real c, real scale, real beta)
    {
        if (c > v[SUM_HARD_TOP])
            raise_hard(c, scale, beta);
        const real t = (c - v[SUM_HARD_TOP]) * scale, b = pow2(beta * t), be = b * pow2(t);
        v[SUM_COUNT] += 1;
        v[SUM_B] += b;
        v[SUM_BE] += be;
        v[SUM_BT] += t * b;
        v[SUM_BET] += t * be;
    }

    __device__ __forceinline__ void merge(hex_sums o, real scale, real beta)
    {
        const real top = larger(v[SUM_TOP], o.v[SUM_TOP]);
        const real hard = larger(v[SUM_HARD_TOP], o.v[SUM_HARD_TOP]);
        raise_rest(top, scale), o.raise_rest(top, scale);
        raise_hard(hard, scale, beta), o.raise_hard(hard, scale, beta);
        for (int k = 0; k < SUMS; k++)
            if (k != SUM_TOP && k != SUM_HARD_TOP)
                v[k] += o.v[k];
    }
};

// From the sums of a row to its loss, returned, and its statistics, which stand in place `at` of
// `rows`. n negatives, cp the positive, scale the log2(e) / tau that the sums were taken with.
template <class real>
SHARED_DEVICE double finish_row(const hex_problem_t &p, int64_t at, int64_t n, double cp, real eps,
                                const hex_sums<double> &s, double scale, real *stats, int64_t rows)
{
    const double tau = read_vector(p.tau, 0), count = s.v[SUM_COUNT];
    const bool released = p.variant == HEX_RELEASED && eps != (real)INFINITY;
    double out[HEX_STATS] = {(double)eps}, loss;
    if (!(tau > 0) || eps != eps) {
        for (int k = 1; k < HEX_STATS; k++)
            out[k] = (double)NAN;
        loss = (double)NAN;
    } else if (count == (double)n && (released || n == 0)) { // nothing to repel
        out[HEX_STAT_COUNT] = count;
        loss = cp - cp;
    } else {
        const bool some = count < (double)n; // G holds some
        const double rest_top = s.v[SUM_TOP], hard_top = s.v[SUM_HARD_TOP];
        const double rest_x = s.v[SUM_REST_T] / scale;
        double shift = count > 0 && !released ? hard_top : rest_top;
        out[HEX_STAT_COUNT] = count;
        if (released) {
            const double constant = (double)n * exp(-1 / tau), rest = s.v[SUM_REST];
            out[HEX_STAT_SHIFT] = shift;
            out[HEX_STAT_REST] = 1 / (tau * rest);
            out[HEX_STAT_POSITIVE] = -1 / tau;
            out[HEX_STAT_DTAU] = (cp - shift - rest_x / rest + constant) / (tau * tau);
            loss = (shift - cp) / tau + log(rest) + constant;
        } else {
            const double m = fmax((shift - cp) / tau, 0.0), e0 = exp(-m);
            const double rest_unit = some ? exp((rest_top - cp) / tau - m) : 0;
            const double hard_unit = exp((hard_top - cp) / tau - m);
            double local = 0, r = 0, floor_ = 0;
            bool clamped = false;
            if (count > 0) {
                r = hard_unit * s.v[SUM_BE] / s.v[SUM_B];
                local = count * (r - p.tau_plus * e0) / (1 - p.tau_plus);
                floor_ = count * exp(-(1 + cp) / tau - m);
                clamped = local < floor_;
                local = clamped ? floor_ : local;
                if (clamped && some)
                    shift = rest_top;
            }
            const double rest = rest_unit * s.v[SUM_REST], S = local + rest;
            const double k = 1 / (tau * (e0 + S)), x = m + log(S);
            out[HEX_STAT_SHIFT] = shift;
            out[HEX_STAT_REST] = k * exp((shift - cp) / tau - m);
            out[HEX_STAT_POSITIVE] = -k * S;
            out[HEX_STAT_SHARE] = local / (e0 + S);
            double moment = k * rest_unit * (rest_x + (rest_top - cp) * s.v[SUM_REST]);
            if (count > 0 && !clamped) {
                const double above = hard_top - cp, h = k * count / ((1 - p.tau_plus) * s.v[SUM_B]);
                const double hard_e = h * (1 + p.beta) * hard_unit, hard = h * p.beta * r;
                out[HEX_STAT_HARD_E] = hard_e;
                out[HEX_STAT_HARD] = hard;
                out[HEX_STAT_POSITIVE] -= k * count * p.tau_plus * e0 / (1 - p.tau_plus);
                moment += hard_e * (s.v[SUM_BET] / scale + above * s.v[SUM_BE]) -
                          hard * (s.v[SUM_BT] / scale + above * s.v[SUM_B]);
            }
            out[HEX_STAT_DTAU] = ((clamped ? k * floor_ * (1 + cp) : 0) - moment) / tau;
            loss = x <= 0 ? log1p(exp(x)) : x + log1p(exp(-x));
        }
    }
    for (int k = 0; k < HEX_STATS; k++)
        stats[k * rows + at] = (real)out[k];
    return loss;
}

// One row's part of a gradient entry, dL_i / dc_ij: see HEX_STAT_*.
template <class real>
SHARED_DEVICE real row_entry(real c, real eps, real shift, real rest, real hard_e, real hard,
                             real scale, real beta)
{
    const real x = (c - shift) * scale, t = x > 0 ? 0 : x, e = pow2(t); // a NaN stays
    return c > eps ? pow2(beta * t) * (hard_e * e - hard) : rest * e;
}

// The negatives of each anchor.
SHARED_DEVICE __host__ int64_t negatives_of_a_row(const hex_problem_t &p)
{
    return p.mode == HEX_NTXENT ? 2 * p.B - 2 : p.mode < HEX_UNPAIRED ? p.B - 1 : p.K;
}
// All of the batch; those of the call are the rows of its parts.
SHARED_DEVICE __host__ int64_t anchors_of(const hex_problem_t &p)
{
    return p.mode == HEX_NTXENT || p.mode == HEX_CROSS ? 2 * p.B : p.B;
}

// ---- the threshold ----

// By one thread: a step of ../tracker.h, or the mean itself.
SHARED_DEVICE void settle(const hex_choice &choice, double candidate, int64_t anchors)
{
    const hex_device_state_t &to = choice.to;
    if (!to.state) {
        *to.eps = candidate;
        return;
    }
    hex_tracker_t t = choice.rule;
    for (int k = 0; k < HEX_STATE; k++)
        t.state[k] = to.state[k * to.stride];
    hex_track(&t, candidate, anchors);
    for (int k = 0; k < HEX_STATE; k++)
        to.next[k] = t.state[k];
    *to.eps = t.eps;
}

// Cosines in 65536 bins around k / 32767.5 - 1: -1 and 1 are the middle of the first and the last,
// no cosine is further than 1.5e-5 from its bin's middle. The high byte is the coarse bin.
#define HEX_BINS 256
#define HEX_BIN0 8388608.f // adding 2^23 rounds to an integer, which then stands in the low bits
SHARED_DEVICE float above_bin0(float c)
{
    return __saturatef(c * 0.5f + 0.5f) * 65535.f + HEX_BIN0;
}
SHARED_DEVICE int bin_of(float c)
{
    return (int)(__float_as_uint(above_bin0(c)) & 0xffff);
} // NaN: 0
SHARED_DEVICE double bin_middle(int bin) { return bin / 32767.5 - 1; }

// By one warp, whose lane holds the counts of bins 8 lane to 8 lane + 7: the bin, of 256, that has
// the element of rank *rank, and its rank among those of the bin. The extra elements count as well.
SHARED_DEVICE int pick_bin(uint32_t (&count)[8], int extra0, int extra1, int64_t *rank)
{
    const int lane = (int)threadIdx.x & 31;
    uint32_t sum = 0;
    for (int k = 0; k < 8; k++) {
        const int bin = 8 * lane + k;
        count[k] += (bin == extra0) + (bin == extra1);
        sum += count[k];
    }
    uint32_t upto = sum; // no row has 2^32 columns
    for (int k = 1; k < 32; k <<= 1) {
        const uint32_t other = __shfl_up_sync(~0u, upto, k);
        upto += lane >= k ? other : 0;
    }
    const unsigned reached = __ballot_sync(~0u, (int64_t)upto > *rank);
    const int owner = reached ? __ffs((int)reached) - 1 : 31;
    int bin = 7;
    int64_t left = *rank - (int64_t)(upto - sum);
    for (int k = 0; k < 7; k++) {
        if (left < (int64_t)count[k]) {
            bin = k;
            break;
        }
        left -= count[k];
    }
    *rank = __shfl_sync(~0u, left, owner);
    return __shfl_sync(~0u, 8 * lane + bin, owner);
}
