/* SPDX-License-Identifier: MIT */
/* What memory.h declares. Under ThreadSanitizer, which has to have malloc for itself, nothing is counted
 * and nothing fails. */
#define _GNU_SOURCE
#include "memory.h"

#include <dlfcn.h>
#include <link.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#ifdef __SANITIZE_ADDRESS__
#define REAL(name) __interceptor_##name
#else
#define REAL(name) __libc_##name
#endif
void *REAL(malloc)(size_t size);
void REAL(free)(void *memory);

_Atomic int64_t allocations, failing_allocation = -1, live_blocks;
_Thread_local bool in_extension;

static uintptr_t code_begin, code_end;

static int find_code(struct dl_phdr_info *library, size_t size, void *of)
{
    const uintptr_t address = *(uintptr_t *)of;
    (void)size;
    for (int k = 0; k < library->dlpi_phnum; k++) {
        const uintptr_t begin = library->dlpi_addr + library->dlpi_phdr[k].p_vaddr,
                        end = begin + library->dlpi_phdr[k].p_memsz;
        if (library->dlpi_phdr[k].p_type == PT_LOAD && begin <= address && address < end)
            code_begin = begin, code_end = end;
    }
    return 0;
}

void watch_allocations(const void *address) { dl_iterate_phdr(find_code, &address); }

#ifndef __SANITIZE_THREAD__
static bool from_extension(void *caller)
{
    return (uintptr_t)caller >= code_begin && (uintptr_t)caller < code_end;
}

/* More than this nobody has: sizes that are drawn at random ask for it. */
#define MOST_BYTES ((size_t)256 << 20)

/* New memory is full of NaN, in every type. */
__attribute__((noinline)) void *malloc(size_t size)
{
    if (!from_extension(__builtin_return_address(0)))
        return REAL(malloc)(size);
    if (atomic_fetch_add(&allocations, 1) == failing_allocation || size > MOST_BYTES)
        return NULL;
    live_blocks++;
    return memset(REAL(malloc)(size), 0xff, size);
}

__attribute__((noinline)) void free(void *memory)
{
    if (memory && (in_extension || from_extension(__builtin_return_address(0))))
        live_blocks--;
    REAL(free)(memory);
}
#endif
