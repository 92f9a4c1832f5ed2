# SPDX-License-Identifier: MIT
"""Time and memory of labels and of logits, forward and backward: hex, plain PyTorch, a library.

    python benchmarks/classes.py           4096 rows with labels, 512 x 65537 logits
    python benchmarks/classes.py --quick   small sizes

Every method first computes the loss and gradient of the batch it is timed on, and they have to be
near those of hex.reference_classes in float64, or of the same formula with the local term off.
How time and memory are measured is in measure.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence

import measure
import table
import torch
import torch.nn.functional as F
from torch import Tensor

from hex import hex_cross_entropy, hex_sup_con
from hex import reference_classes as reference

TAU, CLASSES, FEATURES = 0.1, 64, 128
Loss = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--repeats", type=int, default=5, help="samples a method; default 5")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default 1")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows, logits = (256, (64, 1025)) if options.quick else (4096, (512, 65537))
    lines: list[table.Line] = []
    notes: list[str] = []
    for title, x, methods in (labels(rows, notes), queue(*logits)):
        lines.append(title)
        lines += measured(x, methods, options)
    machine = measure.machine()
    table.show(
        "Forward + backward, float32", ["", "ms", "peak MB"], lines,
        [f"{machine['cpu']}; torch {machine['torch']}, hex {machine['hex']} "
         f"({machine['hex_isa']}), threads: {machine['threads']}; stock heap; load "
         f"{measure.load():.1f}.", *notes],
    )  # fmt: skip
    return 0


def measured(
    x: Tensor, methods: dict[str, tuple[Loss, Loss]], options: argparse.Namespace
) -> list[table.Line]:
    """A line a method, after its value and gradient were found right."""

    def step(loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
        value = loss(x)
        return value.detach(), torch.autograd.grad(value, x)[0]

    steps, peaks = {}, {}
    wide = x.detach().double().requires_grad_()
    for name, (loss, truth) in methods.items():
        for got, right in zip(step(loss, x), step(truth, wide), strict=True):
            error = (got.double() - right).abs().max() / right.abs().max()
            if not error < 1e-4:
                sys.exit(f"error: {name} is off by {error:.1e}")
        del right
        steps[name] = lambda loss=loss: step(loss, x)
        peaks[name] = measure.peak_mb(steps[name])
    samples = measure.times(steps, options.repeats, measure.clock(options.threads))
    return [
        [name, table.number(statistics.median(samples[name])), table.number(peaks[name])]
        for name in steps
    ]


def labels(rows: int, notes: list[str]) -> tuple[str, Tensor, dict[str, tuple[Loss, Loss]]]:
    """rows embeddings of 64 classes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(rows) % CLASSES  # none alone: the library leaves such rows out
    centres = torch.randn(CLASSES, FEATURES, generator=generator)
    x = centres[ids] + 0.8 * torch.randn(rows, FEATURES, generator=generator)
    x.requires_grad_()
    eps = 0.2  # a percent or so of the other classes
    none = ids[:0]

    def plain(x: Tensor, eps: float) -> Tensor:
        empty = x.new_empty((0, 0))
        return reference.labelled_rows(
            x, x[:0], ids, none, empty.bool(), none, none, empty, empty,
            torch.tensor(eps, dtype=torch.float64), torch.tensor(TAU, dtype=torch.float64),
            0, 0, 0, 1.0, 0.1,
        )[0].mean()  # fmt: skip

    def sup_contrast(x: Tensor) -> Tensor:
        z = F.normalize(x)
        other = ~torch.eye(rows, dtype=torch.bool)
        logits = z @ z.T / TAU
        log_p = logits - logits.masked_fill(~other, -math.inf).logsumexp(1, keepdim=True)
        positive = (ids[:, None] == ids) & other
        return -((log_p * positive).sum(1) / positive.sum(1)).mean()

    def hex_truth(x: Tensor) -> Tensor:
        return plain(x, eps)

    def sup_con_truth(x: Tensor) -> Tensor:
        return plain(x, math.inf)

    methods: dict[str, tuple[Loss, Loss]] = {
        "hex_sup_con": (lambda x: hex_sup_con(x, ids, eps=eps, temperature=TAU), hex_truth),
        "HEX in plain PyTorch": (hex_truth, hex_truth),
        "hex_sup_con, H empty": (
            lambda x: hex_sup_con(x, ids, eps=math.inf, temperature=TAU), sup_con_truth),
        "SupContrast in plain PyTorch": (sup_contrast, sup_con_truth),
    }  # fmt: skip
    try:
        from pytorch_metric_learning.losses import SupConLoss

        peer = SupConLoss(TAU)
        methods["pytorch-metric-learning SupConLoss"] = (lambda x: peer(x, ids), sup_con_truth)
    except ImportError as error:
        notes.append(f"pytorch-metric-learning is left out: {error}")
    return f"{rows} rows, {CLASSES} labels, D = {FEATURES}", x, methods


def queue(rows: int, columns: int) -> tuple[str, Tensor, dict[str, tuple[Loss, Loss]]]:
    """Logits of a queue, the positive first."""
    generator = torch.Generator().manual_seed(0)
    cosines = 0.15 * torch.randn(rows, columns, generator=generator)
    cosines[:, 0] = 0.8
    logits = (cosines.clamp(-1, 1) / TAU).requires_grad_()
    target = torch.zeros(rows, dtype=torch.int64)
    eps = torch.tensor(0.35, dtype=torch.float64)

    def plain(x: Tensor) -> Tensor:
        tau = torch.tensor(TAU, dtype=torch.float64)
        empty = x.new_empty((0, 0))
        return reference.logits_rows(x, target, empty, eps, tau, False, 0, 1.0, 0.1)[0].mean()

    def cross_entropy(x: Tensor) -> Tensor:
        return F.cross_entropy(x, target)

    return f"{rows} x {columns} logits", logits, {
        "hex_cross_entropy": (
            lambda x: hex_cross_entropy(x, target, eps=eps, temperature=TAU), plain),
        "HEX in plain PyTorch": (plain, plain),
        "hex_cross_entropy, H empty": (
            lambda x: hex_cross_entropy(x, target, eps=math.inf, temperature=TAU), cross_entropy),
        "torch's cross_entropy": (cross_entropy, cross_entropy),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
