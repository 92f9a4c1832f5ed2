# SPDX-License-Identifier: MIT
"""Batches to measure on: embeddings clustered as in training, others that are hard, labels, logits.

A batch is made in float64 from a fixed seed, so that every dtype rounds the same numbers. What is
computed from it is left to peers.py.
"""

from __future__ import annotations

import functools
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
    (N, M). others do not: negatives (K, D), labels (N,), targets (N,), or nothing.
    """

    leaves: tuple[Tensor, ...]
    others: tuple[Tensor, ...] = ()
    mode: str = "ntxent"

    def to(self, place: torch.dtype | torch.device | str) -> Batch:
        """The same in another dtype, but for labels and targets; or on another device."""
        there = [
            x.to(place) if x.is_floating_point() or not isinstance(place, torch.dtype) else x
            for x in (*self.leaves, *self.others)
        ]
        leaves = [x.detach().requires_grad_() for x in there[: len(self.leaves)]]
        return Batch(tuple(leaves), tuple(there[len(leaves) :]), self.mode)


class Case(NamedTuple):
    """A batch, described: the fields stand in the records."""

    case: str
    rows: int
    """Anchors: 2B in modes "ntxent" and "cross"."""
    features: int = 128
    queue: int = 0
    """Negatives (mode "unpaired"), or columns (mode "logits")."""
    dtype: str = "float32"
    mode: str = "ntxent"
    """That of hex.hex_loss, or "unpaired" with a queue, "labels" or "logits"."""
    kind: str = "clusters"

    @property
    def candidates(self) -> int:
        """Columns of the matrix of cosines or logits."""
        of_mode = {"cross": self.rows // 2, "unpaired": 1 + self.queue, "logits": self.queue}
        return of_mode.get(self.mode, self.rows)

    def tiny(self, rows: int) -> Case:
        """For a rehearsal."""
        small = {"rows": rows, "features": 72, "queue": 320}
        return self._replace(
            **{name: min(size, getattr(self, name)) for name, size in small.items()}
        )


@functools.lru_cache(maxsize=1)
def make(case: Case, device: str = "cpu") -> Batch:
    """Of the last case it is kept."""
    of_mode = {"labels": _labels, "logits": _logits}
    batch = of_mode.get(case.mode, _views)(case, torch.Generator().manual_seed(0))
    return batch.to(getattr(torch, case.dtype)).to(device)


def _views(case: Case, generator: torch.Generator) -> Batch:
    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # Classes; and in each feature how far an image lies from its centre, a view from its image.
    classes, spread, moved = {"tight": (4, 0.08, 0.06)}.get(case.kind, (CLASSES, 0.6, 0.4))
    centres = noise(classes, case.features)

    def rows(n: int) -> tuple[Tensor, Tensor]:
        """n images (n, D), each of length sqrt(D) or so; and how freely they spread, (n, 1)."""
        label = torch.randint(classes, (n,), generator=generator)
        free = torch.ones(n, 1, dtype=torch.float64)
        if case.kind in ALIKE:
            every, freedom = ALIKE[case.kind]
            label[::every], free[::every] = 0, freedom
        return centres[label] + spread * free * noise(n, case.features), free

    def view(image: Tensor, free: Tensor) -> Tensor:
        """The images as an augmentation shows them: moved a little, and of another length."""
        length = 0.5 + torch.rand(len(image), 1, generator=generator)
        return (image + moved * free * noise(*image.shape)) * length

    image, free = rows(case.rows // 2 if case.mode in ("ntxent", "cross") else case.rows)
    z0, z1 = view(image, free), view(image, free)
    return Batch((z0, z1), (rows(case.queue)[0],) if case.queue else (), case.mode)


def _labels(case: Case, generator: torch.Generator) -> Batch:
    """Embeddings of 64 classes, none of which has one row: a library leaves such rows out."""
    ids = torch.arange(case.rows) % CLASSES
    centres = torch.randn(CLASSES, case.features, generator=generator)
    x = centres[ids] + 0.8 * torch.randn(case.rows, case.features, generator=generator)
    return Batch((x,), (ids,), case.mode)


def _logits(case: Case, generator: torch.Generator) -> Batch:
    """Those of a queue at a temperature of 0.1, the positive first."""
    cosines = 0.15 * torch.randn(case.rows, case.queue, generator=generator)
    cosines[:, 0] = 0.8
    target = torch.zeros(case.rows, dtype=torch.int64)
    return Batch((cosines.clamp(-1, 1) / 0.1,), (target,), case.mode)
