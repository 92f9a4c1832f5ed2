/* SPDX-License-Identifier: MIT */
/* The extension, as it was built, without torch and without Python: on the stand-ins of torch.c and
 * python.c. Problems are drawn at random (problem.h), and with each call of an operator something is
 * done:
 *
 *     import            each of torch's calls fails once while it is imported, and levels of
 *                       instructions are asked for that there are not
 *     solve FROM TO     it is made, with 1 and 2 threads
 *     fail FROM TO      each of torch's calls fails once, and each allocation, with 1 and 2 threads: an
 *                       error, nothing is left in use, and the next call has the bits of the first
 *     cuda FROM TO IN   the same, on the stand-ins for the CUDA core (cuda.c) that are in the folder IN
 *     threads FROM TO   it has the same bits with 2, 3 and 8 threads, from four threads at once, and in
 *                       children that fork before, during and after
 *     fuzz SECONDS LEAST  arguments are changed to any others, and that with LEAST problems or more: a
 *                       result or an error, and no more
 *
 *     alone EXTENSION SEED COMMAND ...          HEX_ISA: the level of instructions
 *
 * The problems FROM to TO are the same with the same seed. What is found is printed, with the seed
 * and the number of the problem, and ends the process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"
#include "memory.h"
#include "python.h"

/* Another CPU's. */
#ifdef __aarch64__
#define NO_SUCH_LEVEL "avx2"
#else
#define NO_SUCH_LEVEL "neon"
#endif

static _Atomic int64_t calls, failures, refused;

__attribute__((noreturn, format(printf, 2, 3))) static void found(const operator_t *op,
                                                                  const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("hex::%s: ", op->name);
    vprintf(format, arguments);
    printf("\n%s\n", described());
    fflush(stdout);
    _exit(1);
}

static bool says(const char *text) { return strstr(error_text, text) != NULL; }

/* ---- a call is right ---- */

static result_t right(values_t *v, const operator_t *op)
{
    result_t r = call(v, op);
    calls++;
    if (r.threw)
        found(op, "%s", error_text);
    return r;
}

static result_t with_1_and_2_threads(values_t *v, const operator_t *op)
{
    threads = 1;
    result_t one = right(v, op);
    threads = 2;
    result_t two = right(v, op);
    if (!same_bits(&one, &two))
        found(op, "other bits with 2 threads");
    drop(&two);
    return one;
}

/* ---- everything fails once ---- */

/* One call in which something fails. */
static void fail_once(values_t *v, const operator_t *op, const char *what, int64_t number,
                      const char *words)
{
    const int64_t tensors = live_tensors, blocks = live_blocks;
    result_t r = call(v, op);
    failing_call = -1;
    failing_allocation = -1;
    failures++;
    if (!r.threw)
        found(op, "%s %lld failed, and nothing was said", what, (long long)number);
    if (!says(words) && !says("cannot allocate an output"))
        found(op, "%s %lld failed, and this was said: %s", what, (long long)number, error_text);
    if (live_tensors != tensors || live_blocks != blocks)
        found(op, "%s %lld failed, and %lld tensors and %lld blocks of memory are left", what,
              (long long)number, (long long)(live_tensors - tensors),
              (long long)(live_blocks - blocks));
}

static result_t failing(values_t *v, const operator_t *op)
{
    result_t expected = {0};
    for (threads = 1; threads <= 2; threads++) {
        result_t first = right(v, op);
        const int64_t most_calls = torch_calls, most_allocations = allocations;
        for (int64_t k = 0; k < most_calls; k++) {
            failing_call = k;
            fail_once(v, op, "call of torch", k, "");
        }
        for (int64_t k = 0; k < most_allocations; k++) {
            failing_allocation = k;
            fail_once(v, op, "allocation", k, "out of memory");
        }
        result_t next = right(v, op);
        if (!same_bits(&first, &next))
            found(op, "other bits after failures");
        drop(&next);
        if (threads == 1)
            expected = first;
        else
            drop(&first);
    }
    threads = 1;
    return expected;
}

/* ---- threads ---- */

static result_t with_any_threads(values_t *v, const operator_t *op)
{
    static const int counts[] = {2, 3, 8};
    threads = 1;
    result_t one = right(v, op);
    for (int k = 0; k < 3; k++) {
        threads = counts[k];
        result_t r = right(v, op);
        if (!same_bits(&one, &r))
            found(op, "other bits with %d threads", counts[k]);
        drop(&r);
    }
    return one;
}

/* A sum of all bits of all results of the problems that this thread has solved. */
static _Thread_local uint64_t sum_of_bits;

static result_t summed(values_t *v, const operator_t *op)
{
    result_t r = right(v, op);
    for (int k = 0; k < r.count; k++)
        for (int64_t i = 0; !kept_output(op, k) && i < r.out[k]->storage->bytes; i++)
            sum_of_bits = sum_of_bits * 0x100000001b3u + (uint8_t)r.out[k]->storage->data[i];
    return r;
}

typedef struct {
    uint64_t seed, sum;
    int64_t from, to;
} part_t;

static void *solve_part(void *of)
{
    part_t *p = of;
    sum_of_bits = 0;
    for (int64_t n = p->from; n < p->to; n++)
        solve(p->seed, n, summed);
    p->sum = sum_of_bits;
    return NULL;
}

/* From several threads at once, each with its own problems; and from a child that is forked now. */
enum { CALLERS = 4 };

static void in_child(part_t part)
{
    const uint64_t sum = part.sum;
    const pid_t child = fork();
    if (child == 0) {
        alarm(120); /* ends a child that waits for threads it does not have */
        solve_part(&part);
        exit(part.sum != sum);
    }
    int status;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) {
        printf("a forked child %s\n",
               WIFEXITED(status) ? "has other bits" : "did not end by itself");
        exit(1);
    }
}

static void from_many(uint64_t seed, int64_t from, int64_t to)
{
    part_t alone[CALLERS], at_once[CALLERS];
    pthread_t thread[CALLERS];
    threads = 1;
    for (int k = 0; k < CALLERS; k++) {
        alone[k] = (part_t){seed, 0, from + (to - from) * k / CALLERS,
                            from + (to - from) * (k + 1) / CALLERS};
        at_once[k] = alone[k];
        solve_part(&alone[k]);
    }
    in_child(alone[0]);
    threads = 2;
    for (int k = 0; k < CALLERS; k++)
        pthread_create(&thread[k], NULL, solve_part, &at_once[k]);
    in_child(alone[1]);
    for (int k = 0; k < CALLERS; k++) {
        pthread_join(thread[k], NULL);
        if (alone[k].sum != at_once[k].sum) {
            printf("seed %llu, problems %lld to %lld: other bits from several threads at once\n",
                   (unsigned long long)seed, (long long)alone[k].from, (long long)alone[k].to);
            exit(1);
        }
    }
    in_child(alone[2]);
}

/* ---- the module ---- */

__attribute__((noreturn)) static void wrong(const char *what, const char *wanted, const char *got)
{
    printf("%s: wanted \"%s\", got \"%s\"\n", what, wanted, got);
    exit(1);
}

/* Whether a function of the module answers with these words, or has these in its exception. */
static void answers(const char *function, const char *argument, const char *words)
{
    const char *said = call_module(function, argument);
    if (!strstr(*said ? said : python_error, words))
        wrong(argument ? argument : function, words, *said ? said : python_error);
}

/* Importing, with each of torch's calls failing in turn; then with levels that there are not. */
static void import_failing(const char *extension)
{
    for (int64_t k = 0;; k++) {
        torch_calls = 0;
        failing_call = k;
        const bool imported = import_extension(extension);
        failing_call = -1;
        if (imported)
            break;
        failures++;
        if (!strstr(python_error, "could not register its operators"))
            wrong("importing", "could not register its operators", python_error);
    }
    char level[32];
    snprintf(level, sizeof level, "%s", call_module("isa", NULL));
    answers("isa_problem", NULL, "None");
    setenv("HEX_ISA", "mmx", 1);
    if (import_extension(extension) || !strstr(python_error, "HEX_ISA: got 'mmx', wanted base"))
        wrong("HEX_ISA=mmx", "wanted base, neon", python_error);
    setenv("HEX_ISA", NO_SUCH_LEVEL, 1);
    warnings_are_errors = true;
    if (import_extension(extension) || !strstr(python_error, "this build does not have it; using"))
        wrong(NO_SUCH_LEVEL, "this build does not have it; using", python_error);
    warnings_are_errors = false;
    if (!import_extension(extension))
        wrong(NO_SUCH_LEVEL, "", python_error);
    answers("isa_problem", NULL, "this build does not have it");
    setenv("HEX_ISA", "", 1);
    if (!import_extension(extension))
        wrong("HEX_ISA=", "", python_error);
    setenv("HEX_ISA", level, 1);
    if (!import_extension(extension))
        wrong(level, "", python_error);
    answers("isa", NULL, level);
}

/* ---- the CUDA core ---- */

static const char *in_folder(const char *folder, const char *name)
{
    static char path[1000];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void on_cuda(const char *folder, uint64_t seed, int64_t from, int64_t to)
{
    answers("load_cuda", NULL, "None");
    answers("load_cuda", "", "no path");
    answers("probe_cuda", "x", "no number");
    answers("probe_cuda", "-1", "-1");
    answers("load_cuda", in_folder(folder, "libtorch_cpu.so"), "undefined symbol");
    answers("load_cuda", in_folder(folder, "no_such_file.so"), "no_such_file.so");
    answers("load_cuda", in_folder(folder, "another_version.so"), "another version");
    answers("load_cuda", in_folder(folder, "no_driver.so"), "error 35: it is missing, or older");
    answers("load_cuda", in_folder(folder, "broken_driver.so"), "error 1");
    answers("load_cuda", in_folder(folder, "cuda.so"), "has no CUDA");
    answers("probe_cuda", "0", "-1");
    if (!dlopen(in_folder(folder, "libtorch_cuda.so"), RTLD_NOW | RTLD_LOCAL))
        wrong("libtorch_cuda.so", "", dlerror());
    for (int64_t k = 0; k < 2; k++) {
        torch_calls = 0;
        failing_call = k;
        answers("load_cuda", in_folder(folder, "cuda.so"), "could not be registered");
    }
    failing_call = -1;
    answers("load_cuda", in_folder(folder, "cuda.so"), "None");
    answers("load_cuda", in_folder(folder, "cuda.so"), "None");
    answers("probe_cuda", "7", "7");
    answers("load_cuda", NULL, "None");
    for (int core = 0; core < 3; core++) { /* CUDA's, the CPU's beside it, the emulated one */
        home = core == 0 ? CUDA : CPU;
        if (core == 2)
            answers("load_cuda", in_folder(folder, "emulated.so"), "None");
        for (int64_t n = from; n < to; n++)
            solve(seed, n, failing);
    }
    answers("load_cuda", NULL, "None");
}

/* ---- any arguments ---- */

static random_t fuzz_random;

static result_t fuzzed(values_t *v, const operator_t *op)
{
    result_t r = right(v, op);
    for (int64_t k = 0; k < FUZZED_CALLS; k++) {
        const int64_t tensors = live_tensors, blocks = live_blocks;
        values_t changed = changed_values(&fuzz_random, v, op);
        threads = 1 + (int)(k % 2);
        result_t other = call(&changed, op);
        calls++;
        refused += other.threw;
        if (other.threw && strncmp(error_text, "hex::", 5) != 0)
            found(op, "an error without a text");
        drop(&other);
        clear(&changed);
        if (live_tensors != tensors || live_blocks != blocks)
            found(op, "something is left in use after \"%s\"", error_text);
    }
    result_t again = right(v, op);
    if (!same_bits(&r, &again))
        found(op, "other bits after calls with other arguments");
    drop(&again);
    return r;
}

static void fuzz(uint64_t seed, int64_t seconds, int64_t least)
{
    const time_t end = time(NULL) + seconds;
    int64_t n = 0;
    fuzz_random.state = seed;
    for (; n < least || time(NULL) < end; n++) /* problems of all classes but LISTS */
        solve(seed, n % 72 + 96 * (n / 72), fuzzed);
}

/* ---- */

int main(int count, char **arguments)
{
    if (count < 4) {
        fprintf(stderr, "alone EXTENSION SEED COMMAND ...\n");
        return 2;
    }
    const char *extension = arguments[1], *command = arguments[3];
    const uint64_t seed = strtoull(arguments[2], NULL, 10);
    const int64_t from = count > 4 ? atoll(arguments[4]) : 0,
                  to = count > 5 ? atoll(arguments[5]) : 0;
    if (strcmp(command, "import") == 0)
        import_failing(extension);
    else if (!import_extension(extension)) {
        printf("%s\n", python_error);
        return 3;
    }
    if (strcmp(command, "fuzz") == 0)
        fuzz(seed, from, to);
    else if (strcmp(command, "cuda") == 0 && count > 6)
        on_cuda(arguments[6], seed, from, to);
    else {
        check_t *check = strcmp(command, "solve") == 0  ? with_1_and_2_threads
                         : strcmp(command, "fail") == 0 ? failing
                                                        : with_any_threads;
        for (int64_t n = from; n < to; n++)
            solve(seed, n, check);
        if (strcmp(command, "threads") == 0)
            from_many(seed, from, to);
    }
    printf("%lld calls, %lld of them refused, %lld with a failure, at %s\n", (long long)calls,
           (long long)refused, (long long)failures, call_module("isa", NULL));
    const bool left = live_tensors || live_blocks;
    if (left)
        printf("%lld tensors and %lld blocks of memory are left\n", (long long)live_tensors,
               (long long)live_blocks);
    fflush(stdout); /* a sanitizer that finds a leak ends the process without it */
    return left;
}
