# SPDX-License-Identifier: MIT
"""Small batches and steps of training, for the tests of the threshold over training."""

import torch

from hex import ThresholdTracker

STATEFUL = ({}, {"momentum": 0.9}, {"monotonic": True}, {"lagged": True})


def adaptive(**options) -> ThresholdTracker:
    return ThresholdTracker.adaptive(**{"quantile": 0.9, **options})


def views(images: int, seed: int = 0, features: int = 8, shift: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, images, features, generator=generator, dtype=torch.float64)
    return (rows + shift).unbind()


def train(loss, *inputs):
    leaves = [z.clone().requires_grad_() for z in inputs]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(z.grad for z in leaves)]


def counts(tracker) -> list[int]:
    return [int(tracker.updates), int(tracker.skipped), int(tracker.short)]


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
