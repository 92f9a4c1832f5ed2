/* SPDX-License-Identifier: MIT */
/* Problems drawn at random, as named values, and calls of the extension's operators with them, whose
 * arguments are read off the operators' own schemas. */
#ifndef ALONE_PROBLEM_H
#define ALONE_PROBLEM_H

#include "../../csrc/hex.h"
#include "torch.h"

/* ---- random numbers: splitmix64 ---- */

typedef struct {
    uint64_t state;
} random_t;

uint64_t draw(random_t *r);
int64_t below(random_t *r, int64_t n);                   /* in [0, n) */
int64_t between(random_t *r, int64_t low, int64_t high); /* in [low, high] */
double unit(random_t *r);                                /* in [0, 1) */
bool chance(random_t *r, double probability);

/* ---- values by name ---- */

typedef struct {
    const char *name;
    tensor_t *tensor; /* or NULL, and one of */
    int64_t number;
    double real;
} value_t;

enum { MOST_VALUES = 48 };

typedef struct {
    value_t value[MOST_VALUES];
    int count;
} values_t;

value_t *value_of(values_t *v, const char *name);            /* made where it is new */
void set_tensor(values_t *v, const char *name, tensor_t *t); /* which is the values' from here on */
tensor_t *tensor_named(values_t *v, const char *name);
void clear(values_t *v);

/* ---- calls ---- */

typedef struct {
    const operator_t *op;
    int count;
    tensor_t *out[5];
    bool threw; /* then error_text says why, and there are no outputs */
} result_t;

result_t call(values_t *v, const operator_t *op);
void drop(result_t *r);
/* Whether an output is room for cosines: what is between its rows may be anything. */
bool kept_output(const operator_t *op, int output);
bool same_bits(const result_t *a, const result_t *b);

/* What is done with each call; it returns the results to go on with. */
typedef result_t check_t(values_t *v, const operator_t *op);

/* ---- problems ---- */

enum { TINY, ROWS, TILES, LISTS, SIZE_CLASSES };

/* Problem `number`: mode, type and the class of sizes follow from it, all else from the seed. Then
 * every operator is called with it, through `check`. */
void solve(uint64_t seed, int64_t number, check_t *check);
/* "ntxent, float32, tiles, labels outside": where it is, for messages. */
const char *described(void);

#endif
