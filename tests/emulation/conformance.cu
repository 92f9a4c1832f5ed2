// SPDX-License-Identifier: MIT
// One kernel for each primitive of csrc/cuda/, by whose answers a GPU and the emulation are held to
// the same plain arithmetic (test_cuda_emulation.py, test_gpu.py): a belief about a lane's place
// that kernels and emulation share, and that is wrong, would show nowhere else.
#include "../../csrc/cuda/tile.cuh"

// c (16 x 8) = a (16 x 16) b' (8 x 16): mma.sync, from fragments put together by hand.
static __global__ void mma(const uint16_t *a, const uint16_t *b, float *c)
{
    const int g = (int)threadIdx.x >> 2, t = (int)threadIdx.x & 3;
    auto two = [](const uint16_t *p) { return p[0] | (uint32_t)p[1] << 16; };
    uint32_t x[4];
    for (int i = 0; i < 4; i++)
        x[i] = two(a + (g + 8 * (i & 1)) * 16 + 2 * t + 8 * (i >> 1));
    float acc[4] = {};
    mma_f16(acc, x, two(b + g * 16 + 2 * t), two(b + g * 16 + 2 * t + 8));
    for (int q = 0; q < 4; q++)
        c[(g + 8 * (q >> 1)) * 8 + 2 * t + (q & 1)] = acc[q];
}

// c (64 x 64) = a (64 x 64) b' (64 x 64): copies, swizzle, ldmatrix, and mma.sync or wgmma.
static __global__ void panel(const uint16_t *a, const uint16_t *b, float *c)
{
    HEX_SHARED_MEMORY(shared);
    uint16_t *x = (uint16_t *)shared, *y = x + B_HALVES;
    load_panel<64, 128>(x, a, 64, 0, 64, 0);
    load_panel<64, 128>(y, b, 64, 0, 64, 0);
    copy_wait();
    fence_async();
    __syncthreads();
    float acc[8][4] = {};
    multiply_panel(acc, x, y);
    const int row = (int)threadIdx.x / 32 * 16 + ((int)threadIdx.x & 31) / 4;
    for (int n = 0; n < 8; n++)
        for (int q = 0; q < 4; q++)
            c[(row + 8 * (q >> 1)) * 64 + 8 * n + 2 * ((int)threadIdx.x & 3) + (q & 1)] = acc[n][q];
}

// c (16 x 64): element (g, 2 t + h) of the transposed 8 x 8 matrices that ldmatrix_transposed takes
// from rows and columns of a (16 x 64 used), as the right operand of the second product.
static __global__ void transposed(const uint16_t *a, const uint16_t *, float *c)
{
    HEX_SHARED_MEMORY(shared);
    uint16_t *x = (uint16_t *)shared;
    load_panel<64, 32>(x, a, 64, 0, 64, 0);
    copy_wait();
    __syncthreads();
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

// c: for each lane its fp16 number's 2^x, the warp's sum, the sum of the lanes up to it, and the
// number as bfloat16 has it.
static __global__ void lanes(const uint16_t *a, const uint16_t *, float *c)
{
    const int lane = (int)threadIdx.x;
    const float x = f16_to_float(a[lane]);
    float upto = x;
    for (int k = 1; k < 32; k <<= 1) {
        const float other = __shfl_up_sync(~0u, upto, k);
        upto += lane >= k ? other : 0;
    }
    c[lane] = ex2(x);
    c[32 + lane] = warp_sum(x);
    c[64 + lane] = upto;
    c[96 + lane] = bf16_to_float(float_to_bf16(x));
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
    const int bytes = 4 * B_HALVES;
    float *z = (float *)c;
    switch (which) {
    case 0:
        HEX_LAUNCH(mma, dim3(1), dim3(32), 0, 0, x, y, z);
        return hex_launched("mma");
    case 1:
        HEX_LAUNCH(panel, dim3(1), dim3(128), bytes, 0, x, y, z);
        return hex_launched("panel");
    case 2:
        HEX_LAUNCH(transposed, dim3(1), dim3(32), bytes, 0, x, y, z);
        return hex_launched("transposed");
    default:
        HEX_LAUNCH(lanes, dim3(1), dim3(32), 0, 0, x, y, z);
        return hex_launched("lanes");
    }
}
