// SPDX-License-Identifier: MIT
// The last kernel of the backward, a warp for each row of an input whose gradient is wanted: adds
// the slices in their order and the partner's part, projects, and rounds once to the input's dtype.
//
//     dz_o = (du_o - (du_o . u_o) u_o) / |z_o|,   du_o = sum of slices + (g_op + g_po) u_p
//
// Unit rows are taken from the inputs again, not from their fp16 form. One block more, the first,
// adds up dL/dtau.
#include "core.cuh"

#define THREADS 128

template <class real>
static __global__ void __launch_bounds__(THREADS, 1)
    project_rows(hex_problem p, hex_run r, hex_gradient g, int64_t row0, int64_t row1)
{
    HEX_SHARED_MEMORY(shared);
    const int lane = (int)threadIdx.x & 31;
    const int64_t anchors = anchors_of(p);
    const int64_t block = (int64_t)blockIdx.x - (g.dtau ? 1 : 0);
    if (block < 0) {
        double sum = 0;
        const real *stats = (const real *)g.stats + HEX_STAT_DTAU * anchors;
        for (int64_t i = threadIdx.x; i < anchors; i += THREADS)
            sum += read_vector(g.grad, i) * (double)stats[i];
        sum = block_sum(sum, (double *)shared);
        if (threadIdx.x == 0)
            write_number(g.dtau, p.tau.dtype, 0,
                         p.reduction == HEX_MEAN && anchors ? sum / (double)anchors : sum);
        return;
    }
    const int64_t o = row0 + block * (THREADS / 32) + (threadIdx.x >> 5);
    if (o >= row1)
        return;
    const int input = o < p.B ? 0 : o < 2 * p.B ? 1 : 2;
    void *dz = input == 0 ? g.dz[0] : input == 1 ? g.dz[1] : g.dz[2]; // no index: no local memory
    if (!dz)
        return;
    const hex_rows &x = p.input[input];
    const int64_t at = row_start(x, o - input * p.B);
    const double inverse = r.unit.inverse[o];

    real *partial = NULL;
    int64_t slices = 0;
    for (int k = 0; k < r.parts.count; k++) {
        const hex_part &part = r.parts.part[k];
        if (o >= part.row0 && o < part.row1) {
            partial = (real *)r.partial + (part.first_row + o - part.row0) * r.unit.width;
            slices = part.slices;
        }
    }
    const int64_t q = input < 2 ? partner_of(o, p.B) : o;
    const hex_rows &y = p.input[input < 2 ? 1 - input : 2];
    const int64_t there = row_start(y, input < 2 ? image_of(o, p.B) : o - 2 * p.B);
    double weight = 0;
    if (input < 2) {
        const real *positive = (const real *)r.coefficients + K_POSITIVE * r.unit.count;
        weight = ((double)positive[o] + (double)positive[q]) * r.unit.inverse[q];
    }
    const int64_t step = r.parts.rows * r.unit.width; // from slice to slice
    auto du = [&](int64_t d) {
        double sum = input < 2 ? weight * read_number(y.data, y.dtype, there + d * y.col) : 0;
        return slices > 0 ? sum + (double)partial[d] : sum;
    };
    double along = 0;
    for (int64_t d = lane; d < p.D; d += 32) {
        double sum = 0;
#pragma unroll 8 // as many reads on their way
        for (int64_t slice = 0; slice < slices; slice++)
            sum += (double)partial[slice * step + d];
        if (slices > 1)
            partial[d] = (real)sum; // for this very thread, below
        along += du(d) * (read_number(x.data, x.dtype, at + d * x.col) * inverse);
    }
    along = warp_sum(along);
    for (int64_t d = lane; d < p.D; d += 32) {
        const double u = read_number(x.data, x.dtype, at + d * x.col) * inverse;
        write_number(dz, x.dtype, (o - input * p.B) * p.D + d,
                     inverse == 0 ? 0 : (du(d) - along * u) * inverse);
    }
}

const char *hex_project(const hex_problem &p, const hex_run &r, const hex_gradient &g, int64_t row0,
                        int64_t row1)
{
    hex_gradient wanted = g;
    if (p.mode != HEX_SHARED)
        wanted.dz[2] = NULL;
    // Of the band's rows those from the first to the last that is wanted.
    const int64_t input[] = {0, p.B, 2 * p.B, r.unit.count};
    int64_t first = row1, end = row0;
    for (int k = 0; k < 3; k++) {
        const int64_t from = input[k] > row0 ? input[k] : row0;
        const int64_t to = input[k + 1] < row1 ? input[k + 1] : row1;
        if (!wanted.dz[k] || from >= to)
            continue;
        first = from < first ? from : first;
        end = to;
    }
    const int64_t row_blocks = first < end ? (end - first + THREADS / 32 - 1) / (THREADS / 32) : 0;
    const int64_t blocks = row_blocks + (g.dtau ? 1 : 0);
    if (blocks == 0)
        return NULL;
    const int bytes = THREADS / 32 * (int)sizeof(double);
    if (p.wide)
        HEX_LAUNCH(project_rows<double>, dim3((unsigned)blocks), dim3(THREADS), bytes, r.stream, p,
                   r, wanted, first, end);
    else
        HEX_LAUNCH(project_rows<float>, dim3((unsigned)blocks), dim3(THREADS), bytes, r.stream, p,
                   r, wanted, first, end);
    return hex_launched("backward projection");
}

cudaError_t hex_find_code(void)
{
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, project_rows<float>);
}
