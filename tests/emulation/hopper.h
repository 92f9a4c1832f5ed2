// SPDX-License-Identifier: MIT
// What only Hopper has of csrc/cuda/ptx.cuh, for cuda_emu.h, which includes this: barriers in
// shared memory that count arrivals and bytes, bulk copies, and the products of four warps.
#pragma once

static inline emu::Counter *hex_emu_counter(uint64_t *barrier)
{
    static_assert(sizeof(emu::Counter) == sizeof(uint64_t), "in the place of an mbarrier");
    if (!emu::is_shared(barrier))
        emu::fail("a barrier is not in shared memory");
    return (emu::Counter *)barrier;
}
static inline void barrier_start(uint64_t *barrier, int arrivals)
{
    emu::Counter *c = hex_emu_counter(barrier);
    if (c->wanted != 0xffff && c->wanted != (emu::LARGE << 8 | emu::LARGE))
        emu::fail("a barrier is set up where there is one"); // it has to be stopped first
    *c = {(uint16_t)arrivals, (uint16_t)arrivals, 0, 0};
}
static inline void barrier_stop(uint64_t *barrier) { memset(hex_emu_counter(barrier), 255, 8); }
static inline void barrier_fence() {}
static inline void barrier_arrive(uint64_t *barrier)
{
    emu::Counter *c = hex_emu_counter(barrier);
    if (c->wanted == 0 || c->wanted > 0x7000 || c->missing == 0)
        emu::fail("an arrival that the barrier does not wait for");
    c->missing--;
    emu::check(c);
}
static inline void barrier_expect(uint64_t *barrier, int bytes)
{
    hex_emu_counter(barrier)->bytes += (unsigned)bytes;
    barrier_arrive(barrier);
}
static inline void barrier_wait(uint64_t *barrier, unsigned parity)
{
    emu::Fiber &f = *emu::S.current;
    f.counter = hex_emu_counter(barrier);
    f.parity = parity;
    if (!emu::over(f))
        emu::yield();
    f.counter = nullptr;
}
static inline void barrier_wait_together(uint64_t *barrier, unsigned parity)
{
    barrier_wait(barrier, parity);
    __syncwarp();
}
static inline void copy_bulk(void *to, const void *from, int bytes, uint64_t *barrier)
{
    if (((uintptr_t)to | (uintptr_t)from | (unsigned)bytes) & 15)
        emu::fail("copy_bulk: an address or the size is not a multiple of 16");
    if (!emu::is_shared(to) || !emu::is_shared((char *)to + bytes - 1) || emu::is_shared(from))
        emu::fail("copy_bulk: not from global to shared memory");
    const emu::Bulk b = {hex_emu_counter(barrier), to, from, (uint32_t)bytes};
    if (emu::S.seed & 1)
        emu::land(b);
    else
        emu::S.bulk.push_back(b);
}

// A descriptor is the place in shared memory in units of 16 bytes; the swizzle is undone here.
static inline uint32_t wgmma_panel(const void *p)
{
    if ((uintptr_t)p & 1023 || !emu::is_shared(p))
        emu::fail("wgmma: the panel is not at a multiple of 1024 in shared memory");
    return (uint32_t)((const unsigned char *)p - emu::S.shared) >> 4 | 1 << 16; // never 0
}
static inline uint32_t wgmma_panel_transposed(const void *p) { return wgmma_panel(p); }
template <class Accumulators> static inline void wgmma_begin(Accumulators &) {}
template <class Accumulators> static inline void wgmma_end(Accumulators &) {}
static inline void wgmma_operand(uint32_t (&)[4][4]) {}
// Half k of a panel's row, from the descriptor's place on.
static inline float hex_emu_half(uint32_t d, int row, int k)
{
    const unsigned char *panel = emu::S.shared + ((d & 0x3fc0) << 4);
    const int chunk = (int)(d & 63) + (k >> 3);
    const uint16_t *p = (const uint16_t *)(panel + row * 128 + ((chunk ^ row) & 7) * 16);
    return hex_f16_to_float(p[k & 7]);
}
// A from a panel, where `a` is not 0, else from the threads' registers; B from a panel's rows, or
// TRANSPOSED from its columns.
template <bool FRESH, bool TRANSPOSED>
static inline void hex_emu_wgmma(float (&c)[8][4], const uint32_t *left, uint32_t a, uint32_t b)
{
    emu::Warp *first = &emu::S.warps[(size_t)(emu::S.current->warp - emu::S.warps.data()) / 4 * 4];
    emu::S.current->acc = &c[0][0];
    emu::S.current->left = left;
    emu::arrive(first->group, [=] {
        static float A[64][16], B[64][16];
        for (int r = 0; r < 64; r++)
            for (int k = 0; k < 16; k++) {
                if (a)
                    A[r][k] = hex_emu_half(a, r, k);
                B[r][k] = TRANSPOSED ? hex_emu_half(b, k, r) : hex_emu_half(b, r, k);
            }
        auto each = [&](auto f) {
            for (auto &fiber : emu::S.fibers) {
                const int warp = (int)(fiber.warp - first);
                if (warp >= 0 && warp <= 3)
                    f(fiber, warp * 16 + (fiber.lane >> 2), 2 * (fiber.lane & 3));
            }
        };
        if (!a)
            each([&](emu::Fiber &f, int row, int col) {
                for (int i = 0; i < 4; i++)
                    for (int h = 0; h < 2; h++)
                        A[row + 8 * (i & 1)][col + h + 8 * (i >> 1)] =
                            hex_f16_to_float((uint16_t)(f.left[i] >> 16 * h));
            });
        each([&](emu::Fiber &f, int row, int col) {
            for (int i = 0; i < 32; i++) {
                const float *x = A[row + 8 * (i >> 1 & 1)], *y = B[i / 4 * 8 + col + (i & 1)];
                f.acc[i] = emu::add(FRESH ? 0 : f.acc[i], x, y);
            }
        });
    });
}
template <bool FRESH> static inline void wgmma_f16(float (&c)[8][4], uint32_t a, uint32_t b)
{
    hex_emu_wgmma<FRESH, false>(c, nullptr, a, b);
}
template <bool FRESH>
static inline void wgmma_f16(float (&c)[8][4], const uint32_t (&a)[4], uint32_t b)
{
    hex_emu_wgmma<FRESH, false>(c, a, 0, b);
}
static inline void wgmma_f16_transposed(float (&c)[8][4], const uint32_t (&a)[4], uint32_t b)
{
    hex_emu_wgmma<false, true>(c, a, 0, b);
}
