/* SPDX-License-Identifier: MIT */
/* What problem.h declares. */
#include "problem.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/cpu/convert.h"
#include "memory.h"

/* ---- random numbers ---- */

uint64_t draw(random_t *r)
{
    uint64_t x = r->state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

int64_t below(random_t *r, int64_t n) { return (int64_t)(draw(r) % (uint64_t)n); }

int64_t between(random_t *r, int64_t low, int64_t high) { return low + below(r, high - low + 1); }

double unit(random_t *r) { return (double)(draw(r) >> 11) * 0x1p-53; }

bool chance(random_t *r, double probability) { return unit(r) < probability; }

static double normal(random_t *r)
{
    return unit(r) + unit(r) + unit(r) + unit(r) + unit(r) + unit(r) - 3;
}

/* ---- values by name ---- */

value_t *value_of(values_t *v, const char *name)
{
    for (int k = 0; k < v->count; k++)
        if (strcmp(v->value[k].name, name) == 0)
            return &v->value[k];
    if (v->count == MOST_VALUES)
        abort();
    v->value[v->count] = (value_t){.name = name};
    return &v->value[v->count++];
}

void set_tensor(values_t *v, const char *name, tensor_t *t)
{
    value_t *value = value_of(v, name);
    if (value->tensor)
        delete_tensor(value->tensor);
    value->tensor = t;
}

tensor_t *tensor_named(values_t *v, const char *name) { return value_of(v, name)->tensor; }

static void set_number(values_t *v, const char *name, int64_t number)
{
    value_of(v, name)->number = number;
}

static void set_real(values_t *v, const char *name, double real) { value_of(v, name)->real = real; }

static int64_t number_named(values_t *v, const char *name) { return value_of(v, name)->number; }

void clear(values_t *v)
{
    for (int k = 0; k < v->count; k++)
        if (v->value[k].tensor)
            delete_tensor(v->value[k].tensor);
    v->count = 0;
}

/* ---- calls ---- */

/* The arguments, as torch puts them on its stack: of "op(Tensor a, int b, float c=1, ...) -> ...". */
static uint64_t fill(StableIValue *stack, values_t *v, const operator_t *op)
{
    const char *at = strchr(op->schema, '(') + 1, *end = strchr(at, ')');
    uint64_t arguments = 0;
    while (at < end) {
        char type[16], name[32];
        if (sscanf(at, "%15s %31[a-z0-9_]", type, name) != 2)
            abort();
        const value_t *value = value_of(v, name);
        StableIValue *to = &stack[arguments++];
        if (strcmp(type, "Tensor") == 0)
            *to = (StableIValue)(uintptr_t)another(value->tensor);
        else if (strcmp(type, "float") == 0)
            memcpy(to, &value->real, sizeof value->real);
        else
            *to = (StableIValue)value->number;
        at += strcspn(at, ",)");
        at += strspn(at, ", ");
    }
    return arguments;
}

static int count_outputs(const operator_t *op)
{
    int count = 0;
    for (const char *at = strstr(op->schema, "->"); (at = strstr(at, "Tensor")); at++)
        count++;
    return count;
}

/* false: it threw. A function of its own, for no variable may live across setjmp. */
__attribute__((noinline)) static bool returns(const operator_t *op, StableIValue *stack,
                                              uint64_t arguments)
{
    if (setjmp(thrown))
        return false;
    (home == CUDA ? op->cuda : op->kernel)(stack, arguments, 0);
    return true;
}

result_t call(values_t *v, const operator_t *op)
{
    StableIValue stack[64];
    const uint64_t arguments = fill(stack, v, op);
    const int outputs = count_outputs(op);
    torch_calls = 0;
    allocations = 0;
    error_text[0] = 0;
    if (!returns(op, stack, arguments))
        return (result_t){.op = op, .threw = true};
    result_t r = {.op = op, .count = outputs};
    for (int k = 0; k < outputs; k++)
        r.out[k] = (tensor_t *)(uintptr_t)stack[k];
    return r;
}

void drop(result_t *r)
{
    for (int k = 0; k < r->count; k++)
        delete_tensor(r->out[k]);
    r->count = 0;
}

/* Kept cosines have any numbers between their rows; they are compared by what comes of them. */
bool kept_output(const operator_t *op, int output)
{
    const char *at = strstr(op->schema, "->");
    for (int k = 0; k <= output; k++)
        at = strstr(at + 1, "Tensor");
    return strncmp(at, "Tensor kept", 11) == 0 || strncmp(at, "Tensor new_kept", 15) == 0;
}

bool same_bits(const result_t *a, const result_t *b)
{
    if (a->count != b->count || a->threw != b->threw)
        return false;
    for (int k = 0; k < a->count; k++) {
        const tensor_t *x = a->out[k], *y = b->out[k];
        if (x->storage->bytes != y->storage->bytes)
            return false;
        if (!kept_output(a->op, k) &&
            memcmp(x->storage->data, y->storage->data, (size_t)x->storage->bytes) != 0)
            return false;
    }
    return true;
}

/* ---- tensors ---- */

static void write_number(tensor_t *t, int64_t at, double x)
{
    void *data = t->storage->data + at * element_size(t->dtype);
    const float narrow = (float)x;
    const uint16_t half = hex_float_to_f16(narrow);
    switch (t->dtype) {
    case F64:
        memcpy(data, &x, sizeof x);
        break;
    case F32:
        memcpy(data, &narrow, sizeof narrow);
        break;
    case BF16:
        memcpy(data, (const char *)&narrow + 2, 2);
        break;
    case F16:
        memcpy(data, &half, sizeof half);
        break;
    case I64:
        memcpy(data, &(int64_t){(int64_t)x}, sizeof(int64_t));
        break;
    default:
        *(uint8_t *)data = (uint8_t)(int)x;
    }
}

/* With strides that torch's views have; what is between the elements is NaN. */
static tensor_t *any_layout(random_t *r, int32_t dtype, int64_t dim, const int64_t *size)
{
    enum { CONTIGUOUS, PADDED, SPREAD, TRANSPOSED, KINDS };
    const int64_t kind = chance(r, 0.6) ? CONTIGUOUS : below(r, KINDS);
    int64_t stride[MOST_DIM], step = kind == SPREAD ? between(r, 2, 3) : 1, last = 0;
    for (int64_t k = 0; k < dim; k++) {
        const int64_t d = kind == TRANSPOSED ? k : dim - 1 - k;
        stride[d] = step;
        last += size[d] > 0 ? (size[d] - 1) * step : 0;
        step *= size[d] > 0 ? size[d] : 1;
        step += kind == PADDED ? between(r, 1, 5) : 0;
    }
    const int64_t offset = kind == CONTIGUOUS ? 0 : below(r, 4);
    tensor_t *t = new_tensor(dtype, last + offset + 1, dim, size, stride);
    t->offset = offset;
    return t;
}

static tensor_t *scalar(int32_t dtype, double x)
{
    tensor_t *t = new_tensor(dtype, 1, 0, NULL, NULL);
    write_number(t, 0, x);
    return t;
}

static tensor_t *vector_of(random_t *r, int32_t dtype, int64_t n, double (*number)(random_t *))
{
    tensor_t *t = any_layout(r, dtype, 1, &n);
    for (int64_t i = 0; i < n; i++)
        write_number(t, t->offset + i * t->stride[0], number(r));
    return t;
}

enum { NORMAL, CLUSTERS, EQUAL, SIGNS, SCALED, WITH_ZEROS, WITH_NAN, WITH_HOLES, STYLES };

/* Feature rows; dim 2, or 3 for (B, K, D). */
static tensor_t *features(random_t *r, int style, int32_t dtype, int64_t dim, const int64_t *size)
{
    tensor_t *t = any_layout(r, dtype, dim, size);
    const int64_t D = size[dim - 1], inner = dim == 3 ? size[1] : 1;
    for (int64_t i = 0; i < size[0]; i++)
        for (int64_t j = 0; j < inner; j++) {
            random_t center = {style == CLUSTERS ? (uint64_t)below(r, 5) : 1};
            const double power = dtype == F64 ? 7.75 : 1; /* doubles from 1e-310 to 1e294 */
            const double scale = style == SCALED ? pow(10, power * (double)between(r, -40, 38)) : 1;
            const bool zero = style == WITH_ZEROS && chance(r, 0.2);
            const double holes = style != WITH_HOLES ? 0
                                 : chance(r, 0.7)    ? 0.7
                                 : chance(r, 0.5)    ? 0.999
                                                     : 1;
            for (int64_t d = 0; d < D; d++) {
                double x = style == EQUAL   ? normal(&center)
                           : style == SIGNS ? (chance(r, 0.5) ? 1 : -1)
                                            : normal(r);
                if (style == CLUSTERS)
                    x = normal(&center) + 0.3 * x;
                if (holes > 0 && chance(r, holes))
                    x = -INFINITY; /* as masked logits are */
                if (style == WITH_NAN && chance(r, 0.01))
                    x = chance(r, 0.3) ? (double)NAN : chance(r, 0.2) ? INFINITY : -INFINITY;
                const int64_t at = dim == 3 ? i * t->stride[0] + j * t->stride[1] + d * t->stride[2]
                                            : i * t->stride[0] + d * t->stride[1];
                write_number(t, t->offset + at, zero ? 0 : x * scale);
            }
        }
    return t;
}

/* ---- problems ---- */

static const int32_t FLOATS_OF[] = {F32, F64, BF16, F16};
static const char *const MODES[] = {"ntxent", "query", "cross", "unpaired", "paired", "logits"};
static const char *const DTYPES[] = {"float32", "float64", "bfloat16", "float16"};
static const char *const CLASSES[] = {"tiny", "rows", "tiles", "lists"};

static _Thread_local char description[200];

const char *described(void) { return description; }

static double any_number(random_t *r) { return normal(r); }

static double any_quantile(random_t *r) { return chance(r, 0.1) ? (double)INFINITY : unit(r); }

/* Sums, sizes and counts; some as of many short batches. */
static double any_state(random_t *r) { return chance(r, 0.1) ? 60 : floor(3 * unit(r)); }

/* How many labels there are: one that all have, a few, or more than rows. */
static _Thread_local int64_t kinds_of_labels;

static double any_label(random_t *r)
{
    const double label = (double)below(r, kinds_of_labels);
    return kinds_of_labels > 1000 && chance(r, 0.5) ? label * 0x1p40 : label - 2;
}

static _Thread_local double share_of_true;

static double any_bool(random_t *r)
{
    return chance(r, share_of_true) ? (double)between(r, 1, 255) : 0;
}

static double any_eps(random_t *r)
{
    static const double some[] = {INFINITY, -INFINITY, NAN, 1, -1, 0};
    return chance(r, 0.3) ? some[below(r, 6)] : 1.6 * unit(r) - 0.6;
}

/* Of so many elements, or empty. */
static tensor_t *labels(random_t *r, int64_t n)
{
    static const int64_t kinds[] = {1, 2, 7, 50, 100000};
    kinds_of_labels = kinds[below(r, 5)];
    return vector_of(r, I64, n, any_label);
}

typedef struct {
    int64_t mode, class, positives, B, M, K, D, G, anchors;
    bool logits, paired;
    int32_t dtype;
} shape_t;

static shape_t shape_of(random_t *r, int64_t number)
{
    shape_t s = {.mode = number % 6, .dtype = FLOATS_OF[number / 6 % 4]};
    s.class = number / 24 % SIZE_CLASSES;
    s.logits = s.mode == HEX_LOGITS;
    s.paired = s.mode == HEX_PAIRED;
    s.positives = s.logits                                            ? between(r, 1, 2)
                  : s.mode == HEX_CROSS || s.paired || chance(r, 0.5) ? 0
                                                                      : between(r, 1, 2);
    switch (s.class) {
    case TINY:
        s.B = below(r, 8), s.K = below(r, 8), s.D = below(r, 10);
        break;
    case ROWS:
        s.B = between(r, 8, 60), s.K = below(r, 80), s.D = between(r, 1, chance(r, 0.2) ? 600 : 40);
        break;
    case TILES:
        s.B = between(r, 96, 230), s.K = between(r, 192, 420);
        s.D = between(r, 1, chance(r, 0.1) ? 700 : 20); /* of many, every loop has threads */
        if (chance(r, 0.05))
            s.B += 300;
        break;
    default: /* the rarest: as many columns as lists are made for */
        s.B = between(r, 16, 40), s.K = between(r, 6144, 6500);
        s.D = chance(r, 0.1) ? 330 : between(r, 1, 3); /* or so large that they come from memory */
    }
    if (s.class >= TILES && s.logits)
        s.D = s.class == LISTS ? between(r, 4096, 5000) : between(r, 193, 700),
        s.B = between(r, 1, 50);
    if (s.class == LISTS && number / 96 % 8 == 7 && s.mode < HEX_UNPAIRED) /* the largest */
        s.B = s.mode == HEX_NTXENT ? 3100 : 6200, s.positives = 0;
    if (s.logits && s.D == 0)
        s.B = 0; /* there is no target */
    if (s.class >= TILES && s.paired)
        s.B = between(r, 1, 20), s.K = between(r, 150, 700);
    const bool other = s.positives && !s.logits && s.mode != HEX_UNPAIRED && chance(r, 0.4);
    s.M = s.logits ? 0 : other ? below(r, 2 * s.B + 1) : s.B;
    if (s.mode < HEX_UNPAIRED || s.logits)
        s.K = 0;
    s.anchors = s.mode == HEX_NTXENT || s.mode == HEX_CROSS ? s.B + s.M : s.B;
    return s;
}

static void make_inputs(random_t *r, const shape_t *s, values_t *v)
{
    const int style = chance(r, 0.5) ? NORMAL : (int)below(r, STYLES);
    const int64_t z0[] = {s->B, s->D}, z1[] = {s->M, s->D}, cube[] = {s->B, s->K, s->D},
                  shared[] = {s->K, s->D};
    const int32_t of_z1 = chance(r, 0.1) ? FLOATS_OF[below(r, 4)] : s->dtype,
                  of_rest = chance(r, 0.1) ? FLOATS_OF[below(r, 4)] : s->dtype;
    set_tensor(v, "z0", features(r, style, s->dtype, 2, z0));
    set_tensor(v, "z1", features(r, style, of_z1, 2, z1));
    set_tensor(v, "negatives",
               features(r, style, of_rest, s->paired ? 3 : 2, s->paired ? cube : shared));
}

static double any_code(random_t *r)
{
    return chance(r, share_of_true) ? 2 : chance(r, 0.1) ? (double)between(r, 1, 3) : 0;
}

/* Half of a number, for both views; one for all; or itself. */
static int64_t any_part(random_t *r, int64_t n)
{
    const double which = unit(r);
    return which < 0.3 && n % 2 == 0 ? n / 2 : which < 0.5 && n > 0 ? 1 : n;
}

static int64_t anchors_of(const shape_t *s)
{
    return s->mode == HEX_NTXENT || s->mode == HEX_CROSS ? s->B + s->M : s->B;
}

static int64_t candidates_of(const shape_t *s)
{
    return s->mode == HEX_NTXENT    ? s->B + s->M
           : s->mode < HEX_UNPAIRED ? s->M
           : s->positives           ? s->M + s->K
                                    : s->K;
}

static tensor_t *any_mask(random_t *r, const shape_t *s, bool codes)
{
    const int64_t size[] = {any_part(r, anchors_of(s)), any_part(r, candidates_of(s))};
    tensor_t *mask = any_layout(r, codes ? U8 : BOOL, 2, size);
    for (int64_t i = 0; i < size[0]; i++)
        for (int64_t j = 0; j < size[1]; j++)
            write_number(mask, mask->offset + i * mask->stride[0] + j * mask->stride[1],
                         codes ? any_code(r) : any_bool(r));
    return mask;
}

/* Labels or a mask or both; groups or a guide. Returns what there is. */
static const char *make_sets(random_t *r, const shape_t *s, values_t *v)
{
    const int64_t rows = s->B + s->M + (s->paired ? s->B * s->K : s->K);
    const bool codes = !s->positives || chance(r, 0.5);
    const bool masked = !s->logits && chance(r, 0.3);
    const bool alone = masked && anchors_of(s) > 0 && candidates_of(s) > 0; /* an empty one is none */
    const bool labelled = s->positives && (!alone || chance(r, 0.5));
    tensor_t *ids = labels(r, s->logits ? s->B : labelled ? rows : 0);
    for (int64_t i = 0; s->logits && i < s->B; i++)
        write_number(ids, ids->offset + i * ids->stride[0], (double)below(r, s->D > 0 ? s->D : 1));
    set_tensor(v, "ids", ids);
    share_of_true = chance(r, 0.7) ? 0.3 : (double)below(r, 2);
    set_tensor(v, "mask",
               masked ? any_mask(r, s, codes) : any_layout(r, BOOL, 2, (int64_t[]){0, 0}));
    const int64_t decider = s->logits ? 0 : below(r, 5); /* 1: groups, 2: guide */
    const int64_t guide[] = {decider == 2 ? rows : 0, between(r, 1, 9)};
    set_tensor(v, "groups", labels(r, decider == 1 ? rows : 0));
    set_tensor(v, "guide", features(r, NORMAL, FLOATS_OF[below(r, 4)], 2, guide));
    static _Thread_local char said[64];
    snprintf(said, sizeof said, "%s%s%s", labelled || s->logits ? ", ids" : "",
             masked && codes ? ", codes"
             : masked        ? ", mask"
                             : "",
             decider == 1   ? ", groups"
             : decider == 2 ? ", guide"
                            : "");
    return said;
}

static void make_rule(random_t *r, const shape_t *s, values_t *v)
{
    static const double betas[] = {0, 1, 0.5, 2.5};
    static const double taus[] = {0.1, 0.5, 1, 0.02, 1e-3, 100, 1e35, 0, -1, NAN};
    static const double shares[] = {0, 0.5, 1, 0.9, 0.965, 0.98, 0.99};
    const bool usual =
        s->class >= TILES &&
        (s->B > 3000 || chance(r, 0.6)); /* as most are: threshold and loss at once */
    set_number(v, "mode", s->mode);
    set_number(v, "positives", s->positives);
    set_number(v, "several", s->positives > 0);
    set_number(v, "reduction", below(r, HEX_REDUCTIONS));
    set_number(v, "variant", below(r, HEX_VARIANTS));
    set_number(v, "decoupled", chance(r, 0.3));
    set_number(v, "keep", chance(r, 0.5) ? (int64_t)1 << 27 : chance(r, 0.5) ? 0 : 1000);
    set_number(v, "allow_tf32", chance(r, 0.3));
    set_number(v, "self_column", chance(r, 0.3));
    set_number(v, "over_negatives", chance(r, usual && s->class == TILES ? 0.8 : 0.5));
    set_number(v, "monotonic", chance(r, 0.5));
    set_number(v, "lagged", chance(r, 0.5));
    set_number(v, "warmup_epochs", !usual && chance(r, 0.2) ? 3 : 0);
    set_real(v, "warmup_threshold", 0.7);
    set_real(v, "momentum", chance(r, 0.5) ? 0 : 0.9);
    set_real(v, "beta", betas[below(r, usual ? 3 : 4)]);
    set_real(v, "tau_plus", chance(r, 0.5) ? 0 : 0.2);
    set_real(v, "quantile",
             usual            ? shares[between(r, 4, 6)]
             : chance(r, 0.8) ? shares[below(r, 7)]
                              : unit(r));
    const int32_t dtype = s->dtype == F64 || chance(r, 0.3) ? F64 : F32;
    const double sound = s->class == LISTS ? 0.5 : 0.9;
    set_tensor(v, "tau", scalar(dtype, taus[below(r, usual ? 4 : chance(r, sound) ? 6 : 10)]));
    set_tensor(v, "state", vector_of(r, F64, HEX_STATE, any_state));
}

/* One for all or one for each of n. */
static void set_eps(random_t *r, values_t *v, int64_t n)
{
    const int32_t dtype = chance(r, 0.5) ? F64 : F32;
    set_tensor(v, "eps",
               chance(r, 0.7) ? scalar(dtype, any_eps(r)) : vector_of(r, dtype, n, any_eps));
}

/* ---- every operator with a problem ---- */

/* The outputs are put among the values, under these names; those without one are dropped. */
static bool make_call(values_t *v, const char *op, check_t *check, const char *const names[5])
{
    result_t r = check(v, operator_named(op));
    for (int k = 0; k < r.count; k++)
        if (names[k])
            set_tensor(v, names[k], r.out[k]);
        else
            delete_tensor(r.out[k]);
    return !r.threw;
}

static const char *const NOTHING[5];

static void both_directions(random_t *r, const shape_t *s, values_t *v, check_t *check)
{
    set_eps(r, v, s->anchors);
    if (!make_call(v, "forward", check, (const char *const[5]){NULL, "stats", "kept"}))
        return;
    const bool each = number_named(v, "reduction") == HEX_NONE;
    const int32_t dtype = chance(r, 0.5) ? F64 : F32;
    set_tensor(v, "grad", each ? vector_of(r, dtype, s->anchors, any_number) : scalar(dtype, 0.7));
    set_number(v, "needs", chance(r, 0.5) ? 15 : below(r, 16));
    set_number(v, "first", 0);
    set_number(v, "count", -1);
    make_call(v, "backward", check, NOTHING);
}

static void of_a_block(random_t *r, const shape_t *s, values_t *v, check_t *check)
{
    const int64_t first = below(r, s->B + 1), count = below(r, s->B - first + 1);
    const bool both = s->mode == HEX_NTXENT || s->mode == HEX_CROSS;
    if (s->M != 0 && s->M != s->B)
        return;
    set_number(v, "first", first);
    set_number(v, "count", count);
    const char *const to[5] = {NULL, NULL, "kept"};
    if (!make_call(v, "block_quantiles", check, to))
        return;
    if (value_of(v, "bounds")->number) /* these made no cosines to be kept */
        set_tensor(
            v, "kept",
            new_tensor(tensor_named(v, "kept")->dtype, 0, 1, (int64_t[]){0}, (int64_t[]){1}));
    set_eps(r, v, both && s->M ? 2 * count : count);
    const bool none = tensor_named(v, "kept")->size[0] == 0;
    if (make_call(v, "block_forward", check, none ? to : NOTHING) && tensor_named(v, "stats"))
        make_call(v, "backward", check, NOTHING);
}

void solve(uint64_t seed, int64_t number, check_t *check)
{
    random_t r = {seed * 0x100000001b3u + (uint64_t)number};
    values_t v = {0};
    const shape_t s = shape_of(&r, number);
    make_inputs(&r, &s, &v);
    const char *sets = make_sets(&r, &s, &v);
    make_rule(&r, &s, &v);
    snprintf(description, sizeof description,
             "seed %llu, problem %lld: %s, %s, %s, B %lld, M %lld, K %lld, D %lld%s",
             (unsigned long long)seed, (long long)number, MODES[s.mode], DTYPES[number / 6 % 4],
             CLASSES[s.class], (long long)s.B, (long long)s.M, (long long)s.K, (long long)s.D,
             sets);
    both_directions(&r, &s, &v, check);
    set_number(&v, "bounds", chance(&r, 0.3));
    make_call(&v, "quantile", check, NOTHING);
    of_a_block(&r, &s, &v, check);
    set_tensor(&v, "rows", vector_of(&r, chance(&r, 0.5) ? F64 : F32, below(&r, 50), any_quantile));
    make_call(&v, "settle", check, NOTHING);
    set_tensor(&v, "rows",
               features(&r, NORMAL, chance(&r, 0.5) ? F64 : F32, 2,
                        (int64_t[]){below(&r, 5), below(&r, 50)}));
    make_call(&v, "total", check, NOTHING);
    set_tensor(&v, "groups", labels(&r, 0)); /* whom the tracker's threshold is not for */
    set_tensor(&v, "guide", features(&r, NORMAL, F32, 2, (int64_t[]){0, 1}));
    if (make_call(&v, "adaptive", check, (const char *const[5]){NULL, "stats", "kept"})) {
        set_number(&v, "first", 0);
        set_number(&v, "count", -1);
        make_call(&v, "backward", check, NOTHING);
    }
    clear(&v);
}
