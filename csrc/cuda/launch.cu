// SPDX-License-Identifier: MIT
// The entry points of hex/_cuda.so: cut a problem into parts, take the workspace, launch. No call
// waits for the device, none depends on what is in device memory, so all can be captured in a
// graph.
//
//     threshold       unit rows, coarse histogram, fine histogram                        3 kernels
//     row_quantiles   the same                                                           3
//     forward         unit rows, forward statistics                                      2
//     adaptive        unit rows, coarse histogram, fine histogram, forward statistics    4
//     row_range       unit rows, row bounds                                              2
//     backward        unit rows, backward gather, backward projection                    3
//                     or, for the gather, backward weights, backward product             4
//     settle, total   one each                                                           1
//
// (for per-anchor negatives one more: their norms, or two: their gradient; for labels or groups one
// more, and one for the rows of a guide; for the quantiles of a large batch in 16 bits two more,
// before the coarse histogram: sample histogram, brackets. Given logits have no unit rows: one
// kernel each.)
//
// A block of anchors has unit rows of the whole batch, for all are candidates, and parts, memory by
// row and outputs of its own rows alone.
#include <stdio.h>

#include "bins.cuh"
#include "parts.cuh"
#include "row.cuh"
#include "sets.cuh"

#define HOPPER_GATHER 192 // rows of a block of the backward

// The text of the last launch's error; of one thread, until its next call.
const char *hex_launched(const char *kernel)
{
    static thread_local char text[160];
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess)
        return NULL;
    snprintf(text, sizeof text, "kernel '%s': CUDA error %d, %s", kernel, (int)error,
             cudaGetErrorString(error));
    return text;
}

// ---- workspace: one allocation a call ----

struct workspace {
    char *at; // NULL while the size is added up
    int64_t bytes;

    template <class T> T *take(int64_t n)
    {
        T *p = at ? (T *)(at + bytes) : NULL;
        bytes += cut(n * (int64_t)sizeof(T), 256) * 256;
        return p;
    }
};

struct plan {
    hex_run run;
    bool plain;
    int64_t zeros;
    double *rows; // a number for each anchor
    const char *error;
};

struct wants {
    int64_t tickets, counts, partial; // words, words, bytes
    int64_t later;                    // bytes, of the forward where the counts were before
    bool coefficients;
};

static void lay_out(const hex_problem_t &p, plan &plan, const wants &w, bool split,
                    workspace &space)
{
    hex_run &r = plan.run;
    hex_unit &u = r.unit;
    const int64_t real = p.compute_f64 ? 8 : 4, own = p.mode == HEX_PAIRED ? p.count * p.K : 0;
    const int64_t rows = padded(u.count);
    // tickets and counts stand together: they are set to 0 in one go
    const int64_t tickets = cut(w.tickets, 64) * 64;
    const int64_t later = cut(w.later, sizeof(unsigned));
    plan.zeros = tickets + w.counts;
    r.tickets = space.take<unsigned>(tickets + (later > w.counts ? later : w.counts));
    r.counts = r.tickets ? r.tickets + tickets : NULL;
    const bool guided = r.guide.width > 0;
    u.inverse = space.take<double>(u.count);
    u.own = space.take<double>(own);
    const int64_t parts = cut(p.B + p.M, HEX_SUMMED); // of dL/dtau, where z1 may be the larger
    u.positive = space.take<double>(p.B > parts ? p.B : parts);
    plan.rows = space.take<double>(hex_block_anchors(&p));
    if (guided) {
        r.guide.inverse = space.take<double>(u.count);
        r.guide.own = space.take<double>(own);
    }
    if (plan.plain) {
        u.plain = space.take<char>(u.count * u.width * real);
        if (guided)
            r.guide.plain = space.take<char>(u.count * r.guide.width * real);
    } else {
        u.split = r.guide.split = split;
        u.tiles = space.take<uint16_t>(rows * u.panels * TILE * (split ? 2 : 1));
        r.guide.tiles = u.tiles; // its panels stand before the others
    }
    if (p.several && p.mode != HEX_LOGITS && p.ids[0].data)
        r.ids = space.take<int64_t>(rows);
    if (p.by_group)
        r.groups = space.take<int64_t>(rows);
    if (p.mask.data && p.mode != HEX_PAIRED)
        r.places = space.take<int64_t>(rows);
    if (w.coefficients)
        r.coefficients = space.take<char>(K_ALL * rows * real);
    r.partial = space.take<char>(w.partial);
}

// Whether a cosine is one product of fp16: all inputs have 16 bits, or the user asks for it.
static bool allow_tf32(const hex_problem_t &p, const hex_device &d)
{
    bool narrow = true;
    for (int k = 0; k < (p.mode >= HEX_UNPAIRED ? 3 : 2); k++)
        narrow &= p.input[k].dtype == HEX_F16 || p.input[k].dtype == HEX_BF16;
    if (p.G > 0)
        narrow &= p.guide[0].dtype == HEX_F16 || p.guide[0].dtype == HEX_BF16;
    return narrow || d.allow_tf32;
}

// The parts are there; takes the memory for the rest.
static void prepare(const hex_problem_t &p, const hex_device &d, const wants &w, plan &plan)
{
    const bool split = !allow_tf32(p, d);
    workspace size = {}, space = {};
    lay_out(p, plan, w, split, size);
    space.at = (char *)d.allocate(d.context, size.bytes);
    if (!space.at)
        plan.error = "cannot allocate the workspace";
    lay_out(p, plan, w, split, space);
}

// The device, and the size of the unit rows.
static void start(const hex_problem_t &p, const hex_device &d, plan &plan)
{
    hex_run &r = plan.run;
    int device = 0, major = 0;
    r.stream = (cudaStream_t)d.stream;
    plan.plain = p.compute_f64 || p.mode >= HEX_PAIRED;
    const auto width = [&](int64_t D) {
        return plan.plain ? D : D > 0 ? cut(D, TILE) * TILE : TILE;
    };
    r.unit.count = p.mode == HEX_LOGITS ? 0 : p.B + p.M + (p.mode == HEX_UNPAIRED ? p.K : 0);
    r.unit.width = width(p.D);
    r.guide.count = r.unit.count;
    r.guide.width = p.G > 0 ? width(p.G) : 0;
    r.unit.first = (int)(r.guide.width / TILE);
    r.unit.panels = r.guide.panels = r.unit.first + (int)(r.unit.width / TILE);
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&r.processors, cudaDevAttrMultiProcessorCount, device) !=
            cudaSuccess ||
        cudaDeviceGetAttribute(&r.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
            cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess)
        plan.error = hex_launched("(looking at the device)");
    r.hopper = major == 9 && r.shared_limit >= 220 * 1024;
}

// The threshold in one pass: its parts, and what it takes beside the two passes.
static void bracket_parts(hex_run &r, int64_t anchors, hex_parts &counted, wants &w)
{
    const int64_t all = (int64_t)1 << 40;
    hex_bracket &b = r.bracket;
    b.sample = b.tiles = r.parts;
    slice_parts(b.sample, 16 * b.warps, all, 2 * r.processors);
    slice_parts(b.tiles, 16 * b.warps, all, 0);
    if (const int64_t slices = r.processors / b.tiles.row_blocks) // a block fills a processor
        slice_parts(b.tiles, 16 * b.warps, cut(b.tiles.part[0].tiles, slices), 0);
    slice_parts(counted, 64, 128, 3 * r.processors); // what is left for them is seldom many rows
    w.tickets += b.sample.row_blocks + b.tiles.row_blocks;
    w.partial += anchors * (int64_t)sizeof(int);
    if (most_slices(b.tiles) > 1) {
        w.tickets += 2 * anchors;
        w.partial += anchors * b.most * (int64_t)sizeof(uint16_t);
    }
}

// ---- the entry points ----

// The threshold of the batch, the loss, or the first and at it the second.
static const char *of_anchors(hex_problem_t p, const hex_device &d, const hex_choice *choice,
                              void *loss, void *stats)
{
    plan plan = {};
    hex_run &r = plan.run;
    const int64_t anchors = hex_block_anchors(&p);
    start(p, d, plan);
    if (plan.error)
        return plan.error;
    if (anchors == 0) { // the threshold of nothing is NaN, its sum is 0
        if (loss && p.reduction != HEX_NONE)
            cudaMemsetAsync(loss, 0, p.compute_f64 ? 8 : 4, r.stream);
        return choice && choice->to.eps ? hex_threshold_of_nothing(r, *choice)
                                        : hex_launched("(memset)");
    }
    wants w = {};
    anchor_parts(p, r.parts);
    hex_parts counted = r.parts;
    if (choice) { // 16-bit counts: at most 32768 columns a block
        slice_parts(counted, 64, 512, 3 * r.processors);
        w.tickets = 3 * counted.row_blocks + 2 + (are_uneven(p) ? anchors : 0);
        r.narrow = columns_of_a_row(p) <= 0xffff;
        w.counts = plan.plain ? 0 : anchors * (r.narrow ? HEX_BINS / 2 : HEX_BINS);
        w.partial = anchors * (int64_t)(sizeof(int64_t) + sizeof(int));
        if (!plan.plain && allow_tf32(p, d) && !are_uneven(p))
            r.bracket = hex_plan_bracket(p, r, *choice);
        if (r.bracket.warps)
            bracket_parts(r, anchors, counted, w);
    }
    const int64_t tickets = w.tickets;
    if (loss) {
        // A block with more warps reads the columns less often; four warps give a small batch more
        // blocks, and need less shared memory. 512 threads a processor in any case; half as many
        // where they have more registers.
        const int64_t threads = has_sets(p) ? 256 : 512;
        const bool many = anchors >= 128 * (int64_t)r.processors && r.shared_limit >= 120 * 1024;
        const bool one = r.unit.width <= 2 * TILE && allow_tf32(p, d) && !has_sets(p);
        r.block_rows = r.hopper && one && anchors >= 16 * r.processors ? 256 : many ? 128 : 64;
        const int64_t most = p.block || r.block_rows < 128 ? 64 : r.block_rows / 2;
        slice_parts(r.parts, r.block_rows, most,
                    p.block ? ANY_ROWS : threads / (2 * r.block_rows) * r.processors);
        const int64_t kinds = has_sets(p) ? SUMS_OF_SETS : SUMS;
        const int64_t sums = most_slices(r.parts) * kinds * anchors * (int64_t)sizeof(float);
        w.tickets += r.parts.row_blocks + 1;
        (choice ? w.later : w.partial) = sums;
    }
    prepare(p, d, w, plan);
    if (!plan.error)
        plan.error = hex_unit_rows(p, r, plan.zeros, NULL);
    if (choice && !plan.error) {
        hex_run counting = r;
        counting.parts = counted;
        counting.bracket.tickets = r.tickets + 3 * counted.row_blocks + 2; // not if they are uneven
        const auto threshold = p.mode == HEX_LOGITS ? hex_logits_threshold
                               : plan.plain         ? hex_plain_threshold
                                                    : hex_tile_threshold;
        plan.error = threshold(p, counting, *choice, plan.rows);
        r.tickets += tickets;
        r.partial = r.counts;
        p.eps = {choice->to.eps, HEX_F64, 0};
    }
    if (loss && !plan.error) {
        const auto forward = p.mode == HEX_LOGITS ? hex_logits_forward
                             : plan.plain         ? hex_plain_forward
                                                  : hex_tile_forward;
        plan.error = forward(p, r, plan.rows, loss, stats);
    }
    return plan.error;
}

static const char *forward(const hex_problem_t *p, const hex_device *d, void *loss, void *stats)
{
    return of_anchors(*p, *d, NULL, loss, stats);
}

// The element of a row that a quantile is: the nearest rank, halves to even.
static int64_t rank_of(const hex_problem_t &p, double quantile, bool over_negatives)
{
    const int64_t n = negatives_of_a_row(p) + (over_negatives ? 0 : p.mode == HEX_NTXENT ? 2 : 1);
    return n > 0 ? (int64_t)nearbyint(quantile * (double)(n - 1)) : -1;
}

static const char *threshold(const hex_problem_t *p, const hex_device *d, double quantile,
                             bool over_negatives, double *mean)
{
    const int64_t rank = rank_of(*p, quantile, over_negatives);
    const hex_choice choice = {quantile, rank, over_negatives, {}, {NULL, 0, NULL, mean}, NULL};
    return of_anchors(*p, *d, &choice, NULL, NULL);
}

static const char *row_quantiles(const hex_problem_t *p, const hex_device *d, double quantile,
                                 bool over_negatives, void *rows)
{
    const int64_t rank = rank_of(*p, quantile, over_negatives);
    const hex_choice choice = {quantile, rank, over_negatives, {}, {}, rows};
    return of_anchors(*p, *d, &choice, NULL, NULL);
}

static const char *adaptive(const hex_problem_t *p, const hex_device *d, const hex_tracker_t *t,
                            const hex_device_state_t *s, void *loss, void *stats)
{
    const int64_t rank = rank_of(*p, t->quantile, t->over_negatives);
    const hex_choice choice = {t->quantile, rank, t->over_negatives, *t, *s, NULL};
    return of_anchors(*p, *d, &choice, loss, stats);
}

// The tiles of columns whose weights, of a band of rows, are in memory at a time. Those of a block
// of anchors leave room for four blocks of rows, whether the band has them or not.
static int64_t weights_at_a_time(const hex_run &r, const hex_parts &band, bool any_rows)
{
    const int64_t tiles = most_tiles(band), all = hex_most_weights(r);
    const int64_t blocks = any_rows || band.row_blocks == 0 ? 4 : band.row_blocks;
    const int64_t most = all > blocks ? all / blocks : 1;
    return tiles <= most ? (tiles > 0 ? tiles : 1) : any_rows ? most : cut(tiles, cut(tiles, most));
}

// The gradient of a band, of which r.parts are the first columns: weights and product, in turn.
static const char *weigh_and_multiply(const hex_problem_t &p, const hex_run &r,
                                      const hex_parts &band, int64_t places)
{
    const int64_t tiles = most_tiles(band), at_a_time = hex_weights_at_a_time(p, r);
    const char *error = NULL;
    hex_run some = r;
    for (int64_t first = 0; !error; some.weights.more = true) {
        hex_run weighing = some;
        slice_parts(weighing.parts, r.block_rows, (int64_t)1 << 40, at_a_time,
                    4 * at_a_time / (1 + band.row_blocks) + 1);
        error = hex_weigh_tiles(p, weighing);
        error = error ? error : hex_multiply_tiles(some);
        first += r.weights.tiles;
        if (first >= tiles)
            break;
        some.parts = columns_of(band, first, r.weights.tiles);
        // No more slices than the first had: those have sums in memory.
        slice_parts(some.parts, r.block_rows, (int64_t)1 << 40, places, most_slices(r.parts));
    }
    return error;
}

static const char *backward(const hex_problem_t *p, const hex_device *d, const hex_gradient_t *g)
{
    if (p->mode == HEX_LOGITS)
        return g->dz[0] || g->dtau ? hex_logits_backward(*p, (cudaStream_t)d->stream, *g) : NULL;
    plan plan = {};
    hex_run &r = plan.run;
    start(*p, *d, plan);
    if (plan.error)
        return plan.error;
    hex_parts all = {};
    owner_parts(*p, *g, all);
    hex_weights &w = r.weights;
    r.unit.split = !plan.plain && !allow_tf32(*p, *d);
    // Whether the weights go through memory.
    const bool weighed = !plan.plain && (has_sets(*p) || !hex_holds_tiles(r));
    const bool wide = weighed || r.unit.width > 2 * TILE;
    const bool narrow = !wide && !r.unit.split && !plan.plain;
    r.block_rows = r.hopper && narrow ? HOPPER_GATHER : 128;
    // Many rows go in bands that fill the device twice, so that the partial sums of one are all
    // that is in memory. A band of fewer rows goes in slices of columns; the anchors before a queue
    // are such a band by themselves, for each of theirs meets many more columns. Wide rows fill it
    // once, for their sums take more memory; so do those whose weights are in memory, of more
    // columns at a time then.
    const int64_t chunks = weighed ? hex_product_chunks(r) : 1;
    const int64_t enough = 2 * r.processors > chunks ? 2 * r.processors / chunks : 1;
    const int64_t rounds = wide && enough > 1 ? enough / 2 : enough;
    // Blocks of rows begin at multiples of TILE, so that each part but the first may take one more.
    const int64_t most = r.block_rows * (rounds < all.count ? 1 : rounds - all.count + 1);
    // Of a block of anchors its own rows are counted, views and then negatives; of a whole batch
    // these are the unit rows.
    const int64_t views = p->count + hex_block_rows(p, 1);
    const int64_t own = views + r.unit.count - p->B - p->M;
    auto unit_row = [&](int64_t n) {
        return n < p->count ? p->first + n
               : n < views  ? p->first + n + p->B - p->count
                            : n + p->B + p->M - views;
    };
    hex_span band = {}; // of unit rows
    hex_parts whole;    // its parts, of which r.parts are the first columns
    const int64_t places = plan.plain ? 0 : p->block ? ANY_ROWS : cut(r.processors, chunks);
    auto take = [&](int64_t first, int64_t end) {
        band = {unit_row(first), unit_row(end - 1) + 1};
        r.parts = whole = band_of(all, band);
        // The sums of a band's slices take no more memory than a whole band; of a batch that is one
        // band, twice as much, and so of any band of wide rows.
        const int64_t rows = end - first, alone = rows == own && !wide ? 2 : 1;
        int64_t limit = alone * r.block_rows * enough / rows;
        limit = p->block ? ANY_SLICES : limit < 128 ? limit : 128;
        if (weighed) {
            slice_parts(whole, r.block_rows, (int64_t)1 << 40, 0);
            w.tiles = weights_at_a_time(r, whole, p->block);
            r.parts = columns_of(whole, 0, w.tiles);
        }
        slice_parts(r.parts, r.block_rows, (int64_t)1 << 40, places, limit);
        return end;
    };
    auto band_from = [&](int64_t first) { // its parts become r.parts, its end is returned
        int64_t end = own;
        if (!plan.plain) {
            // Rows of z1 meet the anchors alone, and only where positives are several.
            const int64_t anchors = p->several && first < p->count ? p->count : views;
            const int64_t queue = p->mode == HEX_UNPAIRED && first < views ? anchors : end;
            end = queue < end ? queue : end;
            end = end - first > most ? first + most : end;
        }
        take(first, end);
        const int64_t slices = p->block && !plan.plain ? most_slices(r.parts) : 0;
        if (slices == 0)
            return end;
        // The slices of a block of anchors are given, and the columns of which the weights are in
        // memory, so that its bands have fewer rows. They may be of two parts that begin anywhere.
        int64_t rows = cut(2 * most / slices, r.block_rows) * r.block_rows;
        const int64_t fit = weighed ? (hex_most_weights(r) / w.tiles - 2) * r.block_rows : rows;
        rows = rows < fit ? rows : fit;
        return end - first > rows ? take(first, first + rows) : end;
    };
    int64_t gradients = 0, weights = 0;
    for (int64_t first = 0; first < own;) {
        first = band_from(first);
        const int64_t n = most_slices(r.parts) * r.parts.rows * r.unit.width;
        gradients = n > gradients ? n : gradients;
        const int64_t tiles = r.parts.row_blocks * w.tiles;
        weights = tiles > weights ? tiles : weights;
    }
    // The weights and their scales lie behind the gradients.
    const int64_t of_sums = cut(gradients * (p->compute_f64 ? 8 : 4), 256) * 256;
    const int64_t of_weights = weights * hex_bytes_of_weights(r);
    prepare(*p, *d, {0, 0, of_sums + of_weights + weights * r.block_rows * 4, 0, true}, plan);
    w.halves = (uint4 *)((char *)r.partial + of_sums);
    w.scales = (float *)((char *)r.partial + of_sums + of_weights);
    if (!plan.error)
        plan.error = hex_unit_rows(*p, r, plan.zeros, g);
    hex_gradient_t rest = *g;
    for (int64_t first = 0; first < own && !plan.error;) {
        first = band_from(first);
        plan.error = weighed      ? weigh_and_multiply(*p, r, whole, places)
                     : plan.plain ? hex_plain_gather(*p, r, rest)
                                  : hex_tile_gather(*p, r);
        if (!plan.error)
            plan.error = hex_project(*p, r, rest, band);
        rest.dtau = NULL; // is there
    }
    if (!plan.error && own == 0)
        plan.error = hex_project(*p, r, rest, {});
    return plan.error;
}

static const char *row_range(const hex_problem_t *p, const hex_device *d, void *low, void *high)
{
    plan plan = {};
    hex_run &r = plan.run;
    start(*p, *d, plan);
    if (plan.error || hex_block_anchors(p) == 0)
        return plan.error;
    anchor_parts(*p, r.parts);
    slice_parts(r.parts, 64, (int64_t)1 << 40, 2 * r.processors);
    const int64_t bounds = most_slices(r.parts) * 3 * r.parts.rows * (int64_t)sizeof(float);
    prepare(*p, *d, {r.parts.row_blocks, 0, bounds, 0, false}, plan);
    if (!plan.error)
        plan.error = hex_unit_rows(*p, r, plan.zeros, NULL);
    if (!plan.error)
        plan.error = (p->mode == HEX_LOGITS ? hex_logits_range
                      : plan.plain          ? hex_plain_range
                                            : hex_tile_range)(*p, r, low, high);
    return plan.error;
}

static const char *settle(const hex_device *d, const hex_matrix_t *q, const hex_tracker_t *t,
                          const hex_device_state_t *s)
{
    return hex_settle_rows((cudaStream_t)d->stream, *q, {0, 0, false, *t, *s, NULL});
}

static const char *total(const hex_device *d, const hex_matrix_t *x, double *sums)
{
    return hex_sum_matrix((cudaStream_t)d->stream, *x, sums);
}

static int driver(void)
{
    int devices;
    return (int)cudaGetDeviceCount(&devices);
}

// Code is loaded when it is first asked for, which a capture in its strict mode takes for an error.
static int probe(int device)
{
    int before = 0;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess)
        error = cudaSetDevice(device);
    if (error == cudaSuccess) {
        cudaThreadExchangeStreamCaptureMode(&mode);
        error = hex_find_code();
        cudaThreadExchangeStreamCaptureMode(&mode);
        cudaSetDevice(before);
    }
    cudaGetLastError(); // it is reported here, not by the next launch
    return (int)error;
}

#ifdef HEX_EMULATION
#define EMULATED true
#else
#define EMULATED false
#endif
extern "C" __attribute__((visibility("default"))) const hex_cuda_table hex_cuda_core = {
    HEX_CUDA_VERSION, EMULATED,      forward, backward, threshold, adaptive,
    row_range,        row_quantiles, settle,  total,    driver,    probe};
