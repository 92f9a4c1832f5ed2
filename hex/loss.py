# SPDX-License-Identifier: MIT
"""The losses as modules: options, the threshold over training, the statistics of the last batch.

The mathematics is in functional.py's docstrings and docs/math.md; the threshold's state machine is
in threshold.py.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from . import distributed, membership, ops
from . import state as states
from ._calls import is_compiled_in_checkpoint, is_first_run, is_in_backward, is_transformed
from .functional import (
    Batch,
    Mode,
    Reduction,
    Variant,
    check_batch,
    check_choice,
    check_options,
    check_temperature,
    is_number,
    temperature_tensor,
)
from .threshold import ThresholdTracker

__all__ = ["HEXLoss", "InfoNCELoss", "Statistics"]


class Statistics(NamedTuple):
    """What the last batch looked like: detached 0-d tensors on its device, read without a sync."""

    eps: Tensor
    """The threshold used, a cosine; the mean over rows where each has its own; +inf: H empty."""
    hard: Tensor
    """Mean |H(i)| over the rows."""
    share: Tensor
    """Mean share of the local term in the denominator: Q_i / (exp(l_ip) + Q_i + sum_G exp)."""


class _Contrastive(nn.Module):
    """What HEXLoss and InfoNCELoss share: everything but where eps comes from."""

    temperature: float | Tensor  # may be set later; each call checks it

    def __init__(
        self,
        temperature: float | Tensor,
        threshold: ThresholdTracker | None,
        beta: float,
        tau_plus: float,
        variant: Variant,
        mode: Mode,
        reduction: Reduction,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, get_args(Mode))
        check_options(beta, tau_plus, variant, reduction)
        temperature = check_temperature(temperature)
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature, persistent=False)
        else:
            self.temperature = temperature  # a Parameter registers itself
        self.beta = float(beta)
        self.tau_plus = float(tau_plus)
        self.variant: Variant = variant
        self.mode: Mode = mode
        self.reduction: Reduction = reduction
        self.gather_distributed = distributed.check_gather(gather_distributed)
        self.threshold = threshold
        if threshold is not None and variant == "paper":
            threshold.warn_if_never()  # the released form without H is decoupled InfoNCE
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        negatives: Tensor | None = None,
        *,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; arguments, result and errors as in `hex_loss`.

        Args:
            z0, z1: (B, D), two views.
            negatives: None, (K, D) or (B, K, D).
            temperature: overrides the module's for this call (CLIP: `1 / logit_scale.exp()`).
        """
        batch = self._gathered(check_batch(z0, z1, negatives, self.mode))
        given = check_temperature(self.temperature if temperature is None else temperature)
        tau = temperature_tensor(given, z0)
        learner = *batch.inputs, tau
        options: tuple[Any, ...] = (
            tau,
            batch.mode,
            ops.REDUCTIONS[self.reduction],
            ops.VARIANTS[self.variant],
            self.beta,
            self.tau_plus,
        )
        tracker = self.threshold
        if (
            tracker is not None
            and tracker.adaptive_rule
            and tracker.state.device == z0.device
            and tracker.state.dtype == torch.float64
            and ops.has_adaptive(z0)
            and not is_transformed(*learner, tracker.state)
            and not is_in_backward()
            and not is_compiled_in_checkpoint()
        ):
            tracker.warn_if_too_small(batch.row_length, has_self=batch.has_self)
            value, hard, share, eps, state = ops.adaptive_loss(
                *batch.inputs, tracker.state, *options, *tracker.kernel_rule()
            )
            if self._learns(learner):
                tracker.remember(state[states.CANDIDATE], eps)
                tracker.store(state)
        else:
            eps = self._eps(batch, learner)
            value, hard, share = ops.loss(*batch.inputs, eps, *options)
        self._keep(learner, value, eps, hard, share)
        return value

    def __prepare_scriptable__(self) -> None:  # called by torch.jit.script
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}; take torch.compile or "
            "torch.export"
        )

    def _gathered(self, batch: Batch) -> Batch:
        """With the rows of the other ranks, if they are wanted and there are any."""
        if not self.gather_distributed:
            return batch
        z0, z1, negatives = batch.inputs
        if batch.mode >= ops.MODES["shared"]:
            raise ValueError(
                "gather_distributed: got True with negatives, whose anchors have no use for the "
                "rows of other ranks; gather the keys that go into the queue"
            )
        return Batch((distributed.gather(z0), distributed.gather(z1), negatives), batch.mode)

    def _eps(self, batch: Batch, learner: tuple[Tensor, ...]) -> Tensor:
        """eps as measured on a batch, in a step that trains `learner`."""
        return self._threshold(
            batch.inputs[0].device,
            learner,
            batch.rows,
            batch.row_length,
            batch.has_self,
            lambda quantile, over: ops.threshold(*batch.inputs, batch.mode, quantile, over),
            lambda: ops.row_range(*batch.inputs, batch.mode),
        )

    def _threshold(
        self,
        device: torch.device,
        learner: tuple[Tensor, ...],
        anchors: int,
        row_length: int,
        has_self: bool,
        measure: Callable[[float, str], Tensor],
        row_range: Callable[[], tuple[Tensor, Tensor]],
    ) -> Tensor:
        tracker = self.threshold
        if tracker is None:
            return torch.full((), math.inf, dtype=torch.float64, device=device)
        if tracker.adaptive_rule:
            tracker.warn_if_too_small(row_length, has_self=has_self)
            candidate = measure(tracker.quantile, tracker.over)
            update = _update_outside if is_compiled_in_checkpoint() else ThresholdTracker.update
            return update(tracker, candidate, store=self._learns(learner), anchors=anchors)
        eps = tracker.current()
        if not tracker.normalize_rows:
            return eps.to(device)
        low, high = row_range()
        return low + eps.to(low) * (high - low)

    def _learns(self, learner: tuple[Tensor, ...]) -> bool:
        """Training, with a gradient of anything: the only calls that move the threshold."""
        if not self.training or is_transformed(*learner):
            return False
        if torch.is_grad_enabled():
            return any(z.requires_grad for z in learner)
        return is_first_run()

    def _keep(
        self,
        learner: tuple[Tensor, ...],
        value: Tensor,
        *statistics: Tensor,
        given: bool = False,
    ) -> None:
        """The statistics of a batch; value: the loss, but NaN where it is 0 for want of positives;
        given: H was, and the threshold has played no part. Meta tensors have none."""
        eps, hard, share = statistics
        if hard.is_meta or is_transformed(*learner, *statistics):
            return
        if (
            is_in_backward() and self._last is not None
        ):  # most likely the second run of a checkpoint
            known = None if given or self.threshold is None else self.threshold.known
            if known is not None:
                pairs = zip(self._last, statistics, strict=True)
                eps, hard, share = (torch.where(known, _mean(a), _mean(b)) for a, b in pairs)
                self._last = eps, hard, share
            return
        self._last = eps, hard, share
        if self.threshold is not None and not given and self._learns(learner):
            self.threshold.watch(hard, value.detach(), could_be_0=self.variant == "released")

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
        tau = self.temperature
        shown = tau if isinstance(tau, float) else f"<{type(tau).__name__}>"
        return (
            f"temperature={shown}, beta={self.beta}, tau_plus={self.tau_plus}, "
            f"variant={self.variant!r}, mode={self.mode!r}, reduction={self.reduction!r}"
            + ", gather_distributed=True"
            * self.gather_distributed
        )


@torch.compiler.disable(reason="compile around an activation checkpoint, not a HEX loss inside one")  # type: ignore[untyped-decorator, no-untyped-call]
def _update_outside(tracker: ThresholdTracker, candidate: Tensor, **options: Any) -> Tensor:
    """`tracker.update` outside the graph, where it knows the second run of a checkpoint."""
    return tracker.update(candidate, **options)


class HEXLoss(_Contrastive):
    """The HEX loss with a threshold that follows training: InfoNCE, its near negatives apart.

    With c_ij the cosine of anchor i and candidate j, l = c / tau, p the positive of i::

        H(i) = { j : c_ij > eps },   G(i) the other negatives
        L_i  = -l_ip + log( exp(l_ip) + Q_i + sum_{j in G(i)} exp(l_ij) )

    where Q_i is the weighted, debiased sum over H(i) (`hex_loss` has it in full) and eps, by
    default, is the mean over rows of the row's 0.99 quantile, fresh in every batch. As groups
    emerge in the embedding, eps falls.

    Args:
        temperature: tau > 0; a Parameter of one element is learned.
        threshold: "adaptive"; a `ThresholdTracker` (quantile, warm-up, momentum, schedules); a
            number, a fixed cosine; or None, InfoNCE.
        beta: >= 0, how much more the closest members of H weigh.
        tau_plus: in [0, 1), the share of H expected to be false negatives.
        variant: "paper", or "released" for what the authors' code computes (docs/math.md).
        mode: "ntxent" (SimCLR), "query" (NNCLR, MoCo v3) or "cross" (CLIP); see `hex_loss`.
        reduction: "mean", "sum" or "none".
        gather_distributed: with several ranks of torch.distributed, the batches of all are one:
            each rank computes the same loss and threshold of all rows, and gets the gradient that
            data-parallel training (DDP, FSDP) makes the whole batch's. Every rank has as many
            rows (`drop_last=True`). One process: no effect.

    Shape:
        z0, z1: (B, D) float64, float32, bfloat16 or float16; negatives: (K, D) or (B, K, D).
        Result: 0-d, or one value a row; float64 if an input is, else float32.

    Attributes:
        threshold: the `ThresholdTracker` in use, part of `state_dict`; None for InfoNCE.
        last, statistics(): eps, mean |H| and the local share of the last batch.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import HEXLoss
        >>> criterion = HEXLoss(temperature=0.1)
        >>> z0, z1 = torch.randn(2, 256, 128).requires_grad_()
        >>> criterion(z0, z1).backward()
        >>> criterion.statistics().keys()
        dict_keys(['eps', 'hard', 'share'])

    Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
    Algorithms", WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        threshold: float | Literal["adaptive"] | ThresholdTracker | None = "adaptive",
        beta: float = 1.0,
        tau_plus: float = 0.1,
        variant: Variant = "paper",
        mode: Mode = "ntxent",
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
    ) -> None:
        tracker = _tracker(threshold)
        super().__init__(
            temperature, tracker, beta, tau_plus, variant, mode, reduction, gather_distributed
        )

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        negatives: Tensor | None = None,
        *,
        groups: Tensor | tuple[Tensor, Tensor] | None = None,
        guide: tuple[Tensor, ...] | None = None,
        temperature: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; arguments, result and errors as in `hex_loss`.

        Args:
            z0, z1: (B, D), two views.
            negatives: None, (K, D) or (B, K, D).
            groups: H(i) is given: the negatives of i's group. (B,) integers, one for each image;
                with negatives the pair (groups, negative_groups), the latter (K,) or (B, K). The
                threshold plays no part then: its statistic is NaN, the tracker is not touched.
            guide: (g0, g1), or (g0, g1, g_negatives) with negatives, of the embeddings' shapes but
                for the features: H(i) and eps come from its cosines, the loss from the embeddings'.
                No gradient flows to it. A backbone's features, say, which keep more of the image.
            temperature: overrides the module's for this call (CLIP: `1 / logit_scale.exp()`).

        Example:
            >>> import torch
            >>> from hex import HEXLoss
            >>> z0, z1 = torch.randn(2, 256, 128)
            >>> loss = HEXLoss()(z0, z1, groups=torch.arange(256) // 16)
            >>> loss = HEXLoss()(z0, z1, guide=tuple(torch.randn(2, 256, 512)))
        """
        if groups is None and guide is None:
            return super().forward(z0, z1, negatives, temperature=temperature)
        batch = check_batch(z0, z1, negatives, self.mode)
        if groups is not None and guide is not None:
            raise ValueError("groups, guide: got both, wanted one of them")
        tau = check_temperature(self.temperature if temperature is None else temperature)
        given = None if groups is None else membership.check_groups(groups, batch)
        guiding = None if guide is None else membership.check_guide(guide, batch, self.mode)
        batch = self._gathered(batch)
        if guiding is not None:
            guiding = self._gathered(guiding)
        elif given is not None and self.gather_distributed:
            given = distributed.gather_constant(given[0]), None
        learner = *batch.inputs, temperature_tensor(tau, z0)
        if guiding is None:
            eps = membership.unknown_eps(z0)
        else:
            eps = self._eps(guiding, learner)
        value, hard, share = membership.loss(
            batch,
            given,
            guiding,
            eps,
            learner[-1],
            ops.REDUCTIONS[self.reduction],
            ops.VARIANTS[self.variant],
            self.beta,
            self.tau_plus,
        )
        self._keep(learner, value, eps, hard, share, given=guiding is None)
        return value


class InfoNCELoss(_Contrastive):
    """InfoNCE by the kernels of `HEXLoss`: the baseline to compare it with.

        L_i = -l_ip + log( exp(l_ip) + sum_{negatives j} exp(l_ij) ),    l = c / tau

    Args:
        temperature, mode, reduction, gather_distributed: as in `HEXLoss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import InfoNCELoss
        >>> loss = InfoNCELoss(0.1)(torch.randn(256, 128), torch.randn(256, 128))

    Source: van den Oord et al. 2018 (arXiv 1807.03748); Chen et al. 2020 (arXiv 2002.05709).
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        mode: Mode = "ntxent",
        reduction: Reduction = "mean",
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, None, 1.0, 0.0, "paper", mode, reduction, gather_distributed)

    def extra_repr(self) -> str:
        return ", ".join(
            part for part in super().extra_repr().split(", ")
            if part.split("=")[0] in ("temperature", "mode", "reduction", "gather_distributed")
        )  # fmt: skip


def _tracker(threshold: Any) -> ThresholdTracker | None:
    if threshold is None or isinstance(threshold, ThresholdTracker):
        return threshold
    wanted = "wanted 'adaptive', a number, a ThresholdTracker or None"
    if isinstance(threshold, str):
        if threshold == "adaptive":
            return ThresholdTracker.adaptive()
        raise ValueError(f"threshold: got {threshold!r}, {wanted}")
    if not is_number(threshold):
        raise TypeError(f"threshold: got {type(threshold).__name__}, {wanted}")
    if math.isnan(threshold):
        raise ValueError("threshold: got nan, wanted a cosine")
    return ThresholdTracker.fixed(float(threshold))


def _mean(rows: Tensor) -> Tensor:
    """Over the rows; 0 where there are none, as the loss is then."""
    return rows.mean() if rows.numel() else rows.new_zeros(())
