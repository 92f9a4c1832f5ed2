# SPDX-License-Identifier: MIT
"""The threshold eps over training: measured on the batches, or a schedule over epochs.

Computes the eps of a step from a batch's candidate (see hex.batch_threshold) and from what earlier
steps left, and keeps that state; what a state is, and what it has to come through, is in state.py.
Measuring the candidate, scaling a schedule to the range of each row, and deciding what counts as
training are left to the loss.

Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
Algorithms", WACV 2025 (arXiv 2410.23200), and the code at github.com/olivesgatech/HEX.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import schedules
from . import state as states
from ._calls import is_in_backward, warn
from .checks import Over, check_choice, check_count

__all__ = ["ThresholdTracker"]

_RECENT = 256  # training calls between a forward and its backward, for activation checkpointing
_NEAR = 1e-5  # a second run's candidate differs by rounding at most, where it differs at all


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

    A short batch, with less than half the anchors of the largest batch of this and the last epoch
    (of the last hundred calls, at most, where no epoch is named), is given the eps of its own
    candidate, which is not stored: the last batch of an epoch, where a loader does not drop it,
    says little of the next. After twenty of them in a row that length is the normal one. Where two
    sizes alternate, give each a loss of its own: the smaller would never move the threshold.

    With activation checkpointing the second run of a loss has the eps of its first, found by the
    candidate among the last 256 training calls, and stores nothing; of two equal batches before one
    backward both have that of the second. Compile around a checkpoint: a loss that is compiled
    inside one leaves the graph for its threshold, and one that was compiled elsewhere before, and
    is then called in one, is not known there. A selective checkpoint wants the same operators in
    both runs, and refuses an adaptive threshold.

    Under DDP, which gives all ranks rank 0's buffers before each forward, every rank goes on from
    rank 0's state, as BatchNorm does; with that turned off, from its own.

    Keep the tracker on the device of the embeddings (`loss.to(device)`): elsewhere the result is
    the same, but every step waits for copies between devices.

    Attributes:
        state: float64, (11,), what is stored (state.py); the next four are read from it.
        epoch: the last `set_epoch`, -1 before (taken as epoch 0).
        updates: candidates stored.
        skipped, short: candidates not stored, for they were not finite, or of short batches.

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

    state: Tensor

    def __init__(self, rule: str, **options: Any) -> None:
        """For the class methods, which fill in the defaults."""
        super().__init__()
        check_choice("rule", rule, tuple(schedules.OPTIONS))
        if sorted(options) != sorted(schedules.OPTIONS[rule]):
            raise TypeError(
                f"ThresholdTracker: got {rule!r} with {', '.join(options) or 'no options'}, wanted "
                f"ThresholdTracker.{rule}(...), which has the defaults"
            )
        self.rule = rule
        self.options = schedules.checked(rule, options)
        self.normalize_rows: bool = self.options.get("normalize_rows", False)
        self.quantile: float = self.options.get("quantile", 0.99)
        self.over: Over = self.options.get("over", "negatives")
        self.register_buffer("state", torch.zeros(states.STATE, dtype=torch.float64))
        # (1,): what is written to a 0-d float64 on the CPU a compiled graph loses (torch 2.13)
        self._tally = tuple(torch.zeros(1, dtype=torch.float64, device="cpu") for _ in range(3))
        self.reset()

    @classmethod
    def adaptive(
        cls,
        quantile: float = 0.99,
        over: Over = "negatives",
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
            over: "negatives", a row without self and positives, for batches of any size; or
                "all", the row whole (the authors' rule; fails for few rows, see
                `warn_if_too_small`).
            warmup_epochs: while epoch < warmup_epochs, eps is warmup_threshold and nothing is
                updated. The authors' `epoch <= 10` is warmup_epochs=11.
            momentum: in [0, 1), of the running mean; 0 uses each batch's own value.
            monotonic: never rise.
            lagged: use the value that the batches before this one left.
            warmup_threshold: +inf is InfoNCE; the authors take 0.9 for NNCLR.

        Raises: TypeError, ValueError: an argument of another type, or outside its range.
        """
        return cls(
            "adaptive",
            quantile=quantile,
            over=over,
            warmup_epochs=warmup_epochs,
            momentum=momentum,
            monotonic=monotonic,
            lagged=lagged,
            warmup_threshold=warmup_threshold,
        )

    @classmethod
    def fixed(cls, t: float, normalize_rows: bool = False) -> ThresholdTracker:
        """One threshold for all epochs: eps = t, or eps_i = min_i + t (max_i - min_i).

        Args:
            t: < 1; < -1 puts every negative in H, math.inf is InfoNCE. No cosine is above any
                other t >= 1, of which a loss of the paper's form warns.
            normalize_rows: t is for the cosines scaled to [0, 1] over each row (the authors' form
                for all schedules; the row whole, so that in mode "ntxent" max_i is 1).

        Raises: TypeError, ValueError: t is no number, NaN, or infinite with normalize_rows.
        """
        return cls("fixed", t=t, normalize_rows=normalize_rows)

    @classmethod
    def step(
        cls, start: float, drop: float, every: int, normalize_rows: bool = False
    ) -> ThresholdTracker:
        """eps = max(start - drop floor(epoch / every), -1). The authors: 0.9, 0.1 every 25 epochs.

        Args:
            start, drop: finite; drop >= 0. every: epochs, >= 1. normalize_rows: as in `fixed`.

        Raises: TypeError, ValueError: an argument of another type, or outside its range.
        """
        return cls("step", start=start, drop=drop, every=every, normalize_rows=normalize_rows)

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
            start=start,
            end=end,
            epochs=epochs,
            normalize_rows=normalize_rows,
            compounded=compounded,
        )

    @property
    def epoch(self) -> Tensor:
        return self._count_of(states.EPOCH) - 1

    @property
    def updates(self) -> Tensor:
        return self._count_of(states.UPDATES)

    @property
    def skipped(self) -> Tensor:
        return self._count_of(states.SKIPPED)

    @property
    def short(self) -> Tensor:
        return self._count_of(states.SHORT)

    def _count_of(self, index: int) -> Tensor:
        return self.state[index].round().clamp(max=2**53).to(torch.int64)

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
            return schedules.at(self.rule, self.options, self.state[states.EPOCH] - 1)
        threshold: float = self.options["warmup_threshold"]
        return torch.where(self._is_warm_up(), threshold, states.stored(self.state))

    def _is_warm_up(self) -> Tensor:
        epochs: int = self.options.get("warmup_epochs", 0)
        return self.epoch.clamp(min=0) < epochs

    @property
    def history(self) -> list[tuple[int, float]]:
        """(epoch, value at its end) of each epoch that a call of `set_epoch` ended, in order."""
        return list(self._history)

    def set_epoch(self, epoch: int) -> None:
        """Says that `epoch`, counted from 0, begins; the one before goes into `history`.

        For the host, between steps. Naming the epoch that is already running changes nothing.
        Warns, once, if H was empty in every row of the epoch that ends, or in the released form
        all of H, so that the loss was 0.

        Raises: TypeError, ValueError: epoch is no integer >= 0.
        """
        epoch = check_count("epoch", epoch, 0)
        self._epoch_set = True
        if self.state.is_meta:
            return
        before = int(self.epoch)
        if before == epoch:
            return
        if before >= 0 or int(self.updates) > 0:
            self._history.append((max(before, 0), float(self.value)))
            self._judge(f"epoch {max(before, 0)}")
        state = self.state.clone()
        if state[states.MOST] > 0:
            state[states.BEFORE] = state[states.MOST]
        state[states.MOST] = state[states.CALLS] = 0
        state[states.EPOCH] = epoch + 1
        self.state.copy_(state)

    def reset(self) -> None:
        """Forgets all state, history and warnings given; the options stay."""
        with torch.no_grad():
            self.state.zero_()
        self._history: list[tuple[int, float]] = []
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=_RECENT)
        self._warned: set[str] = set()
        self._longest_row = 0
        self.known: Tensor | None = None  # whether the last candidate was a second run's
        self._epoch_set = False
        self._forget_tally()

    def _forget_tally(self) -> None:
        for count in self._tally:
            count.zero_()
        self._passed, self._is_fine = 0, False  # of batches on the CPU, of which one was fine

    def reset_parameters(self) -> None:
        """`reset`, under the name that is called after `to_empty`, as by FSDP."""
        self.reset()

    def update(self, candidate: Tensor, *, store: bool, anchors: int = 0) -> Tensor:
        """The eps of an adaptive tracker for a batch, and the new state.

        Args:
            candidate: 0-d, the batch's own threshold. One that is not finite counts as skipped,
                leaves the value as it is, and the stored value is used.
            store: whether to keep the result; False (evaluation) computes the same eps. Under
                torch.func transforms nothing is kept, nor of a candidate that is met again in a
                backward, the second run of a checkpoint.
            anchors: rows of the batch, by which a short one is known; 0 where all are alike.

        Returns: 0-d float64 on the candidate's device, no gradient, never the buffer.
        Raises: RuntimeError: the tracker is a schedule.
        """
        if not self.adaptive_rule:
            raise RuntimeError(f"update: got a {self.rule} schedule, wanted an adaptive tracker")
        candidate = candidate.detach().to(torch.float64)
        state = self.state.to(candidate.device, torch.float64)
        eps, moved = states.step(state, candidate, anchors, *self.kernel_rule()[2:])
        if torch._C._are_functorch_transforms_active():
            return eps
        self.known = None
        if is_in_backward() and self._recent:
            eps, self.known = self._recalled(candidate, eps)
            moved = torch.where(self.known.to(state.device), state, moved)
        if store:
            self.remember(candidate, eps)
            self.store(moved)
        return eps

    def store(self, state: Tensor) -> None:
        """Takes a new `state`: of an update made elsewhere, as by `torch.ops.hex.adaptive`."""
        if state.is_meta and not self.state.is_meta:
            return  # a call for the shapes alone
        if self.options["warmup_epochs"] > 0:
            self._warn_without_epochs("the warm-up never ends")
        if self.state.dtype != torch.float64:  # cast in place, as by FSDP's buffer_dtype
            self.state = self.state.to(torch.float64)
        self.state.copy_(state)

    def remember(self, candidate: Tensor, eps: Tensor) -> None:
        """Notes what a candidate was given, for the second run of a checkpoint."""
        if not torch.compiler.is_compiling() and not candidate.is_meta:
            self._recent.appendleft((candidate, eps))

    def _recalled(self, candidate: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """The eps that this candidate was given in its first run, or eps if there was none; and
        whether there was one (a candidate that is not finite is not asked for)."""
        seen, given = (torch.stack(column) for column in zip(*self._recent, strict=True))
        distance = (seen.to(candidate.device) - candidate).abs().nan_to_num(nan=math.inf)
        nearest = distance.argmin()  # the newest of several
        first = given.to(eps.device).index_select(0, nearest.reshape(1)).squeeze(0)
        known = distance.amin() <= _NEAR
        return torch.where(known, first, eps), known | ~candidate.isfinite()

    def watch(self, hard: Tensor, loss: Tensor, could_be_0: bool) -> None:
        """Counts a training batch, whether any row had members of H, and whether any had a loss, if
        `could_be_0` by the threshold; on the device, without waiting for it. A batch whose loss is
        not finite says nothing."""
        if torch.compiler.is_exporting() or hard.is_meta:
            return
        at_hand = hard.is_cpu and type(hard) is Tensor and not torch.compiler.is_compiling()
        if at_hand and self._is_fine:
            self._passed += 1
            return
        if self._tally[0].device != hard.device:
            self._tally = tuple(count.to(hard.device) for count in self._tally)
        batches, members, nothing = self._tally
        finite = loss.isfinite().all()
        batches.add_(finite)
        members.add_(hard.any() & finite)
        if could_be_0:
            nothing.add_(~loss.any())
        if at_hand:
            self._is_fine = bool(members > 0) and bool(nothing < batches)

    def look(self, ended: bool = False) -> None:
        """Warns of what `watch` has counted, where no epochs are named or where the last of them
        has ended; waits for the device."""
        if ended:
            self._judge("the last epoch")
        elif not self._epoch_set:
            self._judge("the last {:.0f} batches", least=100)

    def _judge(self, period: str, least: int = 1) -> None:
        batches, members, nothing = (float(count) for count in self._tally)
        batches += self._passed
        if batches < least:
            return
        period = period.format(batches)
        self._forget_tally()
        if schedules.lowest(self.rule, self.options) == math.inf or self._is_warm_up():
            return  # InfoNCE, or the warm-up's threshold, is wanted
        if members == 0:
            if schedules.is_falling(self.rule, self.options, float(self.value)):
                return  # it has not come to where it is meant to go
            if self.options.get("lagged") and batches == 1:
                return  # the first batch of all has nothing before it
            self._warn(
                "never any",
                f"no row of {period} had a negative above the threshold: H was empty, so this was "
                "InfoNCE (decoupled, in the released form); take a lower threshold or quantile, or "
                f"larger batches ({self})",
            )
        elif nothing == batches:
            self._warn(
                "nothing else",
                f"every negative was above the threshold in every row of {period}, and the "
                "released form leaves those out: the loss and its gradient were 0; take a higher "
                f"threshold, or a schedule that falls less far ({self})",
            )

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
        return self.value

    def warn_if_never(self) -> None:
        """Warns of a schedule that stays where no cosine is above it, but for math.inf."""
        lowest = schedules.lowest(self.rule, self.options)
        if 1 <= lowest < math.inf:
            self._warn(
                "never any",
                f"no cosine is above {lowest:g}, so H is always empty, which is InfoNCE; take a "
                f"lower threshold, or threshold=None to have InfoNCE ({self})",
            )

    def warn_if_too_small(self, n_row: int, has_self: bool) -> None:
        """Warns, once, where the quantile of a row whole is no negative's cosine.

        The element taken is number k = round(quantile (n - 1)) of n in ascending order. k = n - 1
        is the self similarity if the row has it: eps is 1 and H is always empty (quantile 0.99:
        n < 52). The next below, or the greatest of a row without self, is the positive's as soon
        as training works: eps follows the positives and H is nearly empty (n < 151, or n < 52).
        The short last batch of an epoch is passed over.

        Args:
            n_row: cosines in a row. has_self: whether the row's own is among them ("ntxent").
        """
        if torch.compiler.is_compiling() or self.over != "all" or not self.adaptive_rule:
            return
        above = n_row - 1 - round(self.quantile * (n_row - 1))  # elements after the one taken
        longest, self._longest_row = self._longest_row, max(n_row, self._longest_row)
        if n_row < 1 or above > int(has_self) or 2 * n_row < longest:
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
        """The history, in a tensor of fixed shape: a state_dict holds nothing else than tensors."""
        return states.pack_history(self._history)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes back what get_extra_state gave."""
        self._history = states.unpack_history(state)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # a state from before there was a tracker: no keys to miss
        saved = state_dict.get(f"{prefix}state")
        if isinstance(saved, Tensor) and saved.dtype == torch.int64 and saved.shape == (4,):
            state_dict[f"{prefix}state"] = states.converted(saved)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)
        self._epoch_set = not self.state.is_meta and int(self.epoch) >= 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ThresholdTracker:
        """`to`, `half` and the like: another device, but float64 as before."""
        before = self.state
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.state.dtype != torch.float64:
            self.state = before.to(self.state.device)
        if not self.state.is_meta:
            self._tally = tuple(count.to(self.state.device) for count in self._tally)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: without what a backward yet to come would need."""
        return {**self.__dict__, "_recent": deque(maxlen=_RECENT), "known": None}

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
            warn(f"ThresholdTracker: {message}")
