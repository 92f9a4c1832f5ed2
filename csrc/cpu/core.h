/* SPDX-License-Identifier: MIT */
/* The whole core for one instruction set and one type. Everything is static but the table here, so
 * that no wider instruction can leak into a narrower level. Every file includes the layer below it:
 *
 *     real, dots            the type, its vectors, 2^x; pairs of bfloat16
 *     unit, dot_rows        unit rows
 *     product, dot_product  products of them, by register tiles
 *     row, row_gradient     the loss of one row, and its gradient: the mathematics
 *     select                its quantile and its bounds
 *     sets                  who is a positive, who is left out, what is compared with eps
 *     visit                 any problem by blocks of rows
 *     blocks, quantile_rows the loss and its gradient that way; the threshold
 *     schedule, tiles       where many anchors share their candidates: order and threads; sums and
 *                           gradient
 *     quantile, onepass     the threshold from lists; it and the loss from one pass
 *     onepass_logits        the same of logits
 *     entry                 which way a problem goes */
#include "cpu.h"
#ifdef LEVEL_TARGET
LEVEL_BEGIN
#endif
#include "entry.h"

#define JOIN_(a, b, c) a##b##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#ifdef HEX_REAL_IS_DOUBLE
#define ENTRY JOIN(hex_cpu_, HEX_LEVEL, _f64)
#else
#define ENTRY JOIN(hex_cpu_, HEX_LEVEL, _f32)
#endif

const hex_cpu_entry_t ENTRY = {
    .forward = forward,
    .backward = backward,
    .adaptive = adaptive,
    .threshold = threshold,
    .row_range = row_range,
    .row_quantiles = row_quantiles,
    .kept = kept_room,
};

#ifdef LEVEL_TARGET
LEVEL_END
#endif
