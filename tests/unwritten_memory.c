/* SPDX-License-Identifier: MIT */
/* Preloaded: memory for numbers, the core's by aligned_alloc and torch's by posix_memalign, comes
 * full of NaN, whatever the type, so that a number that nothing wrote shows. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

int posix_memalign(void **memory, size_t alignment, size_t size)
{
    int (*allocate)(void **, size_t, size_t) = NULL;
    *(void **)&allocate = dlsym(RTLD_NEXT, "posix_memalign");
    const int error = allocate(memory, alignment, size);
    if (!error)
        memset(*memory, 0xff, size);
    return error;
}

void *aligned_alloc(size_t alignment, size_t size)
{
    void *memory = NULL;
    return posix_memalign(&memory, alignment, size) ? NULL : memory;
}
