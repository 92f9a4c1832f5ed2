# SPDX-License-Identifier: MIT
"""The numbers that a threshold keeps over training, and one step of them, as csrc/tracker.h has it.

The state is one float64 tensor of fixed shape. What can happen to it decided its form:

* Averages. Weight averaging (timm's ModelEma, torch's AveragedModel) averages every tensor of a
  module or of its state_dict, whatever its meaning. So the threshold is stored as a weight, which
  is 0 before the first threshold and 1 after it, and as weight times threshold. An average of
  states then has the average of those thresholds that existed. Counts are rounded when they are
  read, nothing is infinite, and the history has a fixed number of rows. (Storing the bits in an
  int64, which `.half()` cannot round, was given up: an average of bits is a meaningless number.)
* `.half()` and `.to(dtype)` leave the state in float64 (ThresholdTracker._apply).
* `torch.device("meta")`, `to_empty` and `reset_parameters`: the first state is all zeros.
* DDP sends rank 0's buffers to all ranks before each forward, unless `broadcast_buffers` (in newer
  torch `forward_sync_buffers`) turns that off. The state stays a buffer nevertheless, because vmap
  over stacked modules, FSDP and export need one. So under DDP every step begins on every rank with
  rank 0's state, as the statistics of BatchNorm do, and the state that rank 0 saves is that of all
  ranks. Without the broadcast each rank has its own state; with `gather_distributed=True` all are
  the same in either case. Were the state hidden from DDP, a run that is resumed from rank 0's file
  would not continue as it had been.
* Activation checkpointing runs a forward twice. The second run stores nothing and uses the eps of
  the first (ThresholdTracker.update).
* Short batches, which a loader gives last: their thresholds are used but not stored.
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_dense

__all__ = ["HISTORY", "STATE", "converted", "pack_history", "step", "stored", "unpack_history"]

# In the order of HEX_STATE_* in csrc/hex.h, where each is explained.
WEIGHT, VALUE, EPOCH, UPDATES, SKIPPED, SHORT, MOST, BEFORE, CALLS, RUN, CANDIDATE = range(11)
STATE = 11
WINDOW, SHORT_RUN = 50, 20  # HEX_WINDOW and HEX_SHORT_RUN in csrc/hex.h
HISTORY = 1024  # so many epochs, the newest, are in a state_dict
_INFINITE = sys.float_info.max  # is stored for +inf, which would make every average infinite


def stored(state: Tensor) -> Tensor:
    """The threshold that a state holds, 0-d. It is +inf if there is none."""
    weight = state[WEIGHT]
    return torch.where(weight > 0, state[VALUE] / weight, math.inf)


def step(
    state: Tensor,
    candidate: Tensor,
    anchors: int,
    momentum: float,
    monotonic: bool,
    lagged: bool,
    warmup_epochs: int,
    warmup_threshold: float,
) -> tuple[Tensor, Tensor]:
    """eps, 0-d, and the next state, both float64: the same bits as csrc/tracker.h gives.

    Args:
        state: (STATE,) float64.
        candidate: 0-d float64, the batch's own threshold.
        anchors: the number of rows of the batch, by which a short one is told.
        momentum, monotonic, lagged, warmup_epochs, warmup_threshold: those of
            `ThresholdTracker.adaptive`.
    """
    old = state.unbind()
    number = old[EPOCH].round() - 1  # of the epoch; -1 before the first
    warm = number.clamp(min=0) < warmup_epochs
    first = ~(old[WEIGHT] > 0)
    before = stored(state)
    value = candidate
    if momentum:
        value = torch.where(first, candidate, candidate + momentum * (before - candidate))
    if monotonic:
        value = torch.where(before < value, before, value)
    finite = candidate.isfinite()
    used = before if lagged else torch.where(finite, value, before)
    eps = torch.where(warm, warmup_threshold, used)

    size = torch.full_like(candidate, anchors)
    calls = old[CALLS] + (number < 0)
    roll = calls > WINDOW
    most, past = torch.where(roll, 0.0, old[MOST]), torch.where(roll, old[MOST], old[BEFORE])
    small = 2 * size < torch.maximum(most, past)
    run = torch.where(small, old[RUN] + 1, 0.0)
    normal = run >= SHORT_RUN  # from the next batch on this size counts as normal
    new = list(old)
    new[CALLS] = torch.where(roll, 1.0, calls)
    new[MOST] = torch.where(normal, size, torch.maximum(most, size))
    new[BEFORE] = torch.where(normal, 0.0, past)
    new[RUN] = torch.where(normal, 0.0, run)
    new[CANDIDATE] = candidate
    new[SHORT] = old[SHORT] + small
    new[UPDATES] = old[UPDATES] + ~small
    new[WEIGHT] = torch.where(small, old[WEIGHT], 1.0)
    new[VALUE] = torch.where(small, old[VALUE], value)
    skipped = list(old)
    # 2, which is no cosine, stands for a candidate that is not finite.
    skipped[SKIPPED], skipped[CANDIDATE] = old[SKIPPED] + 1, torch.full_like(candidate, 2)
    moved = torch.where(finite, torch.stack(new), torch.stack(skipped))
    return eps, torch.where(warm, state, moved)


def converted(state: Tensor) -> Tensor:
    """The state of an old state_dict, int64 (bits of the value, epoch, updates, skipped), in
    today's form."""
    bits, epoch, updates, skipped = state.cpu().unbind()
    new = torch.zeros(STATE, dtype=torch.float64, device="cpu")
    value = float(bits.view(torch.float64))
    if math.isfinite(value):
        new[WEIGHT], new[VALUE] = 1, value
    new[EPOCH], new[UPDATES], new[SKIPPED] = epoch + 1, updates, skipped
    return new


def pack_history(history: Sequence[tuple[int, float]]) -> Tensor:
    """The newest epochs as (HISTORY, 3) float64: weight, weight times epoch, weight times value."""
    rows = torch.zeros(HISTORY, 3, dtype=torch.float64, device="cpu")
    kept = [
        (1.0, float(epoch), min(max(value, -_INFINITE), _INFINITE))
        for epoch, value in history[-HISTORY:]
    ]
    if kept:
        rows[: len(kept)] = torch.tensor(kept, dtype=torch.float64, device="cpu")
    return rows


def unpack_history(rows: Tensor) -> list[tuple[int, float]]:
    """The history that was packed. An average of several gives the averages of their epochs.

    Raises:
        TypeError, ValueError: rows is neither (epochs, 3) nor, as an old state_dict has it,
            (epochs, 2), or no dense tensor of real numbers, or an epoch is not finite.
    """
    if isinstance(rows, Tensor):
        check_dense("_extra_state", rows)
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] not in (2, 3):
        got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"_extra_state: got {got}, wanted a tensor of shape (epochs, 3)")
    if rows.is_complex() or rows.is_quantized or rows.is_meta:
        what = "device meta" if rows.is_meta else str(rows.dtype)
        raise ValueError(f"_extra_state: got {what}, wanted a tensor of real numbers")
    history = []
    for *weights, epoch, value in rows.tolist():
        weight = weights[0] if weights else 1.0
        if weight > 0:
            far = bool(weights) and abs(value) > weight * _INFINITE / 4
            shown = math.copysign(math.inf, value) if far else value / weight
            if not math.isfinite(number := epoch / weight):
                raise ValueError(f"_extra_state: got epoch {number}, wanted a finite number")
            history.append((round(number), shown))
    return history
