# SPDX-License-Identifier: MIT
"""What a step costs besides its numbers: 64 rows of 128 features, two views of 32 images.

    python benchmarks/small.py

A step is criterion(z0, z1).backward(). The empty one is that of an autograd.Function of two inputs
whose forward and backward return tensors that are there already: what PyTorch itself takes. All of
them take turns on one thread of one process, so a slow minute hits all; the CPU time counts, and of
the turns the median. The difference is the loss, with its share of Python.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from measure import machine, timer, times
from torch import Tensor

from hex import HEXLoss, InfoNCELoss

IMAGES, FEATURES, TURNS = 32, 128, 100
GRADIENTS = torch.zeros(2, IMAGES, FEATURES).unbind()
LOSS = torch.zeros(())


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z0: Tensor, z1: Tensor) -> Tensor:
        return LOSS.view(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return GRADIENTS


def step(criterion: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    torch.manual_seed(0)
    z0, z1 = (torch.randn(IMAGES, FEATURES, requires_grad=True) for _ in range(2))

    def run() -> None:
        z0.grad = z1.grad = None
        criterion(z0, z1).backward()

    return run


def main() -> None:
    methods = {"empty": Empty.apply, "HEXLoss": HEXLoss(0.1), "InfoNCELoss": InfoNCELoss(0.1)}
    samples = times([timer(step(criterion)) for criterion in methods.values()], TURNS)
    empty, *losses = (1e3 * statistics.median(sample) for sample in samples)
    print(machine("cpu")["on"])
    print(f"{'empty':<12} {empty:6.0f} us")
    for name, loss in zip(list(methods)[1:], losses, strict=True):
        print(f"{name:<12} {loss:6.0f} us, {loss - empty:.0f} above the empty one")


if __name__ == "__main__":
    main()
