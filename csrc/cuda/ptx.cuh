// SPDX-License-Identifier: MIT
// The instructions that the kernels use, under names of our own. tests/emulation/cuda_emu.h has the
// same names in C++, so that the kernels' source also runs on a CPU (HEX_EMULATION).
#pragma once
#ifdef HEX_EMULATION
#include "cuda_emu.h"
#else
#include <cuda_runtime.h>
#include <stdint.h>

#define DEVICE static __device__ __forceinline__
#define HEX_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]
#define HEX_LAUNCH(kernel, grid, block, shared, stream, ...)                                       \
    kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)

// Warpgroup instructions exist for sm_90a alone, and there for good.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HEX_WGMMA 1
#endif

DEVICE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// x, of which the compiler then knows nothing: what is computed from it is not kept from before.
DEVICE unsigned anew(unsigned x)
{
    asm volatile("" : "+r"(x));
    return x;
}

// 2^x, error 2 ulp; 0 below 2^-126.
DEVICE float ex2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Conversions between float and the bits of the narrow types, to nearest even.
DEVICE uint16_t float_to_f16(float x)
{
    uint16_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

DEVICE float f16_to_float(uint16_t x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

DEVICE uint16_t float_to_bf16(float x)
{
    uint16_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

DEVICE float bf16_to_float(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }

// Two halves in a register, `low` in the low bits.
DEVICE uint32_t pack_f16(float low, float high)
{
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// The products of the low halves and of the high ones, to nearest even.
DEVICE uint32_t multiply_f16(uint32_t x, uint32_t y)
{
    uint32_t z;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

// c += a b: a 16 x 16 by rows, b 16 x 8 by columns. Lane 4 g + t holds of c the rows g and g + 8,
// columns 2 t and 2 t + 1; of a the same rows, columns 2 t, 2 t + 1 and those + 8; of b the column
// g, rows like a's columns.
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of halves; lane 8 q + r gives the address of row r of matrix q.
DEVICE void ldmatrix(uint32_t (&r)[4], const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}

DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}

// 16 bytes from global to shared memory, in the background.
DEVICE void copy_async(void *to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
}

// Waits for all copies of this thread.
DEVICE void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#ifdef HEX_WGMMA
// ---- barriers in shared memory that count arrivals and bytes ----

// For so many arrivals in each phase. One thread sets all of them up, then calls the fence.
DEVICE void barrier_start(uint64_t *barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

DEVICE void barrier_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::
                     : "memory");
}

// Before its place is used for another, or for the same again.
DEVICE void barrier_stop(uint64_t *barrier)
{
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

DEVICE void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Arrives, and has the phase wait for so many bytes of copy_bulk besides.
DEVICE void barrier_expect(uint64_t *barrier, int bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

DEVICE unsigned barrier_try(uint64_t *barrier, unsigned parity)
{
    unsigned done;
    asm volatile("{\n\t.reg .pred p;\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(done)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
    return done;
}

// Waits for the end of the phase of this parity; the first phase has parity 0.
DEVICE void barrier_wait(uint64_t *barrier, unsigned parity)
{
    while (!barrier_try(barrier, parity))
        ;
}

// The same by all of a warp, which is together afterwards.
DEVICE void barrier_wait_together(uint64_t *barrier, unsigned parity)
{
    while (!__all_sync(~0u, (int)barrier_try(barrier, parity)))
        ;
}

// So many bytes, a multiple of 16, from global to shared memory, by the copy engine.
DEVICE void copy_bulk(void *to, const void *from, int bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Makes what this thread wrote to shared memory visible to the tensor cores, which read it by
// another path.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warpgroup products ----

// A panel of 64 rows of 128 bytes, chunks swizzled by the row, 8 rows to 1024 bytes: the low half
// of its descriptor, in units of 16 bytes. The high half, the same for all, has the 1024 bytes and
// the swizzle. As an operand whose rows are the product's rows or columns; 16 features are 2 units.
DEVICE uint32_t wgmma_panel(const void *p) { return (shared_address(p) & 0x3ffff) >> 4 | 1 << 16; }
// As one whose rows are the product's inner dimension; 16 of them are 128 units. The next 64
// features, of which no product here takes any, would be a panel further on.
DEVICE uint32_t wgmma_panel_transposed(const void *p)
{
    return (shared_address(p) & 0x3ffff) >> 4 | (64 * 128 / 16) << 16;
}
#define PANEL_HIGH 0x40000040

// The accumulator, for the products below and for what stands around them: the compiler knows not
// that it is being written from the first product to wgmma_end, and would otherwise be free to set
// it after wgmma_begin, or to use it before the products are done.
#define ROW(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define ROWS_OF(c)                                                                                 \
    ROW(c, 0), ROW(c, 1), ROW(c, 2), ROW(c, 3), ROW(c, 4), ROW(c, 5), ROW(c, 6), ROW(c, 7)
#define C_IN_REGISTERS                                                                             \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                                      \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "

DEVICE void wgmma_begin(float (&c)[8][4])
{
    asm volatile("wgmma.fence.sync.aligned;" : ROWS_OF(c) : : "memory");
}

DEVICE void wgmma_end(float (&c)[8][4])
{
    asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;"
                 : ROWS_OF(c)
                 :
                 : "memory");
}

// A left operand in registers is complete before the wgmma_begin that follows.
DEVICE void wgmma_operand(uint32_t (&a)[4][4])
{
#pragma unroll
    for (int k = 0; k < 4; k++)
        asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3]) : : "memory");
}

// The same for several accumulators at a time.
template <int N> DEVICE void wgmma_begin(float (&c)[N][8][4])
{
#pragma unroll
    for (int k = 1; k < N; k++)
        asm volatile("" : ROWS_OF(c[k]) : : "memory");
    wgmma_begin(c[0]);
}
template <int N> DEVICE void wgmma_end(float (&c)[N][8][4])
{
    wgmma_end(c[0]);
#pragma unroll
    for (int k = 1; k < N; k++)
        asm volatile("" : ROWS_OF(c[k]) : : "memory");
}

// c (64 x 64 over four warps, each like mma_f16's) += a b; FRESH: c = a b. Both from panels,
template <bool FRESH> DEVICE void wgmma_f16(float (&c)[8][4], uint32_t a, uint32_t b)
{
    asm volatile("{\n\t.reg .b64 a, b;\n\tmov.b64 a, {%32, %34};\n\tmov.b64 b, {%33, %34};\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " C_IN_REGISTERS
                 "a, b, %35, 1, 1, 0, 0;\n\t}"
                 : ROWS_OF(c)
                 : "r"(a), "r"(b), "n"(PANEL_HIGH), "n"(FRESH ? 0 : 1)
                 : "memory");
}

// a from registers, as mma_f16 has it,
template <bool FRESH> DEVICE void wgmma_f16(float (&c)[8][4], const uint32_t (&a)[4], uint32_t b)
{
    asm volatile("{\n\t.reg .b64 b;\n\tmov.b64 b, {%36, %37};\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " C_IN_REGISTERS
                 "{%32,%33,%34,%35}, b, %38, 1, 1, 0;\n\t}"
                 : ROWS_OF(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(PANEL_HIGH),
                   "n"(FRESH ? 0 : 1)
                 : "memory");
}

// and with b transposed: 16 rows of a panel are the product's inner dimension, its 64 features the
// product's columns. The next 16 rows are 128 units further on.
DEVICE void wgmma_f16_transposed(float (&c)[8][4], const uint32_t (&a)[4], uint32_t b)
{
    asm volatile("{\n\t.reg .b64 b;\n\tmov.b64 b, {%36, %37};\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " C_IN_REGISTERS
                 "{%32,%33,%34,%35}, b, 1, 1, 1, 1;\n\t}"
                 : ROWS_OF(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(PANEL_HIGH)
                 : "memory");
}
#undef PANEL_HIGH
#undef C_IN_REGISTERS
#undef ROWS_OF
#undef ROW
#else
DEVICE void fence_async() {}
#endif
#endif
