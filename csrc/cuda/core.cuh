// SPDX-License-Identifier: MIT
// What all kernels share: how the work is cut, what a launch is given, unit rows, numbers of any
// dtype, sums over a block and over blocks. Notation: ../hex.h. The mathematics of a row is in
// row.cuh, the bins of the threshold in bins.cuh, tiles of cosines in tile.cuh.
#pragma once
#include <float.h>
#include <math.h>

#include "hex_cuda.h"
#include "ptx.cuh"

#define HEX_LOG2E 1.4426950408889634
#define HEX_LOWEST (-2.f) // below every cosine

struct hex_unit {         // rows of length one; see ../hex.h for their order
    int64_t count, width; // width = D rounded up to 64
    int first, panels;    // of the panels of 64 rows: the first of these, how many there are in all
    uint16_t *tiles;      // fp16, laid out by place_of; rows up to a multiple of 64 are zeros
    bool split;           // with the low parts too: for three products
    void *plain;          // instead, for plain.cu: float or double, width = D
    double *inverse;      // 1 / |z|; 0 for a row of zeros, NaN for one that is not finite
    double *own;          // the same of each anchor's own negatives
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
    K_POS_SHIFT, // these three where positives may be several, else 0
    K_POS_MEAN,
    K_POS_E,
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
    bool hopper;          // compute capability 9.0: kernels with more warps, and more shared memory
    int block_rows;       // a multiple of 64
    hex_unit unit, guide; // the guide's rows; width 0: there is none
    int64_t *ids, *groups; // see sets.cuh; NULL: there are none
    int64_t *places;       // where a mask says something of each unit row; NULL: there is none
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
    double quantile;
    int64_t rank; // that of a row whose length is known; -1: the rows are empty
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
int hex_weights_at_a_time(const hex_problem_t &p,
                          const hex_run &r); // so many CUDA blocks run at a time
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
const char *hex_logits_forward(const hex_problem_t &p, const hex_run &r, double *rows, void *loss,
                               void *stats);
const char *hex_logits_threshold(const hex_problem_t &p, const hex_run &r, const hex_choice &choice,
                                 double *rows);
const char *hex_logits_range(const hex_problem_t &p, const hex_run &r, void *low, void *high);
const char *hex_logits_backward(const hex_problem_t &p, cudaStream_t stream,
                                const hex_gradient_t &g);

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

// The threshold of the row in this place as the compute type compares with it: H is empty from 1 on,
// and of cosines it holds all below -1, though rounding takes some past either. Logits are any
// numbers.
template <class real> SHARED_DEVICE real row_threshold(const hex_problem_t &p, int64_t at)
{
    const double eps = read_vector(p.eps, at);
    const bool cosines = p.mode != HEX_LOGITS;
    const double most = cosines ? 2 : (double)__FLT_MAX__;
    const double reach = eps >= 1 && eps < (double)INFINITY ? most : cosines && eps < -1 ? -2 : eps;
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
    const int64_t panel = (i >> 6) * u.panels + u.first + (d >> 6);
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

// The input that unit row i is of, and which row of it.
struct hex_origin {
    int input;
    int64_t row;
};
SHARED_DEVICE hex_origin origin_of(const hex_problem_t &p, int64_t i)
{
    return i < p.B         ? hex_origin{0, i}
           : i < p.B + p.M ? hex_origin{1, i - p.B}
                           : hex_origin{2, i - p.B - p.M};
}

// hex_candidate(); 0 of a row that no anchor meets.
SHARED_DEVICE int64_t candidate_of(const hex_problem_t &p, int64_t j)
{
    const bool of_z0 = p.mode == HEX_NTXENT || (p.mode == HEX_CROSS && j < p.B);
    const int64_t first = of_z0 ? 0 : p.mode == HEX_UNPAIRED && !p.several ? p.B + p.M : p.B;
    return j < first ? 0 : j - first;
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

// The negatives of each anchor.
SHARED_DEVICE __host__ int64_t negatives_of_a_row(const hex_problem_t &p)
{
    return p.mode == HEX_NTXENT ? 2 * p.B - 2 : p.mode < HEX_UNPAIRED ? p.B - 1 : p.K;
}
// The most columns that a histogram counts of a row.
SHARED_DEVICE __host__ int64_t columns_of_a_row(const hex_problem_t &p)
{
    return !p.several              ? negatives_of_a_row(p)
           : p.mode == HEX_NTXENT  ? p.B + p.M
           : p.mode < HEX_UNPAIRED ? p.M
                                   : p.M + p.K;
}
// All of the batch; those of the call are the rows of its parts.
SHARED_DEVICE __host__ int64_t anchors_of(const hex_problem_t &p)
{
    return p.mode == HEX_NTXENT || p.mode == HEX_CROSS ? p.B + p.M : p.B;
}
