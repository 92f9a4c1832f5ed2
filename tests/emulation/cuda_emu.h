// SPDX-License-Identifier: MIT
// Runs the source of csrc/cuda/ on a CPU: the part of CUDA's C++ and of csrc/cuda/ptx.cuh that the
// kernels use, for g++ on x86-64. For tests only; it shows wrong results, not speed.
//
// A CUDA thread is a fiber, a block is run to its end before the next one starts. A warp-wide
// instruction is carried out by the last of its 32 threads to arrive. To bring errors to light:
//
//   shared memory   starts as NaN (seeds 0 and 1 of 4) or as large numbers (2 and 3), and is as
//                   large as the launch says (AddressSanitizer sees more)
//   warps           run in random order, each as far as it gets, four of them seldom: a barrier
//                   that is missing shows
//   copy_async      copies at once (odd seeds) or only at the wait (even seeds): so does a wait
//   copy_bulk       the same; what waits for the barrier sees the copies
//   blocks          odd seeds run them from the last to the first
//   ldmatrix        counts bank conflicts: a wrong swizzle is slow, not wrong
//   tensor cores    round as IEEE does, or cut off as hardware does (tensor_cores.h)
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <utility>
#include <vector>

#include "tensor_cores.h"

extern "C" {
#include "../../csrc/cpu/convert.h"
}

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define DEVICE static inline __attribute__((unused))
#define HEX_SHARED_MEMORY(name) unsigned char *name = emu::S.shared
#define HEX_LAUNCH(kernel, grid, block, shared, stream, ...)                                       \
    ((void)(stream), emu::launch(__FILE__, grid, block, shared, [&] { kernel(__VA_ARGS__); }))

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return {x, y, z, w};
}

typedef void *cudaStream_t;
typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoKernelImageForDevice = 209 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrComputeCapabilityMajor
};
struct cudaFuncAttributes {};

namespace emu
{
struct Barrier {
    unsigned want = 0, arrived = 0, generation = 0;
};
struct Lane { // arguments and results of a warp-wide instruction
    uint64_t word;
    int from;
    uint32_t u[6], r[4];
    float f[4];
    const void *p;
};
struct Warp {
    Barrier bar, group; // group: of four warps, kept by the first
    Lane lane[32];
};
struct Copy { // of 16 bytes
    void *to;
    const void *from;
};
struct Counter {              // a barrier in shared memory, 8 bytes
    uint16_t wanted, missing; // arrivals
    uint32_t phase : 1, bytes : 31;
};
struct Bulk {
    Counter *counter;
    void *to;
    const void *from;
    uint32_t bytes;
};
struct Launch {
    const char *file; // that the kernel is in
    unsigned blocks;
};
struct Fiber {
    void *sp = nullptr;
    char *stack = nullptr;
    uint3 thread;
    int lane = 0;
    Warp *warp = nullptr;
    Barrier *wait = nullptr;
    unsigned wait_generation = 0;
    Counter *counter = nullptr; // waited for, and the phase that has to end
    unsigned parity = 0;
    bool done = false;
    std::vector<Copy> copies;
    float *acc = nullptr; // wgmma's
    const uint32_t *left = nullptr;
};
struct State {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned> order;
    Fiber *current = nullptr;
    void *main_sp = nullptr;
    Barrier block;
    std::vector<Bulk> bulk; // on their way
    dim3 grid, threads;
    uint3 block_index;
    unsigned char *shared = nullptr;
    size_t shared_bytes = 0;
    void (*entry)(void *) = nullptr;
    void *argument = nullptr;
    unsigned seed = 0, seed_given = 0;
    uint64_t launches = 0, conflicts = 0;
    bool recording = false; // launches are noted and not run
    std::vector<Launch> recorded;
    int device = 0;       // the current one
    unsigned no_code = 0; // bit d: the library has no code for device d
    int processors = 3, shared_limit = 227 * 1024;
#ifdef HEX_WGMMA
    int major = 9; // of the compute capability
#else
    int major = 8;
#endif
    int least_allowed = 1 << 30; // shared memory of a kernel, since it was asked
    cudaError_t error = 0;
    int mutant = 0; // of tests/test_cuda_mutants.py, the error that is to be made
};
inline State S;
constexpr size_t STACK = 256 * 1024;
constexpr int LARGE = 0x7b; // fp16 61,000, float 1.3e36

// Saves what a call must preserve, exchanges stacks: a few nanoseconds.
extern "C" void hex_emu_switch(void **save, void *load);
asm(R"(
.text
.p2align 4
.type hex_emu_switch,@function
hex_emu_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp,(%rdi); movq %rsi,%rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size hex_emu_switch,.-hex_emu_switch
)");

inline unsigned random_number() { return (S.seed = S.seed * 1664525u + 1013904223u) >> 8; }
inline void yield() { hex_emu_switch(&S.current->sp, S.main_sp); }

[[noreturn]] inline void fail(const char *what)
{
    const uint3 t = S.current ? S.current->thread : uint3{0, 0, 0};
    fprintf(stderr, "cuda_emu: %s (block %u, thread %u)\n", what, S.block_index.x, t.x);
    fflush(stderr);
    abort();
}

inline bool has_no_code(int device) { return S.no_code >> device & 1; }

inline bool is_shared(const void *p)
{
    const unsigned char *at = (const unsigned char *)p;
    return at >= S.shared && at < S.shared + S.shared_bytes;
}

// A phase ends when all have arrived and all bytes are there.
inline void check(Counter *c)
{
    if (c->missing == 0 && c->bytes == 0) {
        c->phase ^= 1;
        c->missing = c->wanted;
    }
}
inline void land(const Bulk &b)
{
    memcpy(b.to, b.from, b.bytes);
    if (b.counter->bytes < b.bytes)
        fail("copy_bulk: more bytes than its barrier expects");
    b.counter->bytes -= b.bytes;
    check(b.counter);
}
// Whether the phase that the fiber waits for has ended; late copies arrive when somebody waits.
inline bool over(Fiber &f)
{
    if (f.counter->phase == f.parity)
        for (size_t k = 0; k < S.bulk.size(); k++)
            if (S.bulk[k].counter == f.counter) {
                const Bulk b = S.bulk[k];
                S.bulk.erase(S.bulk.begin() + (long)k--);
                land(b);
            }
    return f.counter->phase != f.parity;
}

inline void fiber_main()
{
    S.entry(S.argument);
    S.current->done = true;
    yield();
    abort();
}

// The last to arrive carries `op` out for all and releases the others.
template <class Op> inline void arrive(Barrier &b, Op op)
{
    if (++b.arrived == b.want) {
        b.arrived = 0;
        b.generation++;
        op();
        return;
    }
    S.current->wait = &b;
    S.current->wait_generation = b.generation;
    yield();
}
template <class Op> inline void collective(Op op) { arrive(S.current->warp->bar, op); }
inline Lane &me() { return S.current->warp->lane[S.current->lane]; }

inline void prepare(unsigned i)
{
    Fiber &f = S.fibers[i];
    f.thread = {i, 0, 0};
    f.lane = (int)(i % 32);
    f.warp = &S.warps[i / 32];
    f.wait = nullptr;
    f.counter = nullptr;
    f.done = false;
    f.copies.clear();
    void **sp = (void **)(f.stack + STACK) - 1; // as after a call: rsp % 16 == 8
    *--sp = (void *)fiber_main;
    sp -= 6;
    memset(sp, 0, 6 * sizeof *sp);
    f.sp = sp;
}

inline void run_block()
{
    const unsigned n = (unsigned)S.fibers.size(), warps = n / 32;
    for (unsigned i = 0; i < n; i++)
        prepare(i);
    for (auto &w : S.warps) {
        w.bar = {32, 0, 0};
        w.group = {128, 0, 0};
    }
    S.block = {n, 0, 0};
    const unsigned slow = S.seed ? random_number() % ((warps + 3) / 4) : warps;
    bool together = true; // the slow ones run too
    for (unsigned left = n; left;) {
        bool moved = false;
        for (unsigned i = warps - 1; S.seed && i > 0; i--)
            std::swap(S.order[i], S.order[random_number() % (i + 1)]);
        for (unsigned k = 0; k < warps; k++)
            for (bool again = together || S.order[k] / 4 != slow; again;) {
                again = false;
                for (unsigned lane = 0; lane < 32; lane++) {
                    Fiber &f = S.fibers[S.order[k] * 32 + lane];
                    if (f.done || (f.wait && f.wait->generation == f.wait_generation))
                        continue;
                    if (f.counter && !over(f))
                        continue;
                    f.wait = nullptr;
                    f.counter = nullptr;
                    S.current = &f;
                    moved = again = true;
                    hex_emu_switch(&S.main_sp, f.sp);
                    left -= f.done;
                }
            }
        if (!moved && together)
            fail("deadlock: some threads wait where the others never come");
        together = !moved || (S.seed && random_number() % 8 == 0);
    }
    if (!S.bulk.empty())
        fail("copy_bulk: the block ended before its copy did");
    S.current = nullptr;
}

template <class Body>
inline void launch(const char *file, dim3 grid, dim3 threads, size_t shared, Body body)
{
    const unsigned n = threads.x;
    if (has_no_code(S.device)) {
        S.error = cudaErrorNoKernelImageForDevice;
        return;
    }
    if (n % 32 || n == 0 || n > 1024 || grid.x == 0 || shared > (size_t)S.shared_limit) {
        S.error = cudaErrorInvalidValue;
        return;
    }
    S.launches++;
    if (S.recording) {
        S.recorded.push_back({file, grid.x});
        return;
    }
    for (Fiber &f : S.fibers)
        free(f.stack);
    S.fibers.clear();
    S.fibers.resize(n);
    for (Fiber &f : S.fibers)
        f.stack = (char *)aligned_alloc(64, STACK);
    S.warps.resize(n / 32);
    S.order.resize(n / 32);
    for (unsigned i = 0; i < n / 32; i++)
        S.order[i] = i;
    void *p = nullptr;
    if (posix_memalign(&p, 1024, shared ? shared : 1))
        abort();
    S.shared = (unsigned char *)p;
    S.shared_bytes = shared;
    S.grid = grid;
    S.threads = threads;
    S.entry = [](void *b) { (*(Body *)b)(); };
    S.argument = &body;
    const bool backwards = S.seed & 1;
    for (unsigned b = 0; b < grid.x; b++) {
        S.block_index = {backwards ? grid.x - 1 - b : b, 0, 0};
        memset(S.shared, S.seed_given & 2 ? LARGE : 0xff, shared);
        run_block();
    }
    free(p);
    S.shared = nullptr;
}
} // namespace emu

#define threadIdx (emu::S.current->thread)
#define blockIdx (emu::S.block_index)
#define blockDim (emu::S.threads)
#define gridDim (emu::S.grid)

static inline cudaError_t cudaMemsetAsync(void *p, int byte, size_t n, cudaStream_t)
{
    memset(p, byte, n);
    return cudaSuccess;
}
template <class F> static inline cudaError_t cudaFuncSetAttribute(F, int, int bytes)
{
    emu::S.least_allowed = bytes < emu::S.least_allowed ? bytes : emu::S.least_allowed;
    return bytes <= emu::S.shared_limit ? cudaSuccess : emu::S.error = cudaErrorInvalidValue;
}
template <class F> static inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *, F)
{
    return emu::S.error =
               emu::has_no_code(emu::S.device) ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}
static inline cudaError_t cudaGetLastError() { return std::exchange(emu::S.error, 0); }
static inline const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorNoKernelImageForDevice ? "no kernel image" : "invalid argument";
}
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
static inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *)
{
    return cudaSuccess;
}
static inline cudaError_t cudaGetDevice(int *d) { return *d = emu::S.device, cudaSuccess; }
static inline cudaError_t cudaSetDevice(int d) { return emu::S.device = d, cudaSuccess; }
static inline cudaError_t cudaGetDeviceCount(int *n) { return *n = 2, cudaSuccess; }
static inline cudaError_t cudaDeviceGetAttribute(int *v, int which, int)
{
    *v = which == cudaDevAttrMultiProcessorCount      ? emu::S.processors
         : which == cudaDevAttrComputeCapabilityMajor ? emu::S.major
                                                      : emu::S.shared_limit;
    return cudaSuccess;
}

static inline void __syncthreads()
{
    emu::arrive(emu::S.block, [] {});
}
static inline void __syncwarp(unsigned = ~0u)
{
    emu::collective([] {});
}
static inline void __threadfence() {}
// Of global memory alone: the device would fault.
template <class T> static inline T __ldcg(const T *p)
{
    if (emu::is_shared(p))
        emu::fail("__ldcg: the address is one of shared memory");
    return *p;
}
template <class T> static inline T __shfl_sync(unsigned, T v, int from)
{
    static_assert(sizeof(T) <= 8, "a register or two");
    emu::Lane &m = emu::me();
    memcpy(&m.word, &v, sizeof v);
    m.from = from & 31;
    emu::Warp *w = emu::S.current->warp;
    emu::collective([w] {
        uint64_t old[32];
        for (int i = 0; i < 32; i++)
            old[i] = w->lane[i].word;
        for (auto &l : w->lane)
            l.word = old[l.from];
    });
    T r;
    memcpy(&r, &emu::me().word, sizeof r);
    return r;
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int x)
{
    return __shfl_sync(mask, v, emu::S.current->lane ^ x);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T v, int by)
{
    const int lane = emu::S.current->lane;
    return __shfl_sync(mask, v, lane >= by ? lane - by : lane);
}
static inline unsigned __ballot_sync(unsigned, int p)
{
    emu::Lane &m = emu::me();
    m.u[0] = p != 0;
    emu::Warp *w = emu::S.current->warp;
    emu::collective([w] {
        unsigned b = 0;
        for (int i = 0; i < 32; i++)
            b |= w->lane[i].u[0] << i;
        for (auto &l : w->lane)
            l.r[0] = b;
    });
    return emu::me().r[0];
}
static inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
static inline unsigned __float_as_uint(float f) { return hex_to_bits(f); }
static inline float __uint_as_float(unsigned u) { return hex_from_bits(u); }
static inline double __longlong_as_double(long long x)
{
    double y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline long long __double_as_longlong(double x)
{
    long long y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline double __dmul_rn(double x, double y) { return x * y; } // x86-64 fuses nothing
static inline double __dadd_rn(double x, double y) { return x + y; }
static inline double rsqrt(double x) { return 1 / sqrt(x); }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; } // NaN: 0
static inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> static inline T atomicAdd(T *p, T v)
{
    T old = *p;
    *p = old + v;
    return old;
}

// ---- csrc/cuda/ptx.cuh ----
static inline unsigned anew(unsigned x) { return x; }
static inline float ex2(float x)
{
    const float y = exp2f(x);
    return y < 0x1p-126f ? 0 : y;
}
static inline uint16_t float_to_f16(float x) { return hex_float_to_f16(x); }
static inline float f16_to_float(uint16_t x) { return hex_f16_to_float(x); }
static inline uint16_t float_to_bf16(float x) { return hex_float_to_bf16(x); }
static inline float bf16_to_float(uint16_t x) { return hex_bf16_to_float(x); }
static inline uint32_t pack_f16(float low, float high)
{
    return hex_float_to_f16(low) | (uint32_t)hex_float_to_f16(high) << 16;
}

static inline uint32_t multiply_f16(uint32_t x, uint32_t y)
{
    auto half = [](uint32_t v, int h) { return hex_f16_to_float((uint16_t)(v >> 16 * h)); };
    return pack_f16(half(x, 0) * half(y, 0), half(x, 1) * half(y, 1)); // exact before it rounds
}

static inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    emu::Lane &m = emu::me();
    emu::Warp *w = emu::S.current->warp;
    memcpy(m.u, a, sizeof a);
    m.u[4] = b0, m.u[5] = b1;
    memcpy(m.f, c, sizeof c);
    emu::collective([w] {
        float A[16][16], B[8][16];
        for (int l = 0; l < 32; l++) {
            const int g = l >> 2, t = l & 3;
            for (int i = 0; i < 6; i++)
                for (int h = 0; h < 2; h++) {
                    const float x = hex_f16_to_float((uint16_t)(w->lane[l].u[i] >> 16 * h));
                    if (i < 4)
                        A[g + 8 * (i & 1)][2 * t + h + 8 * (i >> 1)] = x;
                    else
                        B[g][2 * t + h + 8 * (i - 4)] = x;
                }
        }
        for (int l = 0; l < 32; l++)
            for (int q = 0; q < 4; q++) {
                const float *x = A[(l >> 2) + 8 * (q >> 1)], *y = B[2 * (l & 3) + (q & 1)];
                w->lane[l].f[q] = emu::add(w->lane[l].f[q], x, y);
            }
    });
    memcpy(c, emu::me().f, sizeof c);
}

template <bool TRANSPOSED> static inline void hex_emu_ldmatrix(uint32_t (&r)[4], const void *p)
{
    emu::Warp *w = emu::S.current->warp;
    emu::me().p = p;
    if ((uintptr_t)p & 15 || !emu::is_shared(p))
        emu::fail("ldmatrix: the address is not a multiple of 16 in shared memory");
    emu::collective([w] {
        for (int q = 0; q < 4; q++) { // its 8 rows should lie in 8 different groups of banks
            unsigned seen = 0;
            for (int l = 0; l < 8; l++) {
                const unsigned bit = 1u << ((uintptr_t)w->lane[8 * q + l].p >> 4 & 7);
                emu::S.conflicts += (seen & bit) != 0;
                seen |= bit;
            }
        }
        for (int l = 0; l < 32; l++)
            for (int q = 0; q < 4; q++) {
                const int row = l >> 2, col = 2 * (l & 3);
                uint16_t v[2];
                for (int h = 0; h < 2; h++)
                    v[h] = TRANSPOSED ? ((const uint16_t *)w->lane[8 * q + col + h].p)[row]
                                      : ((const uint16_t *)w->lane[8 * q + row].p)[col + h];
                w->lane[l].r[q] = v[0] | (uint32_t)v[1] << 16;
            }
    });
    memcpy(r, emu::me().r, sizeof r);
}
static inline void ldmatrix(uint32_t (&r)[4], const void *p) { hex_emu_ldmatrix<false>(r, p); }
static inline void ldmatrix_transposed(uint32_t (&r)[4], const void *p)
{
    hex_emu_ldmatrix<true>(r, p);
}

static inline void copy_async(void *to, const void *from)
{
    if (((uintptr_t)to | (uintptr_t)from) & 15)
        emu::fail("copy_async: an address is not a multiple of 16");
    if (!emu::is_shared(to) || emu::is_shared(from))
        emu::fail("copy_async: not from global to shared memory");
    if (emu::S.seed & 1)
        memcpy(to, from, 16);
    else
        emu::S.current->copies.push_back({to, from});
}
static inline void copy_wait()
{
    for (const emu::Copy &c : emu::S.current->copies)
        memcpy(c.to, c.from, 16);
    emu::S.current->copies.clear();
}

static inline void fence_async() {}
#ifdef HEX_WGMMA
#include "hopper.h"
#endif

extern "C" {
// 0: threads in order. See above.
inline __attribute__((used, visibility("default"))) void hex_emu_seed(unsigned seed)
{
    emu::S.seed = emu::S.seed_given = seed;
}
inline __attribute__((used, visibility("default"))) void hex_emu_device(int processors, int shared)
{
    emu::S.processors = processors;
    emu::S.shared_limit = shared;
}
inline __attribute__((used, visibility("default"))) void hex_emu_major(int major)
{
    emu::S.major = major;
}
inline __attribute__((used, visibility("default"))) void hex_emu_mutant(int mutant)
{
    emu::S.mutant = mutant;
}
// The tensor cores' additions: tensor_cores.h.
inline __attribute__((used, visibility("default"))) void hex_emu_truncate(int extra_bits)
{
    emu::extra = extra_bits;
}
// Bit d of the mask: the library has no code for device d.
inline __attribute__((used, visibility("default"))) void hex_emu_no_code(unsigned devices)
{
    emu::S.no_code = devices;
}
// The least shared memory that a kernel was allowed to have since this was called last.
inline __attribute__((used, visibility("default"))) int hex_emu_least_allowed()
{
    return std::exchange(emu::S.least_allowed, 1 << 30);
}
inline __attribute__((used, visibility("default"))) uint64_t hex_emu_count(int which)
{
    return which ? emu::S.conflicts : emu::S.launches;
}
// From now on launches are noted and not run; false: they run again.
inline __attribute__((used, visibility("default"))) void hex_emu_record(bool record)
{
    emu::S.recording = record;
    emu::S.recorded.clear();
}
// The file of the kernel of the launch number `which` that was noted, and its blocks; NULL: there
// were fewer.
inline __attribute__((used, visibility("default"))) const char *hex_emu_recorded(int which,
                                                                                 unsigned *blocks)
{
    if ((size_t)which >= emu::S.recorded.size())
        return nullptr;
    *blocks = emu::S.recorded[(size_t)which].blocks;
    return emu::S.recorded[(size_t)which].file;
}
}
