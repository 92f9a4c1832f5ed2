// SPDX-License-Identifier: MIT
// Products on the tensor cores of panels of 64 rows and 64 features: mma.sync, and on Hopper wgmma.
//
// Unit rows stand in memory as fp16, in panels that are laid out as shared memory wants them (place_of
// in core.cuh): a row is 128 bytes whose eight 16-byte chunks are exchanged by c ^ (row & 7). So
// ldmatrix meets no bank twice, wgmma reads its 128-byte swizzle, and a panel is copied in one piece.
#pragma once
#include "core.cuh"

#define BN 64
#define PANEL 64
#define HALVES (BN * PANEL) // of a panel

DEVICE void clear(float (&acc)[8][4])
{
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int q = 0; q < 4; q++)
            acc[n][q] = 0;
}

// acc += 16 rows a warp of the panel a times the 64 rows of the panel b; FRESH: acc is set.
template <bool FRESH>
DEVICE void multiply_panel(float (&acc)[8][4], const uint16_t *a, const uint16_t *b)
{
#ifdef HEX_WGMMA
    const uint32_t pa = wgmma_panel(a), pb = wgmma_panel(b);
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++) // 16 halves are two units of 16 bytes
        if (FRESH && k == 0)
            wgmma_f16<true>(acc, pa, pb);
        else
            wgmma_f16<false>(acc, pa + 2 * k, pb + 2 * k);
#else
    if (FRESH)
        clear(acc);
    const int warp = (int)threadIdx.x >> 5 & 3, lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++) {
        uint32_t x[4];
        ldmatrix(x, a + swizzle(warp * 16 + (lane & 15), 2 * k + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < BN / 16; n++) {
            uint32_t y[4];
            ldmatrix(y,
                     b + swizzle(16 * n + (lane & 7) + (lane >> 4 << 3), 2 * k + (lane >> 3 & 1)));
            mma_f16(acc[2 * n], x, y[0], y[1]);
            mma_f16(acc[2 * n + 1], x, y[2], y[3]);
        }
    }
#endif
}

// The warp's 16 rows of a panel in shared memory, as the left operand of four products.
DEVICE void load_fragments(uint32_t (&to)[4][4], const uint16_t *a)
{
    const int warp = (int)threadIdx.x >> 5 & 3, lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++)
        ldmatrix(to[k], a + swizzle(warp * 16 + (lane & 15), 2 * k + (lane >> 4)));
}

// The same with a as fragments.
template <bool FRESH>
DEVICE void multiply_panel(float (&acc)[8][4], const uint32_t (&a)[4][4], const uint16_t *b)
{
#ifdef HEX_WGMMA
    const uint32_t pb = wgmma_panel(b);
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++)
        if (FRESH && k == 0)
            wgmma_f16<true>(acc, a[k], pb);
        else
            wgmma_f16<false>(acc, a[k], pb + 2 * k);
#else
    if (FRESH)
        clear(acc);
    const int lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < PANEL / 16; k++)
#pragma unroll
        for (int n = 0; n < BN / 16; n++) {
            uint32_t y[4];
            ldmatrix(y,
                     b + swizzle(16 * n + (lane & 7) + (lane >> 4 << 3), 2 * k + (lane >> 3 & 1)));
            mma_f16(acc[2 * n], a[k], y[0], y[1]);
            mma_f16(acc[2 * n + 1], a[k], y[2], y[3]);
        }
#endif
}

// acc (16 rows a warp, 64 features) += the weights a (16 rows a warp, 64 columns) times the panel
// b, whose 64 rows are those columns.
DEVICE void multiply_transposed(float (&acc)[8][4], const uint32_t (&a)[4][4], const uint16_t *b)
{
#ifdef HEX_WGMMA
    const uint32_t pb = wgmma_panel_transposed(b);
#pragma unroll
    for (int k = 0; k < BN / 16; k++) // 16 rows are 128 units of 16 bytes
        wgmma_f16_transposed(acc, a[k], pb + 128 * k);
#else
    const int lane = (int)threadIdx.x & 31;
#pragma unroll
    for (int k = 0; k < BN / 16; k++)
#pragma unroll
        for (int d = 0; d < PANEL / 16; d++) {
            uint32_t y[4];
            ldmatrix_transposed(y, b + swizzle(16 * k + (lane & 15), 2 * d + (lane >> 4)));
            mma_f16(acc[2 * d], a[k], y[0], y[1]);
            mma_f16(acc[2 * d + 1], a[k], y[2], y[3]);
        }
#endif
}

#ifndef HEX_WGMMA
template <class Accumulators> DEVICE void wgmma_begin(Accumulators &) {}
template <class Accumulators> DEVICE void wgmma_end(Accumulators &) {}
DEVICE void wgmma_operand(uint32_t (&)[4][4]) {}
#endif
