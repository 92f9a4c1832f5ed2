# SPDX-License-Identifier: MIT
"""HEX for code that hands (logits, target) to a criterion, as to torch.nn.CrossEntropyLoss.

The function with eps given, the module, and the checks of their arguments. The mathematics is in
docs/math.md; the kernels behind ops.py.
"""

from typing import Any, Literal

from torch import Tensor

from . import ops
from .functional import (
    Reduction,
    Variant,
    check_embeddings,
    check_options,
    check_temperature,
    eps_tensor,
    temperature_tensor,
)
from .loss import _Contrastive, _tracker
from .membership import check_labels
from .threshold import ThresholdTracker

__all__ = ["HEXCrossEntropyLoss", "hex_cross_entropy"]


def hex_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    eps: float | Tensor,
    temperature: float | Tensor,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    variant: Variant = "paper",
    reduction: Reduction = "mean",
) -> Tensor:
    """The HEX loss of rows of logits at a given threshold, in nats.

    With l the logits, p = target[i], the other columns of row i that are not -inf its negatives::

        H(i) = { j : tau l_ij > eps },  G(i) the other negatives
        L_i  = -l_ip + log( exp(l_ip) + Q_i + sum_{j in G(i)} exp(l_ij) )

    with Q_i of `hex_loss`. With H empty it is torch's cross-entropy. Half logits are rounded
    cosines: at tau = 0.07 a step of 5.5e-4 (float16) or 4.4e-3 (bfloat16) near 0.9, so eps is
    compared with no more than that.

    Args:
        logits: (N, C), cosine / temperature; float64, float32, bfloat16 or float16; -inf leaves a
            column out of its row.
        target: (N,) integers, the positive's column, in [0, C). Where that is -inf the loss is
            +inf, as torch's, and the gradient that of its limit: -1 there. Where nothing is left
            beside it (in the released form nothing outside H) both are NaN, as torch's.
        eps: threshold, a cosine: a number, 0-d or (N,).
        temperature: what the cosines were divided by. Only eps and the floor of Q know it: its own
            gradient is at constant logits, and a learned temperature learns through the logits.
        beta, tau_plus, variant, reduction: as in `hex_loss`.

    Returns:
        0-d, or (N,) for "none"; float64 if the logits are, else float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.
        RuntimeError: a target outside [0, C), on the CPU.

    Example:
        >>> import torch
        >>> from hex import hex_cross_entropy
        >>> logits, target = torch.rand(32, 4097) / 0.2, torch.zeros(32, dtype=torch.int64)
        >>> loss = hex_cross_entropy(logits, target, eps=0.8, temperature=0.2)  # MoCo

    Source: Kokilepersaud et al., WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX.
    """
    target = _check(logits, target)
    check_options(beta, tau_plus, variant, reduction)
    tau = temperature_tensor(check_temperature(temperature), logits)
    given = eps_tensor(eps, logits.shape[0], logits.device)
    return _loss(logits, target, given, tau, reduction, variant, float(beta), float(tau_plus))[0]


class HEXCrossEntropyLoss(_Contrastive):
    """The HEX loss in place of `torch.nn.CrossEntropyLoss` on contrastive logits.

    For MoCo, sthalles/SimCLR, mmpretrain and others that build logits = cosines / temperature and a
    target. `hex_cross_entropy` has the equations; the threshold follows training as in `HEXLoss`.
    The logits exist already, so no memory is saved: where the embeddings are at hand, take
    `HEXLoss`.

    Args:
        temperature: what the cosines were divided by; the cosines are logits * temperature.
        self_column: logits do not say whether the anchor's similarity with itself, 1, was among
            its candidates. The authors' quantile counts it. False: the columns present, as in
            MoCo, which never had one. True: one cosine of 1 is added to each row for the quantile
            (over="all"), as in SimCLR, where the code has left out the diagonal or filled it with
            -inf.
        threshold, beta, tau_plus, variant, reduction: as in `HEXLoss`.

    Shape:
        logits: (N, C); target: (N,). Result: 0-d, or (N,).

    Attributes:
        threshold, last, statistics(), set_epoch(): as in `HEXLoss`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import HEXCrossEntropyLoss
        >>> criterion = HEXCrossEntropyLoss(temperature=0.2)
        >>> logits = (torch.rand(32, 4097) / 0.2).requires_grad_()
        >>> criterion(logits, torch.zeros(32, dtype=torch.int64)).backward()

    Source: Kokilepersaud et al., WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX.
    """

    def __init__(
        self,
        temperature: float | Tensor,
        *,
        threshold: float | Literal["adaptive"] | ThresholdTracker | None = "adaptive",
        self_column: bool = False,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        variant: Variant = "paper",
        reduction: Reduction = "mean",
    ) -> None:
        if not isinstance(self_column, bool):
            raise TypeError(f"self_column: got {type(self_column).__name__}, wanted a bool")
        tracker = _tracker(threshold)
        super().__init__(temperature, tracker, beta, tau_plus, variant, "ntxent", reduction)
        self.self_column = self_column

    def forward(  # type: ignore[override]
        self, logits: Tensor, target: Tensor, *, temperature: float | Tensor | None = None
    ) -> Tensor:
        """The loss of a batch; arguments, result and errors as in `hex_cross_entropy`."""
        target = _check(logits, target)
        given = check_temperature(self.temperature if temperature is None else temperature)
        tau = temperature_tensor(given, logits)
        eps = self._threshold(
            logits.device,
            (logits, tau),
            logits.shape[0],
            logits.shape[1] + self.self_column,
            self.self_column,
            lambda quantile, over: ops.logits.threshold(
                logits, target, tau, self.self_column, quantile, over
            ),
            lambda: ops.logits.row_range(logits, target, tau, self.self_column),
        )
        value, hard, share = _loss(
            logits, target, eps, tau, self.reduction, self.variant, self.beta, self.tau_plus
        )
        self._keep((logits, tau), value, eps, hard, share)
        return value

    def extra_repr(self) -> str:
        shown = [part for part in super().extra_repr().split(", ") if not part.startswith("mode=")]
        return ", ".join([shown[0], f"self_column={self.self_column}", *shown[1:]])


def _check(logits: Any, target: Any) -> Tensor:
    check_embeddings("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, wanted (N, C)")
    return check_labels("target", target, (logits.shape[0],), logits.device)


def _loss(
    logits: Tensor, target: Tensor, eps: Tensor, tau: Tensor, reduction: str, variant: str,
    beta: float, tau_plus: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return ops.logits.loss(
        logits, target, logits.new_empty((0, 0)), eps, tau, False, ops.REDUCTIONS[reduction],
        ops.VARIANTS[variant], beta, tau_plus,
    )  # fmt: skip
