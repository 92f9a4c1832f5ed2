/* SPDX-License-Identifier: MIT */
/* What module.c registers: the boxed kernels of ops.c, and the hook of parallel.c that is set once at
 * import. */
#ifndef HEX_OPS_H
#define HEX_OPS_H

#include <stdbool.h>
#include <stdint.h>

void hex_forward_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_adaptive_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_backward_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);
void hex_quantile_boxed(uint64_t *stack, uint64_t arguments, uint64_t outputs);

bool hex_watch_forks(void);

#endif
