# SPDX-License-Identifier: MIT
"""What all loss modules share: how a problem (problem.py) becomes a loss.

This file has the common options, the choice of eps, the call of the operator, the step of the
tracker and the statistics of the last batch. The modules, with the problem of each, are in loss.py.
The state machine of the threshold is in threshold.py.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import ops, positive, problem
from ._calls import is_compiled_in_checkpoint, is_first_run, is_in_backward, is_transformed
from .checks import (
    Positives,
    Reduction,
    Variant,
    check_flag,
    check_gathers,
    check_one_positive,
    check_rows,
    check_temperature,
    check_threshold,
)
from .distributed import Meeting, Ranks
from .problem import Problem, Rule, checked_rule
from .threshold import ThresholdTracker

__all__ = ["ContrastiveLoss", "Statistics", "Threshold"]

_ANY_RULE: dict[str, Any] = dict(beta=0.0, tau_plus=0.0, variant="paper", reduction="mean")

Threshold = float | Literal["adaptive"] | ThresholdTracker | None


class Statistics(NamedTuple):
    """Statistics of the last batch, as detached 0-d tensors on the batch's device.

    Getting these tensors does not wait for the device. `ContrastiveLoss.statistics` gives numbers.
    """

    eps: Tensor
    """The threshold that was used, a cosine, float64. It is +inf if the loss was InfoNCE, and NaN
    if H was given by groups. If each row had a threshold of its own, it is their mean."""
    hard: Tensor
    """The mean of |H(i)| over the rows."""
    share: Tensor
    """The share of the local term Q_i in the denominator, averaged over the rows. It is 0 in the
    variants "released" and "excluded", which have no such term."""


class ContrastiveLoss(nn.Module):
    """A loss whose threshold follows training. A subclass turns its arguments into a problem.

    Args:
        temperature, threshold, gather_distributed, process_group, check_sizes: as in `HEXLoss`.
        **options: the options of `checked_rule`. They become attributes.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.
    """

    temperature: float | Tensor  # a user may set another value at any time, so each call checks it
    reduction: Reduction  # these are the rule's, which every call reads again
    variant: Variant
    beta: float
    tau_plus: float
    decoupled: bool = False
    positives: Positives = "outside"
    base_temperature: float | None = None
    cache_bytes: int | None = None
    shown: ClassVar[tuple[str, ...]] = ()  # the options that are in the repr
    _several: ClassVar[bool] = False  # whether an anchor may have several positives

    def __init__(
        self,
        temperature: float | Tensor,
        threshold: Threshold,
        *,
        gather_distributed: bool = False,
        process_group: Any = None,
        check_sizes: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.gather_distributed = check_flag("gather_distributed", gather_distributed)
        self._ranks = Ranks(process_group, check_flag("check_sizes", check_sizes))
        check_gathers(gather_distributed, process_group)
        rule = checked_rule(**options)
        for name in options:
            setattr(self, name, getattr(rule, name))
        temperature = check_temperature(temperature)
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature, persistent=False)
        else:
            self.temperature = temperature  # a Parameter registers itself
        self.threshold = _tracker(threshold)
        self._last: tuple[Tensor, ...] | None = None  # eps, and what ops.hard_and_share takes
        self._warn_of_options()

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks an option that is set later, in the same way as when the loss was made. Each call
        checks the temperature. A subclass may have attributes of these names before."""
        if name == "threshold":
            value = _tracker(value)
            check_one_positive(value is not None and value.rule == "by_positive" and self._several)
        elif name in self.__dict__ and name in Rule._fields:
            value = getattr(checked_rule(**{**_ANY_RULE, name: value}), name)
        elif name in self.__dict__ and name in ("gather_distributed", "self_column"):
            value = check_flag(name, value)
        super().__setattr__(name, value)
        if name in ("threshold", "variant", "decoupled") and "_last" in self.__dict__:
            self._warn_of_options()

    def _warn_of_options(self) -> None:
        """Warns of options that each may have any value, but of which one makes another useless."""
        if self.threshold is not None and self.variant != "released":
            # In the released form an empty H makes sense: it is decoupled InfoNCE.
            self.threshold.warn_if_never()
        elif self.threshold is not None and self.decoupled:
            self.threshold.warn_if_decoupled_twice()

    @property
    def process_group(self) -> Any:
        """The group of ranks whose batches count as one, or None for all ranks."""
        return self._ranks.group

    def meeting(self, rows: Sequence[int] | None) -> Meeting | None:
        """The call on all ranks that this call is part of, or None if there are no other ranks.

        Args:
            rows: as in `HEXLoss.forward`.
        """
        # A Proxy is refused with the embeddings.
        if not isinstance(rows, torch.fx.Proxy) and rows is not None:
            check_gathers(self.gather_distributed, None, rows)
            rows = check_rows(rows)
        if not self.gather_distributed or not self._ranks.are_several():
            return None
        options: tuple[Any, ...] = ()
        tracker = self.threshold
        if not torch.compiler.is_compiling():
            of_loss = {name: getattr(self, name) for name in self.shown if name != "temperature"}
            of_tracker = tracker and (tracker.rule, tracker.options)
            options = type(self).__name__, of_loss | {"training": self.training}, of_tracker
        return Meeting(self._ranks, rows, options, None if tracker is None else tracker.state)

    def loss_of(self, batch: Problem) -> Tensor:
        """The loss of a problem. It also makes the tracker's step and keeps the statistics."""
        tracker = None if batch.h_is_given else self.threshold
        rule = Rule(
            self.reduction, self.variant, self.beta, self.tau_plus, self.decoupled,
            self.positives, self.base_temperature, self.cache_bytes,
        )  # fmt: skip
        learner, state = batch.learner(), None
        if tracker is None:
            transformed = is_transformed(*learner)
        else:
            state = tracker.state  # once: to find a buffer takes a module longer than an attribute
            if state.is_meta and not learner[0].is_meta:
                raise ValueError(
                    "threshold: got a state on device meta, wanted the batch's device, "
                    f"{learner[0].device}; call to_empty(device=...) on the loss and "
                    "reset_parameters() on its threshold"
                )
            transformed = is_transformed(*learner, state)
        again = is_in_backward()  # if so, this is most likely the second run of a checkpoint
        learns = tracker is not None and not transformed and self._learns(learner)
        # One operator measures eps, makes the tracker's step and computes the loss, unless
        # the state is on another device or the eps of a checkpoint's first run may be wanted.
        if (
            tracker is not None
            and state is not None
            and tracker.adaptive_rule
            and batch.has_adaptive()
            and state.device == batch.inputs[0].device
            and state.dtype == torch.float64
            and not transformed
            and not again
            and not is_compiled_in_checkpoint()
        ):
            tracker.warn_if_too_small(batch.row_length, has_self=batch.has_self)
            value, seen, eps, moved = batch.adaptive_loss(state, rule, tracker.kernel_rule())
            if learns:
                tracker.remember(moved, eps)
                tracker.store(moved, state)
        else:
            eps = self._eps(batch, tracker, learns)
            value, seen, eps = batch.loss(eps, rule)
            transformed = transformed or is_transformed(seen[0], eps)  # by vmap over a guide, say
        if not transformed and not seen[0].is_meta:
            self._keep(batch, value, (eps, *seen), tracker, learns, again)
        return value

    def _eps(self, batch: Problem, tracker: ThresholdTracker | None, learns: bool) -> Tensor:
        """The eps of a problem, 0-d or (N,). An adaptive tracker stores its step if it learns."""
        like = batch.inputs[0]
        if batch.h_is_given:
            return problem.unknown_eps(like)
        if tracker is None:
            return problem.number_tensor(math.inf, like)
        if tracker.adaptive_rule:
            tracker.warn_if_too_small(batch.row_length, has_self=batch.has_self)
            candidate = batch.threshold(tracker.quantile, tracker.over)
            update = _update_outside if is_compiled_in_checkpoint() else ThresholdTracker.update
            return update(tracker, candidate, store=learns, anchors=batch.anchors)
        if tracker.rule == "by_positive":
            return tracker.below(positive.cosines(batch), positive.rounding(batch)).to(like.device)
        eps = tracker.current()
        if not tracker.normalize_rows:
            return eps.to(like.device)
        low, high = batch.row_range()
        return low + eps.to(low) * (high - low)

    def _learns(self, learner: tuple[Tensor, ...]) -> bool:
        """Whether this call trains something. Only such calls move the threshold."""
        if not self.training:
            return False
        if torch.is_grad_enabled():
            for z in learner:
                if z.requires_grad:
                    return True
            return False
        return is_first_run()

    def _keep(
        self,
        batch: Problem,
        value: Tensor,
        statistics: tuple[Tensor, ...],
        tracker: ThresholdTracker | None,
        learns: bool,
        again: bool,
    ) -> None:
        """Keeps the statistics of a batch, and lets the tracker count it for its warnings.

        Args:
            value: the loss.
            statistics: eps, and what `ops.hard_and_share` takes.
            learns: whether the tracker counts the batch.
            again: whether the call may be the second run of a checkpoint, whose statistics are not
                those of a new batch.
        """
        if again and self._last is not None:
            # An unknown candidate is that of a new batch inside a backward, whose statistics count.
            known = None if tracker is None else tracker.known
            if known is not None:
                pairs = zip(_rows(self._last), _rows(statistics), strict=True)
                eps, hard, share = (torch.where(known, _mean(a), _mean(b)) for a, b in pairs)
                self._last = eps, hard, share
            return
        object.__setattr__(self, "_last", statistics)  # it is none of what a module looks for
        if tracker is not None and learns and not tracker.counts_unseen(value):
            hard, leaves_out = _rows(statistics)[1], self.variant != "paper"
            value = value.detach()
            # A loss that is 0 for want of positives says nothing of H: as NaN it is not counted.
            if leaves_out and batch.may_lack_positives():
                value = torch.where(batch.is_without_positives(), math.nan, value)
            tracker.watch(hard, value, could_be_0=leaves_out)

    def __prepare_scriptable__(self) -> None:  # called by torch.jit.script
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}; use torch.compile or "
            "torch.export"
        )

    @property
    def last(self) -> Statistics | None:
        """The `Statistics` of the last batch, or None before the first."""
        if self._last is None:
            return None
        eps, hard, share = _rows(self._last)
        return Statistics(eps.mean(), _mean(hard), _mean(share))

    def statistics(self) -> dict[str, float]:
        """`last` as numbers for a logger: {"eps", "hard", "share"}. This waits for the device.

        If `set_epoch` has never been called, this method also warns, once, if H was empty in every
        row of the last hundred batches or more.

        Raises:
            RuntimeError: there has been no batch yet.
        """
        if (last := self.last) is None:
            raise RuntimeError("statistics: there has been no batch yet; call the loss first")
        if self.threshold is not None:
            self.threshold.look()
        return {name: float(value) for name, value in last._asdict().items()}

    def set_epoch(self, epoch: int) -> None:
        """Tells the threshold which epoch begins. Epochs count from 0. See
        `ThresholdTracker.set_epoch`.

        Raises:
            TypeError, ValueError: epoch is not an integer >= 0.
        """
        if self.threshold is not None:
            self.threshold.set_epoch(epoch)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: keeps the means of the statistics instead of every row's."""
        last = None if self._last is None else tuple(self.last or ())
        return {**self.__dict__, "_last": last}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """A loss without a threshold ignores that of a state, even in a strict load, so that a
        baseline can start from any checkpoint."""
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        if self.threshold is None:
            theirs = f"{prefix}threshold."
            unexpected[:] = [key for key in unexpected if not key.startswith(theirs)]

    def extra_repr(self) -> str:
        parts = []
        for name in self.shown:
            value = getattr(self, name)
            if name == "temperature" and isinstance(value, Tensor):
                parts.append(f"temperature=<{type(value).__name__}>")
            elif name not in ("decoupled", "base_temperature", "gather_distributed") or value:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


@torch.compiler.disable(reason="put torch.compile around an activation checkpoint, not inside it")  # type: ignore[untyped-decorator, no-untyped-call]
def _update_outside(tracker: ThresholdTracker, candidate: Tensor, **options: Any) -> Tensor:
    """`tracker.update` outside the graph, where it can tell the second run of a checkpoint."""
    return tracker.update(candidate, **options)


def _tracker(threshold: Threshold) -> ThresholdTracker | None:
    """The tracker that the argument `threshold` of a loss stands for."""
    if threshold is None or isinstance(threshold, ThresholdTracker):
        return threshold
    check_threshold(threshold)
    if isinstance(threshold, str):
        return ThresholdTracker.adaptive()
    return ThresholdTracker.fixed(float(threshold))


def _rows(last: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """eps, |H| and share of each row or their means, of what is kept of a batch."""
    return last[0], *ops.hard_and_share(last[1:])


def _mean(rows: Tensor) -> Tensor:
    """The mean over the rows. Without rows it is 0, as the loss is."""
    return rows.mean() if rows.numel() else rows.new_zeros(())
