# SPDX-License-Identifier: MIT
"""torch.ops.hex.* as PyTorch sees them: shapes, batching, first and second derivatives.

Four operators serve every loss: forward, adaptive, backward and quantile; and for the loss of many
ranks block_quantiles, block_forward, settle and total. Their schemas and kernels are in csrc/; the
formulas in reference.py serve every device without a kernel, and the second derivative everywhere.
Arguments arrive checked and laid out (problem.py).
"""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._calls import cat, warn
from ._load import _C, cuda_problem

__all__ = [
    "COUNT",
    "DTAU",
    "EPS",
    "Function",
    "MODES",
    "POSITIVES",
    "REDUCTIONS",
    "SHARE",
    "Seen",
    "VARIANTS",
    "WHOLE",
    "adaptive_loss",
    "block_backward",
    "block_forward",
    "block_quantiles",
    "block_range",
    "bytes_to_keep",
    "compute_dtype",
    "has_adaptive",
    "hard_and_share",
    "has_block",
    "in_graph",
    "isa",
    "kept_numbers",
    "loss",
    "plain_rows",
    "quantile",
    "rounding_of_factors",
    "row_range",
    "settle",
    "total",
]


def _codes(names: tuple[str, ...]) -> dict[str, int]:
    return {name: code for code, name in enumerate(names)}


MODES = _codes((*reference.MODES, "logits"))
REDUCTIONS = _codes(reference.REDUCTIONS)
VARIANTS = _codes(reference.VARIANTS)
POSITIVES = _codes(("one", *reference.POSITIVES))  # or several, outside the logarithm or inside

# Rows of stats (csrc/hex.h, HEX_STAT_*): eps, dL/dtau, |H|, and the local term's share.
EPS, DTAU, COUNT, SHARE = 0, 6, 7, 8
_STATS, _STATS_SEVERAL = 9, 12  # rows of one positive, and of several

WHOLE = (0, -1)  # the block that is the whole batch

_INPUTS = 7  # tensors that a problem is given as: z0, z1, negatives, ids, mask, groups, guide
_TAU = _INPUTS + 1  # its place among the arguments of forward


def _operator(name: str) -> Any:
    """That of the extension; None without it. Its one overload: to choose it takes time."""
    return getattr(torch.ops.hex, name).default if _C else None


def _length(name: str, last: str) -> int:
    """Of the rule in an operator's schema, from mode to the argument before `last`."""
    operator = _operator(name)
    if operator is None:
        return 0
    names = [argument.name for argument in operator._schema.arguments]
    return names.index(last) - names.index("mode")


# The rule of a call: mode, reduction, positives and beta, and what the forward alone looks at.
_RULE = _length("forward", "keep")
_BACKWARD_RULE = _length("backward", "allow_tf32")


def _cache_bytes(wanted: str | None) -> int:
    if not wanted:
        return 1 << 30
    if not (wanted.isascii() and wanted.isdecimal()) or int(wanted) >= 2**53:
        raise ValueError(f"HEX_CACHE_BYTES: got {wanted!r}, wanted a number of bytes below 2^53")
    return int(wanted)


_CACHE_BYTES = _cache_bytes(os.environ.get("HEX_CACHE_BYTES"))
_mkldnn: Any = torch.backends.mkldnn  # mypy knows of no matmul there
_matmul = _mkldnn.matmul
# Device types with kernels; the fakes below are those of "meta".
_KERNELS = {"cpu", "meta"} if _C else set()


def isa() -> str:
    """The level of the CPU kernels in use: "base", "neon", "avx2", "avx512", "avx512_bf16" or
    "avx512_amx"; or "none" without the extension."""
    return str(_C.isa()) if _C else "none"


_HAS_BF16 = isa() in ("avx512_bf16", "avx512_amx")  # the levels that multiply rows of bfloat16


# ---- shapes -------------------------------------------------------------------------------------


def _block(z: Tensor, first: int = 0, count: int = -1) -> int:
    """Rows of an input that belong to the block [first, first + count), which is within z0; z1 has
    as many rows or none. (0, -1): to the whole batch. Without a branch on a size of z."""
    if isinstance(count, int) and count == -1:
        return z.shape[0]
    rows: int = torch.sym_min(z.shape[0], count)  # type: ignore[no-untyped-call]
    return rows


def _anchors(z0: Tensor, z1: Tensor, mode: int, *block: int) -> int:
    both = mode in (MODES["ntxent"], MODES["cross"])
    return _block(z0, *block) + (_block(z1, *block) if both else 0)


def compute_dtype(z0: Tensor, z1: Tensor, negatives: Tensor, mode: int) -> torch.dtype:
    used = (z0, z1, negatives) if mode in (MODES["unpaired"], MODES["paired"]) else (z0, z1)
    return torch.float64 if any(z.dtype == torch.float64 for z in used) else torch.float32


def kept_numbers(
    z0: Tensor, z1: Tensor, negatives: Tensor, mode: int, several: int, most: int
) -> int:
    """Room for what the CPU's forward leaves for the backward: kept_room in csrc/cpu/schedule.h;
    and NONE_KEPT where that is more than `most` bytes.

    The sizes may be symbolic, and a branch on one would be a guard: so this bounds from above what
    is used, by an expression that torch knows to be more than 1, for 0 and 1 it would tell apart.
    """
    if not _keeps(z0, mode, most):
        return 0
    B, M = z0.shape[0], z1.shape[0]
    item = compute_dtype(z0, z1, negatives, mode).itemsize
    block = 96 if item == 8 else 192
    tile = block * (block + 64 // item)
    columns = M
    if mode == MODES["ntxent"]:
        columns = B + M
        across = (columns + block - 1) // block
        tiles = across * (across + 1) // 2
    else:
        if mode == MODES["unpaired"]:
            columns = negatives.shape[0]
        tiles = ((B + block - 1) // block) * ((columns + block - 1) // block)
    enough = 192  # ENOUGH in csrc/cpu/row.h
    many: int = torch.sym_min(1, columns // enough)  # type: ignore[no-untyped-call]
    rows = _row_numbers(z0, z1, negatives, mode, several)
    by_tiles = tiles * tile + 12 * (enough + 16)  # KEPT_ROWS and KEPT_LINE in csrc/cpu/visit.h
    return _at_most(many * by_tiles + (1 - many) * rows, most // item)


def _keeps(z: Tensor, mode: int, most: int) -> bool:
    return most > 0 and z.device.type in ("cpu", "meta") and mode < MODES["paired"]


def _row_numbers(
    z0: Tensor, z1: Tensor, negatives: Tensor, mode: int, several: int, *block: int
) -> int:
    """Room for the cosines of the anchors, row by row: kept_numbers in csrc/cpu/visit.h."""
    columns = z1.shape[0]
    if mode == MODES["ntxent"]:
        columns += z0.shape[0]
    elif mode == MODES["unpaired"]:
        columns = negatives.shape[0] + (columns if several else 0)
    item = compute_dtype(z0, z1, negatives, mode).itemsize
    wide, high = 32, 12  # KEPT_COLUMNS and KEPT_ROWS
    stride = (columns + wide - 1) // wide * wide + 64 // item
    return (_anchors(z0, z1, mode, *block) + high) * stride


def _at_most(numbers: int, most: int) -> int:
    """The numbers, or NONE_KEPT where they are more than `most`; without a branch on them."""
    none = 2  # NONE_KEPT in csrc/ops.c
    some: int = torch.sym_max(none, numbers)  # type: ignore[no-untyped-call]
    few = torch.sym_min(1, most // some)  # type: ignore[no-untyped-call]
    room: int = torch.sym_max(none, some * few)  # type: ignore[no-untyped-call]
    return room


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    z0, z1, negatives = arguments[:3]
    options = arguments[_INPUTS + 2 :]
    mode, reduction, positives = options[:3]
    most = options[_RULE]
    rows, dtype = _anchors(z0, z1, mode), compute_dtype(z0, z1, negatives, mode)
    loss = z0.new_empty((rows,) if reduction == REDUCTIONS["none"] else (), dtype=dtype)
    stats = z0.new_empty((_STATS_SEVERAL if positives else _STATS, rows), dtype=dtype)
    kept = kept_numbers(z0, z1, negatives, mode, positives, most)
    return loss, stats, z0.new_empty((kept,), dtype=dtype)


def _fake_adaptive(*arguments: Any) -> tuple[Tensor, ...]:
    z0, state = arguments[0], arguments[_INPUTS]
    eps = z0.new_empty((), dtype=torch.float64)
    forward = arguments[: _INPUTS + 2 + _RULE + 2]
    return *_fake_forward(*forward), eps, torch.empty_like(state)


def _fake_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    learned = *arguments[:3], arguments[_INPUTS]
    options = arguments[_INPUTS + 3 :]
    mode, (_, needs, *block) = options[0], options[_BACKWARD_RULE:]
    of_rows = 3 if mode == MODES["paired"] else 2  # shared negatives belong to every block
    shapes = [(_block(z, *block), *z.shape[1:]) for z in learned[:of_rows]]
    shapes += [z.shape for z in learned[of_rows:]]
    return tuple(
        z.new_empty(shape if needs >> k & 1 else (0,))
        for k, (z, shape) in enumerate(zip(learned, shapes, strict=True))
    )


def _fake_quantile(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    z0, z1, negatives = arguments[:3]
    mode, _, _, _, _, _, bounds = arguments[6:]
    rows = _anchors(z0, z1, mode) if bounds else 0
    low = z0.new_empty(rows, dtype=compute_dtype(z0, z1, negatives, mode))
    mean = z0.new_empty((0,) if bounds else (), dtype=torch.float64)
    return mean, low, torch.empty_like(low)


def _kept_of_block(
    z0: Tensor, z1: Tensor, negatives: Tensor, mode: int, several: int, most: int, *block: int
) -> int:
    """As `kept_numbers`, of a block."""
    if isinstance(block[1], int) and block[1] == WHOLE[1]:
        return kept_numbers(z0, z1, negatives, mode, several, most)
    if not _keeps(z0, mode, most):
        return 0
    item = compute_dtype(z0, z1, negatives, mode).itemsize
    return _at_most(_row_numbers(z0, z1, negatives, mode, several, *block), most // item)


def _fake_block_quantiles(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    z0, z1, negatives = arguments[:3]
    mode, several, _, _, _, _, bounds, most, *block = arguments[6:]
    dtype, rows = compute_dtype(z0, z1, negatives, mode), _anchors(z0, z1, mode, *block)
    kept = _kept_of_block(z0, z1, negatives, mode, several, most, *block)
    low = z0.new_empty(rows, dtype=dtype)
    return low, z0.new_empty(rows if bounds else 0, dtype=dtype), z0.new_empty(kept, dtype=dtype)


def _fake_block_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    z0, z1, negatives = arguments[:3]
    mode, _, positives = arguments[_INPUTS + 3 : _INPUTS + 6]
    given, (most, _, *block) = arguments[_INPUTS + 2], arguments[-4:]
    rows, dtype = _anchors(z0, z1, mode, *block), compute_dtype(z0, z1, negatives, mode)
    stats = z0.new_empty((_STATS_SEVERAL if positives else _STATS, rows), dtype=dtype)
    kept = _kept_of_block(*arguments[:3], mode, positives, most, *block)
    if given.shape[0]:
        kept = 0
    return z0.new_empty(rows, dtype=dtype), stats, z0.new_empty(kept, dtype=dtype)


def _fake_settle(rows: Tensor, state: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return state.new_empty(()), torch.empty_like(state)


def _fake_total(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.float64)


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
            return cat([x[None] for x in results]), 0
        stacked = tuple(cat([x[None] for x in of]) for of in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    # Where hex is imported a second time, anew, torch 2.10 to 2.12 refuse to have them replaced;
    # those of the first time do the same.
    try:
        torch.library.register_fake(f"hex::{name}", on_one_device)
        torch.library.register_vmap(f"hex::{name}", batched)
    except RuntimeError as error:
        if "already" not in str(error):
            raise


for _name, _fake in (
    ("forward", _fake_forward),
    ("adaptive", _fake_adaptive),
    ("backward", _fake_backward),
    ("quantile", _fake_quantile),
    ("block_quantiles", _fake_block_quantiles),
    ("block_forward", _fake_block_forward),
    ("settle", _fake_settle),
    ("total", _fake_total),
):
    if _C:
        _register(_name, _fake)


# ---- derivatives -------------------------------------------------------------------------------
# autograd.Function and not register_autograd: with the latter torch.func.jvp returns zeros without
# a word and torch.func.grad raises; here grad and vmap are right and jvp raises.


class Function(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "hex-ssl: a loss has no forward-mode derivative (jvp, jacfwd, hessian, forward_ad); "
            "use grad, vjp or jacrev, and jacrev twice for a Hessian"
        )


def _differentiable(operator: Any) -> Callable[..., Any]:
    """forward or adaptive, with its first and second derivative. Their numbers come as one tuple,
    for each argument of a Function takes time."""
    n = _INPUTS
    gradient_operator = _operator("backward")

    def gradients(tensors: Sequence[Tensor], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """tensors: grad, the inputs, tau, stats, kept. options: the rule, allow_tf32, needs."""
        result: tuple[Tensor, ...] = gradient_operator(
            *tensors, *options[:_BACKWARD_RULE], *options[_RULE:]
        )
        return result

    class Gradient(Function):
        """The gradient as a function of its own, so that it can be differentiated again."""

        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            *tensors, options = arguments
            return gradients(tensors, options)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs[: n + 3])
            ctx.options = inputs[-1]

        @staticmethod
        def backward(ctx: Any, *outer: Tensor) -> tuple[Any, ...]:
            """Dense: of the reference's gradient at the thresholds of the forward, by torch."""
            grad, *inputs, tau, stats = ctx.saved_tensors
            rule, needs = ctx.options[:_RULE], ctx.options[-1]
            there = [k for k in range(4) if needs >> k & 1]

            def loss(z0: Tensor, z1: Tensor, negatives: Tensor, tau: Tensor) -> Tensor:
                rows = _reference(z0, z1, negatives, *inputs[3:], stats[0], tau, rule=rule)[0]
                return reference.reduce(rows, rule[1])

            def gradient(grad: Tensor, *learned: Tensor) -> tuple[Tensor, ...]:
                pull: Callable[[Tensor], tuple[Tensor, ...]] = torch.func.vjp(loss, *learned)[1]
                grads = pull(grad)
                return tuple(grads[k] for k in there)

            pull = torch.func.vjp(gradient, grad, *inputs[:3], tau)[1]
            dgrad, dz0, dz1, dnegatives, dtau = pull(tuple(outer[k] for k in there))
            return dgrad, dz0, dz1, dnegatives, *[None] * (n - 3), dtau, None, None, None

    apply_gradient = in_graph(Gradient)

    class Loss(Function):
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, ...]:
            *tensors, options = arguments
            outputs: tuple[Tensor, ...] = operator(*tensors, *options)
            return outputs

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            _, stats, kept, *others = output  # stats has each row's eps: a later write changes none
            ctx.mark_non_differentiable(stats, kept, *others)
            ctx.set_materialize_grads(False)  # zeros as large as what is kept
            ctx.save_for_backward(*inputs[:n], inputs[_TAU], stats, kept)
            ctx.options = inputs[-1]

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
            needed = ctx.needs_input_grad
            if grad is None:
                return (None,) * len(needed)
            needs = needed[0] | needed[1] << 1 | needed[2] << 2 | needed[_TAU] << 3
            tensors, options = (grad, *ctx.saved_tensors), ctx.options
            options = *options[:_RULE], options[_RULE + 1], needs  # all but keep
            if torch.is_grad_enabled():
                grads = apply_gradient(*tensors, options)
            else:
                grads = gradients(tensors, options)
            dz0, dz1, dnegatives, dtau = grads
            return (
                dz0 if needed[0] else None,
                dz1 if needed[1] else None,
                dnegatives if needed[2] else None,
                *[None] * (n - 2),
                dtau if needed[_TAU] else None,
                None,
            )

    return in_graph(Loss)


def in_graph(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, which torch.compile puts into its graph as it is.

    Looked into, it would come out wrong: inside a func transform the compiler traces the operator
    of `forward` alone, and the gradient is 0 without a word; elsewhere it refuses a tensor that is
    passed twice. Autograd's own tracing, which comes after it, does both.
    """
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)  # or worked out at each transformed call

    # What torch's own apply comes to outside the func transforms, but for the binding of the
    # arguments to the signature of forward: it takes longer than all the rest, and there are no
    # defaults. A wrapper that has outlived its transform is always a Tensor, of no subclass.
    plain: Any = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    unwrapped = torch._C._functorch.unwrap_if_dead

    def apply(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*arguments)  # type: ignore[no-untyped-call]
        return plain(*[unwrapped(a) if type(a) is Tensor else a for a in arguments])

    applied: Callable[..., Any] = torch.compiler.allow_in_graph(apply)  # type: ignore[no-untyped-call]
    return applied


_apply_loss = _differentiable(_operator("forward"))
_apply_adaptive = _differentiable(_operator("adaptive"))


# ---- kernels, or the reference where there are none --------------------------------------------

Seen = tuple[Tensor, ...]  # the stats of a forward, or |H| and share of each row or their means

_warned: set[str] = set() if _C else {"cpu", "meta"}  # of which _load.py has warned


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda(index: int) -> tuple[str | None, bool]:
    """What keeps the CUDA kernels from a device; whether torch lets float32 products be rounded.

    A compiled graph keeps the answers of the time it was compiled.
    """
    rounded: bool = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return cuda_problem(index), rounded


def _has_kernel(z: Tensor) -> bool:
    device, why = z.device.type, ""
    if device in _KERNELS:
        return True
    if device == "cuda":
        problem = _cuda(z.device.index)[0]
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _allow_bf16() -> bool:
    """Whether torch lets float32 products of the CPU be rounded, for a level that has them. A
    compiled graph keeps the answer, as above."""
    return _HAS_BF16 and _matmul.fp32_precision == "bf16"


def _allow_tf32(z: Tensor) -> bool:
    """Whether float32 may be rounded before it is multiplied, as torch is set: on a GPU to 11 bits,
    on a CPU to the 8 of bfloat16."""
    return _cuda(z.device.index)[1] if z.is_cuda else z.is_cpu and _allow_bf16()


def rounding_of_factors(z: Tensor) -> float:
    """The relative error of a float32 that is rounded before it is multiplied; 0 if none is."""
    return 0.0 if not _allow_tf32(z) else 2.0**-11 if z.is_cuda else 2.0**-8


def bytes_to_keep(cache_bytes: int | None, wanted: bool = True) -> int:
    """How many bytes of cosines a forward may keep. None: as the environment says."""
    return 0 if not wanted else _CACHE_BYTES if cache_bytes is None else cache_bytes


def _keep(z0: Tensor, z1: Tensor, negatives: Tensor, cache_bytes: int | None) -> int:
    """The same for a backward, if one may come."""
    learns = z0.requires_grad or z1.requires_grad or negatives.requires_grad
    return bytes_to_keep(cache_bytes, torch.is_grad_enabled() and learns)


def _reference(*tensors: Tensor, rule: tuple[Any, ...]) -> reference.Rows:
    mode, _, *rest = rule
    arguments: tuple[Any, ...] = (*tensors, mode, *rest)
    return reference.problem_rows(*arguments)


def loss(
    inputs: tuple[Tensor, ...], eps: Tensor, tau: Tensor, rule: tuple[Any, ...],
    cache_bytes: int | None = None,
) -> tuple[Tensor, Seen]:  # fmt: skip
    """The reduced loss, and what `hard_and_share` takes (no gradient)."""
    z0, z1, negatives = inputs[:3]
    if eps.device != z0.device:  # of a tracker that was not moved: right, though it waits
        eps = eps.to(z0.device)
    if not _has_kernel(z0):
        rows, hard, share = _reference(*inputs, eps, tau, rule=rule)
        return reference.reduce(rows, rule[1]), (hard, share)
    value, stats, _ = _apply_loss(
        *inputs, eps, tau, (*rule, _keep(z0, z1, negatives, cache_bytes), _allow_tf32(z0))
    )
    return value, (stats,)


def adaptive_loss(
    inputs: tuple[Tensor, ...], state: Tensor, tau: Tensor, rule: tuple[Any, ...],
    tracking: tuple[Any, ...], cache_bytes: int | None = None,
) -> tuple[Tensor, Seen, Tensor, Tensor]:  # fmt: skip
    """`loss` at the eps that a tracker gives for the batch, in one call; and eps, and the tracker's
    new state. tracking: self_column, and the tracker's rule, as in the operator's schema."""
    z0, z1, negatives = inputs[:3]
    value, stats, _, eps, state = _apply_adaptive(
        *inputs, state, tau,
        (*rule, _keep(z0, z1, negatives, cache_bytes), _allow_tf32(z0), *tracking),
    )  # fmt: skip
    return value, (stats,), eps, state


def hard_and_share(seen: Seen) -> tuple[Tensor, Tensor]:
    """|H| and the local term's share. They are taken of the stats when they are read, which few
    steps are."""
    if len(seen) == 2:
        return seen[0], seen[1]
    (stats,) = seen
    return stats[COUNT], stats[SHARE]


def has_adaptive(z: Tensor) -> bool:
    """Whether `adaptive_loss` serves such inputs, without groups and a guide. It does not under
    func transforms, where nothing is stored: the caller looks."""
    if z.is_cuda:
        return _cuda(z.device.index)[0] is None
    return z.is_cpu and "cpu" in _KERNELS


def quantile(*arguments: Any) -> Tensor:
    """Mean over rows of the row's quantile; 0-d float64, no gradient.

    Arguments: z0, z1, negatives, ids, mask, tau, mode, several, self_column, the quantile, and
    over what: "all" or "negatives".
    """
    *measured, quantile, over = arguments
    return _measure(measured, quantile, over, False)[0]


def row_range(*measured: Any) -> tuple[Tensor, Tensor]:
    """Least and largest cosine of each row; (N,) each, no gradient. Arguments: those of `quantile`
    up to self_column."""
    return _measure(measured, 0.0, "all", True)[1:]


def _measure(
    measured: Sequence[Any], quantile: float, over: str, bounds: bool
) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, mode, several, self_column = measured
    z0, tau = tensors[0], tensors[-1]
    with torch.no_grad():
        if _has_kernel(z0):
            outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.hex.quantile(
                *tensors, mode, several, _allow_tf32(z0), self_column, quantile,
                over == "negatives", bounds,
            )  # fmt: skip
            return outputs
        table = reference.problem_table(*measured)
        if bounds:
            return tau, *reference.range_of(table)
        return reference.quantile_of(table, quantile, over), tau, tau


# ---- the loss of many ranks: each has a block of anchors, and all the numbers of all rows --------


def block_quantiles(
    measured: Sequence[Any], quantile: float, over: str, keep: int, block: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Of each anchor of the block the quantile of its row, +inf where that has no element; and, if
    they take no more than `keep` bytes, the cosines for `block_forward`. No gradient. measured: as
    in `row_range`."""
    low, _, kept = _measure_block(measured, quantile, over, False, keep, block)
    return low, kept


def block_range(measured: Sequence[Any], block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`row_range` of the anchors of the block."""
    return _measure_block(measured, 0.0, "all", True, 0, block)[:2]


def _measure_block(
    measured: Sequence[Any], quantile: float, over: str, bounds: bool, keep: int,
    block: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *tensors, mode, several, self_column = measured
    z0, z1, tau = *tensors[:2], tensors[-1]
    with torch.no_grad():
        if _has_kernel(z0):
            outputs: tuple[Tensor, Tensor, Tensor] = torch.ops.hex.block_quantiles(
                *tensors, mode, several, _allow_tf32(z0), self_column, quantile,
                over == "negatives", bounds, keep, *block,
            )  # fmt: skip
            return outputs
        table = reference.problem_table(*measured)
        if bounds:
            low, high = (_of_block(x, z0, z1, mode, *block) for x in reference.range_of(table))
            return low, high, tau
        rows = reference.row_quantiles(table, quantile, over)
        return _of_block(rows, z0, z1, mode, *block), tau, tau


def _of_block(rows: Tensor, z0: Tensor, z1: Tensor, mode: int, first: int, count: int) -> Tensor:
    """Those of the rows of all anchors that are of the block."""
    if (first, count) == WHOLE:
        return rows
    both = mode in (MODES["ntxent"], MODES["cross"]) and z1.shape[0]
    begins = (first, z0.shape[0] + first) if both else (first,)
    return torch.cat([rows[begin : begin + count] for begin in begins])


def has_block(z: Tensor) -> bool:
    """Whether `block_forward` serves such inputs."""
    return _has_kernel(z)


def block_forward(
    inputs: tuple[Tensor, ...], eps: Tensor, tau: Tensor, kept: Tensor | None,
    rule: tuple[Any, ...], keep: int, block: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss and statistics of each anchor of the block, without gradient, and the cosines for the
    backward: `kept`, or without it its own of at most `keep` bytes. eps: 0-d, or theirs."""
    z0, z1, negatives = inputs[:3]
    given = kept
    if given is None:
        given = z0.new_empty(0, dtype=compute_dtype(z0, z1, negatives, rule[0]))
    with torch.no_grad():
        loss, stats, new = torch.ops.hex.block_forward(
            *inputs, eps.to(tau.device), tau, given, *rule, keep, _allow_tf32(tau), *block
        )
    return loss, stats, new if kept is None else kept


def block_backward(
    grad: Tensor, inputs: tuple[Tensor, ...], tau: Tensor, stats: Tensor, kept: Tensor,
    rule: tuple[Any, ...], needs: int, block: tuple[int, int],
) -> tuple[Tensor, ...]:  # fmt: skip
    """dz0, dz1 and dnegatives of the block's rows, of those whose bit is in `needs`. grad and stats
    are of all anchors."""
    options = rule[0], REDUCTIONS["none"], *rule[2:_BACKWARD_RULE]
    gradients: tuple[Tensor, ...] = torch.ops.hex.backward(
        grad, *inputs, tau, stats, kept, *options, _allow_tf32(tau), needs, *block
    )
    return gradients[:3]


def plain_rows(
    inputs: tuple[Tensor, ...], eps: Tensor, tau: Tensor, rule: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, |H| and share of each anchor by the formulas, for a device without kernels."""
    return _reference(*inputs, eps.to(tau.device), tau, rule=rule)


def settle(rows: Tensor, state: Tensor, rule: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """eps and a tracker's new state, for the quantiles of the rows of all ranks. rule: that of
    `ThresholdTracker.kernel_rule` from momentum on."""
    outputs: tuple[Tensor, Tensor] = torch.ops.hex.settle(rows, state, *rule)
    return outputs


def total(rows: Tensor) -> Tensor:
    """The sum of each row, (R, N) to (R,) float64, in the order of the columns: the same bits on
    every rank."""
    on_cuda = rows.is_cuda and _cuda(rows.device.index)[0] is None
    if not on_cuda and rows.device.type not in _KERNELS:
        return rows.to(torch.float64).sum(1)
    sums: Tensor = torch.ops.hex.total(rows.detach())
    return sums
