# SPDX-License-Identifier: MIT
"""torch.ops.hex.* as the tests call them: of what a test is about, all arguments of the operator.

Each function is called with the tensors and options of two views and negatives; `arguments` gives
what the operator then gets. labelled_problems.py has those with ids, masks, groups, guides and
logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HEX = torch.ops.hex
KEEP = 1 << 30  # bytes of cosines that a forward may keep


def nothing(like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, mask, groups and guide where there are none."""
    return (
        like.new_empty(0, dtype=torch.int64), like.new_empty((0, 0), dtype=torch.bool),
        like.new_empty(0, dtype=torch.int64), like.new_empty((0, 0), dtype=torch.float32),
    )  # fmt: skip


def arguments(name: str, *of: Any, allow_tf32: bool = False) -> tuple[Any, ...]:
    """Of forward, adaptive, backward, threshold and row_range below."""
    if name == "forward":
        z0, z1, negatives, eps, tau, mode, reduction, variant, beta, tau_plus, decoupled, keep = of
        return (z0, z1, negatives, *nothing(z0), eps, tau, mode, reduction, 0, beta, variant,
                tau_plus, decoupled, keep, allow_tf32)  # fmt: skip
    if name == "adaptive":
        z0, z1, negatives, state, tau, mode, reduction, variant, beta, *rest, keep = of
        tau_plus, decoupled, *rule = rest
        return (z0, z1, negatives, *nothing(z0), state, tau, mode, reduction, 0, beta, variant,
                tau_plus, decoupled, keep, allow_tf32, False, *rule)  # fmt: skip
    if name == "backward":
        grad, z0, z1, negatives, tau, stats, kept, mode, reduction, beta, needs = of
        return (grad, z0, z1, negatives, *nothing(z0), tau, stats, kept, mode, reduction, 0, beta,
                allow_tf32, needs)  # fmt: skip
    z0, z1, negatives, mode, *rest = of
    ids, mask, _, _ = nothing(z0)
    tau = torch.ones((), dtype=torch.float64, device=z0.device)  # of logits alone
    options = (*rest, False) if name == "threshold" else (0.0, False, True)
    return (z0, z1, negatives, ids, mask, tau, mode, False, allow_tf32, False, *options)


def forward(*of: Any, allow_tf32: bool = False) -> Any:
    """z0, z1, negatives, eps, tau, mode, reduction, variant, beta, tau_plus, decoupled, keep."""
    return HEX.forward(*arguments("forward", *of, allow_tf32=allow_tf32))


def adaptive(*of: Any) -> Any:
    """z0, z1, negatives, state, tau, mode, reduction, variant, beta, tau_plus, decoupled, *rule,
    keep."""
    return HEX.adaptive(*arguments("adaptive", *of))


def backward(*of: Any) -> Any:
    """grad, z0, z1, negatives, tau, stats, kept, mode, reduction, beta, needs."""
    return HEX.backward(*arguments("backward", *of))


def threshold(*of: Any) -> Tensor:
    """z0, z1, negatives, mode, quantile, over: a bool or "all" or "negatives"."""
    *inputs, over = of
    return HEX.quantile(*arguments("threshold", *inputs, over in (True, "negatives")))[0]


def row_range(*of: Any) -> tuple[Tensor, Tensor]:
    """z0, z1, negatives, mode."""
    _, low, high = HEX.quantile(*arguments("row_range", *of))
    return low, high
