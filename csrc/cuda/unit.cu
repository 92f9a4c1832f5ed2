// SPDX-License-Identifier: MIT
// The first kernel of every call, a warp for each unit row: u = z / |z| from any dtype and strides,
// as fp16 (high and low) or plain; the positives' cosines, from the inputs as they are; the
// coefficients of the backward; and zeros where later kernels count.
//
// Norms are taken in double of the row scaled by a power of two, so that rows of 1e-23 or 1e20 keep
// their direction. A row of zeros gives u = 0 and 1 / |z| = 0, a row with NaN or Inf NaN
// throughout.
#include "core.cuh"

#define THREADS 128

// A NaN inverse makes NaN of 0 as well; an inverse of 0 makes 0 of everything finite.
static __device__ double unit_number(const hex_rows &x, int64_t at, int64_t d, length n)
{
    return read_number(x.data, x.dtype, at + d * x.col) * n.scale * n.inverse;
}

// The coefficients of unit row i, times its grad_output; of no row at all they are those of a row
// that is no anchor.
template <class real>
static __device__ void scale_coefficients(const hex_problem &p, const hex_gradient &g, int64_t i,
                                          real *out)
{
    const int64_t anchors = anchors_of(p);
    real k[K_ALL] = {};
    k[K_EPS] = (real)INFINITY;
    if (i < anchors) {
        const real *stats = (const real *)g.stats + i;
        const double go =
            read_vector(g.grad, i) / (p.reduction == HEX_MEAN ? (double)anchors : 1.0);
        k[K_EPS] = stats[HEX_STAT_EPS * anchors];
        k[K_SHIFT] = stats[HEX_STAT_SHIFT * anchors];
        const int from[] = {HEX_STAT_REST, HEX_STAT_HARD_E, HEX_STAT_HARD, HEX_STAT_POSITIVE};
        const int to[] = {K_REST, K_HARD_E, K_HARD, K_POSITIVE};
        for (int n = 0; n < 4; n++)
            k[to[n]] = (real)(go * (double)stats[from[n] * anchors]);
        const double x = -HEX_LOG2E / read_vector(p.tau, 0) * (double)k[K_SHIFT];
        const double unit = exp2(x), hard_unit = exp2(p.beta * x);
        k[K_REST0] = (real)((double)k[K_REST] * unit);
        k[K_HARD_E0] = (real)((double)k[K_HARD_E] * hard_unit * unit);
        k[K_HARD0] = (real)((double)k[K_HARD] * hard_unit);
    }
    for (int n = 0; n < K_ALL; n++)
        out[coefficient(n, i)] = k[n];
}

static __global__ void __launch_bounds__(THREADS, 1)
    unit_rows(hex_problem p, hex_unit u, uint32_t *zeros, int64_t zero_count, hex_gradient g,
              void *coefficients, int64_t blocks)
{
    const int lane = (int)threadIdx.x & 31;
    for (int64_t k = blockIdx.x * (int64_t)THREADS + threadIdx.x; k < zero_count;
         k += blocks * THREADS)
        zeros[k] = 0;
    const int64_t i = blockIdx.x * (int64_t)(THREADS / 32) + (threadIdx.x >> 5);
    if (i >= u.count) { // up to the end of the last 64 rows
        for (int64_t d = lane; u.tiles && d < u.width; d += 32) {
            u.tiles[place_of(u, i, d)] = 0;
            if (u.split)
                u.tiles[place_of(u, i, d) + 4096] = 0;
        }
        if (coefficients && lane == 0 && !p.wide)
            scale_coefficients(p, g, i, (float *)coefficients);
        return;
    }
    const int input = i < p.B ? 0 : i < 2 * p.B ? 1 : 2;
    const hex_rows &x = p.input[input];
    const int64_t at = row_start(x, i - input * p.B);
    const length n = norm_of(x, at, p.D);
    for (int64_t d = lane; d < u.width; d += 32) {
        const double v = d < p.D ? unit_number(x, at, d, n) : 0;
        if (u.plain)
            write_number(u.plain, p.wide ? HEX_F64 : HEX_F32, i * u.width + d, v);
        else {
            const uint16_t high = float_to_f16((float)v);
            const int64_t to = place_of(u, i, d);
            u.tiles[to] = high;
            if (u.split)
                u.tiles[to + 4096] = float_to_f16((float)(v - (double)f16_to_float(high)));
        }
    }
    if (lane == 0)
        u.inverse[i] = n.scale * n.inverse;
    if (i < p.B) {
        const hex_rows &y = p.input[1];
        const int64_t there = row_start(y, i);
        const length m = norm_of(y, there, p.D);
        double sum = 0;
        for (int64_t d = lane; d < p.D; d += 32)
            sum += unit_number(x, at, d, n) * unit_number(y, there, d, m);
        sum = warp_sum(sum);
        if (lane == 0)
            u.positive[i] = sum;
    }
    if (coefficients && lane == 0) {
        if (p.wide)
            scale_coefficients(p, g, i, (double *)coefficients);
        else
            scale_coefficients(p, g, i, (float *)coefficients);
    }
}

const char *hex_unit_rows(const hex_problem &p, const hex_run &r, int64_t zeros,
                          const hex_gradient *g)
{
    const int64_t blocks = padded(r.unit.count) / (THREADS / 32);
    if (blocks == 0)
        return NULL;
    HEX_LAUNCH(unit_rows, dim3((unsigned)blocks), dim3(THREADS), 0, r.stream, p, r.unit, r.tickets,
               zeros, g ? *g : hex_gradient{}, g ? r.coefficients : NULL, blocks);
    return hex_launched("unit rows");
}
