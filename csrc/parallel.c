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
#include "ieee.h"
#include "ops.h"
#include "torch_shim.h"

static atomic_bool forked;

static void after_fork_in_child(void) { forked = true; }

bool hex_watch_forks(void) { return pthread_atfork(NULL, NULL, after_fork_in_child) == 0; }

/* Below this many operations a chunk is done sooner than another thread is awake. */
#define CHUNK_WORK (1 << 18)

typedef struct {
    hex_body_t body;
    void *context;
} loop;

/* A chunk, on one of the pool's threads. */
static void run_chunk(int64_t begin, int64_t end, void *context)
{
    const loop *l = context;
    const hex_arithmetic_t before = hex_ieee_begin();
    l->body(begin, end, l->context);
    hex_ieee_end(before);
}

bool hex_parallel_for(int64_t n, int64_t work, hex_body_t body, void *context)
{
    loop l = {body, context};
    const int64_t grain = work < CHUNK_WORK ? CHUNK_WORK / (work + 1) + 1 : 1;
    if (forked || n <= grain) {
        if (n > 0)
            body(0, n, context);
        return true;
    }
    return torch_parallel_for(0, n, grain, run_chunk, &l) == 0;
}
