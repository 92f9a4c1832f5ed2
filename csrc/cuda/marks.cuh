// SPDX-License-Identifier: MIT
// What the cosines of a tile are to their rows and to their columns where a problem has labels, a
// mask, groups or a guide (sets.cuh), as bits of a word: bit 4 n + q of a thread is its acc[n][q],
// and every fourth and the next one are of its first row, the others of its second.
//
// Panels of a guide stand before the others of 64 rows, so that its cosines are there first and
// become bits before the tile's own are computed.
#pragma once
#include "sets.cuh"
#include "tile.cuh"

#define BITS_OF_ROW(h) (0x33333333u << 2 * (h))

// One direction: the rows as anchors of the columns, or the columns as anchors of the rows.
struct hex_marks {
    uint32_t positive, negative, hard; // `hard` says nothing of what is no negative
    uint32_t unknown;                  // what a guide has no number for
};

// Calls f(bit, n, q, column of the tile) for each of the thread's cosines.
template <class F> DEVICE void for_each_bit(F f)
{
    const int t = (int)threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int q = 0; q < 4; q++)
            f(1u << (4 * n + q), n, q, 8 * n + 2 * t + (q & 1));
}

// The thread's cosines that are larger than their limit.
template <class Limit> DEVICE uint32_t bits_above(const float (&acc)[8][4], Limit limit)
{
    uint32_t bits = 0;
    for_each_bit([&](uint32_t bit, int n, int q, int col) {
        bits |= acc[n][q] > limit(q >> 1, col) ? bit : 0;
    });
    return bits;
}

DEVICE uint32_t bits_not_numbers(const float (&acc)[8][4])
{
    uint32_t bits = 0;
    for_each_bit(
        [&](uint32_t bit, int n, int q, int) { bits |= acc[n][q] != acc[n][q] ? bit : 0; });
    return bits;
}

// What a thread knows of its two rows.
struct hex_marker {
    hex_places places;
    const int64_t *ids, *groups, *places_in_mask; // of all rows; NULL: there are none
    hex_mask_t mask;
    int64_t id[2], group[2], place[2];
    int views; // UNPAIRED: rows of z1 end here, which are seen by their positives only; else 0
    bool several;

    __device__ __forceinline__ void start(const hex_problem_t &p, const hex_run &r, int64_t row0)
    {
        several = p.several;
        places.start(row0, several ? 0 : p.B); // of several positives none is left out
        ids = r.ids, groups = r.groups, places_in_mask = r.places, mask = p.mask;
        views = several && p.mode == HEX_UNPAIRED ? (int)(p.B + p.M) : 0;
        for (int h = 0; h < 2; h++) {
            const bool there = places.row[h] < r.unit.count;
            id[h] = ids && there ? ids[places.row[h]] : 0;
            group[h] = groups && there ? groups[places.row[h]] : 0;
            place[h] = places_in_mask && there ? places_in_mask[places.row[h]] : 0;
        }
    }

    // Those of two columns, of which the first is even.
    struct alignas(16) pair {
        int64_t first, second;
    };
    static __device__ __forceinline__ pair pair_at(const int64_t *codes)
    {
        return *(const pair *)codes;
    }

    // The marks of a tile but for `hard` where no groups say that. to: of the columns as anchors,
    // where it is not NULL.
    __device__ __forceinline__ hex_marks enter(int tile, int col0, int col1, hex_marks *to)
    {
        const bool edge = places.enter(tile, col0, col1);
        uint32_t seen = ~0u, positive = 0, positive_to, of_z1 = 0, hard = 0, out = 0, out_to = 0;
        if (edge) {
            seen = 0;
            for_each_bit([&](uint32_t bit, int, int q, int col) {
                seen |= places.leaves_out(q >> 1, col) ? 0 : bit;
            });
        }
        const int t = (int)threadIdx.x & 3, first = tile * BN + 2 * t;
        if (ids)
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const pair of = pair_at(ids + first + 8 * n);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    positive |= of.first == id[h] ? 1u << (4 * n + 2 * h) : 0;
                    positive |= of.second == id[h] ? 2u << (4 * n + 2 * h) : 0;
                }
            }
        positive_to = positive;
        if (places_in_mask) // unrolled, it would take registers from problems without a mask
#pragma unroll 1
            for (int n = 0; n < 8; n++) {
                const pair of = pair_at(places_in_mask + first + 8 * n);
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    const int64_t other = q ? of.second : of.first;
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const uint32_t bit = 1u << (4 * n + 2 * h + q);
                        add_code(code_in_mask(mask, place[h], other), bit, positive, out);
                        if (to)
                            add_code(code_in_mask(mask, other, place[h]), bit, positive_to, out_to);
                    }
                }
            }
        if (groups)
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const pair of = pair_at(groups + first + 8 * n);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    hard |= of.first == group[h] ? 1u << (4 * n + 2 * h) : 0;
                    hard |= of.second == group[h] ? 2u << (4 * n + 2 * h) : 0;
                }
            }
        if (to) {
            uint32_t row_of_z1 = 0; // which is no negative of the columns
            for (int h = 0; h < 2; h++)
                row_of_z1 |= places.row[h] < views ? BITS_OF_ROW(h) : 0;
            *to = {positive_to & seen, seen & ~(positive_to | row_of_z1 | out_to), hard, 0};
        }
        if (tile * BN < views)
            for_each_bit([&](uint32_t bit, int, int, int col) {
                of_z1 |= tile * BN + col < views ? bit : 0;
            });
        return {positive & seen, seen & ~(positive | of_z1 | out), hard, 0};
    }
    __device__ __forceinline__ void add_code(int code, uint32_t bit, uint32_t &positive,
                                             uint32_t &out) const
    {
        positive |= code == HEX_CODE_POSITIVE && several ? bit : 0;
        out |= code == HEX_CODE_LEFT_OUT ? bit : 0;
    }
};

// Every tile of a block with its marks, handed to `fold`. eps: of the thread's two rows.
template <int WARPS, bool SPLIT, class Fold>
DEVICE void for_each_marked_tile(const hex_block &block, const hex_problem_t &p, const hex_run &r,
                                 const hex_fit &fit, unsigned char *shared, const float (&eps)[2],
                                 Fold &fold)
{
    hex_stream<WARPS, SPLIT, 0, false> stream;
    hex_marker marker;
    stream.start(r.unit, fit, shared, block.row0, block.tile0, block.tile1, block.stride);
    stream.fill();
    fold.start();
    __syncthreads();
    marker.start(p, r, block.row0);
    const int col0 = (int)block.part.col0, col1 = (int)block.part.col1;
    const auto limit = [&](int h, int) { return h ? eps[1] : eps[0]; };
    for (int tile = block.tile0; tile < block.tile1; tile += block.stride) {
        float acc[8][4];
        hex_marks marks = marker.enter(tile, col0, col1, NULL);
        if (r.unit.first > 0) {
            stream.cosines(acc, r.unit.first);
            marks.hard = bits_above(acc, limit);
            marks.unknown = bits_not_numbers(acc) & marks.negative;
        }
        stream.cosines(acc, r.unit.panels - r.unit.first);
        if (!r.groups && r.unit.first == 0)
            marks.hard = bits_above(acc, limit);
        fold.tile(acc, marks);
    }
#ifndef HEX_WGMMA
    copy_wait(); // for the rows' panels, where there was no tile
#endif
    __syncthreads(); // the shared memory is free again
    stream.stop();
}
