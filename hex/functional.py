# SPDX-License-Identifier: MIT
"""The loss as functions, with the threshold given; and the checks of everything a user passes.

Every argument is checked here before anything is computed, so that a bad one changes nothing. What
is left to ops.py: the kernels; to loss.py: modules, the threshold over training.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, get_args

import torch
from torch import Tensor

from . import ops

__all__ = ["batch_threshold", "hex_loss", "info_nce"]

Mode = Literal["ntxent", "query", "cross"]
Variant = Literal["paper", "released"]
Reduction = Literal["none", "mean", "sum"]
Over = Literal["all", "negatives"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def hex_loss(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None = None,
    *,
    eps: float | Tensor,
    temperature: float | Tensor = 0.1,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    variant: Variant = "paper",
    mode: Mode = "ntxent",
    reduction: Reduction = "mean",
) -> Tensor:
    """The HEX loss of a batch at a given threshold, in nats.

    With c_ij the cosine of anchor i and candidate j, l = c / tau, p the positive of i::

        H(i) = { j : c_ij > eps },  G(i) the other negatives,  N_h = |H(i)|
        w_ij = exp(beta l_ij) / mean_{h in H(i)} exp(beta l_ih)
        R_i  = sum_{j in H(i)} w_ij exp(l_ij)
        Q_i  = max( (R_i - tau_plus N_h exp(l_ip)) / (1 - tau_plus),  N_h exp(-1/tau) )
        L_i  = -l_ip + log( exp(l_ip) + Q_i + sum_{j in G(i)} exp(l_ij) )

    H(i) empty (eps >= 1) is InfoNCE; eps < -1 is the hard-negative loss of Robinson et al., with
    beta = 0 the debiased loss of Chuang et al. No gradient flows through membership in H.

    Args:
        z0, z1: (B, D), two views; row i of one is the positive of row i of the other. float64,
            float32, bfloat16 or float16, each its own; any strides, any scale (rows are
            normalised here; a row of zeros has cosine 0 with all).
        negatives: None; or (K, D) shared by all anchors, any strides (a queue: `queue.T`); or
            (B, K, D), K for each anchor. With negatives only z0 are anchors, and the negatives
            are the only ones; `mode` is not looked at.
        eps: threshold, a cosine: a number, a 0-d tensor, or one value a row, (N,).
        temperature: tau > 0, a number or a tensor of one element, which may require grad. A tensor
            <= 0 gives NaN, for seeing it would wait for the device.
        beta: >= 0, how much more the closest members of H weigh.
        tau_plus: in [0, 1), the share of H expected to be false negatives.
        variant: "paper", the above; "released", what the authors' code computes (docs/math.md).
        mode: "ntxent", all of z0 and z1 are anchors and the other 2B - 2 rows negatives (SimCLR);
            "query", z0 against z1 (NNCLR, MoCo v3); "cross", z0 against z1 and back (CLIP).
        reduction: "mean", "sum", or "none".

    Returns:
        0-d, or (N,) for "none": N = 2B in "ntxent" and "cross" (z0's rows first), else B. float64
        if an input is, else float32, also under autocast.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import batch_threshold, hex_loss
        >>> z0, z1 = torch.randn(2, 256, 128).requires_grad_()
        >>> eps = batch_threshold(z0, z1)
        >>> hex_loss(z0, z1, eps=eps).backward()

    Source: Kokilepersaud et al., "HEX: Hierarchical Emergence Exploitation in Self-Supervised
    Algorithms", WACV 2025 (arXiv 2410.23200); https://github.com/olivesgatech/HEX.
    """
    batch = check_batch(z0, z1, negatives, mode)
    check_options(beta, tau_plus, variant, reduction)
    return ops.loss(
        *batch.inputs,
        eps_tensor(eps, batch.rows, z0.device),
        temperature_tensor(check_temperature(temperature), z0),
        batch.mode,
        ops.REDUCTIONS[reduction],
        ops.VARIANTS[variant],
        float(beta),
        float(tau_plus),
    )[0]


def info_nce(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    mode: Mode = "ntxent",
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE by the same kernels: `hex_loss` with H empty.

        L_i = -l_ip + log( exp(l_ip) + sum_{negatives j} exp(l_ij) ),    l = c / tau

    Arguments, result and errors are those of `hex_loss`.

    Example:
        >>> import torch
        >>> from hex import info_nce
        >>> query, key, queue = torch.randn(32, 128), torch.randn(32, 128), torch.randn(128, 4096)
        >>> loss = info_nce(query, key, queue.T, temperature=0.07)  # MoCo

    Source: van den Oord et al. 2018 (arXiv 1807.03748); Chen et al. 2020 (arXiv 2002.05709).
    """
    return hex_loss(
        z0, z1, negatives, eps=math.inf, temperature=temperature, mode=mode, reduction=reduction
    )


def batch_threshold(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None = None,
    *,
    mode: Mode = "ntxent",
    quantile: float = 0.99,
    over: Over = "negatives",
) -> Tensor:
    """The adaptive threshold of a batch: the mean over rows of a quantile of the row's cosines.

        eps = 1/N sum_i c_i[k],   c_i ascending,   k = round(quantile (n - 1)), half to even

    Exact, by selection; no gradient.

    Args:
        z0, z1, negatives, mode: as in `hex_loss`.
        quantile: in [0, 1].
        over: "negatives", the negatives alone, for any batch; or "all", the row whole: with the
            positive and, in "ntxent", the anchor itself (cosine 1), as the authors do. For 2B < 52
            that rank *is* the anchor, so eps = 1 and H is empty; up to 2B of about 150 it is
            mostly the positive.

    Returns:
        0-d float64, a cosine. NaN if the batch is empty or not finite.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, named in the text.

    Example:
        >>> import torch
        >>> from hex import batch_threshold
        >>> eps = batch_threshold(*torch.randn(2, 256, 128), over="negatives")

    Source: Kokilepersaud et al., WACV 2025 (arXiv 2410.23200), and its released code.
    """
    batch = check_batch(z0, z1, negatives, mode)
    check_number("quantile", quantile, 0, 1)
    check_choice("over", over, get_args(Over))
    return ops.threshold(*batch.inputs, batch.mode, float(quantile), over)


# ---- checks -------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A checked batch: three tensors for the operators, and the code of the mode."""

    inputs: tuple[Tensor, Tensor, Tensor]
    mode: int

    @property
    def rows(self) -> int:
        """Anchors, N."""
        z0 = self.inputs[0]
        return z0.shape[0] * (2 if self.mode in (ops.MODES["ntxent"], ops.MODES["cross"]) else 1)

    @property
    def has_self(self) -> bool:
        """Whether an anchor's own cosine is in that row."""
        return self.mode == ops.MODES["ntxent"]

    @property
    def row_length(self) -> int:
        """Cosines in one row of the threshold's table over "all"."""
        z0, _, negatives = self.inputs
        if self.mode >= ops.MODES["shared"]:
            return 1 + negatives.shape[-2]
        return z0.shape[0] * (2 if self.mode == ops.MODES["ntxent"] else 1)


def check_batch(z0: Tensor, z1: Tensor, negatives: Tensor | None, mode: str) -> Batch:
    check_choice("mode", mode, get_args(Mode))
    check_embeddings("z0", z0)
    check_embeddings("z1", z1)
    if z0.dim() != 2:
        raise ValueError(f"z0: got shape {tuple(z0.shape)}, wanted (B, D)")
    if not has_shape(z1, z0.shape):
        raise ValueError(f"z1: got shape {tuple(z1.shape)}, wanted that of z0, {tuple(z0.shape)}")
    if z1.device != z0.device:
        raise ValueError(f"z1: got device {z1.device}, wanted that of z0, {z0.device}")
    if negatives is None:
        return Batch((z0, z1, z0.new_empty((0, z0.shape[1]))), ops.MODES[mode])
    check_embeddings("negatives", negatives)
    images, features = z0.shape
    own = negatives.dim() == 3
    if negatives.dim() < 2 or not has_shape(
        negatives, ((images,) if own else ()) + (negatives.shape[-2], features)
    ):
        raise ValueError(
            f"negatives: got shape {tuple(negatives.shape)}, wanted (K, {features}) or "
            f"({images}, K, {features})"
        )
    if negatives.device != z0.device:
        raise ValueError(
            f"negatives: got device {negatives.device}, wanted that of z0, {z0.device}"
        )
    return Batch((z0, z1, negatives), ops.MODES["own" if own else "shared"])


def has_shape(z: Tensor, wanted: Sequence[int]) -> bool:
    """Whether z is of this shape. A size that a compiled graph does not know, as after
    mark_unbacked, is taken for the wanted one, and the graph guards it."""
    if not torch.compiler.is_compiling():
        return z.shape == tuple(wanted)
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if z.dim() != len(wanted):
        return False
    for size, right in zip(z.shape, wanted, strict=True):
        if not guard_or_true(size == right):
            return False
        torch._check(size == right)  # type: ignore[no-untyped-call]
    return True


def check_embeddings(name: str, z: Any) -> None:
    if isinstance(z, torch.fx.Proxy):
        raise TypeError(
            f"{name}: got a Proxy, and torch.fx.symbolic_trace cannot follow the checks of a loss; "
            "make the loss a leaf module of the Tracer, or take torch.export or torch.compile"
        )
    if not isinstance(z, Tensor):
        raise TypeError(f"{name}: got {type(z).__name__}, wanted a torch.Tensor")
    if z.dtype not in _DTYPES:
        labels = z.dim() == 1 and not z.is_complex() and not z.is_floating_point()
        raise TypeError(
            f"{name}: got {z.dtype}, wanted torch.float64, float32, bfloat16 or float16"
            + "; labels go to HEXSupConLoss, the target of logits to HEXCrossEntropyLoss" * labels
        )
    if z.layout != torch.strided:
        raise TypeError(f"{name}: got layout {z.layout}, wanted a dense tensor")


def check_options(beta: float, tau_plus: float, variant: str, reduction: str) -> None:
    check_number("beta", beta, 0, math.inf, open_end=True)
    check_number("tau_plus", tau_plus, 0, 1, open_end=True)
    check_choice("variant", variant, get_args(Variant))
    check_choice("reduction", reduction, get_args(Reduction))


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, choices))}")


def is_number(value: object) -> TypeGuard[float]:
    """Real, and no bool: Python's own, numpy's scalars, fractions."""
    return isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)


def check_number(
    name: str, value: object, low: float, high: float, *, open_end: bool = False
) -> None:
    if not is_number(value):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number")
    if not (low <= value < high or (value == high and not open_end)):
        end = ")" if open_end else "]"
        raise ValueError(f"{name}: got {value}, wanted a number in [{low}, {high}{end}")


def check_temperature(temperature: float | Tensor, name: str = "temperature") -> float | Tensor:
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point():
            raise TypeError(f"{name}: got {temperature.dtype}, wanted a floating dtype")
        if temperature.numel() != 1:
            raise ValueError(
                f"{name}: got shape {tuple(temperature.shape)}, wanted a number or one element"
            )
        return temperature
    if not is_number(temperature):
        raise TypeError(f"{name}: got {type(temperature).__name__}, wanted a number or a tensor")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: got {temperature}, wanted a finite number > 0")
    return float(temperature)


def temperature_tensor(temperature: float | Tensor, like: Tensor) -> Tensor:
    """tau as the operators take it: 0-d, float32 or float64, on the batch's device."""
    if not isinstance(temperature, Tensor):
        return number_tensor(temperature, like.device)
    wide = temperature.dtype in (torch.float32, torch.float64)
    if temperature.dim():  # (1,), say: sharded training wants one dimension
        temperature = temperature.reshape(())
    return temperature.to(like.device, temperature.dtype if wide else torch.float32)


def number_tensor(value: float, device: torch.device) -> Tensor:
    """A Python number as the operators take it: 0-d float64."""
    if torch.compiler.is_compiling():  # of full() it would make a graph for each value
        return torch.ones((), dtype=torch.float64, device=device) * value
    return torch.full((), value, dtype=torch.float64, device=device)


def eps_tensor(eps: float | Tensor, rows: int, device: torch.device) -> Tensor:
    """eps as the operators take it: float64, 0-d or (rows,), without gradient."""
    if not isinstance(eps, Tensor):
        if not is_number(eps):
            raise TypeError(f"eps: got {type(eps).__name__}, wanted a number or a tensor")
        if eps != eps:  # which torch.compile reads where it does not read math.isnan
            raise ValueError("eps: got nan, wanted a cosine")
        return number_tensor(float(eps), device)
    if not eps.is_floating_point():
        raise TypeError(f"eps: got {eps.dtype}, wanted a floating dtype")
    if eps.dim() and tuple(eps.shape) != (rows,):
        raise ValueError(f"eps: got shape {tuple(eps.shape)}, wanted () or ({rows},)")
    return eps.detach().to(device, torch.float64)
