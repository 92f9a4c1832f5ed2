/* SPDX-License-Identifier: MIT */
/* The adaptive threshold over training, one step, for the CPU's core and for CUDA's:
 * hex/state.py has the same as PyTorch operators, for compiled graphs and for devices without
 * kernels; all give the same bits.
 *
 *     v_t = momentum v_(t-1) + (1 - momentum) candidate_t,  v_1 = candidate_1
 *     v_t = min(v_t, v_(t-1))      if monotonic
 *     eps_t = v_t, or v_(t-1) if lagged; in warm-up its threshold, and nothing moves
 *
 * A candidate that is not finite is counted and changes nothing else. That of a short batch, which
 * has less than half the anchors of the largest lately, gives its eps and is not stored. */
#ifndef HEX_TRACKER_H
#define HEX_TRACKER_H

#include <math.h>

#include "hex.h"

/* cuda/core.cuh has its own. A product and a sum are not to be fused, or the bits differ. */
#ifndef HEX_TRACKER
#define HEX_TRACKER static inline
#define HEX_TRACKER_ADD(x, y) ((x) + (y))
static inline double HEX_TRACKER_MUL(double x, double y)
{
    const volatile double product = x * y;
    return product;
}
#endif

/* -1 before the first; a state that is an average of states has counts that are not whole. */
HEX_TRACKER double hex_epoch(const double *state) { return nearbyint(state[HEX_STATE_EPOCH]) - 1; }

HEX_TRACKER bool hex_is_warm_up(const hex_tracker_t *t)
{
    return fmax(hex_epoch(t->state), 0.0) < (double)t->warmup_epochs;
}

/* Whether a batch is short, after the record of sizes has been brought up to it. */
HEX_TRACKER bool hex_is_short(double *s, double anchors)
{
    if (hex_epoch(s) < 0 && ++s[HEX_STATE_CALLS] > HEX_WINDOW) {
        s[HEX_STATE_BEFORE] = s[HEX_STATE_MOST];
        s[HEX_STATE_MOST] = 0;
        s[HEX_STATE_CALLS] = 1;
    }
    const bool small = 2 * anchors < fmax(s[HEX_STATE_MOST], s[HEX_STATE_BEFORE]);
    s[HEX_STATE_RUN] = small ? s[HEX_STATE_RUN] + 1 : 0;
    s[HEX_STATE_MOST] = fmax(s[HEX_STATE_MOST], anchors);
    if (s[HEX_STATE_RUN] >= HEX_SHORT_RUN) { /* from the next one on this length is the normal */
        s[HEX_STATE_MOST] = anchors;
        s[HEX_STATE_BEFORE] = s[HEX_STATE_RUN] = 0;
    }
    return small;
}

HEX_TRACKER void hex_track(hex_tracker_t *t, double candidate, int64_t anchors)
{
    double *s = t->state;
    if (hex_is_warm_up(t)) {
        t->eps = t->warmup_threshold;
        return;
    }
    const bool first = !(s[HEX_STATE_WEIGHT] > 0);
    const double stored = first ? (double)INFINITY : s[HEX_STATE_VALUE] / s[HEX_STATE_WEIGHT];
    double value = stored;
    if (candidate - candidate == 0) { /* finite */
        value = candidate;
        if (!first && t->momentum > 0)
            value = HEX_TRACKER_ADD(candidate, HEX_TRACKER_MUL(t->momentum, stored - candidate));
        if (t->monotonic && stored < value)
            value = stored;
        s[HEX_STATE_CANDIDATE] = candidate;
        if (hex_is_short(s, (double)anchors))
            s[HEX_STATE_SHORT]++;
        else {
            s[HEX_STATE_UPDATES]++;
            s[HEX_STATE_WEIGHT] = 1;
            s[HEX_STATE_VALUE] = value;
        }
    } else {
        s[HEX_STATE_CANDIDATE] = 2;
        s[HEX_STATE_SKIPPED]++;
    }
    t->eps = t->lagged ? stored : value;
}

#endif
