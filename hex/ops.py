# SPDX-License-Identifier: MIT
"""torch.ops.hex.* as PyTorch sees it: shapes without data, batching, first and second derivatives.

The schemas and the kernels are in csrc/; the formulas in reference.py serve every device without a
kernel, and the second derivative everywhere. Arguments arrive checked (functional.py).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._calls import warn
from ._load import _C, cuda_problem

__all__ = [
    "MODES",
    "REDUCTIONS",
    "VARIANTS",
    "adaptive_loss",
    "has_adaptive",
    "isa",
    "loss",
    "row_range",
    "threshold",
]

MODES = {"ntxent": 0, "query": 1, "cross": 2, "shared": 3, "own": 4}
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
VARIANTS = {"paper": 0, "released": 1}

_COUNT, _SHARE = 7, 8  # rows of `stats` that are shown to users (csrc/hex.h, HEX_STAT_*)
_STATS = 9
_KERNELS = {"cpu", "meta"}  # device types with kernels; the fakes below are those of "meta"
_CUDA_KERNELS = {"forward", "backward", "threshold", "row_range", "adaptive"}  # with one
_ONE_PRODUCT = 8  # added to the mode: float32 may be rounded to 11 bits before it is multiplied


def isa() -> str:
    """The level of the CPU kernels in use: "base", "avx2", "avx512" or "avx512_bf16"."""
    return _C.isa()


# ---- shapes ------------------------------------------------------------------------------------


def _rows(z0: Tensor, mode: int) -> int:
    both = (MODES["ntxent"], MODES["cross"])
    return z0.shape[0] * (2 if mode & ~_ONE_PRODUCT in both else 1)


def _compute_dtype(z0: Tensor, z1: Tensor, negatives: Tensor, mode: int) -> torch.dtype:
    used = (z0, z1, negatives) if mode & ~_ONE_PRODUCT >= MODES["shared"] else (z0, z1)
    return torch.float64 if any(z.dtype == torch.float64 for z in used) else torch.float32


def _kept_numbers(z0: Tensor, negatives: Tensor, mode: int, wide: bool) -> int:
    """Room for what the CPU's forward leaves for the backward: kept_room in csrc/cpu/pairs.inc.

    The sizes may be symbolic, and a branch on one would be a guard: so this bounds from above what
    is used, by an expression that torch knows to be more than 0.
    """
    B = z0.shape[0]
    if z0.device.type not in ("cpu", "meta") or mode == MODES["own"]:
        return 0
    item, block = (8, 96) if wide else (4, 192)
    tile = block * (block + 64 // item)
    if mode == MODES["ntxent"]:
        across = (2 * B + block - 1) // block
        tiles = across * (across + 1) // 2
    else:
        columns = negatives.shape[0] if mode == MODES["shared"] else B
        tiles = ((B + block - 1) // block) * ((columns + block - 1) // block)
    room: int = torch.sym_min(tiles * tile, (24 << 20) // item)  # type: ignore[no-untyped-call]
    return room


def _forward_fake(
    z0: Tensor, z1: Tensor, negatives: Tensor, eps: Tensor, tau: Tensor,
    mode: int, reduction: int, variant: int, beta: float, tau_plus: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, dtype = _rows(z0, mode), _compute_dtype(z0, z1, negatives, mode)
    loss = z0.new_empty((rows,) if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    kept = _kept_numbers(z0, negatives, mode, dtype == torch.float64) if keep else 0
    return loss, z0.new_empty((_STATS, rows), dtype=dtype), z0.new_empty((kept,), dtype=dtype)


def _adaptive_fake(
    z0: Tensor, z1: Tensor, negatives: Tensor, state: Tensor, tau: Tensor,
    mode: int, reduction: int, variant: int, beta: float, tau_plus: float, *rule: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    loss, stats, kept = _forward_fake(
        z0, z1, negatives, tau, tau, mode, reduction, variant, beta, tau_plus, rule[-1]
    )
    return loss, stats, z0.new_empty((), dtype=torch.float64), torch.empty_like(state), kept


def _backward_fake(
    grad: Tensor, z0: Tensor, z1: Tensor, negatives: Tensor, tau: Tensor, stats: Tensor,
    kept: Tensor, mode: int, reduction: int, beta: float, needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dz0, dz1, dnegatives = (
        z.new_empty(z.shape if needs >> k & 1 else (0,)) for k, z in enumerate((z0, z1, negatives))
    )
    return dz0, dz1, dnegatives, tau.new_empty(() if needs & 8 else (0,))


def _threshold_fake(
    z0: Tensor, z1: Tensor, negatives: Tensor, mode: int, quantile: float, over_negatives: bool
) -> Tensor:
    return z0.new_empty((), dtype=torch.float64)


def _row_range_fake(z0: Tensor, z1: Tensor, negatives: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    low = z0.new_empty(_rows(z0, mode), dtype=_compute_dtype(z0, z1, negatives, mode))
    return low, torch.empty_like(low)


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake, refusing what the kernels refuse: one meta tensor among others calls it too, and
    what it then made on the others' device would be uninitialised memory."""
    names = tuple(inspect.signature(fake).parameters)

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        first = next(a for a in args if isinstance(a, Tensor))
        for name, a in zip(names, args, strict=False):
            if isinstance(a, Tensor) and a.device != first.device:
                raise RuntimeError(
                    f"{name}: got device {a.device}, wanted that of {names[0]}, {first.device}"
                )
        return fake(*args)

    return checked


for _name, _fake in (
    ("forward", _forward_fake),
    ("adaptive", _adaptive_fake),
    ("backward", _backward_fake),
    ("threshold", _threshold_fake),
    ("row_range", _row_range_fake),
):
    torch.library.register_fake(f"hex::{_name}", _on_one_device(_fake))


# ---- vmap: one call a batch element, as each batch has its own threshold and positives ---------


def _register_vmap(name: str) -> None:
    op = getattr(torch.ops.hex, name)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(f"hex::{name}", rule)


for _name in ("forward", "adaptive", "backward", "threshold", "row_range"):
    _register_vmap(_name)


# ---- derivatives -------------------------------------------------------------------------------
# autograd.Function and not register_autograd: with the latter torch.func.jvp returns zeros without
# a word and torch.func.grad raises; here grad and vmap are right and jvp raises.


def no_forward_mode(ctx: Any, *tangents: Any) -> Any:
    raise NotImplementedError(
        "hex-ssl: a loss has no forward-mode derivative (jvp, jacfwd, hessian, forward_ad); take "
        "grad, vjp or jacrev, for a Hessian jacrev twice"
    )


class _Loss(torch.autograd.Function):
    generate_vmap_rule = True
    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(
        z0: Tensor, z1: Tensor, negatives: Tensor, eps: Tensor, tau: Tensor,
        mode: int, reduction: int, variant: int, beta: float, tau_plus: float, keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        loss, stats, kept = torch.ops.hex.forward(
            z0, z1, negatives, eps, tau, mode, reduction, variant, beta, tau_plus, keep
        )
        return loss, stats, kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z0, z1, negatives, _eps, tau, *options = inputs
        _, stats, kept = output  # has each row's threshold: a later write to eps changes nothing
        ctx.mark_non_differentiable(stats, kept)
        ctx.set_materialize_grads(False)  # zeros as large as kept
        ctx.save_for_backward(z0, z1, negatives, tau, stats, kept)
        ctx.options = options[:5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        dz0, dz1, dnegatives, dtau = _gradients(ctx, grad)
        return dz0, dz1, dnegatives, None, dtau, *(None,) * 6


class _Adaptive(torch.autograd.Function):
    """The same where eps comes from the batch by way of a tracker's state: one call for all."""

    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(  # every argument by its name: torch.compile counts them
        z0: Tensor, z1: Tensor, negatives: Tensor, state: Tensor, tau: Tensor,
        mode: int, reduction: int, variant: int, beta: float, tau_plus: float, quantile: float,
        over_negatives: bool, momentum: float, monotonic: bool, lagged: bool, warmup_epochs: int,
        warmup_threshold: float, keep: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        outputs: tuple[Tensor, ...] = torch.ops.hex.adaptive(
            z0, z1, negatives, state, tau, mode, reduction, variant, beta, tau_plus, quantile,
            over_negatives, momentum, monotonic, lagged, warmup_epochs, warmup_threshold, keep,
        )  # fmt: skip
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z0, z1, negatives, _state, tau, *options = inputs
        _, stats, eps, new_state, kept = output
        ctx.mark_non_differentiable(stats, eps, new_state, kept)
        ctx.set_materialize_grads(False)  # see above
        ctx.save_for_backward(z0, z1, negatives, tau, stats, kept)
        ctx.options = options[:5]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        dz0, dz1, dnegatives, dtau = _gradients(ctx, grad)
        return dz0, dz1, dnegatives, None, dtau, *(None,) * 13


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of z0, z1, negatives and tau, where wanted."""
    if grad is None:
        return (None,) * 4
    z0, z1, negatives, tau, stats, kept = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    needs = sum(1 << k for k, w in enumerate(wanted) if w)
    function: Any = _apply_gradient if torch.is_grad_enabled() else _Gradient.forward
    grads = function(grad, z0, z1, negatives, tau, stats, kept, *ctx.options, needs)
    return tuple(g if w else None for g, w in zip(grads, wanted, strict=True))


class _Gradient(torch.autograd.Function):
    """The gradient as a function of its own, so that it can be differentiated again."""

    generate_vmap_rule = True
    jvp = staticmethod(no_forward_mode)

    @staticmethod
    def forward(
        grad: Tensor, z0: Tensor, z1: Tensor, negatives: Tensor, tau: Tensor, stats: Tensor,
        kept: Tensor, mode: int, reduction: int, variant: int, beta: float, tau_plus: float,
        needs: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        dz0, dz1, dnegatives, dtau = torch.ops.hex.backward(
            grad, z0, z1, negatives, tau, stats, kept, mode, reduction, beta, needs
        )
        return dz0, dz1, dnegatives, dtau

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, _kept, mode, reduction, variant, beta, tau_plus, needs = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = (mode, reduction, variant, beta, tau_plus)
        ctx.needs = needs

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
        """Dense: of the reference's gradient at the thresholds of the forward, by torch itself."""
        grad, z0, z1, negatives, tau, stats = ctx.saved_tensors
        mode, reduction, variant, beta, tau_plus = ctx.options
        eps = stats[0]
        wanted = [k for k in range(4) if ctx.needs >> k & 1]

        def gradient(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            def loss(z0: Tensor, z1: Tensor, negatives: Tensor, tau: Tensor) -> Tensor:
                rows = reference.loss_rows(
                    z0, z1, negatives, eps, tau, mode & ~_ONE_PRODUCT, beta, tau_plus, variant
                )[0]
                return _reduce(rows, reduction)

            pull: Callable[[Tensor], tuple[Tensor, ...]] = torch.func.vjp(loss, *inputs)[1]
            grads = pull(grad)
            return tuple(grads[k] for k in wanted)

        pull = torch.func.vjp(gradient, grad, z0, z1, negatives, tau)[1]
        return *pull(tuple(outer[k] for k in wanted)), *(None,) * 8


def _applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, which torch.compile puts into its graph as it is.

    Looked into, it would come out wrong: inside a func transform the compiler traces the operator
    of `forward` alone, and the gradient is 0 without a word; elsewhere it refuses a tensor that is
    passed twice. Autograd's own tracing, which comes after it, does both.
    """
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)  # or worked out at each call, for 0.1 ms

    def apply(*arguments: Any) -> Any:
        return function.apply(*arguments)  # type: ignore[no-untyped-call]

    applied: Callable[..., Any] = torch.compiler.allow_in_graph(apply)  # type: ignore[no-untyped-call]
    return applied


_apply_loss, _apply_adaptive, _apply_gradient = map(_applied, (_Loss, _Adaptive, _Gradient))


def _reduce(rows: Tensor, reduction: int) -> Tensor:
    if reduction == REDUCTIONS["none"]:
        return rows
    total = rows.sum()
    return total / rows.shape[0] if reduction == REDUCTIONS["mean"] and rows.shape[0] else total


# ---- kernels, or the reference where there are none --------------------------------------------

_warned: set[str] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda(index: int) -> tuple[str | None, bool]:
    """What keeps the CUDA kernels from a device; whether torch lets float32 products be rounded.

    A compiled graph keeps the answers of the time it was compiled.
    """
    rounded: bool = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return cuda_problem(index), rounded


def _has_kernel(z: Tensor, op: str = "") -> bool:
    device, why = z.device.type, ""
    if device in _KERNELS:
        return True
    if device == "cuda":
        problem = _cuda(z.device.index)[0] if op in _CUDA_KERNELS else f"'{op}' has none"
        if problem is None:
            return True
        device, why = f"cuda:{z.device.index}", f" ({problem})"
    if device not in _warned and not torch.compiler.is_compiling():
        _warned.add(device)
        warn(
            f"hex-ssl has no kernels for device '{device}'{why}: its formulas run as plain PyTorch "
            "operators there, correct but with N x N memory",
            RuntimeWarning,
        )
    return False


def _mode(z: Tensor, mode: int) -> int:
    """The mode as the operators take it: with torch's setting for float32 products on CUDA."""
    return mode | _ONE_PRODUCT if z.device.type == "cuda" and _cuda(z.device.index)[1] else mode


def loss(
    z0: Tensor, z1: Tensor, negatives: Tensor, eps: Tensor, tau: Tensor,
    mode: int, reduction: int, variant: int, beta: float, tau_plus: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The reduced loss, and of each row |H| and the local term's share (no gradient)."""
    if _has_kernel(z0, "forward"):
        if eps.device != z0.device:  # of a tracker that was not moved: right, though it waits
            eps = eps.to(z0.device)
        value, stats, _ = _apply_loss(
            z0, z1, negatives, eps, tau, _mode(z0, mode), reduction, variant, beta, tau_plus,
            _learns(z0, z1, negatives),
        )  # fmt: skip
        return value, stats[_COUNT], stats[_SHARE]
    rows, hard, share = reference.loss_rows(
        z0, z1, negatives, eps, tau, mode, beta, tau_plus, variant
    )
    return _reduce(rows, reduction), hard, share


def _learns(*inputs: Tensor) -> bool:
    """Whether a backward may come, for which the forward keeps its cosines."""
    return torch.is_grad_enabled() and any(z.requires_grad for z in inputs)


def adaptive_loss(
    z0: Tensor, z1: Tensor, negatives: Tensor, state: Tensor, tau: Tensor, mode: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`loss` at the eps that a tracker gives for the batch, in one call: the loss, |H| and share of
    each row, eps and the tracker's new state. Arguments: those of torch.ops.hex.adaptive but the
    last."""
    keep = _learns(z0, z1, negatives)
    value, stats, eps, state, _ = _apply_adaptive(
        z0, z1, negatives, state, tau, _mode(z0, mode), *options, keep
    )
    return value, stats[_COUNT], stats[_SHARE], eps, state


def has_adaptive(z: Tensor) -> bool:
    """Whether `adaptive_loss` serves such inputs. It does not under func transforms, where nothing
    is stored: the caller looks."""
    return (z.is_cpu and "cpu" in _KERNELS) or (z.is_cuda and _cuda(z.device.index)[0] is None)


def threshold(
    z0: Tensor, z1: Tensor, negatives: Tensor, mode: int, quantile: float, over: str
) -> Tensor:
    """Mean over rows of the row's quantile; 0-d float64, no gradient."""
    with torch.no_grad():
        if _has_kernel(z0, "threshold"):
            value: Tensor = torch.ops.hex.threshold(
                z0, z1, negatives, _mode(z0, mode), quantile, over == "negatives"
            )
            return value
        return reference.threshold(z0, z1, negatives, mode, quantile, over)


def row_range(z0: Tensor, z1: Tensor, negatives: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Least and largest cosine of each row; (N,) each, no gradient."""
    with torch.no_grad():
        if _has_kernel(z0, "row_range"):
            low, high = torch.ops.hex.row_range(z0, z1, negatives, _mode(z0, mode))
            return low, high
        return reference.row_range(z0, z1, negatives, mode)
