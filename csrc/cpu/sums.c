/* SPDX-License-Identifier: MIT */
/* Sums over the rows of all ranks. They have the same bits on every rank, whatever its instruction
 * set: one thread adds doubles in the order of the rows. */
#include <math.h>

#include "../hex.h"

static double number(const hex_matrix_t *x, int64_t i, int64_t j)
{
    const int64_t at = i * x->row + j * x->col;
    return x->dtype == HEX_F64 ? ((const double *)x->data)[at]
                               : (double)((const float *)x->data)[at];
}

void hex_sum_rows(const hex_matrix_t *x, double *sums)
{
    for (int64_t i = 0; i < x->rows; i++) {
        double sum = 0;
        for (int64_t j = 0; j < x->columns; j++)
            sum += number(x, i, j);
        sums[i] = sum;
    }
}

double hex_mean(const hex_matrix_t *q)
{
    double sum = 0, count = 0;
    for (int64_t j = 0; j < q->columns; j++) {
        const double x = number(q, 0, j);
        if (x != (double)INFINITY) {
            sum += x;
            count++;
        }
    }
    return sum / count; /* NaN where there is none */
}
