// SPDX-License-Identifier: MIT
// What every way to the threshold shares: the bins that a row's quantile is found in, and the step
// of the tracker with the mean of the rows.
#pragma once
#include "core.cuh"

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

// ---- the quantile or the bounds of a row by a block of its own (plain.cu, logits.cu) ----

struct hex_row_choice {
    hex_choice of;
    double *rows;     // room for the quantile of each row
    void *low, *high; // its bounds instead, compute type
};

// What a thread knows of its block's row. Two passes, of each element first `add`, then `pick`.
struct hex_row_bins {
    double least, most, finite; // of what the thread has seen
    int apart[2];               // bins of elements that all threads know; -1: none
    bool negatives;             // whether the quantile is over negatives alone
    int coarse, bin;
    int64_t rank, length;

    __device__ __forceinline__ void start(const hex_choice &choice)
    {
        least = INFINITY, most = -INFINITY, finite = 0;
        apart[0] = apart[1] = -1, coarse = bin = 0, rank = length = 0;
        negatives = choice.negatives;
    }
    __device__ __forceinline__ void see(double x)
    {
        least = fmin(least, x), most = fmax(most, x), finite += x * 0;
    }
    // An element of the whole row that is none of the columns, by all threads.
    __device__ __forceinline__ void add_apart(double x)
    {
        see(x);
        if (!negatives)
            apart[apart[0] < 0 ? 0 : 1] = bin_of((float)x);
    }
    // The histogram's bin to count an element of the whole row in, or -1.
    __device__ __forceinline__ int add(double x, int pass, bool negative)
    {
        see(x);
        const int in = bin_of((float)x);
        return negatives && !negative ? -1
               : pass == 0            ? in >> 8
               : in >> 8 == coarse    ? in & 255
                                      : -1;
    }
    // By each warp, from the counts of all bins.
    __device__ __forceinline__ void pick(const uint32_t *counts, int pass, double quantile)
    {
        uint32_t count[8]; // of the lane's bins
        for (int k = 0; k < 8; k++)
            count[k] = counts[8 * (threadIdx.x & 31) + k];
        if (pass == 0) {
            uint32_t all = 0;
            for (int k = 0; k < 8; k++)
                all += count[k];
            length = (int64_t)warp_sum(all) + (apart[0] >= 0) + (apart[1] >= 0);
            rank = length > 0 ? (int64_t)rint(quantile * (double)(length - 1)) : -1;
        }
        int extra[2];
        for (int k = 0; k < 2; k++)
            extra[k] = apart[k] < 0              ? -1
                       : pass == 0               ? apart[k] >> 8
                       : apart[k] >> 8 == coarse ? apart[k] & 255
                                                 : -1;
        bin = pick_bin(count, extra[0], extra[1], &rank);
        if (pass == 0)
            coarse = bin;
    }

    // The row's result to its place, and of the last block the mean of the quantiles. scratch: three
    // numbers for each warp.
    template <class real>
    __device__ __forceinline__ void finish(const hex_run &r, const hex_row_choice &choice,
                                           double *scratch, unsigned *flag)
    {
        const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
        const int warps = (int)blockDim.x / 32;
        for (int k = 16; k > 0; k >>= 1) {
            least = fmin(least, __shfl_xor_sync(~0u, least, k));
            most = fmax(most, __shfl_xor_sync(~0u, most, k));
            finite += __shfl_xor_sync(~0u, finite, k);
        }
        if (lane == 0)
            scratch[3 * warp] = least, scratch[3 * warp + 1] = most, scratch[3 * warp + 2] = finite;
        __syncthreads();
        for (int k = 0; k < warps; k++) {
            least = fmin(least, scratch[3 * k]), most = fmax(most, scratch[3 * k + 1]);
            finite += scratch[3 * k + 2];
        }
        const int64_t at = blockIdx.x, rows = r.parts.rows;
        if (choice.low) {
            const bool some = finite == 0 && least <= most;
            if (threadIdx.x == 0) {
                ((real *)choice.low)[at] = (real)(some ? fmax(fmin(least, 1.0), -1.0) : NAN);
                ((real *)choice.high)[at] = (real)(some ? fmax(fmin(most, 1.0), -1.0) : NAN);
            }
            return;
        }
        const double quantile = finite != 0  ? (double)NAN
                                : length > 0 ? bin_middle(256 * coarse + bin)
                                             : (double)INFINITY; // of a row that is empty
        if (threadIdx.x == 0 && choice.of.each)
            ((real *)choice.of.each)[at] = (real)quantile;
        else if (threadIdx.x == 0)
            choice.rows[at] = quantile;
        if (choice.of.each || !last_to_arrive(r.tickets, rows, flag))
            return;
        double sum = 0, count = 0;
        for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
            const double x = __ldcg(choice.rows + i);
            const bool there = x != (double)INFINITY;
            sum += there ? x : 0, count += there;
        }
        sum = block_sum(sum, scratch);
        count = block_sum(count, scratch);
        if (threadIdx.x == 0)
            settle(choice.of, sum / count, rows); // NaN where no row has an element
    }
};
