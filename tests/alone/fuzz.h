/* SPDX-License-Identifier: MIT */
/* A call's arguments, some of them changed to any others that torch could hand over. */
#ifndef ALONE_FUZZ_H
#define ALONE_FUZZ_H

#include "problem.h"

enum { FUZZED_CALLS = 12 }; /* of each call that is right */

/* A copy of the values, with one to three of those changed that the operator takes. */
values_t changed_values(random_t *r, const values_t *v, const operator_t *op);

#endif
