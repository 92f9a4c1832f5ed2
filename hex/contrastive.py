# SPDX-License-Identifier: MIT
"""The one way of every module from a problem (problem.py) to its loss.

The options, the threshold over training, the operator, the tracker's step and the statistics of the
last batch. The modules themselves, in loss.py, say which problem theirs is; the threshold's state
machine is in threshold.py.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import problem
from . import state as states
from ._calls import is_compiled_in_checkpoint, is_first_run, is_in_backward, is_transformed
from .checks import (
    Positives,
    Reduction,
    Variant,
    check_options,
    check_temperature,
    check_threshold,
)
from .problem import Problem, Rule
from .threshold import ThresholdTracker

__all__ = ["ContrastiveLoss", "Statistics", "Threshold"]

Threshold = float | Literal["adaptive"] | ThresholdTracker | None


class Statistics(NamedTuple):
    """What the last batch looked like: detached 0-d tensors on its device, read without a sync."""

    eps: Tensor
    """The threshold used, a cosine; the mean over rows where each has its own; +inf: H empty."""
    hard: Tensor
    """Mean |H(i)| over the rows."""
    share: Tensor
    """Mean share of the local term in the denominator: Q_i / (exp(l_ip) + Q_i + sum_G exp)."""


class ContrastiveLoss(nn.Module):
    """What the losses share: everything but which problem theirs is."""

    temperature: float | Tensor  # may be set later; each call checks it
    positives: Positives = "outside"
    base_temperature: float | None = None
    shown: ClassVar[tuple[str, ...]] = ()  # the options that a repr tells

    def __init__(
        self,
        temperature: float | Tensor,
        threshold: Threshold,
        beta: float,
        tau_plus: float,
        variant: Variant,
        reduction: Reduction,
    ) -> None:
        super().__init__()
        check_options(beta, tau_plus, variant, reduction)
        temperature = check_temperature(temperature)
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature, persistent=False)
        else:
            self.temperature = temperature  # a Parameter registers itself
        self.beta = float(beta)
        self.tau_plus = float(tau_plus)
        self.variant: Variant = variant
        self.reduction: Reduction = reduction
        self.threshold = _tracker(threshold)
        if self.threshold is not None and variant == "paper":
            self.threshold.warn_if_never()  # the released form without H is decoupled InfoNCE
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def loss_of(self, batch: Problem) -> Tensor:
        """From a problem to its loss: eps, the operator, the tracker's step and the statistics."""
        tracker = None if batch.h_is_given else self.threshold
        rule = Rule(
            self.reduction,
            self.variant,
            self.beta,
            self.tau_plus,
            self.positives,
            self.base_temperature,
        )
        if tracker is None:
            transformed = is_transformed(*batch.learner())
        else:
            transformed = is_transformed(*batch.learner(), tracker.state)
        again = is_in_backward()  # most likely the second run of a checkpoint
        learns = tracker is not None and not transformed and self._learns(batch)
        if (
            tracker is not None
            and tracker.adaptive_rule
            and batch.has_adaptive()
            and tracker.state.device == batch.inputs[0].device
            and tracker.state.dtype == torch.float64
            and not transformed
            and not again
            and not is_compiled_in_checkpoint()
        ):
            tracker.warn_if_too_small(batch.row_length, has_self=batch.has_self)
            value, hard, share, eps, state = batch.adaptive_loss(
                tracker.state, rule, tracker.kernel_rule()
            )
            if learns:
                tracker.remember(state[states.CANDIDATE], eps)
                tracker.store(state)
        else:
            eps = self._eps(batch, tracker, learns)
            value, hard, share = batch.loss(eps, rule)
            transformed = transformed or is_transformed(hard, eps)  # as of a mapped guide
        if not transformed and not hard.is_meta:
            self._keep(batch, value, (eps, hard, share), tracker, learns, again)
        return value

    def _eps(self, batch: Problem, tracker: ThresholdTracker | None, learns: bool) -> Tensor:
        """eps of a problem, in a step that trains or does not."""
        like = batch.inputs[0]
        if batch.h_is_given:
            return problem.unknown_eps(like)
        if tracker is None:
            return torch.full((), math.inf, dtype=torch.float64, device=like.device)
        if tracker.adaptive_rule:
            tracker.warn_if_too_small(batch.row_length, has_self=batch.has_self)
            candidate = batch.threshold(tracker.quantile, tracker.over)
            update = _update_outside if is_compiled_in_checkpoint() else ThresholdTracker.update
            return update(tracker, candidate, store=learns, anchors=batch.anchors)
        eps = tracker.current()
        if not tracker.normalize_rows:
            return eps.to(like.device)
        low, high = batch.row_range()
        return low + eps.to(low) * (high - low)

    def _learns(self, batch: Problem) -> bool:
        """Training, with a gradient of anything: the only calls that move the threshold."""
        if not self.training:
            return False
        if torch.is_grad_enabled():
            for z in batch.learner():
                if z.requires_grad:
                    return True
            return False
        return is_first_run()

    def _keep(
        self,
        batch: Problem,
        value: Tensor,
        statistics: tuple[Tensor, Tensor, Tensor],
        tracker: ThresholdTracker | None,
        learns: bool,
        again: bool,
    ) -> None:
        """The statistics of a batch, and what the tracker warns of."""
        if again and self._last is not None:
            known = None if tracker is None else tracker.known
            if known is not None:
                pairs = zip(self._last, statistics, strict=True)
                eps, hard, share = (torch.where(known, _mean(a), _mean(b)) for a, b in pairs)
                self._last = eps, hard, share
            return
        self._last = statistics
        if tracker is not None and learns:
            hard, value, released = statistics[1], value.detach(), self.variant == "released"
            if released and batch.may_lack_positives():  # not 0 because all of a row was in H
                value = torch.where(batch.is_without_positives(), math.nan, value)
            tracker.watch(hard, value, could_be_0=released)

    def __prepare_scriptable__(self) -> None:  # called by torch.jit.script
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}; take torch.compile or "
            "torch.export"
        )

    @property
    def last(self) -> Statistics | None:
        """The statistics of the last batch, None before the first. No gradient, no sync."""
        if self._last is None:
            return None
        eps, hard, share = self._last
        return Statistics(eps.mean(), _mean(hard), _mean(share))

    def statistics(self) -> dict[str, float]:
        """`last` as numbers for a logger: {"eps", "hard", "share"}. Waits for the device.

        Where no epochs are named (`set_epoch`) it also warns, once, if H was empty in every row of
        the last hundred batches or more.

        Raises:
            RuntimeError: there has been no batch yet.
        """
        if (last := self.last) is None:
            raise RuntimeError("statistics: there has been no batch yet; call the loss first")
        if self.threshold is not None:
            self.threshold.look()
        return {name: float(value) for name, value in last._asdict().items()}

    def set_epoch(self, epoch: int) -> None:
        """Tells the threshold which epoch begins, counted from 0; see `ThresholdTracker`."""
        if self.threshold is not None:
            self.threshold.set_epoch(epoch)

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: of the statistics the means, not every row."""
        last = None if self._last is None else tuple(self.last or ())
        return {**self.__dict__, "_last": last}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """A strict load of a state that has a threshold leaves that out where this loss has none,
        so that a baseline starts from any checkpoint."""
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
            elif name not in ("base_temperature", "gather_distributed") or value:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


@torch.compiler.disable(reason="compile around an activation checkpoint, not a HEX loss inside one")  # type: ignore[untyped-decorator, no-untyped-call]
def _update_outside(tracker: ThresholdTracker, candidate: Tensor, **options: Any) -> Tensor:
    """`tracker.update` outside the graph, where it knows the second run of a checkpoint."""
    return tracker.update(candidate, **options)


def _tracker(threshold: Threshold) -> ThresholdTracker | None:
    if threshold is None or isinstance(threshold, ThresholdTracker):
        return threshold
    check_threshold(threshold)
    if isinstance(threshold, str):
        return ThresholdTracker.adaptive()
    return ThresholdTracker.fixed(float(threshold))


def _mean(rows: Tensor) -> Tensor:
    """Over the rows; 0 where there are none, as the loss is then."""
    return rows.mean() if rows.numel() else rows.new_zeros(())
