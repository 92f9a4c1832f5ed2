/* SPDX-License-Identifier: MIT */
/* Memory on the CPU: buffers of the core, and what it keeps from a forward to a backward.
 *
 * It is aligned to cache lines. aligned_alloc would do that, but in many a glibc (up to 2.37) what
 * it gives back does not serve the next call of the same size: the ends that it cuts off stay in
 * use, a buffer of a step is put behind them, and the heap grows with each step, by gigabytes. A
 * chunk of malloc's serves again, so it is aligned here. */
#ifndef HEX_MEMORY_H
#define HEX_MEMORY_H

#include <stdint.h>
#include <stdlib.h>

#define HEX_ALIGNMENT 64

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Never NULL for zero elements. The sizes come from tensors that exist, so the product overflows
 * only for buffers many times as large as their inputs: that is refused as out of memory. */
static inline void *allocate(int64_t n, int64_t m, size_t size)
{
    int64_t bytes;
    if (__builtin_mul_overflow(n, m, &bytes) ||
        __builtin_mul_overflow(bytes, (int64_t)size, &bytes) ||
        bytes > INT64_MAX - 2 * HEX_ALIGNMENT)
        return NULL;
    char *memory = malloc((size_t)round_up(bytes, HEX_ALIGNMENT) + HEX_ALIGNMENT);
    if (!memory)
        return NULL;
    void **aligned = (void **)(memory + HEX_ALIGNMENT - (uintptr_t)memory % HEX_ALIGNMENT);
    aligned[-1] = memory; /* malloc's own alignment leaves room for it */
    return aligned;
}

/* What came from allocate(), or NULL. */
static inline void release(void *memory)
{
    if (memory)
        free(((void **)memory)[-1]);
}

#endif
