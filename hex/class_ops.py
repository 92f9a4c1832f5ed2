# SPDX-License-Identifier: MIT
"""torch.ops.hex.labelled_* and logits_* as PyTorch sees them: the counterpart of ops.py.

Shapes without data, batching, first and second derivatives, and the formulas of
reference_classes.py where a device has no kernel for them. Arguments arrive checked (sup_con.py,
logits.py).
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import reference_classes as reference
from ._calls import warn
from .ops import _applied, _on_one_device, _reduce, _register_vmap, no_forward_mode

__all__ = ["PAIRINGS", "POSITIVES", "labelled_loss", "labelled_row_range", "labelled_threshold",
           "logits_loss", "logits_row_range", "logits_threshold"]  # fmt: skip

PAIRINGS = {name: code for code, name in enumerate(reference.PAIRINGS)}
POSITIVES = {name: code for code, name in enumerate(reference.POSITIVES)}

_EPS, _COUNT, _SHARE, _STATS = 0, 7, 8, 12  # csrc/hex.h, HEX_STAT_*
_KERNELS = {"cpu", "meta"}


# ---- shapes ------------------------------------------------------------------------------------


def _dtype(x: Tensor, y: Tensor, pairing: int) -> torch.dtype:
    wide = x.dtype == torch.float64 or (pairing != 0 and y.dtype == torch.float64)
    return torch.float64 if wide else torch.float32


def _rows_fake(x: Tensor, dtype: torch.dtype, reduction: int) -> tuple[Tensor, Tensor]:
    loss = x.new_empty((x.shape[0],) if reduction == 0 else (), dtype=dtype)
    return loss, x.new_empty((_STATS, x.shape[0]), dtype=dtype)


def _labelled_forward_fake(
    x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, groups: Tensor,
    candidate_groups: Tensor, guide: Tensor, candidate_guide: Tensor, eps: Tensor, tau: Tensor,
    pairing: int, reduction: int, variant: int, positives: int, beta: float, tau_plus: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _rows_fake(x, _dtype(x, y, pairing), reduction)


def _labelled_backward_fake(
    grad: Tensor, x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor,
    groups: Tensor, candidate_groups: Tensor, guide: Tensor, candidate_guide: Tensor, tau: Tensor,
    stats: Tensor, pairing: int, reduction: int, beta: float, needs: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dy = needs & 2 and pairing != 0
    return (
        x.new_empty(x.shape if needs & 1 else (0,)),
        y.new_empty(y.shape if dy else (0,)),
        tau.new_empty(() if needs & 4 else (0,)),
    )


def _labelled_threshold_fake(
    x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, pairing: int,
    quantile: float, over_negatives: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty((), dtype=torch.float64)


def _labelled_row_range_fake(
    x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, pairing: int
) -> tuple[Tensor, Tensor]:
    low = x.new_empty(x.shape[0], dtype=_dtype(x, y, pairing))
    return low, torch.empty_like(low)


def _logits_forward_fake(
    logits: Tensor, target: Tensor, score: Tensor, eps: Tensor, tau: Tensor, given: bool,
    reduction: int, variant: int, beta: float, tau_plus: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _rows_fake(logits, _dtype(logits, logits, 0), reduction)


def _logits_backward_fake(
    grad: Tensor, logits: Tensor, target: Tensor, score: Tensor, tau: Tensor, stats: Tensor,
    reduction: int, beta: float, needs: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dlogits = logits.new_empty(logits.shape if needs & 1 else (0,))
    return dlogits, tau.new_empty(() if needs & 2 else (0,))


def _logits_threshold_fake(
    logits: Tensor, target: Tensor, tau: Tensor, quantile: float, over_negatives: bool,
    self_column: bool,
) -> Tensor:  # fmt: skip
    return logits.new_empty((), dtype=torch.float64)


def _logits_row_range_fake(
    logits: Tensor, target: Tensor, tau: Tensor, self_column: bool
) -> tuple[Tensor, Tensor]:
    low = logits.new_empty(logits.shape[0], dtype=_dtype(logits, logits, 0))
    return low, torch.empty_like(low)


for _name, _fake in (
    ("labelled_forward", _labelled_forward_fake),
    ("labelled_backward", _labelled_backward_fake),
    ("labelled_threshold", _labelled_threshold_fake),
    ("labelled_row_range", _labelled_row_range_fake),
    ("logits_forward", _logits_forward_fake),
    ("logits_backward", _logits_backward_fake),
    ("logits_threshold", _logits_threshold_fake),
    ("logits_row_range", _logits_row_range_fake),
):
    torch.library.register_fake(f"hex::{_name}", _on_one_device(_fake))
    _register_vmap(_name)


# ---- derivatives: see ops.py for why these are autograd.Functions -------------------------------


def _second(loss: Any, reduction: int, needs: int, grad: Tensor, inputs: tuple[Tensor, ...],
            outer: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # fmt: skip
    """Dense: the derivative of the reference's gradient at the thresholds of the forward.

    loss: rows from inputs, tau the last. Returns those of grad and of each input.
    """
    wanted = [k for k in range(len(inputs)) if needs >> k & 1]

    def gradient(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        pull = torch.func.vjp(lambda *z: _reduce(loss(*z), reduction), *inputs)[1]
        grads = pull(grad)
        return tuple(grads[k] for k in wanted)

    pull = torch.func.vjp(gradient, grad, *inputs)[1]
    result: tuple[Tensor, ...] = pull(tuple(outer[k] for k in wanted))
    return result


class _Labelled(torch.autograd.Function):
    generate_vmap_rule = True
    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, groups: Tensor,
        candidate_groups: Tensor, guide: Tensor, candidate_guide: Tensor, eps: Tensor, tau: Tensor,
        pairing: int, reduction: int, variant: int, positives: int, beta: float, tau_plus: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        loss, stats = torch.ops.hex.labelled_forward(
            x, y, ids, candidate_ids, mask, groups, candidate_groups, guide, candidate_guide, eps,
            tau, pairing, reduction, variant, positives, beta, tau_plus,
        )  # fmt: skip
        return loss, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        stats = output[1]  # holds the threshold of each row: a later write to eps changes nothing
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(*inputs[:9], inputs[10], stats)
        ctx.options = inputs[11:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 10)]
        needs = sum(1 << k for k, w in enumerate(wanted) if w)
        function: Any = (
            _apply_labelled_gradient if torch.is_grad_enabled() else _LabelledGradient.forward
        )
        grads = function(grad, *ctx.saved_tensors, *ctx.options, needs)
        if ctx.options[0] == 0 and wanted[1]:  # y is not looked at
            grads = grads[0], torch.zeros_like(ctx.saved_tensors[1]), grads[2]
        dx, dy, dtau = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return dx, dy, *(None,) * 8, dtau, *(None,) * 6


class _LabelledGradient(torch.autograd.Function):
    generate_vmap_rule = True
    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor,
        groups: Tensor, candidate_groups: Tensor, guide: Tensor, candidate_guide: Tensor,
        tau: Tensor, stats: Tensor, pairing: int, reduction: int, variant: int, positives: int,
        beta: float, tau_plus: float, needs: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dx, dy, dtau = torch.ops.hex.labelled_backward(
            grad, x, y, ids, candidate_ids, mask, groups, candidate_groups, guide, candidate_guide,
            tau, stats, pairing, reduction, beta, needs,
        )  # fmt: skip
        return dx, dy, dtau

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:12])
        ctx.options = inputs[12:]

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        saved: tuple[Any, ...] = ctx.saved_tensors
        grad, x, y, tau, stats = *saved[:3], *saved[10:]
        given: Any = saved[3:10]  # from ids to the guides
        pairing, reduction, variant, positives, beta, tau_plus, needs = ctx.options
        if pairing == 0:
            needs &= ~2

        def loss(x: Tensor, y: Tensor, tau: Tensor) -> Tensor:
            options = pairing, variant, positives, beta, tau_plus
            arguments: Any = (x, y, *given, stats[_EPS], tau, *options)
            return reference.labelled_rows(*arguments)[0]

        dgrad, dx, dy, dtau = _second(loss, reduction, needs, grad, (x, y, tau), outer)
        return dgrad, dx, dy, *(None,) * 7, dtau, *(None,) * 8


class _Logits(torch.autograd.Function):
    generate_vmap_rule = True
    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, score: Tensor, eps: Tensor, tau: Tensor, given: bool,
        reduction: int, variant: int, beta: float, tau_plus: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        loss, stats = torch.ops.hex.logits_forward(
            logits, target, score, eps, tau, given, reduction, variant, beta, tau_plus
        )
        return loss, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, score, _eps, tau, *options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, target, score, tau, output[1])
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        wanted = [ctx.needs_input_grad[i] for i in (0, 4)]
        needs = sum(1 << k for k, w in enumerate(wanted) if w)
        function: Any = (
            _apply_logits_gradient if torch.is_grad_enabled() else _LogitsGradient.forward
        )
        grads = function(grad, *ctx.saved_tensors, *ctx.options, needs)
        dlogits, dtau = (g if w else None for g, w in zip(grads, wanted, strict=True))
        return dlogits, None, None, None, dtau, *(None,) * 5


class _LogitsGradient(torch.autograd.Function):
    generate_vmap_rule = True
    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(
        grad: Tensor, logits: Tensor, target: Tensor, score: Tensor, tau: Tensor, stats: Tensor,
        given: bool, reduction: int, variant: int, beta: float, tau_plus: float, needs: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dlogits, dtau = torch.ops.hex.logits_backward(
            grad, logits, target, score, tau, stats, reduction, beta, needs
        )
        return dlogits, dtau

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.options = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        grad, logits, target, score, tau, stats = ctx.saved_tensors
        given, reduction, variant, beta, tau_plus, needs = ctx.options

        def loss(logits: Tensor, tau: Tensor) -> Tensor:
            return reference.logits_rows(
                logits, target, score, stats[_EPS], tau, given, variant, beta, tau_plus
            )[0]

        dgrad, dlogits, dtau = _second(loss, reduction, needs, grad, (logits, tau), outer)
        return dgrad, dlogits, None, None, dtau, *(None,) * 7


_apply_labelled, _apply_labelled_gradient, _apply_logits, _apply_logits_gradient = map(
    _applied, (_Labelled, _LabelledGradient, _Logits, _LogitsGradient)
)


# ---- kernels, or the reference where there are none --------------------------------------------

_warned: set[str] = set()


def _has_kernel(z: Tensor) -> bool:
    device = z.device.type
    if device in _KERNELS:
        return True
    if device not in _warned and not torch.compiler.is_compiling():
        _warned.add(device)
        warn(
            "hex-ssl has no kernels for labels, groups, guides and logits on device "
            f"'{device}': the formulas run as plain PyTorch operators there, correct but with "
            "N x N memory",
            RuntimeWarning,
        )
    return False


def labelled_loss(
    x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, groups: Tensor,
    candidate_groups: Tensor, guide: Tensor, candidate_guide: Tensor, eps: Tensor, tau: Tensor,
    pairing: int, reduction: int, variant: int, positives: int, beta: float, tau_plus: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The reduced loss, and of each row |H| and the local term's share (no gradient)."""
    inputs = (x, y, ids, candidate_ids, mask, groups, candidate_groups, guide, candidate_guide, eps,
              tau)  # fmt: skip
    if _has_kernel(x):
        value, stats = _apply_labelled(
            *inputs, pairing, reduction, variant, positives, beta, tau_plus
        )
        return value, stats[_COUNT], stats[_SHARE]
    rows, hard, share = reference.labelled_rows(
        *inputs, pairing, variant, positives, beta, tau_plus
    )
    return _reduce(rows, reduction), hard, share


def labelled_threshold(
    x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, pairing: int,
    quantile: float, over: str,
) -> Tensor:  # fmt: skip
    """Mean over rows of the row's quantile; 0-d float64, no gradient."""
    with torch.no_grad():
        if _has_kernel(x):
            value: Tensor = torch.ops.hex.labelled_threshold(
                x, y, ids, candidate_ids, mask, pairing, quantile, over == "negatives"
            )
            return value
        c, seen, kept = _dense(x, y, ids, candidate_ids, mask, pairing, over == "negatives")
        return reference.quantile_of_rows(c, kept, seen, quantile)


def labelled_row_range(
    x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, pairing: int
) -> tuple[Tensor, Tensor]:
    """Least and largest cosine of each row; (N,) each, no gradient."""
    with torch.no_grad():
        if _has_kernel(x):
            low, high = torch.ops.hex.labelled_row_range(x, y, ids, candidate_ids, mask, pairing)
            return low, high
        c, _, kept = _dense(x, y, ids, candidate_ids, mask, pairing, False)
        return reference.range_of_rows(c, kept)


def _dense(
    x: Tensor, y: Tensor, ids: Tensor, candidate_ids: Tensor, mask: Tensor, pairing: int,
    over_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Cosines, and which are seen and kept; a row itself is of the whole row."""
    c = reference.labelled_cosines(x, y, pairing)
    n, m = c.shape
    positive, negative = reference.sets(ids, candidate_ids, mask, n, m, pairing)
    seen = positive | negative
    if pairing == 0 and not over_negatives:
        seen = torch.ones_like(seen)
    return c, seen, negative if over_negatives else seen


def logits_loss(
    logits: Tensor, target: Tensor, score: Tensor, eps: Tensor, tau: Tensor, given: bool,
    reduction: int, variant: int, beta: float, tau_plus: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The reduced loss, and of each row |H| and the local term's share (no gradient)."""
    if _has_kernel(logits):
        value, stats = _apply_logits(
            logits, target, score, eps, tau, given, reduction, variant, beta, tau_plus
        )
        return value, stats[_COUNT], stats[_SHARE]
    rows, hard, share = reference.logits_rows(
        logits, target, score, eps, tau, given, variant, beta, tau_plus
    )
    return _reduce(rows, reduction), hard, share


def logits_threshold(
    logits: Tensor, target: Tensor, tau: Tensor, quantile: float, over: str, self_column: bool
) -> Tensor:
    """Mean over rows of the row's quantile of cosines, logits times tau; 0-d float64."""
    with torch.no_grad():
        if _has_kernel(logits):
            value: Tensor = torch.ops.hex.logits_threshold(
                logits, target, tau, quantile, over == "negatives", self_column
            )
            return value
        c, seen, kept = _dense_logits(logits, target, tau, over == "negatives", self_column)
        return reference.quantile_of_rows(c, kept, seen, quantile)


def logits_row_range(
    logits: Tensor, target: Tensor, tau: Tensor, self_column: bool
) -> tuple[Tensor, Tensor]:
    """Least and largest cosine of each row; (N,) each, no gradient."""
    with torch.no_grad():
        if _has_kernel(logits):
            low, high = torch.ops.hex.logits_row_range(logits, target, tau, self_column)
            return low, high
        c, _, kept = _dense_logits(logits, target, tau, False, self_column)
        return reference.range_of_rows(c, kept)


def _dense_logits(
    logits: Tensor, target: Tensor, tau: Tensor, over_negatives: bool, self_column: bool
) -> tuple[Tensor, Tensor, Tensor]:
    l = logits if logits.dtype == torch.float64 else logits.float()  # noqa: E741
    positive, negative = reference.logits_sets(l, target)
    seen, c = positive | negative, torch.where(l < math.inf, l * tau.to(l), math.nan)
    if self_column and not over_negatives:
        c = torch.cat([c, torch.ones_like(c[:, :1])], 1)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
    return c, seen, negative if over_negatives else seen
