// SPDX-License-Identifier: MIT
// The last kernel of the backward, a warp for each row of an input whose gradient is wanted: adds
// the slices in their order and the partner's part, projects, and rounds once to the input's dtype.
//
//     dz_o = (du_o - (du_o . u_o) u_o) / |z_o|,   du_o = sum of slices + (g_op + g_po) u_p
//
// Unit rows are taken from the inputs again, not from their fp16 form. One block more, the first,
// adds up dL/dtau.
#include "fours.cuh"

#define THREADS 128

// Whether one row alone is the positive of unit row o, and o its: the tiles leave them out.
static __device__ bool has_partner(const hex_problem_t &p, int64_t o)
{
    return !p.several && o < p.B + p.M;
}

// What a row is made of. The reads here do not wait for one another.
template <class real> struct owner {
    void *dz;
    const hex_rows_t *x, *y;
    int64_t at, there, to;  // where the row, its partner and its gradient start
    double inverse, theirs; // 1 / |z|, the partner's: 0 without
    real given, taken;      // g_op, g_po
    real *partial;
    int64_t slices, step; // from slice to slice

    __device__ __forceinline__ owner(const hex_problem_t &p, const hex_run &r,
                                     const hex_gradient_t &g, int64_t o)
    {
        const hex_origin from = origin_of(p, o);
        const int input = from.input;
        dz = input == 0 ? g.dz[0] : input == 1 ? g.dz[1] : g.dz[2]; // no index: no local memory
        x = &p.input[input], y = &p.input[input < 2 ? 1 - input : 2];
        at = row_start(*x, from.row);
        to = (from.row - (input < 2 ? p.first : 0)) * p.D;
        inverse = r.unit.inverse[o];
        there = 0, theirs = 0, given = taken = 0;
        if (has_partner(p, o)) {
            const real *k = (const real *)r.coefficients;
            const int64_t q = partner_of(o, p.B);
            there = row_start(*y, image_of(o, p.B));
            theirs = r.unit.inverse[q];
            given = k[coefficient(K_POSITIVE, o)], taken = k[coefficient(K_POSITIVE, q)];
        }
    }

    __device__ __forceinline__ void find_slices(const hex_run &r, int64_t o)
    {
        partial = NULL, slices = 0, step = r.parts.rows * r.unit.width;
#pragma unroll 1
        for (int k = 0; k < r.parts.count; k++) {
            const hex_part &part = r.parts.part[k];
            if (o >= part.row0 && o < part.row1) {
                partial = (real *)r.partial + (part.first_row + o - part.row0) * r.unit.width;
                slices = part.slices;
            }
        }
    }
};

// dL/dtau from the parts that unit.cu left.
static __device__ void sum_dtau(const hex_problem_t &p, const hex_run &r, const hex_gradient_t &g,
                                double *scratch)
{
    const int64_t anchors = anchors_of(p);
    const double sum =
        block_sum_of(r.unit.positive, (anchors + HEX_SUMMED - 1) / HEX_SUMMED, scratch);
    if (threadIdx.x == 0)
        write_number(g.dtau, p.tau.dtype, 0,
                     p.reduction == HEX_MEAN && anchors ? sum / (double)anchors : sum);
}

// ---- rows that are read four features at a time ----

// z / |z| in double, or in float where all inputs have 16 bits and so has the gradient.
static __device__ double over_length(double z, double inverse) { return z * inverse; }
static __device__ float over_length(float z, hex_inverse by) { return z * by.scale * by.high; }
static __device__ double inverse_as(double inverse, double) { return inverse; }
static __device__ hex_inverse inverse_as(double inverse, float)
{
    return inverse_in_floats(inverse);
}

// Adds up to N of the slices that are left, all on their way at once, from the lane's place on.
template <int N, int LANES, int QUADS, class number>
static __device__ __forceinline__ void add_slices(number (&sum)[QUADS][4], const float *partial,
                                                  int64_t step, int left, int features)
{
    uint4 got[N][QUADS];
#pragma unroll
    for (int n = 0; n < N; n++, partial += step)
#pragma unroll
        for (int q = 0; q < QUADS; q++)
            got[n][q] = n < left && 4 * LANES * q < features
                            ? load_four(partial, HEX_F32, 4 * LANES * q)
                            : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            float v[4];
            widen_four(v, got[n][q], HEX_F32);
#pragma unroll
            for (int k = 0; k < 4; k++)
                sum[q][k] += (number)v[k];
        }
}

// A row has LANES lanes; lane l has features 4 (l + LANES q) to those + 3. Every row is read once,
// du stays in registers.
template <int LANES, int QUADS, class number>
static __global__ void __launch_bounds__(THREADS, QUADS > 2 ? 3 : 4)
    project_fours(hex_problem_t p, hex_run r, hex_gradient_t g, hex_parts rows)
{
    constexpr int BATCH = QUADS > 2 ? 2 : sizeof(number) > 4 ? 4 : 8; // as registers allow
    HEX_SHARED_MEMORY(shared);
    const int64_t block = (int64_t)blockIdx.x - (g.dtau ? 1 : 0);
    if (block < 0) {
        sum_dtau(p, r, g, (double *)shared);
        return;
    }
    const int64_t row = block * (THREADS / LANES) + threadIdx.x / LANES;
    const bool there = row < rows.rows; // all lanes of a warp add up together
    const int64_t o = nth_row(rows, there ? row : rows.rows - 1);
    owner<float> own(p, r, g, o);
    const hex_dtype_t dtype = own.x->dtype, other = own.y->dtype;
    const int first = 4 * ((int)threadIdx.x % LANES), features = (int)p.D - first;
    const bool partners = has_partner(p, o);
    uint4 mine[QUADS], partner[QUADS];
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        const int64_t d = first + 4 * LANES * q;
        const bool some = 4 * LANES * q < features;
        mine[q] = some ? load_four(own.x->data, dtype, own.at + d) : make_uint4(0, 0, 0, 0);
        partner[q] = partners && some ? load_four(own.y->data, other, own.there + d)
                                      : make_uint4(0, 0, 0, 0);
    }
    own.find_slices(r, o);
    const int slices = (int)own.slices;
    const float *partial = own.partial + first;
    number du[QUADS][4] = {}, u[QUADS][4], along = 0;
    if (slices < 2) // as of most rows of a large batch
        add_slices<1, LANES>(du, partial, own.step, slices, features);
    else
        for (int n = 0; n < slices; n += BATCH)
            add_slices<BATCH, LANES>(du, partial + n * own.step, own.step, slices - n, features);

    const auto by = inverse_as(own.inverse, number()), theirs = inverse_as(own.theirs, number());
    const number weight = (number)own.given + (number)own.taken;
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        float x[4], y[4];
        widen_four(x, mine[q], dtype);
        widen_four(y, partner[q], other);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u[q][k] = over_length((number)x[k], by);
            if (partners)
                du[q][k] += weight * over_length((number)y[k], theirs);
            along += du[q][k] * u[q][k];
        }
    }
#pragma unroll
    for (int k = LANES / 2; k > 0; k >>= 1)
        along += __shfl_xor_sync(~0u, along, k);
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        float out[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
            out[k] = own.inverse == 0 ? 0 : (float)over_length(du[q][k] - along * u[q][k], by);
        if (there && 4 * LANES * q < features)
            store_four(own.dz, dtype, own.to + first + 4 * LANES * q, out);
    }
}

// ---- and any others ----

template <class real>
static __global__ void __launch_bounds__(THREADS, 1)
    project_rows(hex_problem_t p, hex_run r, hex_gradient_t g, hex_parts rows)
{
    HEX_SHARED_MEMORY(shared);
    const int lane = (int)threadIdx.x & 31;
    const int64_t block = (int64_t)blockIdx.x - (g.dtau ? 1 : 0);
    if (block < 0) {
        sum_dtau(p, r, g, (double *)shared);
        return;
    }
    const int64_t row = block * (THREADS / 32) + (threadIdx.x >> 5);
    if (row >= rows.rows)
        return;
    const int64_t o = nth_row(rows, row);
    owner<real> own(p, r, g, o);
    own.find_slices(r, o);
    const hex_rows_t &x = *own.x, &y = *own.y;
    const double weight = ((double)own.given + (double)own.taken) * own.theirs;
    const bool partners = has_partner(p, o);
    auto du = [&](int64_t d) {
        double sum = partners ? weight * read_number(y.data, y.dtype, own.there + d * y.col) : 0;
        return own.slices > 0 ? sum + (double)own.partial[d] : sum;
    };
    double along = 0;
    for (int64_t d = lane; d < p.D; d += 32) {
        double sum = 0;
#pragma unroll 8 // as many reads on their way
        for (int64_t slice = 0; slice < own.slices; slice++)
            sum += (double)own.partial[slice * own.step + d];
        if (own.slices > 1)
            own.partial[d] = (real)sum; // for this very thread, below
        along += du(d) * (read_number(x.data, x.dtype, own.at + d * x.col) * own.inverse);
    }
    along = warp_sum(along);
    for (int64_t d = lane; d < p.D; d += 32) {
        const double u = read_number(x.data, x.dtype, own.at + d * x.col) * own.inverse;
        write_number(own.dz, x.dtype, own.to + d,
                     own.inverse == 0 ? 0 : (du(d) - along * u) * own.inverse);
    }
}

// ---- launching ----

const char *hex_project(const hex_problem_t &p, const hex_run &r, const hex_gradient_t &g,
                        hex_span band)
{
    // Of the band's rows those whose gradient is wanted.
    const int64_t z0 = p.first, z1 = p.B + p.first, views = p.B + p.M;
    const hex_span own[] = {
        {z0, z0 + p.count}, {z1, z1 + hex_block_rows(&p, 1)}, {views, r.unit.count}};
    hex_parts rows = {};
    for (int k = 0; k < 3; k++) {
        const hex_span both = common(own[k], band);
        if (!g.dz[k] || both.begin >= both.end)
            continue;
        hex_part &part = rows.part[rows.count++];
        part.row0 = both.begin, part.row1 = both.end;
        rows.rows += both.end - both.begin;
    }
    if (rows.rows == 0 && !g.dtau)
        return NULL;
    const int bytes = THREADS / 32 * (int)sizeof(double);
    bool fours = hex_in_fours(p), narrow = true;
    for (int k = 0; k < (p.mode == HEX_UNPAIRED ? 3 : 2); k++) {
        fours &= (uintptr_t)g.dz[k] % 16 == 0;
        narrow &= p.input[k].dtype != HEX_F32;
    }
    auto launch = [&](auto kernel, int lanes) {
        const int64_t a_block = THREADS / lanes;
        const int64_t blocks = (rows.rows + a_block - 1) / a_block + (g.dtau ? 1 : 0);
        HEX_LAUNCH(kernel, dim3((unsigned)blocks), dim3(THREADS), bytes, r.stream, p, r, g, rows);
    };
    if (!fours && p.compute_f64)
        launch(project_rows<double>, 32);
    else if (!fours)
        launch(project_rows<float>, 32);
    else if (p.D <= 128)
        narrow ? launch(project_fours<16, 2, float>, 16) : launch(project_fours<16, 2, double>, 16);
    else if (p.D <= 256)
        narrow ? launch(project_fours<32, 2, float>, 32) : launch(project_fours<32, 2, double>, 32);
    else
        narrow ? launch(project_fours<32, 4, float>, 32) : launch(project_fours<32, 4, double>, 32);
    return hex_launched("backward projection");
}

cudaError_t hex_find_code(void)
{
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, project_rows<float>);
}
