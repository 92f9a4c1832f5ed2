/* SPDX-License-Identifier: MIT */
/* Preloaded: memory, the core's by malloc and torch's by posix_memalign, comes full of NaN, whatever
 * the type, so that a number that nothing wrote shows. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

void *__libc_malloc(size_t size); /* glibc's own; to look malloc up takes malloc */

void *malloc(size_t size)
{
    void *memory = __libc_malloc(size);
    return memory ? memset(memory, 0xff, size) : NULL;
}

int posix_memalign(void **memory, size_t alignment, size_t size)
{
    int (*allocate)(void **, size_t, size_t) = NULL;
    *(void **)&allocate = dlsym(RTLD_NEXT, "posix_memalign");
    const int error = allocate(memory, alignment, size);
    if (!error)
        memset(*memory, 0xff, size);
    return error;
}
