# SPDX-License-Identifier: MIT
"""Batches of embeddings to measure on: clustered, as in training, and others that are hard.

A batch is made in float64 from a fixed seed, so that every dtype rounds the same numbers. What is
computed from it is left to methods.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = (
    "clusters",  # 64 classes: the top percent of a row's cosines lie well above the rest
    "tight",  # 4 classes with cosines of 0.99 inside: a quarter of each row is near the threshold
    "half collapsed",  # one image in two along one direction, the others clustered
    "collapsed",  # every row along one direction: all cosines are 1, up to rounding
    "tenth",  # one image in ten in one class with cosines of 0.99, the others clustered
)

# One image in so many is of class 0, and how freely those spread around its centre.
ALIKE = {"half collapsed": (2, 0.0), "collapsed": (1, 0.0), "tenth": (10, 0.14)}


class Batch(NamedTuple):
    """Two views (B, D), negatives (K, D) or None, and the mode by its name in hex.reference."""

    z0: Tensor
    z1: Tensor
    negatives: Tensor | None = None
    mode: str = "ntxent"

    @property
    def rows(self) -> int:
        """Anchors: rows of the matrix of cosines."""
        return len(self.z0) * (2 if self.mode in ("ntxent", "cross") else 1)

    @property
    def candidates(self) -> int:
        """Columns of that matrix."""
        if self.negatives is not None:
            return 1 + len(self.negatives)
        return len(self.z0) * (2 if self.mode == "ntxent" else 1)


def make(
    images: int,
    features: int,
    *,
    kind: str = "clusters",
    dtype: torch.dtype = torch.float32,
    mode: str = "ntxent",
    queue: int = 0,
) -> Batch:
    """A batch of `images` pairs; z0 and z1 require a gradient, the queue of negatives does not.

    queue: the number of negatives, all of them shared, for mode "shared".
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # Classes; and in each feature how far an image lies from its centre, a view from its image.
    classes, spread, moved = {"tight": (4, 0.08, 0.06)}.get(kind, (64, 0.6, 0.4))

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
        z = (image + moved * free * noise(*image.shape)) * length
        return z.to(dtype).requires_grad_()

    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wanted one of {KINDS}")
    image, free = rows(images)
    z0, z1 = view(image, free), view(image, free)
    return Batch(z0, z1, rows(queue)[0].to(dtype) if queue else None, mode)
