/* SPDX-License-Identifier: MIT */
/* The extension's own allocations, which the program sees because its malloc and free come before
 * libc's. They are counted, and can be made to fail one by one. */
#ifndef ALONE_MEMORY_H
#define ALONE_MEMORY_H

#include <stdbool.h>
#include <stdint.h>

/* From here on, of the library that has this address in its code. */
void watch_allocations(const void *address);

extern _Atomic int64_t allocations, failing_allocation; /* its number, or -1 */
extern _Atomic int64_t live_blocks;
/* While this thread runs code of the extension that others call and that frees: the call of free may
 * then come from anywhere. */
extern _Thread_local bool in_extension;

#endif
