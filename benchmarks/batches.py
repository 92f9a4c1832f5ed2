# SPDX-License-Identifier: MIT
"""Batches to measure on: embeddings clustered as in training, others that are hard, labels, logits.

A batch is made in float64 from a fixed seed, so that every dtype rounds the same numbers. What is
computed from it is left to peers.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = 64
KINDS = (
    "clusters",  # the top percent of a row's cosines lie well above the rest
    "tight",  # 4 classes with cosines of 0.99 inside: a quarter of each row is near the threshold
    "half collapsed",  # one image in two along one direction, the others clustered
    "collapsed",  # every row along one direction: all cosines are 1, up to rounding
    "tenth",  # one image in ten in one class with cosines of 0.99, the others clustered
)
# One image in so many is of class 0, and how freely those spread around its centre.
ALIKE = {"half collapsed": (2, 0.0), "collapsed": (1, 0.0), "tenth": (10, 0.14)}


class Batch(NamedTuple):
    """What a loss is called with: leaves, then others.

    leaves require a gradient: two views (B, D) each, or embeddings with labels (N, D), or logits
    (N, M). others do not: negatives (K, D), labels (N,), targets (N,), or nothing. mode is that of
    hex.hex_loss, or "shared" with negatives, "labels" or "logits".
    """

    leaves: tuple[Tensor, ...]
    others: tuple[Tensor, ...] = ()
    mode: str = "ntxent"

    @property
    def rows(self) -> int:
        """Anchors: rows of the matrix of cosines or logits."""
        return len(self.leaves[0]) * (2 if self.mode in ("ntxent", "cross") else 1)

    @property
    def candidates(self) -> int:
        """Columns of that matrix."""
        if self.mode == "shared":
            return 1 + len(self.others[0])
        if self.mode == "logits":
            return self.leaves[0].shape[1]
        return len(self.leaves[0]) * (2 if self.mode == "ntxent" else 1)

    def to(self, place: torch.dtype | torch.device | str) -> Batch:
        """The same in another dtype, but for labels and targets; or on another device."""
        there = [
            x.detach().to(place)
            if x.is_floating_point() or not isinstance(place, torch.dtype)
            else x
            for x in (*self.leaves, *self.others)
        ]
        leaves = tuple(x.requires_grad_() for x in there[: len(self.leaves)])
        return Batch(leaves, tuple(there[len(self.leaves) :]), self.mode)


def views(
    images: int,
    features: int,
    *,
    kind: str = "clusters",
    dtype: torch.dtype = torch.float32,
    mode: str = "ntxent",
    queue: int = 0,
) -> Batch:
    """`images` pairs; for mode "shared" a queue of so many negatives, which all anchors share."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # Classes; and in each feature how far an image lies from its centre, a view from its image.
    classes, spread, moved = {"tight": (4, 0.08, 0.06)}.get(kind, (CLASSES, 0.6, 0.4))
    centres = noise(classes, features)

    def rows(n: int) -> tuple[Tensor, Tensor]:
        """n images (n, D), each of length sqrt(D) or so; and how freely they spread, (n, 1)."""
        label = torch.randint(classes, (n,), generator=generator)
        free = torch.ones(n, 1, dtype=torch.float64)
        if kind in ALIKE:
            every, freedom = ALIKE[kind]
            label[::every], free[::every] = 0, freedom
        return centres[label] + spread * free * noise(n, features), free

    def view(image: Tensor, free: Tensor) -> Tensor:
        """The images as an augmentation shows them: moved a little, and of another length."""
        length = 0.5 + torch.rand(len(image), 1, generator=generator)
        return (image + moved * free * noise(*image.shape)) * length

    image, free = rows(images)
    z0, z1 = view(image, free), view(image, free)
    return Batch((z0, z1), (rows(queue)[0],) if queue else (), mode).to(dtype)


def labels(rows: int, features: int) -> Batch:
    """Embeddings of 64 classes, none of which has one row: a library leaves such rows out."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(rows) % CLASSES
    centres = torch.randn(CLASSES, features, generator=generator)
    x = centres[ids] + 0.8 * torch.randn(rows, features, generator=generator)
    return Batch((x,), (ids,), "labels").to(torch.float32)


def logits(rows: int, columns: int, temperature: float) -> Batch:
    """Those of a queue, the positive first."""
    generator = torch.Generator().manual_seed(0)
    cosines = 0.15 * torch.randn(rows, columns, generator=generator)
    cosines[:, 0] = 0.8
    target = torch.zeros(rows, dtype=torch.int64)
    return Batch((cosines.clamp(-1, 1) / temperature,), (target,), "logits").to(torch.float32)
