// SPDX-License-Identifier: MIT
// One kernel for each primitive of csrc/cuda/, by whose answers a GPU and the emulation are held to
// the same plain arithmetic (test_cuda_emulation.py, test_gpu.py): a belief about a lane's place
// that kernels and emulation share, and that is wrong, would show nowhere else.
//
// a and b are 64 rows of 64 halves, laid out as place_of in core.cuh has it; of b there are TILES.
#include "../../csrc/cuda/tile.cuh"

#define TILES 11
#define THREADS 128

// Panels into shared memory, as the kernels bring them: the n-th of a block's copies.
DEVICE void bring(uint16_t *to, const uint16_t *from, int bytes, unsigned char *shared)
{
#ifdef HEX_WGMMA
    uint64_t *barrier = (uint64_t *)(shared + 4 * HALVES);
    if (threadIdx.x == 0) {
        barrier_start(barrier, 1);
        barrier_fence();
        barrier_expect(barrier, bytes);
        copy_bulk(to, from, bytes, barrier);
    }
    __syncthreads();
    barrier_wait(barrier, 0);
    __syncthreads();
    if (threadIdx.x == 0)
        barrier_stop(barrier);
#else
    (void)shared;
    for (int k = 8 * (int)threadIdx.x; k < bytes / 2; k += 8 * (int)blockDim.x)
        copy_async(to + k, from + k);
    copy_wait();
    __syncthreads();
#endif
}

// The accumulators of four warps as 64 rows.
DEVICE void put(const float (&acc)[8][4], float *c)
{
    const int row = (int)threadIdx.x / 32 * 16 + ((int)threadIdx.x & 31) / 4;
    for (int n = 0; n < 8; n++)
        for (int q = 0; q < 4; q++)
            c[(row + 8 * (q >> 1)) * 64 + 8 * n + 2 * ((int)threadIdx.x & 3) + (q & 1)] = acc[n][q];
}

// c (16 x 8) = 16 rows and features of a times 8 rows of b: mma.sync, from fragments put together
// by hand.
static __global__ void mma(const uint16_t *a, const uint16_t *b, float *c)
{
    const int g = (int)threadIdx.x >> 2, t = (int)threadIdx.x & 3;
    auto two = [](const uint16_t *p, int row, int k) {
        return p[swizzle(row, k >> 3) + k % 8] | (uint32_t)p[swizzle(row, k >> 3) + k % 8 + 1]
                                                     << 16;
    };
    uint32_t x[4];
    for (int i = 0; i < 4; i++)
        x[i] = two(a, g + 8 * (i & 1), 2 * t + 8 * (i >> 1));
    float acc[4] = {};
    mma_f16(acc, x, two(b, g, 2 * t), two(b, g, 2 * t + 8));
    for (int q = 0; q < 4; q++)
        c[(g + 8 * (q >> 1)) * 8 + 2 * t + (q & 1)] = acc[q];
}

// c (64 x 64) = a b': both from shared memory; or a as fragments; or a b, with b transposed.
enum { SHARED, FRAGMENTS, TRANSPOSED };
template <int KIND> static __global__ void panel(const uint16_t *a, const uint16_t *b, float *c)
{
    HEX_SHARED_MEMORY(shared);
    uint16_t *x = (uint16_t *)shared, *y = x + HALVES;
    bring(x, a, 2 * HALVES, shared);
    bring(y, b, 2 * HALVES, shared);
    float acc[8][4];
    uint32_t left[4][4];
    load_fragments(left, x);
    clear(acc);
    wgmma_begin(acc);
    if (KIND == SHARED)
        multiply_panel<true>(acc, x, y);
    else if (KIND == FRAGMENTS)
        multiply_panel<true>(acc, left, y);
    else
        multiply_transposed(acc, left, y);
    wgmma_end(acc);
    put(acc, c);
}

// c (64 x 64) = the sum over the tiles of b of (k + 1) a b[k]': the stream of panels, whose slots
// go round several times while warps are late in turn.
static __global__ void stream(const uint16_t *a, const uint16_t *b, hex_fit fit, float *c)
{
    HEX_SHARED_MEMORY(shared);
    hex_unit unit = {};
    unit.count = 64 * TILES, unit.width = 64, unit.tiles = (uint16_t *)b;
    hex_stream<4, false, 1, true> panels;
    panels.start(unit, fit, shared, 0, 0, TILES);
    panels.fill();
    bring((uint16_t *)shared, a, 2 * HALVES, shared + fit.at.more - 4 * HALVES);
    load_fragments(panels.kept[0], (uint16_t *)shared);
    float sum[8][4], acc[8][4];
    clear(sum);
    for (int k = 0; k < TILES; k++) {
        const int slot = panels.cosines(acc);
        panels.done(slot);
        for (int n = 0; n < 8; n++)
            for (int q = 0; q < 4; q++)
                sum[n][q] += (float)(k + 1) * acc[n][q];
    }
    put(sum, c);
}

// c (16 x 64): element (g, 2 t + h) of the transposed 8 x 8 matrices that ldmatrix_transposed takes
// from rows and columns of a (16 x 64 used), as the right operand of the second product.
static __global__ void transposed(const uint16_t *a, const uint16_t *, float *c)
{
    HEX_SHARED_MEMORY(shared);
    uint16_t *x = (uint16_t *)shared;
    bring(x, a, 2 * HALVES, shared);
    const int lane = (int)threadIdx.x, g = lane >> 2, t = lane & 3;
    for (int d = 0; d < 4; d++) {
        uint32_t y[4];
        ldmatrix_transposed(y, x + swizzle(lane & 15, 2 * d + (lane >> 4)));
        for (int q = 0; q < 4; q++) // q & 1: the rows from 8 on; q >> 1: the columns from 8 on
            for (int h = 0; h < 2; h++)
                c[(8 * (q & 1) + 2 * t + h) * 64 + 16 * d + 8 * (q >> 1) + g] =
                    f16_to_float((uint16_t)(y[q] >> 16 * h));
    }
}

// c: for each lane the 2^x of its fp16 number, the first of a's, the warp's sum, the sum of the
// lanes up to it, the number as bfloat16 has it, and the products of two halves with 2^-20.
static __global__ void lanes(const uint16_t *a, const uint16_t *, float *c)
{
    const int lane = (int)threadIdx.x;
    const float x = f16_to_float(a[swizzle(0, lane >> 3) + lane % 8]);
    float upto = x;
    for (int k = 1; k < 32; k <<= 1) {
        const float other = __shfl_up_sync(~0u, upto, k);
        upto += lane >= k ? other : 0;
    }
    c[lane] = ex2(x);
    c[32 + lane] = warp_sum(x);
    c[64 + lane] = upto;
    c[96 + lane] = bf16_to_float(float_to_bf16(x));
    const uint32_t two = multiply_f16(pack_f16(x, -x), pack_f16(0x1p-20f, 0x1p-2f));
    c[128 + lane] = f16_to_float((uint16_t)two);
    c[160 + lane] = f16_to_float((uint16_t)(two >> 16));
}

const char *hex_launched(const char *kernel)
{
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? NULL : kernel;
}

extern "C" __attribute__((visibility("default"))) const char *
hex_conformance(int which, const void *a, const void *b, void *c)
{
    const uint16_t *x = (const uint16_t *)a, *y = (const uint16_t *)b;
    const int bytes = 4 * HALVES + 16;
    float *z = (float *)c;
    hex_fit fit = {true, 3, layout_of(4, false, true, false, 1, 1, 3, 16)};
    switch (which) {
    case 0:
        HEX_LAUNCH(mma, dim3(1), dim3(32), 0, 0, x, y, z);
        return hex_launched("mma");
    case 1:
        HEX_LAUNCH(panel<SHARED>, dim3(1), dim3(THREADS), bytes, 0, x, y, z);
        return hex_launched("panel");
    case 2:
        HEX_LAUNCH(transposed, dim3(1), dim3(32), bytes, 0, x, y, z);
        return hex_launched("transposed");
    case 3:
        HEX_LAUNCH(panel<FRAGMENTS>, dim3(1), dim3(THREADS), bytes, 0, x, y, z);
        return hex_launched("fragments");
    case 4:
        HEX_LAUNCH(panel<TRANSPOSED>, dim3(1), dim3(THREADS), bytes, 0, x, y, z);
        return hex_launched("transposed product");
    case 5:
        HEX_LAUNCH(stream, dim3(1), dim3(THREADS), (int)fit.at.bytes, 0, x, y, fit, z);
        return hex_launched("stream");
    default:
        HEX_LAUNCH(lanes, dim3(1), dim3(32), 0, 0, x, y, z);
        return hex_launched("lanes");
    }
}
