# SPDX-License-Identifier: MIT
"""`gather_distributed=True`: the batches of all ranks of torch.distributed as one batch.

Every rank gathers the rows of all ranks and computes the loss of all of them as anchors. So the
loss is the same on every rank and so is, what HEX needs, the threshold. No gradient has to be sent
back, because the rows of this rank get their whole gradient on this rank. That gradient is
multiplied by the number of ranks, because data-parallel training (DDP, FSDP) divides the sum of the
gradients of all ranks by that number.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "gather_constant", "is_distributed"]


def is_distributed() -> bool:
    """Whether there is a process group with other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_constant(x: Tensor) -> Tensor:
    """The x of all ranks, without gradient.

    Args:
        x: (B, ...), of the same shape, dtype and device type on every rank.

    Returns:
        (W B, ...), the x of the W ranks in their order, or x itself where there are no other ranks.
    """
    if not is_distributed():
        return x
    out = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
    # torch 2.13 warns of the old name, all_gather_into_tensor, which is the only one in 2.10.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x.detach().contiguous())
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return gather_constant(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rows = inputs[0].shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows] * dist.get_world_size()


def gather(z: Tensor) -> Tensor:
    """`gather_constant` with a gradient: that of this rank's rows, times the number of ranks.

    Example:
        >>> import torch
        >>> from hex.distributed import gather
        >>> z = torch.randn(4, 8, requires_grad=True)
        >>> gather(z) is z  # there is no process group here
        True
    """
    if not is_distributed():
        return z
    gathered: Tensor = _Gather.apply(z)  # type: ignore[no-untyped-call]
    return gathered
