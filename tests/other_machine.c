/* SPDX-License-Identifier: MIT */
/* The operators of csrc/ops.c as a program without torch and Python, so that an emulator can run them
 * as another machine's compiler made them (other_machine.py): calls come on stdin, answers go to
 * stdout. It is linked with all of csrc but module.c, and with alone/torch.c in libtorch's place. Both
 * ends have 64 bits, little-endian. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../csrc/hex.h"
#include "../csrc/ops.h"
#include "alone/torch.h"

enum { WORD = -1 }; /* what is sent: a number; else a tensor, of torch's dtype of this number */
enum { MOST_ARGUMENTS = 32, ERROR_SIZE = sizeof error_text };

_Thread_local bool in_extension; /* for torch.c: nobody counts memory here */

static void get(void *to, int64_t bytes)
{
    if (fread(to, 1, (size_t)bytes, stdin) != (size_t)bytes)
        exit(0); /* no more calls */
}

static void put(const void *from, int64_t bytes) { fwrite(from, 1, (size_t)bytes, stdout); }

static int64_t bytes_of(const tensor_t *t)
{
    int64_t numbers = 1;
    for (int64_t d = 0; d < t->dim; d++)
        numbers *= t->size[d];
    return numbers * element_size(t->dtype);
}

static StableIValue get_argument(void)
{
    int64_t kind, dim, size[MOST_DIM], stride[MOST_DIM], step = 1;
    StableIValue value;
    get(&kind, sizeof kind);
    if (kind == WORD) {
        get(&value, sizeof value);
        return value;
    }
    get(&dim, sizeof dim);
    if (dim > MOST_DIM)
        abort();
    get(size, dim * (int64_t)sizeof *size);
    for (int64_t d = dim - 1; d >= 0; d--) {
        stride[d] = step;
        step *= size[d] > 0 ? size[d] : 1;
    }
    tensor_t *t = new_tensor((int32_t)kind, step, dim, size, stride);
    get(data_of(t), bytes_of(t));
    return (StableIValue)(uintptr_t)t;
}

static void put_output(StableIValue value)
{
    tensor_t *t = (tensor_t *)(uintptr_t)value;
    const int64_t dtype = t->dtype;
    put(&dtype, sizeof dtype);
    put(&t->dim, sizeof t->dim);
    put(t->size, t->dim * (int64_t)sizeof *t->size);
    put(data_of(t), bytes_of(t));
    delete_tensor(t);
}

/* An operator that throws has said why in error_text, and goes on here. */
static void call_operator(const int64_t *head, StableIValue *stack)
{
    if (!setjmp(thrown))
        hex_operators[head[0]].kernel(stack, (uint64_t)head[1], (uint64_t)head[2]);
}

/* Says which level is in use; then for each call: which operator, how many arguments and outputs, the
 * arguments; the answer is an error's text, or an empty one and the outputs. */
int main(void)
{
    const char *problem, *level = hex_cpu_select(getenv("HEX_ISA"), &problem);
    snprintf(error_text, ERROR_SIZE, "%s", problem ? problem : level);
    put(error_text, ERROR_SIZE);
    threads = 2;
    for (;;) {
        int64_t head[3]; /* operator, arguments, outputs */
        StableIValue stack[MOST_ARGUMENTS];
        fflush(stdout);
        get(head, sizeof head);
        for (int64_t k = 0; k < head[1]; k++)
            stack[k] = get_argument();
        memset(error_text, 0, ERROR_SIZE);
        call_operator(head, stack);
        put(error_text, ERROR_SIZE);
        for (int64_t k = 0; !error_text[0] && k < head[2]; k++)
            put_output(stack[k]);
    }
}
