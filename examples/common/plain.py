# SPDX-License-Identifier: MIT
"""A plain training loop, for the study and the demo.

It stays, beside Lightning's in training.py, because the study has committed rows, and those that
are yet to come must have the same batches, views and learning rates to the bit.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.data import MemorySplit
from common.evaluate import check_finite

FIGURES = "loss", "eps", "hard", "share"


def train(
    model: nn.Module,
    images: MemorySplit,
    epochs: int,
    batch: int,
    lr: float,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Trains, and yields after each epoch the FIGURES of its steps, (steps, 4) float64 on the CPU.

    Args:
        model: has a `backbone` and a `criterion` of hex, and returns the loss of two views.
        dtype: of autocast; float32 turns it off.

    Raises:
        Diverged: the training has reached numbers that are not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-4)
    total = len(images) // batch * epochs
    rise = max(1, total // 20)

    def factor(step: int) -> float:  # rises over a twentieth, then falls by a half cosine
        if step < rise:
            return (step + 1) / rise
        return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for epoch in range(epochs):
        model.criterion.set_epoch(epoch)
        model.train()
        rows = []
        for views, _ in images.batches(batch):
            with torch.autocast(views[0].device.type, dtype, enabled=dtype != torch.float32):
                loss = model(*views)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            rows.append(torch.stack([x.double() for x in (loss.detach(), *model.criterion.last)]))
        table = torch.stack(rows).cpu()
        check_finite(model, optimizer, epoch, table[:, 0].tolist(), images)
        yield table
