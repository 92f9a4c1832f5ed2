// SPDX-License-Identifier: MIT
// Rows of contiguous features, which a warp or half of one reads once, four features at a time, and
// keeps in registers: unit.cu and project.cu. Rows with other strides are read as core.cuh does.
#pragma once
#include "core.cuh"

// Whether all inputs can be read so, and their rows fit in a warp's registers.
static inline bool hex_in_fours(const hex_problem_t &p)
{
    bool fit = !p.compute_f64 && p.mode != HEX_PAIRED && p.D % 4 == 0 && p.D <= 512;
    for (int k = 0; k < (p.mode == HEX_UNPAIRED ? 3 : 2); k++) {
        const hex_rows_t &x = p.input[k];
        const uintptr_t bytes = x.dtype == HEX_F32 ? 16 : 8;
        fit &= x.dtype != HEX_F64 && x.col == 1 && x.row % 4 == 0 && (uintptr_t)x.data % bytes == 0;
    }
    return fit;
}

// Four features as they stand in memory, in all four words or in two: nothing waits for them yet.
SHARED_DEVICE uint4 load_four(const void *data, hex_dtype_t dtype, int64_t at)
{
    if (dtype == HEX_F32)
        return *(const uint4 *)((const uint32_t *)data + at);
    const uint2 v = *(const uint2 *)((const uint16_t *)data + at);
    return make_uint4(v.x, v.y, 0, 0);
}

SHARED_DEVICE void widen_four(float (&v)[4], uint4 raw, hex_dtype_t dtype)
{
    const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
    if (dtype == HEX_F32) {
#pragma unroll
        for (int k = 0; k < 4; k++)
            v[k] = __uint_as_float(w[k]);
    } else if (dtype == HEX_F16) {
#pragma unroll
        for (int k = 0; k < 4; k++)
            v[k] = f16_to_float((uint16_t)(w[k / 2] >> 16 * (k & 1)));
    } else {
#pragma unroll
        for (int k = 0; k < 4; k++)
            v[k] = bf16_to_float((uint16_t)(w[k / 2] >> 16 * (k & 1)));
    }
}

SHARED_DEVICE void store_four(void *data, hex_dtype_t dtype, int64_t at, const float (&v)[4])
{
    if (dtype == HEX_F32)
        *(uint4 *)((uint32_t *)data + at) =
            make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                       __float_as_uint(v[3]));
    else if (dtype == HEX_F16)
        *(uint2 *)((uint16_t *)data + at) = make_uint2(pack_f16(v[0], v[1]), pack_f16(v[2], v[3]));
    else
        *(uint2 *)((uint16_t *)data + at) =
            make_uint2(float_to_bf16(v[0]) | (uint32_t)float_to_bf16(v[1]) << 16,
                       float_to_bf16(v[2]) | (uint32_t)float_to_bf16(v[3]) << 16);
}

// 1 / |z| as scale (high + low). The scale is a power of two and takes the exponent, up to what a
// float can have, so that z scale is exact, and neither it nor `high` leaves a float's range for
// any row of floats. A NaN makes NaN of all; of 0, high is 0.
struct hex_inverse {
    float scale, high, low;
};
SHARED_DEVICE hex_inverse inverse_in_floats(double inverse)
{
    int e = (int)(__double_as_longlong(inverse) >> 52 & 0x7ff) - 1023;
    e = e < -126 ? -126 : e > 126 ? 126 : e;
    const double rest = inverse * __longlong_as_double((long long)(1023 - e) << 52);
    const float high = (float)rest;
    return {__uint_as_float((unsigned)(127 + e) << 23), high, (float)(rest - (double)high)};
}
