# SPDX-License-Identifier: MIT
"""`gather_distributed=True`: the batch of all ranks of torch.distributed, as one.

Every rank computes the loss of the whole batch, all rows of all ranks as anchors. So each has the
same value and, what HEX needs, the same threshold, and no gradient has to be sent back: a rank's
own rows have their whole gradient there. It comes times the number of ranks, for data-parallel
training (DDP, FSDP) divides the sum of the ranks' parameter gradients by that number.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather", "gather_constant", "is_distributed"]


def is_distributed() -> bool:
    """Whether there are other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_constant(x: Tensor) -> Tensor:
    """(W B, ...) in the order of the W ranks, of each rank's x, (B, ...); no gradient. Without a
    process group, or alone in it, x itself."""
    if not is_distributed():
        return x
    out = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
    # torch renamed it, and 2.13 warns of the name that 2.10 has
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
    """`gather_constant` with the gradient of this rank's rows, times the number of ranks."""
    if not is_distributed():
        return z
    gathered: Tensor = _Gather.apply(z)  # type: ignore[no-untyped-call]
    return gathered
