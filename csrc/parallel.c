/* SPDX-License-Identifier: MIT */
/* Threads for the CPU core: torch's own pool, because a second OpenMP runtime in the process breaks
 * users.
 *
 * In a forked child the loop runs on the calling thread: the pool's threads did not survive the
 * fork, and asking for them waits for ever (torch's own operators do). Nothing here depends on the
 * number of threads, so neither do results. */
#include <pthread.h>
#include <stdatomic.h>

#include "hex.h"
#include "ops.h"
#include "torch_shim.h"

static atomic_bool forked;

static void after_fork_in_child(void) { forked = true; }

bool hex_watch_forks(void) { return pthread_atfork(NULL, NULL, after_fork_in_child) == 0; }

bool hex_parallel_for(int64_t n, hex_body body, void *context)
{
    if (forked || n <= 1) {
        if (n > 0)
            body(0, n, context);
        return true;
    }
    return torch_parallel_for(0, n, 1, body, context) == 0;
}
