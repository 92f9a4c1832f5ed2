/* SPDX-License-Identifier: MIT */
/* The adaptive threshold over training, one step: hex/threshold.py has the same as PyTorch
 * operators (ThresholdTracker.update), for compiled graphs and for devices without kernels; both
 * give the same bits.
 *
 *     v_t = momentum v_(t-1) + (1 - momentum) candidate_t,  v_1 = candidate_1
 *     v_t = min(v_t, v_(t-1))      if monotonic
 *     eps_t = v_t, or v_(t-1) if lagged; in warm-up its threshold, and nothing moves
 *
 * A candidate that is not finite is counted and leaves the value alone. */
#include <math.h>
#include <string.h>

#include "hex.h"

bool hex_is_warm_up(const hex_tracker *t)
{
    const int64_t epoch = t->state[HEX_STATE_EPOCH]; /* -1 before the first, taken as 0 */
    return (epoch > 0 ? epoch : 0) < t->warmup_epochs;
}

void hex_track(hex_tracker *t, double candidate)
{
    double stored, value;
    memcpy(&stored, &t->state[HEX_STATE_VALUE], sizeof stored);
    if (hex_is_warm_up(t)) {
        t->eps = t->warmup_threshold;
        return;
    }
    value = stored;
    if (isfinite(candidate)) {
        const double step = t->momentum * (stored - candidate); /* rounded, as torch does */
        value = t->state[HEX_STATE_UPDATES] == 0 ? candidate : candidate + step;
        if (t->monotonic && stored < value)
            value = stored;
        t->state[HEX_STATE_UPDATES]++;
        memcpy(&t->state[HEX_STATE_VALUE], &value, sizeof value);
    } else
        t->state[HEX_STATE_SKIPPED]++;
    t->eps = t->lagged ? stored : value;
}
