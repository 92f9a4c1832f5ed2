# SPDX-License-Identifier: MIT
"""The threshold eps over training: measured on the batches, or a schedule over epochs.

Computes the eps of a step from a batch's candidate (see hex.batch_threshold) and from what earlier
steps left, and keeps that state. The state is int64 tensors, so that `.half()` cannot round it,
`state_dict` restores it bit for bit, and a compiled step reads it without recompiling. Measuring
the candidate, scaling a schedule to the range of each row, and deciding what counts as training
are left to the loss.

Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
Algorithms", WACV 2025 (arXiv 2410.23200), and the code at github.com/olivesgatech/HEX.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .functional import check_choice, check_number

__all__ = ["ThresholdTracker"]


class ThresholdTracker(nn.Module):
    """The threshold eps on the cosine, step by step. Make one with a class method:

        adaptive(...)              follows the batches
        fixed(t)                   t
        step(start, drop, every)   max(start - drop floor(epoch / every), -1)
        cosine(start, end, epochs) end + (start - end) (1 + cos(pi epoch / epochs)) / 2, then end

    Call `set_epoch(epoch)` (the loss forwards it) at the start of each epoch, counted from 0; an
    adaptive tracker without warm-up works without. All state is in `state_dict`: a run stopped and
    resumed at any step continues bit for bit. A strict load accepts a state without a tracker, as
    of a model trained with another loss, and leaves this one as it was.

    Keep the tracker on the device of the embeddings (`loss.to(device)`): elsewhere the result is
    the same, but every step waits for copies between devices.

    Attributes:
        state: int64, (4,), of which the next four are views:
        value_bits: the bits of the stored float64 threshold; those of +inf before any update.
        epoch: the last `set_epoch`, -1 before (taken as epoch 0).
        updates, skipped: candidates stored, and candidates refused as not finite.

    Example:
        >>> import torch
        >>> from hex import ThresholdTracker
        >>> tracker = ThresholdTracker.adaptive(quantile=0.99, warmup_epochs=1)
        >>> tracker.set_epoch(0)
        >>> tracker.update(torch.tensor(0.5), store=True)  # warm-up: nothing is in H
        tensor(inf, dtype=torch.float64)
        >>> tracker.set_epoch(1)
        >>> tracker.update(torch.tensor(0.5), store=True)
        tensor(0.5000, dtype=torch.float64)
        >>> tracker.history
        [(0, inf)]
    """

    state: Tensor  # in the order of HEX_STATE_* in csrc/hex.h

    def __init__(self, rule: str, **options: Any) -> None:
        """For the class methods, which check the options of their rule and fill in the defaults."""
        super().__init__()
        check_choice("rule", rule, ("adaptive", "fixed", "step", "cosine"))
        self.rule = rule
        self.options = options
        self.normalize_rows: bool = options.get("normalize_rows", False)
        self.quantile: float = options.get("quantile", 0.99)
        self.over: str = options.get("over", "all")
        self.register_buffer("state", torch.zeros(4, dtype=torch.int64))
        self._warned: set[str] = set()
        self._history: list[tuple[int, float]] = []
        self.reset()

    @classmethod
    def adaptive(
        cls,
        quantile: float = 0.99,
        over: str = "all",
        warmup_epochs: int = 0,
        momentum: float = 0.0,
        monotonic: bool = False,
        lagged: bool = False,
        warmup_threshold: float = math.inf,
    ) -> ThresholdTracker:
        """The mean over rows of a quantile of their cosines, batch by batch.

            v_t = momentum v_(t-1) + (1 - momentum) candidate_t,  v_1 = candidate_1
            v_t = min(v_t, v_(t-1))      if monotonic
            eps_t = v_t, or v_(t-1) if lagged (+inf first)

        Args:
            quantile: in [0, 1], of each row, nearest rank.
            over: "all", the rows whole (the authors' rule; fails for few rows, see
                `warn_if_too_small`), or "negatives", without self and positives.
            warmup_epochs: while epoch < warmup_epochs, eps is warmup_threshold and nothing is
                updated. The authors' `epoch <= 10` is warmup_epochs=11.
            momentum: in [0, 1), of the running mean; 0 uses each batch's own value.
            monotonic: never rise.
            lagged: use the value that the batches before this one left.
            warmup_threshold: +inf is InfoNCE; the authors take 0.9 for NNCLR.

        Raises: TypeError, ValueError: an argument of another type, or outside its range.
        """
        check_choice("over", over, ("all", "negatives"))
        return cls(
            "adaptive",
            quantile=_number("quantile", quantile, 0.0, 1.0),
            over=over,
            warmup_epochs=_count("warmup_epochs", warmup_epochs, 0),
            momentum=_number("momentum", momentum, 0.0, 1.0, open_end=True),
            monotonic=_flag("monotonic", monotonic),
            lagged=_flag("lagged", lagged),
            warmup_threshold=_number("warmup_threshold", warmup_threshold),
        )

    @classmethod
    def fixed(cls, t: float, normalize_rows: bool = False) -> ThresholdTracker:
        """One threshold for all epochs: eps = t, or eps_i = min_i + t (max_i - min_i).

        Args:
            t: >= 1 is InfoNCE, < -1 puts every negative in H.
            normalize_rows: t is for the cosines scaled to [0, 1] over each row (the authors' form
                for all schedules; the row whole, so that in mode "ntxent" max_i is 1).

        Raises: TypeError, ValueError: t is no number, NaN, or infinite with normalize_rows.
        """
        rows = _flag("normalize_rows", normalize_rows)
        return cls("fixed", t=_finite("t", t) if rows else _number("t", t), normalize_rows=rows)

    @classmethod
    def step(
        cls, start: float, drop: float, every: int, normalize_rows: bool = False
    ) -> ThresholdTracker:
        """eps = max(start - drop floor(epoch / every), -1). The authors: 0.9, 0.1 every 25 epochs.

        Args:
            start, drop: finite; drop >= 0. every: epochs, >= 1. normalize_rows: as in `fixed`.

        Raises: TypeError, ValueError: an argument of another type, or outside its range.
        """
        return cls(
            "step",
            start=_finite("start", start),
            drop=_finite("drop", drop, 0.0),
            every=_count("every", every, 1),
            normalize_rows=_flag("normalize_rows", normalize_rows),
        )

    @classmethod
    def cosine(
        cls,
        start: float,
        end: float,
        epochs: int,
        normalize_rows: bool = False,
        compounded: bool = False,
    ) -> ThresholdTracker:
        """eps = end + (start - end) (1 + cos(pi epoch / epochs)) / 2, and end from `epochs` on.

        Args:
            start, end: finite. epochs: length of the decay, >= 1. normalize_rows: as in `fixed`.
            compounded: the authors' code overwrites its own start with each epoch's result, so
                that the factors multiply and the decay is much faster (halfway at about epoch
                0.94 epochs^(2/3), not epochs / 2):
                eps = end + (start - end) prod_(k = 1..epoch) (1 + cos(pi k / epochs)) / 2

        Raises: TypeError, ValueError: an argument of another type, or outside its range.
        """
        return cls(
            "cosine",
            start=_finite("start", start),
            end=_finite("end", end),
            epochs=_count("epochs", epochs, 1),
            normalize_rows=_flag("normalize_rows", normalize_rows),
            compounded=_flag("compounded", compounded),
        )

    @property
    def value_bits(self) -> Tensor:
        return self.state[0]

    @property
    def epoch(self) -> Tensor:
        return self.state[1]

    @property
    def updates(self) -> Tensor:
        return self.state[2]

    @property
    def skipped(self) -> Tensor:
        return self.state[3]

    @property
    def adaptive_rule(self) -> bool:
        """Whether `update` with a batch's candidate gives eps; otherwise `current` does."""
        return self.rule == "adaptive"

    @property
    def value(self) -> Tensor:
        """The threshold as it stands, 0-d float64, a copy.

        Adaptive: what the last update stored, +inf before the first, warmup_threshold in warm-up.
        Schedules: that of this epoch.
        """
        if not self.adaptive_rule:
            return self._schedule()
        warm, stored, _ = self._state(self.value_bits.device)
        return torch.where(warm, self.options["warmup_threshold"], stored)

    @property
    def history(self) -> list[tuple[int, float]]:
        """(epoch, value at its end) of each epoch that a call of `set_epoch` ended, in order."""
        return list(self._history)

    def set_epoch(self, epoch: int) -> None:
        """Says that `epoch`, counted from 0, begins; the one before goes into `history`.

        For the host, between steps. Naming the epoch that is already running changes nothing.

        Raises: TypeError, ValueError: epoch is no integer >= 0.
        """
        epoch = _count("epoch", epoch, 0)
        before = int(self.epoch)
        if before != epoch and (before >= 0 or int(self.updates) > 0):
            self._history.append((max(before, 0), float(self.value)))
        self.epoch.fill_(epoch)
        self._epoch_set = True

    def reset(self) -> None:
        """Forgets all state, history and warnings given; the options stay."""
        infinity = int(torch.tensor(math.inf, dtype=torch.float64).view(torch.int64))
        self.state.copy_(torch.tensor([infinity, -1, 0, 0]))
        self._history.clear()
        self._warned.clear()
        self._epoch_set = False

    def update(self, candidate: Tensor, *, store: bool) -> Tensor:
        """The eps of an adaptive tracker for a batch, and the new state.

        Args:
            candidate: 0-d, the batch's own threshold. One that is not finite counts as skipped,
                leaves the value as it is, and the stored value is used.
            store: whether to keep the result; False (evaluation) computes the same eps. Under
                torch.func transforms nothing is kept.

        Returns: 0-d float64 on the candidate's device, no gradient, never the buffer.
        Raises: RuntimeError: the tracker is a schedule.
        """
        if not self.adaptive_rule:
            raise RuntimeError(f"update: got a {self.rule} schedule, wanted an adaptive tracker")
        candidate = candidate.detach().to(torch.float64)
        warm, stored, first = self._state(candidate.device)
        finite = candidate.isfinite()
        mixed = candidate + self.options["momentum"] * (stored - candidate)
        new = torch.where(first, candidate, mixed)
        if self.options["monotonic"]:
            new = torch.minimum(new, stored)
        new = torch.where(finite, new, stored)
        used = stored if self.options["lagged"] else new
        eps = torch.where(warm, self.options["warmup_threshold"], used)
        if store and not torch._C._are_functorch_transforms_active():
            # Warm-up changes no bit: stored is written back and both counts get 0.
            bits = torch.where(warm, stored, new).view(torch.int64)
            counts = torch.stack((finite & ~warm, ~finite & ~warm)).to(self.state)
            counts = counts + self.state[2:]
            self.store(torch.cat((bits.to(self.state).reshape(1), self.state[1:2], counts)))
        return eps

    def store(self, state: Tensor) -> None:
        """Takes a new `state`: of an update made elsewhere, as by `torch.ops.hex.adaptive`."""
        if self.options["warmup_epochs"] > 0:
            self._warn_without_epochs("the warm-up never ends")
        self.state.copy_(state)

    def kernel_rule(self) -> tuple[float, bool, float, bool, bool, int, float]:
        """The rule of an adaptive tracker, in the order of torch.ops.hex.adaptive's arguments."""
        o = self.options
        return (
            self.quantile,
            self.over == "negatives",
            o["momentum"],
            o["monotonic"],
            o["lagged"],
            o["warmup_epochs"],
            o["warmup_threshold"],
        )

    def current(self) -> Tensor:
        """The t of a schedule in this epoch: 0-d float64 on the tracker's device, a fresh tensor.

        Raises: RuntimeError: the tracker is adaptive.
        """
        if self.adaptive_rule:
            raise RuntimeError("current: got an adaptive tracker, wanted a schedule")
        if self.rule != "fixed" and torch.is_grad_enabled():
            self._warn_without_epochs("the threshold stays at its start")
        return self._schedule()

    def warn_if_too_small(self, n_row: int, has_self: bool) -> None:
        """Warns, once, where the quantile of a row whole is no negative's cosine.

        The element taken is number k = round(quantile (n - 1)) of n in ascending order. k = n - 1
        is the self similarity if the row has it: eps is 1 and H is always empty (quantile 0.99:
        n < 52). The next below, or the greatest of a row without self, is the positive's as soon
        as training works: eps follows the positives and H is nearly empty (n < 151, or n < 52).

        Args:
            n_row: cosines in a row. has_self: whether the row's own is among them ("ntxent").
        """
        if torch.compiler.is_compiling() or self.over != "all" or not self.adaptive_rule:
            return
        above = n_row - 1 - round(self.quantile * (n_row - 1))  # elements after the one taken
        if n_row < 1 or above > int(has_self):
            return
        taken = (
            "the anchor's similarity with itself, so eps is 1 and H always empty"
            if has_self and above == 0
            else "usually the positive's, so H is nearly always empty"
        )
        self._warn(
            "too small",
            f"the {self.quantile:g} quantile of a row of {n_row} cosines is {taken}; take "
            "ThresholdTracker.adaptive(over='negatives'), a lower quantile, or a larger batch",
        )

    def extra_repr(self) -> str:
        """The rule and its options."""
        return ", ".join([self.rule, *(f"{name}={v!r}" for name, v in self.options.items())])

    def get_extra_state(self) -> Tensor:
        """The history as float64 (epochs, 2): a tensor, so that a state_dict holds nothing else."""
        return torch.tensor(self._history, dtype=torch.float64).reshape(-1, 2)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes back what get_extra_state gave."""
        self._history = [(int(epoch), value) for epoch, value in state.tolist()]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # a state from before there was a tracker: no keys to miss
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)
        self._epoch_set = int(self.epoch) >= 0

    def _state(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Whether it is warm-up, a copy of the stored value, whether there was no update yet."""
        stored = self.value_bits.clone().view(torch.float64)
        warm = self.epoch.clamp(min=0) < self.options["warmup_epochs"]
        return warm.to(device), stored.to(device), (self.updates == 0).to(device)

    def _schedule(self) -> Tensor:
        o = self.options
        if self.rule == "fixed":
            return torch.full((), o["t"], dtype=torch.float64, device=self.epoch.device)
        epoch = self.epoch.clamp(min=0)
        if self.rule == "step":
            drops = epoch.div(o["every"], rounding_mode="floor").to(torch.float64)
            return torch.clamp(o["start"] - o["drop"] * drops, min=-1)
        if o["compounded"]:  # the factors of every epoch so far; the last of all is 0
            k = torch.arange(1, o["epochs"] + 1, device=epoch.device)
            factor = torch.where(k <= epoch, _half_cosine(k, o["epochs"]), 1.0).prod()
        else:
            factor = _half_cosine(epoch.clamp(max=o["epochs"]), o["epochs"])
        return torch.add(factor * o["start"], (1 - factor) * o["end"])  # both ends exact

    def _warn_without_epochs(self, consequence: str) -> None:
        if not torch.compiler.is_compiling() and not self._epoch_set:
            self._warn(
                "no epochs",
                f"set_epoch was never called, so {consequence}; call set_epoch(epoch) on the loss "
                f"or its threshold at the start of each epoch ({self})",
            )

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(f"ThresholdTracker: {message}", UserWarning, stacklevel=3)


def _half_cosine(k: Tensor, epochs: int) -> Tensor:
    """(1 + cos(pi k / epochs)) / 2, from 1 at k = 0 to 0 at k = epochs."""
    return (1 + torch.cos(math.pi * k.to(torch.float64) / epochs)) / 2


def _number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, open_end: bool = False
) -> float:
    check_number(name, value, low, high, open_end=open_end)
    return float(value)


def _finite(name: str, value: Any, low: float = -math.inf) -> float:
    number = _number(name, value, low)
    if math.isinf(number):
        raise ValueError(f"{name}: got {value}, wanted a finite number")
    return number


def _count(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an integer")
    if value < low:
        raise ValueError(f"{name}: got {value!r}, wanted an integer >= {low}")
    return int(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a bool")
    return value
