# SPDX-License-Identifier: MIT
"""The numbers that a threshold keeps over training, and a step of them: csrc/tracker.h in torch.

A state is one float64 tensor of fixed shape. What it has to come through decided its form:

* Averages. Weight averaging (timm's ModelEma, torch's AveragedModel) mixes every tensor of a module
  or of its state_dict, whatever it means. So the stored threshold stands as weight and weight times
  threshold, the weight 0 before the first and 1 after: any average of states has the average of
  those thresholds that there were. Counts are rounded when they are read. Nothing is infinite, and
  the history has a fixed number of rows. Bits in an int64, which `.half()` cannot round, become
  other numbers when they are averaged, and were given up for it.
* `.half()` and `.to(dtype)` leave the state in float64 (ThresholdTracker._apply).
* `torch.device("meta")`, `to_empty` and `reset_parameters`: the first state is all zeros.
* DDP, which by default sends rank 0's buffers to all ranks before each forward. The state stays a
  buffer, for vmap over stacked modules, FSDP and export need it to be one; so under DDP every step
  begins on every rank with rank 0's state, as with the statistics of BatchNorm, and the state that
  rank 0 saves is that of all. With that turned off (`broadcast_buffers`, in newer torch
  `forward_sync_buffers`) each rank has its own; with `gather_distributed=True` all are the same
  anyhow. To hide the state from DDP was refused: a run resumed from rank 0's file would not have
  gone on as it had been.
* Activation checkpointing, which runs a forward twice: the second run stores nothing and uses the
  eps of the first (ThresholdTracker.update).
* Short batches, which a loader gives last: their thresholds are used and not stored.
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["HISTORY", "STATE", "converted", "pack_history", "step", "stored", "unpack_history"]

# The order of HEX_STATE_* in csrc/hex.h, which says what each is.
WEIGHT, VALUE, EPOCH, UPDATES, SKIPPED, SHORT, MOST, BEFORE, CALLS, RUN, CANDIDATE = range(11)
STATE = 11
WINDOW, SHORT_RUN = 50, 20  # HEX_WINDOW, HEX_SHORT_RUN
HISTORY = 1024  # epochs in a state_dict, the newest
_INFINITE = sys.float_info.max  # stands for +inf, of which no average can be taken


def stored(state: Tensor) -> Tensor:
    """The threshold that is stored, 0-d; +inf where there is none."""
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
    """eps, 0-d, and the next state: csrc/tracker.h, to the bit. Both tensors are float64."""
    old = state.unbind()
    number = old[EPOCH].round() - 1  # -1 before the first
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
    normal = run >= SHORT_RUN  # from the next one on
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
    skipped[SKIPPED], skipped[CANDIDATE] = old[SKIPPED] + 1, torch.full_like(candidate, 2)
    moved = torch.where(finite, torch.stack(new), torch.stack(skipped))
    return eps, torch.where(warm, state, moved)


def converted(state: Tensor) -> Tensor:
    """A state as first saved, int64 (value's bits, epoch, updates, skipped), in this form."""
    bits, epoch, updates, skipped = state.cpu().unbind()
    new = torch.zeros(STATE, dtype=torch.float64, device="cpu")
    value = float(bits.view(torch.float64))
    if math.isfinite(value):
        new[WEIGHT], new[VALUE] = 1, value
    new[EPOCH], new[UPDATES], new[SKIPPED] = epoch + 1, updates, skipped
    return new


def pack_history(history: Sequence[tuple[int, float]]) -> Tensor:
    """The newest epochs as (HISTORY, 3) float64: weight, and weight times epoch and value."""
    rows = torch.zeros(HISTORY, 3, dtype=torch.float64, device="cpu")
    kept = [
        (1.0, float(epoch), min(max(value, -_INFINITE), _INFINITE))
        for epoch, value in history[-HISTORY:]
    ]
    if kept:
        rows[: len(kept)] = torch.tensor(kept, dtype=torch.float64, device="cpu")
    return rows


def unpack_history(rows: Tensor) -> list[tuple[int, float]]:
    """What was packed; of an average, the averages. Also (epochs, 2), as it was first saved."""
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] not in (2, 3):
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"_extra_state: got {got}, wanted the tensor of a history, (epochs, 3)")
    if rows.shape[1] == 2:
        return [(int(epoch), value) for epoch, value in rows.tolist()]
    history = []
    for weight, epoch, value in rows.tolist():
        if weight > 0:
            far = abs(value) > weight * _INFINITE / 4
            shown = math.copysign(math.inf, value) if far else value / weight
            history.append((round(epoch / weight), shown))
    return history
