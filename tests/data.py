# SPDX-License-Identifier: MIT
"""Inputs of the tests: the generators that vectors.json names, and batches chosen to be hard.

Every batch is deterministic in its arguments, float64, and unnormalised (rows differ in length).
`rows` and `gradients` call the oracle in one line.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hex import reference

INF, NAN = math.inf, math.nan
MODES = ("ntxent", "query", "cross", "unpaired", "paired")
FORMS = ("paper", "released", "excluded", "paper decoupled", "excluded decoupled")
KINDS = (
    "gauss",  # cosines near 0, positives near 0.9
    "cluster",  # four groups of four classes: many cosines above 0.5
    "near_collapsed",  # every cosine within 1e-5 of 1
    "collapsed",  # every row along one direction: every cosine 1, ties everywhere
    "zero_rows",  # gauss with two rows of zeros, one in each view
    "clamped",  # positives near 1, negatives near 0: the floor of Q acts for tau_plus near 1
)


def form(name: str) -> dict[str, Any]:
    """One of FORMS, as options of a loss."""
    variant, _, decoupled = name.partition(" ")
    return {"variant": variant, "decoupled": bool(decoupled)}


def inputs(kind: str, B: int, D: int, seed: int) -> np.ndarray:
    """The stacked input (2B, D) of a case of vectors.json, kind "gauss" or "cluster"."""
    r = np.random.RandomState(seed)
    if kind == "gauss":
        a = r.standard_normal((B, D))
        b = a + 0.5 * r.standard_normal((B, D))
    elif kind == "cluster":
        sup = r.standard_normal((4, D))
        sub = (sup[:, None] + 0.5 * r.standard_normal((4, 4, D))).reshape(16, D)
        base = sub[r.randint(0, 16, B)] + 0.35 * r.standard_normal((B, D))
        a = base + 0.2 * r.standard_normal((B, D))
        b = base + 0.2 * r.standard_normal((B, D))
    else:
        raise ValueError(f"kind: got {kind!r}, wanted 'gauss' or 'cluster'")
    return np.concatenate([a, b]) * (1 + r.rand(2 * B, 1))


def views(kind: str, B: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two views (B, D) of a batch of the kind, one of KINDS."""
    if kind in ("gauss", "cluster"):
        z = inputs(kind, B, D, seed)
    else:
        r = np.random.RandomState(seed)
        length = 1 + r.rand(2 * B, 1)
        direction = np.random.RandomState(D).standard_normal(D)  # one for every seed
        if kind == "near_collapsed":
            z = (direction + 1e-3 * r.standard_normal((2 * B, D))) * length
        elif kind == "collapsed":
            z = direction * length
        elif kind == "zero_rows":
            z = inputs("gauss", B, D, seed)
            z[[B // 2, B + B // 3] if B else []] = 0
        elif kind == "clamped":
            a = r.standard_normal((B, D))
            z = np.concatenate([a, a + 0.02 * r.standard_normal((B, D))]) * length
        else:
            raise ValueError(f"kind: got {kind!r}, wanted one of {KINDS}")
    z0, z1 = torch.from_numpy(z).chunk(2)
    return z0, z1


def candidates(kind: str, B: int, K: int, D: int, mode: str, seed: int = 0) -> Tensor | None:
    """The third argument of the reference: (K, D) for "unpaired", (B, K, D) for "paired" or None.

    Drawn from the distribution of `views`, with rows of their own.
    """
    rows = {"unpaired": K, "paired": B * K}.get(mode)
    if rows is None:
        return None
    z, _ = views(kind, rows, D, seed + 1000)
    return z if mode == "unpaired" else z.reshape(B, K, D)


def batch(
    kind: str, B: int, D: int, mode: str = "ntxent", K: int = 7, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """z0, z1 and the negatives of a mode."""
    return *views(kind, B, D, seed), candidates(kind, B, K, D, mode, seed)


def eps_in_a_gap(cosines: Tensor, near: float) -> Tensor:
    """A threshold (0-d, float64) no cosine is close to: the middle of a gap between neighbours.

    Membership of H jumps at eps, so that two right implementations differ by a whole term where a
    cosine lies within rounding of it. Takes the widest of the 33 gaps around the cosine `near`.
    """
    c = cosines.detach().double().flatten().sort().values
    k = int(torch.searchsorted(c, near))
    c = c[max(k - 17, 0) : k + 17]
    widest = int(c.diff().argmax())
    return (c[widest] + c[widest + 1]) / 2


def vectors() -> list[dict[str, Any]]:
    """The cases of vectors.json; its `_comment` explains the fields."""
    with (Path(__file__).parent / "vectors.json").open() as file:
        return json.load(file)["cases"]


def f64(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    """Copies that require a gradient; None stays None."""
    return [t if t is None else t.detach().clone().requires_grad_() for t in tensors]


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), of)


def rows(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None = None,
    eps: Tensor | float = INF,
    tau: Tensor | float = 0.1,
    mode: str | int = "ntxent",
    **options: Any,
) -> Tensor:
    """The oracle's loss of each row; options are beta, tau_plus, variant."""
    eps = eps if isinstance(eps, Tensor) else f64(eps)
    tau = tau if isinstance(tau, Tensor) else f64(tau)
    return reference.loss_rows(z0, z1, negatives, eps, tau, mode, **options)[0]


# ---- NaNs ----

# bits of the type, of its mantissa
_LAYOUT = {
    torch.float64: (64, 52),
    torch.float32: (32, 23),
    torch.bfloat16: (16, 7),
    torch.float16: (16, 10),
}


def _of_bits(bits: int, dtype: torch.dtype) -> Tensor:
    """The number of these bits, which Python's own floats would not carry."""
    size = _LAYOUT[dtype][0]
    integer = {64: torch.int64, 32: torch.int32, 16: torch.int16}[size]
    signed = bits - (1 << size) if bits >> (size - 1) else bits
    return torch.tensor(signed, dtype=integer).view(dtype)


def nans(dtype: torch.dtype, step: int = 1) -> Iterator[Tensor]:
    """NaNs with every single bit of the payload, with it and the quiet one, with the lowest ones;
    of both signs. step: every so many of them."""
    size, mantissa = _LAYOUT[dtype]
    infinite = (1 << (size - 1)) - (1 << mantissa)
    payloads = {1 << k for k in range(mantissa)} | {(1 << k) - 1 for k in range(1, mantissa + 1)}
    payloads |= {1 << (mantissa - 1) | 1 << k for k in range(mantissa - 1)}
    signed = list(itertools.product((0, 1), sorted(payloads)))
    for sign, payload in signed[::step]:
        value = _of_bits(sign << (size - 1) | infinite | payload, dtype)
        assert value.isnan()
        yield value
