/* SPDX-License-Identifier: MIT */
/* What fuzz.h declares. Sizes are small, for a problem of any kind has to be solved in no time, or so
 * large that nobody has such a tensor: those are expanded, and only refused. */
#include "fuzz.h"

#include <math.h>
#include <string.h>

static int64_t any_size(random_t *r)
{
    static const int64_t edges[] = {((int64_t)1 << 27) + 1, (int64_t)1 << 31, (int64_t)1 << 32,
                                    (int64_t)1 << 40,       (int64_t)1 << 60, INT64_MAX};
    return chance(r, 0.8) ? below(r, chance(r, 0.8) ? 9 : 300) : edges[below(r, 6)];
}

static int64_t any_int(random_t *r)
{
    static const int64_t edges[] = {-1, 1 << 20, INT64_MAX, INT64_MIN, (int64_t)1 << 40};
    return chance(r, 0.6) ? below(r, 9) : chance(r, 0.3) ? (int64_t)draw(r) : edges[below(r, 5)];
}

static double any_real(random_t *r)
{
    static const double edges[] = {NAN, INFINITY, -INFINITY, 0, -0.0, 1, -1, 1e300, 5e-324, 1e-30};
    return chance(r, 0.4) ? 3 * unit(r) - 1 : edges[below(r, 10)];
}

static int32_t any_dtype(random_t *r)
{
    static const int32_t all[] = {F64, F32, F16, BF16, I64, BOOL, U8, COMPLEX};
    return all[below(r, 8)];
}

/* Elements as any bytes, or some of them. */
static void scramble(random_t *r, tensor_t *t)
{
    char *data = t->storage->data;
    const int64_t bytes = t->storage->bytes;
    const bool all = chance(r, 0.5);
    for (int64_t i = 0; i < bytes; i++)
        if (all || chance(r, 0.05))
            data[i] = (char)draw(r);
}

/* New memory for a tensor of small sizes with any strides; that of an expanded one is a few
 * elements. */
static tensor_t *any_tensor(random_t *r, int32_t dtype, int64_t dim, const int64_t *size)
{
    int64_t stride[MOST_DIM], last = 0;
    for (int64_t d = 0; d < dim; d++) {
        stride[d] = size[d] > 300 ? 0 : below(r, 40);
        last += size[d] > 0 ? (size[d] - 1) * stride[d] : 0;
    }
    const int64_t offset = below(r, 3);
    tensor_t *t = new_tensor(dtype, last + offset + 1, dim, size, stride);
    t->offset = offset;
    scramble(r, t);
    return t;
}

/* A copy with its own memory, so that nobody else's changes. */
static tensor_t *with_own_memory(const tensor_t *t)
{
    tensor_t *copy = new_tensor(U8, t->storage->bytes, t->dim, t->size, t->stride);
    memcpy(copy->storage->data, t->storage->data, (size_t)t->storage->bytes);
    copy->dtype = t->dtype;
    copy->offset = t->offset;
    return copy;
}

/* Of the same shape, with the strides of a contiguous tensor but for one, which is larger. */
static tensor_t *further_apart(random_t *r, const tensor_t *t, int64_t direction)
{
    int64_t stride[MOST_DIM], step = 1, last = 0;
    for (int64_t d = t->dim - 1; d >= 0; d--) {
        const bool expanded = t->size[d] > 1000; /* as after an earlier change */
        stride[d] = expanded ? 0 : step + (d == direction ? between(r, 1, 3) : 0);
        last += t->size[d] > 0 ? (t->size[d] - 1) * stride[d] : 0;
        step *= expanded ? 1 : t->size[d];
    }
    tensor_t *apart = new_tensor(t->dtype, last + 1, t->dim, t->size, stride);
    if (!apart)
        return with_own_memory(t); /* it would be too large */
    scramble(r, apart);
    return apart;
}

static tensor_t *changed_tensor(random_t *r, const tensor_t *t)
{
    tensor_t *other = with_own_memory(t);
    const int64_t d = t->dim > 0 ? below(r, t->dim) : 0;
    int64_t size[MOST_DIM] = {0};
    switch (below(r, 11)) {
    case 0: /* another size, of memory that is there */
        memcpy(size, t->size, sizeof size);
        size[d] = any_size(r);
        delete_tensor(other);
        return any_tensor(r, t->dtype, t->dim, size);
    case 1: /* another shape */
        for (int64_t k = 0; k < MOST_DIM; k++)
            size[k] = any_size(r);
        delete_tensor(other);
        return any_tensor(r, chance(r, 0.7) ? t->dtype : any_dtype(r), below(r, MOST_DIM + 1),
                          size);
    case 2: /* one that claims more than its storage has, as if it had been resized */
        other->size[d] = any_size(r);
        break;
    case 3:
        other->storage->bytes = below(r, other->storage->bytes + 1);
        break;
    case 4:
        other->stride[d] = chance(r, 0.2) ? -1 : any_size(r);
        break;
    case 5:
        other->offset = any_size(r);
        break;
    case 6:
        if (chance(r, 0.5))
            other->layout = SPARSE;
        else
            other->device = CUDA, other->index = (int32_t)below(r, 3);
        break;
    case 7:
        other->dtype = any_dtype(r);
        break;
    case 8: /* fewer of everything */
        for (int64_t k = 0; k < t->dim; k++)
            other->size[k] -= other->size[k] > 0;
        break;
    case 9:
        delete_tensor(other);
        return further_apart(r, t, d);
    default:
        scramble(r, other);
    }
    return other;
}

/* A tensor of the call to take this one's place: most often one that could. */
static const tensor_t *anothers(random_t *r, const values_t *v, const tensor_t *t)
{
    const tensor_t *other = NULL;
    const bool alike = chance(r, 0.8);
    for (int tries = 0; tries < 20; tries++) {
        other = v->value[below(r, v->count)].tensor;
        if (other && (!alike || (other != t && other->dtype == t->dtype && other->dim == t->dim)))
            break;
    }
    return other;
}

/* Groups or a guide or both, of the right shape, where the operator may take none. */
static void add_deciders(random_t *r, values_t *v)
{
    static const char *const inputs[] = {"z0", "z1", "negatives"};
    int64_t rows = 0;
    for (int k = 0; k < 3; k++) {
        const tensor_t *z = tensor_named(v, inputs[k]);
        rows += z->size[0] * (z->dim == 3 ? z->size[1] : 1);
    }
    const bool groups = chance(r, 0.7);
    if (groups)
        set_tensor(v, "groups", any_tensor(r, I64, 1, (int64_t[]){rows}));
    if (!groups || chance(r, 0.7))
        set_tensor(v, "guide", any_tensor(r, F32, 2, (int64_t[]){rows, between(r, 1, 9)}));
}

static bool takes(const operator_t *op, const char *name)
{
    const char *outputs = strstr(op->schema, "->");
    const size_t length = strlen(name);
    for (const char *at = op->schema; (at = strstr(at, name)) && at < outputs; at++)
        if (at > op->schema && at[-1] == ' ' && strchr(",)=", at[length]))
            return true;
    return false;
}

values_t changed_values(random_t *r, const values_t *v, const operator_t *op)
{
    values_t copy = *v;
    for (int k = 0; k < copy.count; k++)
        if (copy.value[k].tensor)
            copy.value[k].tensor = another(copy.value[k].tensor);
    if (chance(r, 0.05))
        add_deciders(r, &copy);
    for (int64_t changes = between(r, 1, 3); changes > 0; changes--) {
        value_t *value;
        do
            value = &copy.value[below(r, copy.count)];
        while (!takes(op, value->name));
        if (value->tensor) {
            const tensor_t *other = anothers(r, &copy, value->tensor);
            tensor_t *changed =
                other && chance(r, 0.2) ? another(other) : changed_tensor(r, value->tensor);
            delete_tensor(value->tensor);
            value->tensor = changed;
        } else {
            value->number = any_int(r);
            value->real = any_real(r);
        }
    }
    return copy;
}
