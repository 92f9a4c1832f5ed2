/* SPDX-License-Identifier: MIT */
/* What module.c registers: the operators of ops.c, and the hook of parallel.c that is set once at
 * import. */
#ifndef HEX_OPS_H
#define HEX_OPS_H

#include <stdbool.h>
#include <stdint.h>

/* Each serves the CPU and, with hex/_cuda.so, CUDA. */
typedef struct {
    const char *name, *schema;
    void (*kernel)(uint64_t *stack, uint64_t arguments, uint64_t outputs);
} hex_operator_t;

enum { HEX_OPERATORS = 8 };
extern const hex_operator_t hex_operators[HEX_OPERATORS];

bool hex_watch_forks(void);

#endif
