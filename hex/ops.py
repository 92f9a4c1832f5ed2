# SPDX-License-Identifier: MIT
"""torch.ops.hex.* as PyTorch sees them: shapes, batching, first and second derivatives.

The schemas and the kernels are in csrc/; the formulas in reference.py serve every device without a
kernel, and the second derivative everywhere. The operators are of three forms of the problem: two
views of a batch, rows with labels, and given logits (`Form` says what they share). Arguments arrive
checked and laid out (problem.py).
"""

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
    "PAIRINGS",
    "POSITIVES",
    "REDUCTIONS",
    "VARIANTS",
    "Form",
    "adaptive_loss",
    "has_adaptive",
    "isa",
    "labelled",
    "logits",
    "loss",
    "row_range",
    "threshold",
    "views",
]


def _codes(names: tuple[str, ...]) -> dict[str, int]:
    return {name: code for code, name in enumerate(names)}


MODES = _codes(reference.MODES)
PAIRINGS = _codes(reference.PAIRINGS)
REDUCTIONS = _codes(reference.REDUCTIONS)
VARIANTS = _codes(reference.VARIANTS)
POSITIVES = _codes(reference.POSITIVES)

_KERNELS = {"cpu", "meta"}  # device types with kernels; the fakes below are those of "meta"
_CUDA_KERNELS = {"forward", "backward", "threshold", "row_range", "adaptive"}  # with one
_ONE_PRODUCT = 8  # added to the mode: float32 may be rounded to 11 bits before it is multiplied


def isa() -> str:
    """The level of the CPU kernels in use: "base", "avx2", "avx512" or "avx512_bf16"."""
    return _C.isa()


# ---- what the forms share ------------------------------------------------------------------------


class Form:
    """The operators torch.ops.hex.<prefix>forward, backward, threshold and row_range.

        forward    *inputs, eps, tau, *options      ->  loss, stats and, of views, kept
        backward   grad, *inputs, tau, stats, kept, *some options, needs  ->  gradients
        threshold  *inputs of the threshold, quantile, over_negatives     ->  0-d float64
        row_range  *inputs of the threshold                               ->  low, high

    The options begin with the kind (mode, pairing, whether H is given), reduction and variant.
    """

    prefix: str
    inputs: int  # tensors before eps and tau
    learned: tuple[int, ...]  # those that can have a gradient; tau can too
    backward_options: tuple[int, ...]  # places among the forward's
    stats: int  # statistics of a row that the forward keeps (csrc/)
    count: int  # the one that is |H|
    share: int  # the one that is the local term's share
    keeps = False  # whether the forward leaves cosines for the backward

    def __init__(self) -> None:
        for name, fake in (
            ("forward", self._fake_forward),
            ("backward", self._fake_backward),
            ("threshold", lambda x, *_: x.new_empty((), dtype=torch.float64)),
            ("row_range", self._fake_row_range),
        ):
            _register(self.prefix + name, fake)
        self._apply = _differentiable(self, "forward")

    def size(self, *inputs_and_kind: Any) -> tuple[int, torch.dtype]:
        """Rows, and the dtype that they are computed in."""
        raise NotImplementedError

    def rows(self, *arguments: Any) -> reference.Rows:
        """By the reference, of the arguments of the forward."""
        raise NotImplementedError

    def table(self, *arguments: Any) -> reference.Table:
        """By the reference, of the inputs of a threshold."""
        raise NotImplementedError

    def loss(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The reduced loss, and of each row |H| and the local term's share (no gradient), of the
        arguments of the forward."""
        if _has_kernel(arguments[0], self.prefix + "forward"):
            value, stats = self._apply(*arguments)[:2]
            return value, stats[self.count], stats[self.share]
        loss, hard, share = self.rows(*arguments)
        return reference.reduce(loss, arguments[self.inputs + 3]), hard, share

    def threshold(self, *arguments: Any) -> Tensor:
        """Mean over rows of the row's quantile; 0-d float64, no gradient. Arguments: the inputs of
        `row_range`, the quantile, and over what: "all" or "negatives"."""
        *inputs, quantile, over = arguments
        with torch.no_grad():
            if not _has_kernel(inputs[0], self.prefix + "threshold"):
                return reference.quantile_of(self.table(*inputs), quantile, over)
            operator = getattr(torch.ops.hex, self.prefix + "threshold")
            value: Tensor = operator(*self.in_order(inputs, quantile, over == "negatives"))
            return value

    def row_range(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Least and largest cosine of each row; (N,) each, no gradient."""
        with torch.no_grad():
            if not _has_kernel(inputs[0], self.prefix + "row_range"):
                return reference.range_of(self.table(*inputs))
            low, high = getattr(torch.ops.hex, self.prefix + "row_range")(*inputs)
            return low, high

    def in_order(self, inputs: list[Any], quantile: float, over_negatives: bool) -> Any:
        """The arguments of the operator threshold."""
        return *inputs, quantile, over_negatives

    def there(self, kind: int, needs: int) -> list[int]:
        """Which gradients there are, of the learned inputs and tau, of those in the bits `needs`"""
        return [k for k in range(len(self.learned) + 1) if needs >> k & 1]

    def kept(self, inputs: tuple[Any, ...], mode: int, dtype: torch.dtype) -> int:
        """Numbers that the forward leaves for the backward."""
        return 0

    # fakes

    def _fake_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, (kind, reduction) = arguments[: self.inputs], arguments[self.inputs + 2 :][:2]
        like = inputs[0]
        rows, dtype = self.size(*inputs, kind)
        loss = like.new_empty((rows,) if reduction == REDUCTIONS["none"] else (), dtype=dtype)
        stats = like.new_empty((self.stats, rows), dtype=dtype)
        if not self.keeps:
            return loss, stats
        kept = self.kept(inputs, kind, dtype) if arguments[-1] else 0
        return loss, stats, like.new_empty((kept,), dtype=dtype)

    def _fake_backward(self, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, tau, needs = arguments[: self.inputs], arguments[self.inputs], arguments[-1]
        there = self.there(arguments[self.inputs + 2 + self.keeps], needs)
        shapes = [*(inputs[i] for i in self.learned), tau]
        return tuple(z.new_empty(z.shape if k in there else (0,)) for k, z in enumerate(shapes))

    def _fake_row_range(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        rows, dtype = self.size(*inputs)
        low = inputs[0].new_empty(rows, dtype=dtype)
        return low, torch.empty_like(low)


def _register(name: str, fake: Callable[..., Any]) -> None:
    """Shapes without data, and vmap: one call a batch element, as each batch has its own threshold
    and positives."""
    operator = getattr(torch.ops.hex, name)
    names = [argument.name for argument in operator.default._schema.arguments]

    def on_one_device(*args: Any) -> Any:
        """The fake, refusing what the kernels refuse: one meta tensor among others calls it too,
        and what it then made on the others' device would be uninitialised memory."""
        first = args[0].device
        for name, a in zip(names, args, strict=False):
            if isinstance(a, Tensor) and a.device != first:
                raise RuntimeError(
                    f"{name}: got device {a.device}, wanted that of {names[0]}, {first}"
                )
        return fake(*args)

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            operator(
                *(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_fake(f"hex::{name}", on_one_device)
    torch.library.register_vmap(f"hex::{name}", batched)


# ---- derivatives -------------------------------------------------------------------------------
# autograd.Function and not register_autograd: with the latter torch.func.jvp returns zeros without
# a word and torch.func.grad raises; here grad and vmap are right and jvp raises.


class _Function(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "hex-ssl: a loss has no forward-mode derivative (jvp, jacfwd, hessian, forward_ad); "
            "take grad, vjp or jacrev, for a Hessian jacrev twice"
        )


def _differentiable(form: Form, name: str) -> Callable[..., Any]:
    """An operator with the arguments of a form's forward, and its first and second derivative."""
    n, keeps = form.inputs, int(form.keeps)
    places = (*form.learned, n + 1)  # among the arguments; the last is tau's
    forward_of = getattr(torch.ops.hex, form.prefix + name)
    backward_of = getattr(torch.ops.hex, form.prefix + "backward")

    class Gradient(_Function):
        """The gradient as a function of its own, so that it can be differentiated again."""

        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            # grad, *inputs, tau, stats, kept if there is any; then *options, needs
            tensors, options = arguments[: n + 3 + keeps], arguments[n + 3 + keeps : -1]
            some = [options[k] for k in form.backward_options]
            gradients: tuple[Tensor, ...] = backward_of(*tensors, *some, arguments[-1])
            return gradients

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs[: n + 3])
            ctx.options = inputs[n + 3 + keeps :]

        @staticmethod
        def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
            """Dense: of the reference's gradient at the thresholds of the forward, by torch."""
            grad, *inputs, tau, stats = ctx.saved_tensors
            *options, needs = ctx.options
            there = form.there(options[0], needs)

            def loss(*learned: Tensor) -> Tensor:
                arguments = list(inputs)
                for place, z in zip(form.learned, learned[:-1], strict=True):
                    arguments[place] = z
                rows = form.rows(*arguments, stats[0], learned[-1], *options)[0]
                return reference.reduce(rows, options[1])

            def gradient(grad: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
                pull: Callable[[Tensor], tuple[Tensor, ...]] = torch.func.vjp(loss, *learned)[1]
                grads = pull(grad)
                return tuple(grads[k] for k in there)

            learned = [*(inputs[place] for place in form.learned), tau]
            pull = torch.func.vjp(gradient, grad, *learned)[1]
            dgrad, *grads = pull(tuple(outer[k] for k in there))
            result = [dgrad, *[None] * (n + 2 + keeps + len(ctx.options))]
            for place, g in zip((*form.learned, n), grads, strict=True):
                result[1 + place] = g
            return tuple(result)

    apply_gradient = _in_graph(Gradient)

    class Loss(_Function):
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            outputs: tuple[Tensor, ...] = forward_of(*arguments)
            return outputs

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            _, stats, *others = output  # has each row's eps: a later write to it changes nothing
            ctx.mark_non_differentiable(stats, *others)
            ctx.set_materialize_grads(False)  # zeros as large as what is kept
            kept = others[-1:] if keeps else ()
            ctx.save_for_backward(*inputs[:n], inputs[n + 1], stats, *kept)
            ctx.options = inputs[n + 2 :]

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
            result: list[Tensor | None] = [None] * (n + 2 + len(ctx.options))
            if grad is None:
                return tuple(result)
            needs = 0
            for k, place in enumerate(places):
                needs |= ctx.needs_input_grad[place] << k
            function: Any = apply_gradient if torch.is_grad_enabled() else Gradient.forward
            grads = function(grad, *ctx.saved_tensors, *ctx.options, needs)
            for k in form.there(ctx.options[0], needs):
                result[places[k]] = grads[k]
            return tuple(result)

    return _in_graph(Loss)


def _in_graph(function: type[torch.autograd.Function]) -> Callable[..., Any]:
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


# ---- kernels, or the reference where there are none --------------------------------------------

_warned: set[str] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda(index: int) -> tuple[str | None, bool]:
    """What keeps the CUDA kernels from a device; whether torch lets float32 products be rounded.

    A compiled graph keeps the answers of the time it was compiled.
    """
    rounded: bool = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return cuda_problem(index), rounded


def _has_kernel(z: Tensor, operator: str) -> bool:
    device, what, why = z.device.type, "", ""
    if device in _KERNELS:
        return True
    if device == "cuda":
        problem = _cuda(z.device.index)[0]
        if problem is None and operator in _CUDA_KERNELS:
            return True
        device = f"cuda:{z.device.index}"
        if problem is None and operator.startswith((labelled.prefix, logits.prefix)):
            what = "labels, groups, guides and logits on "
        else:
            why = f" ({problem or f'{operator!r} has none'})"
    if what + device not in _warned and not torch.compiler.is_compiling():
        _warned.add(what + device)
        warn(
            f"hex-ssl has no kernels for {what}device '{device}'{why}: its formulas run as plain "
            "PyTorch operators there, correct but with N x N memory",
            RuntimeWarning,
        )
    return False


def _mode(z: Tensor, mode: int) -> int:
    """The mode as the operators take it: with torch's setting for float32 products on CUDA."""
    return mode | _ONE_PRODUCT if z.device.type == "cuda" and _cuda(z.device.index)[1] else mode


# ---- the three forms ----------------------------------------------------------------------------


def _compute_dtype(*used: Tensor) -> torch.dtype:
    return torch.float64 if any(z.dtype == torch.float64 for z in used) else torch.float32


class _Views(Form):
    """Two views of a batch, and negatives from outside: the plain names of torch.ops.hex."""

    prefix, inputs, learned, backward_options = "", 3, (0, 1, 2), (0, 1, 3)
    stats, count, share, keeps = 9, 7, 8, True  # csrc/hex.h, HEX_STAT_*

    def __init__(self) -> None:
        super().__init__()
        _register("adaptive", self._fake_adaptive)
        self._apply_adaptive = _differentiable(self, "adaptive")

    def size(self, *inputs_and_kind: Any) -> tuple[int, torch.dtype]:
        z0, z1, negatives, mode = inputs_and_kind
        mode &= ~_ONE_PRODUCT
        used = (z0, z1, negatives) if mode >= MODES["shared"] else (z0, z1)
        both = mode in (MODES["ntxent"], MODES["cross"])
        return z0.shape[0] * (2 if both else 1), _compute_dtype(*used)

    def kept(self, inputs: tuple[Any, ...], mode: int, dtype: torch.dtype) -> int:
        """Room for what the CPU's forward leaves: kept_room in csrc/cpu/schedule.h.

        The sizes may be symbolic, and a branch on one would be a guard: so this bounds from above
        what is used, by an expression that torch knows to be more than 0.
        """
        z0, _, negatives = inputs
        B = z0.shape[0]
        if z0.device.type not in ("cpu", "meta") or mode == MODES["own"]:
            return 0
        item, block = (8, 96) if dtype == torch.float64 else (4, 192)
        tile = block * (block + 64 // item)
        if mode == MODES["ntxent"]:
            across = (2 * B + block - 1) // block
            tiles = across * (across + 1) // 2
        else:
            columns = negatives.shape[0] if mode == MODES["shared"] else B
            tiles = ((B + block - 1) // block) * ((columns + block - 1) // block)
        room: int = torch.sym_min(tiles * tile, (24 << 20) // item)  # type: ignore[no-untyped-call]
        return room

    def rows(
        self, z0: Tensor, z1: Tensor, negatives: Tensor, eps: Tensor, tau: Tensor, mode: int,
        reduction: int, variant: int, beta: float, tau_plus: float, *rest: Any,
    ) -> reference.Rows:  # fmt: skip
        mode &= ~_ONE_PRODUCT
        return reference.loss_rows(z0, z1, negatives, eps, tau, mode, beta, tau_plus, variant)

    def table(self, *arguments: Any) -> reference.Table:
        z0, z1, negatives, mode = arguments
        return reference.batch_table(z0, z1, negatives, mode & ~_ONE_PRODUCT)

    def loss(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        z0, z1, negatives, eps, tau, mode, *options = arguments
        if eps.device != z0.device:  # of a tracker that was not moved: right, though it waits
            eps = eps.to(z0.device)
        mode, keep = _mode(z0, mode), self._has_backward(z0, z1, negatives)
        return super().loss(z0, z1, negatives, eps, tau, mode, *options, keep)

    def threshold(self, *arguments: Any) -> Tensor:
        z0, z1, negatives, mode, *rest = arguments
        return super().threshold(z0, z1, negatives, _mode(z0, mode), *rest)

    def row_range(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        z0, z1, negatives, mode = inputs
        return super().row_range(z0, z1, negatives, _mode(z0, mode))

    def adaptive_loss(
        self, z0: Tensor, z1: Tensor, negatives: Tensor, state: Tensor, tau: Tensor, mode: int,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """`loss` at the eps that a tracker gives for the batch, in one call: the loss, |H| and
        share of each row, eps and the tracker's new state. Arguments: those of
        torch.ops.hex.adaptive but the last."""
        value, stats, eps, state, _ = self._apply_adaptive(
            z0, z1, negatives, state, tau, _mode(z0, mode), *options,
            self._has_backward(z0, z1, negatives),
        )  # fmt: skip
        return value, stats[self.count], stats[self.share], eps, state

    def has_adaptive(self, z: Tensor) -> bool:
        """Whether `adaptive_loss` serves such inputs. It does not under func transforms, where
        nothing is stored: the caller looks."""
        return (z.is_cpu and "cpu" in _KERNELS) or (z.is_cuda and _cuda(z.device.index)[0] is None)

    @staticmethod
    def _has_backward(z0: Tensor, z1: Tensor, negatives: Tensor) -> bool:
        """Whether a backward may come, for which the forward keeps its cosines."""
        wanted = z0.requires_grad or z1.requires_grad or negatives.requires_grad
        return torch.is_grad_enabled() and wanted

    def _fake_adaptive(self, *arguments: Any) -> tuple[Tensor, ...]:
        z0, state = arguments[0], arguments[3]
        loss, stats, kept = self._fake_forward(*arguments)
        return loss, stats, z0.new_empty((), dtype=torch.float64), torch.empty_like(state), kept


class _Labelled(Form):
    """Rows with labels: several positives; H by groups or by a guide's cosines."""

    prefix, inputs, learned, backward_options = "labelled_", 9, (0, 1), (0, 1, 4)
    stats, count, share = 12, 7, 8  # csrc/hex.h, HEX_STAT_*

    def size(self, *inputs_and_kind: Any) -> tuple[int, torch.dtype]:
        x, y, *_, pairing = inputs_and_kind
        used = (x,) if pairing == PAIRINGS["self"] else (x, y)
        return x.shape[0], _compute_dtype(*used)

    def in_order(self, inputs: list[Any], quantile: float, over_negatives: bool) -> Any:
        """The arguments of the operator threshold."""
        return *inputs, quantile, over_negatives

    def there(self, kind: int, needs: int) -> list[int]:
        return super().there(kind, needs & ~2 if kind == PAIRINGS["self"] else needs)  # without y

    def rows(self, *arguments: Any) -> reference.Rows:
        *given, _, variant, positives, beta, tau_plus = arguments  # without the reduction
        return reference.labelled_rows(*(*given, beta, tau_plus, variant, positives))

    def table(self, *arguments: Any) -> reference.Table:
        return reference.labelled_table(*arguments)


class _Logits(Form):
    """Given logits and targets; H by the logits themselves, by groups or by another score."""

    prefix, inputs, learned, backward_options = "logits_", 3, (0,), (1, 3)
    stats, count, share = 12, 7, 8  # csrc/hex.h, HEX_STAT_*

    def size(self, *inputs_and_kind: Any) -> tuple[int, torch.dtype]:
        logits = inputs_and_kind[0]
        return logits.shape[0], _compute_dtype(logits)

    def in_order(self, inputs: list[Any], quantile: float, over_negatives: bool) -> Any:
        *tensors, self_column = inputs
        return *tensors, quantile, over_negatives, self_column

    def rows(self, *arguments: Any) -> reference.Rows:
        *given, _, variant, beta, tau_plus = arguments  # without the reduction
        return reference.logits_rows(*(*given, beta, tau_plus, variant))

    def table(self, *arguments: Any) -> reference.Table:
        return reference.logits_cosines(*arguments)


views, labelled, logits = _Views(), _Labelled(), _Logits()

# Those of two views are also known by these names.
loss, threshold, row_range = views.loss, views.threshold, views.row_range
adaptive_loss, has_adaptive = views.adaptive_loss, views.has_adaptive
