// SPDX-License-Identifier: MIT
// Sums over the rows of all ranks: of each row of a matrix, and the tracker's step with the mean of
// the rows' quantiles. A block adds up a row in double, thread k the numbers k, k + THREADS and so
// on. So the order depends on how many there are alone, and all ranks have the same bits.
#include "bins.cuh"

#define THREADS 1024

static __device__ double number(const hex_matrix_t &x, int64_t i, int64_t j)
{
    return read_number(x.data, x.dtype, i * x.row + j * x.col);
}

static __global__ void __launch_bounds__(THREADS, 1) sum_matrix(hex_matrix_t x, double *sums)
{
    HEX_SHARED_MEMORY(shared);
    double sum = 0;
#pragma unroll 8 // as many reads on their way
    for (int64_t j = threadIdx.x; j < x.columns; j += THREADS)
        sum += number(x, blockIdx.x, j);
    sum = block_sum(sum, (double *)shared);
    if (threadIdx.x == 0)
        sums[blockIdx.x] = sum;
}

static __global__ void __launch_bounds__(THREADS, 1) settle_rows(hex_matrix_t q, hex_choice choice)
{
    HEX_SHARED_MEMORY(shared);
    double sum = 0, count = 0;
#pragma unroll 8
    for (int64_t j = threadIdx.x; j < q.columns; j += THREADS) {
        const double x = number(q, 0, j);
        const bool there = x != (double)INFINITY; // else the row has no element
        sum += there ? x : 0;
        count += there;
    }
    sum = block_sum(sum, (double *)shared);
    count = block_sum(count, (double *)shared);
    if (threadIdx.x == 0)
        settle(choice, sum / count, q.columns); // NaN where there is none
}

const char *hex_sum_matrix(cudaStream_t stream, const hex_matrix_t &x, double *sums)
{
    if (x.rows == 0)
        return NULL;
    HEX_LAUNCH(sum_matrix, dim3((unsigned)x.rows), dim3(THREADS), THREADS / 32 * 8, stream, x,
               sums);
    return hex_launched("sums over the rows");
}

const char *hex_settle_rows(cudaStream_t stream, const hex_matrix_t &q, const hex_choice &choice)
{
    HEX_LAUNCH(settle_rows, dim3(1), dim3(THREADS), THREADS / 32 * 8, stream, q, choice);
    return hex_launched("settle");
}
