# SPDX-License-Identifier: MIT
"""The cosine of each anchor with its positive, from which `ThresholdTracker.by_positive` takes eps.

It is computed here in plain PyTorch and in float64, in the layouts of problem.py in which an anchor
has one positive. How eps follows from it is in threshold.py. Which negatives are above eps is
decided by the kernels, which round: `rounding` says by how much at most.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops, reference

if TYPE_CHECKING:
    from .problem import Problem

__all__ = ["cosines", "rounding"]

_BOTH = ops.MODES["ntxent"], ops.MODES["cross"]


def cosines(p: Problem) -> Tensor:
    """The cosine of each anchor, or of each one of this rank, with its positive; of the guide where
    there is one. (N,) float64, no gradient."""
    with torch.no_grad():
        if p.mode == ops.MODES["logits"]:
            return _of_logits(p.inputs[0], p.inputs[3], p.tau)
        z0, z1, *_ = p.inputs if p.guide is None else p.guide
        if p.part is not None and p.part.gathered:
            first, count = p.part.block()
            z0, z1 = z0.narrow(0, first, count), z1.narrow(0, first, count)
        z0, z1 = z0.detach().to(torch.float64), z1.detach().to(torch.float64)
        none = z0.new_empty((0, z0.shape[1]))
        code = ops.MODES["unpaired"]  # without negatives: the row of the same image alone
        c = reference.problem_cosines(z0, z1, none, code, False).squeeze(1)
        return torch.cat([c, c]) if p.mode in _BOTH else c


def _of_logits(logits: Tensor, target: Tensor, tau: Tensor) -> Tensor:
    """As the kernels scale them. The operator is the one that refuses a target that is none."""
    rows, columns = logits.shape
    if not columns:
        return logits.new_full((rows,), math.nan, dtype=torch.float64)
    column = target.clamp(0, columns - 1)[:, None]
    values = logits.detach().gather(1, column).squeeze(1)
    values = values if values.dtype == torch.float64 else values.float()
    c = values * tau.detach().to(values)
    return torch.where(values < math.inf, c, math.nan).to(torch.float64)


def rounding(p: Problem) -> float:
    """By how much the kernels' cosine of a negative may exceed the exact one.

    Let u be the unit roundoff of the dtype that they compute in. A sum of D products of two unit
    rows, in any order, has an error of at most D u; that of D squares, from which a length is
    taken, has D u / 2 for each of the two rows. Each row has four more roundings: of its elements
    to that dtype, of its length, of the inverse, and of the product with it. So the cosine has an
    error of at most 2 (D + 4) u. Where torch lets float32 be rounded before it is multiplied, both
    factors have that error, too.

    Logits are given, and a product with tau is the same for equal logits. But two that were equal
    may have been rounded to different neighbours, one unit in the last place (2 u) apart, when they
    were stored in their dtype. So two units are allowed. What else rounded them is not known.
    """
    z0, z1, negatives, *_ = p.inputs
    if p.mode == ops.MODES["logits"]:
        return 2 * torch.finfo(z0.dtype).eps
    dtype = ops.compute_dtype(z0, z1, negatives, p.mode)
    seen = z0 if p.guide is None else p.guide[0]
    exact = 2 * (seen.shape[1] + 4) * torch.finfo(dtype).eps / 2
    return exact if dtype == torch.float64 else exact + 2 * ops.rounding_of_factors(z0)
