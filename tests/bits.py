# SPDX-License-Identifier: MIT
"""Hashes of what the CPU kernels compute, to hold two builds on one machine against each other.

    python tests/bits.py            # a line for each kind of problem, and one for all

A change that is not meant to change a number prints the same before and after it, at every level
(HEX_ISA). Other compilers and other CPUs may print others: only threads, runs, and InfoNCE as the
HEX loss with H empty have the same bits everywhere, which the tests hold.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools

import data
import torch
from torch import Tensor

import hex

SIZES = [(1, 1, 1), (2, 0, 3), (3, 5, 7), (17, 33, 31), (101, 67, 41), (251, 40, 300)]  # B, D, K
LONG = (1100, 24, 2100)  # several blocks, by tiles; lists
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Hashes:
    """One of each kind of problem, fed with tensors."""

    def __init__(self) -> None:
        self.kinds: dict[str, hashlib._Hash] = {}
        self.problems = 0

    def add(self, kind: str, *results: Tensor | None) -> None:
        self.problems += 1
        for t in results:
            if t is not None:
                flat = t.detach().contiguous().view(-1).view(torch.uint8)
                self.kinds.setdefault(kind, hashlib.sha256()).update(flat.numpy().tobytes())

    def lines(self) -> list[str]:
        each = {kind: h.hexdigest()[:12] for kind, h in sorted(self.kinds.items())}
        whole = hashlib.sha256("".join(each.values()).encode()).hexdigest()[:12]
        every = [f"{kind:24}{value}" for kind, value in each.items()]
        return [*every, f"{f'all {self.problems}':24}{whole}"]


def step(loss: Tensor, *inputs: Tensor) -> list[Tensor | None]:
    """The loss, one value a row or 0-d, and its gradients."""
    return [loss, *torch.autograd.grad(loss.sum(), inputs, allow_unused=True)]


def embeddings(h: Hashes, kind: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Every mode: at a threshold, with one of the batch's, with groups and with a guide."""
    B, D, K = size
    for seed, mode in enumerate(data.MODES):
        z = data.batch(kind, B, D, mode, K if mode != "paired" else min(K, 9), seed)
        z = [x.to(dtype).requires_grad_() for x in z if x is not None]
        public = mode if mode in ("ntxent", "query", "cross") else "ntxent"
        tau = torch.tensor(0.1, requires_grad=True)
        for variant, beta in itertools.product(("paper", "released"), (0.0, 1.0, 0.5)):
            rows = hex.hex_loss(
                *z, eps=0.3, temperature=tau, beta=beta, mode=public, variant=variant,
                reduction="none",
            )  # fmt: skip
            h.add(mode, *step(rows, *z, tau))
        for name in data.FORMS[2:]:
            rows = hex.hex_loss(
                *z, eps=0.3, temperature=tau, mode=public, reduction="none", **data.form(name)
            )
            h.add(f"{mode} {name}", *step(rows, *z, tau))
        for over, quantile in itertools.product(("all", "negatives"), (0.5, 0.99)):
            tracker = hex.ThresholdTracker.adaptive(quantile, over=over)
            loss = hex.HEXLoss(threshold=tracker, mode=public)
            h.add(f"{mode} adaptive", *step(loss(*z), *z), *loss.last, tracker.state)
            h.add(
                f"{mode} threshold",
                hex.batch_threshold(*z, quantile=quantile, over=over, mode=public),
            )
        fixed = hex.ThresholdTracker.fixed(0.6, normalize_rows=True)
        loss = hex.HEXLoss(threshold=fixed, mode=public)
        h.add(f"{mode} range", *step(loss(*z), *z), *loss.last)
        if B * K > 10**5:
            continue
        own = torch.arange(B) % 5
        shape = z[2].shape[:-1] if len(z) == 3 else ()
        of = own if len(z) == 2 else (own, torch.arange(shape.numel()).view(shape) % 5)
        loss = hex.HEXLoss(mode=public, threshold=0.4)
        h.add(f"{mode} groups", *step(loss(*z, groups=of), *z), *loss.last[1:])
        guide = tuple(x.detach().float().roll(1, -1) for x in z)
        h.add(f"{mode} guide", *step(loss(*z, guide=guide), *z), *loss.last)


def labelled(h: Hashes, kind: str, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """SupCon with labels and with a mask; logits."""
    B, D, _ = size
    x = torch.cat(data.views(kind, B, D, 7)).to(dtype).requires_grad_()
    labels = torch.arange(2 * B) % 5
    for positives in ("inside", "outside"):
        for variant in ("paper", "released"):
            rows = hex.hex_sup_con(
                x, labels, eps=0.3, temperature=0.1, positives=positives, variant=variant,
                reduction="none",
            )  # fmt: skip
            h.add("supcon", *step(rows, x))
        loss = hex.HEXSupConLoss(positives=positives)
        h.add("supcon adaptive", *step(loss(x, labels), x), *loss.last)
    if dtype != torch.float64:
        unit = torch.nn.functional.normalize(x.detach().float())
    else:
        unit = torch.nn.functional.normalize(x.detach())
    logits = (unit @ unit.T / 0.1).to(dtype).requires_grad_()
    target = torch.arange(2 * B).roll(1)
    for variant in ("paper", "released"):
        rows = hex.hex_cross_entropy(
            logits, target, eps=0.3, temperature=0.1, variant=variant, reduction="none"
        )
        h.add("logits", *step(rows, logits))
    loss = hex.HEXCrossEntropyLoss(0.1)
    h.add("logits adaptive", *step(loss(logits, target), logits), *loss.last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the long problems")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    h = Hashes()
    for kind, size, dtype in itertools.product(data.KINDS, SIZES, DTYPES):
        embeddings(h, kind, size, dtype)
        labelled(h, kind, size, dtype)
    for kind in () if quick else data.KINDS:
        embeddings(h, kind, LONG, torch.float32)
        labelled(h, kind, LONG, torch.float32)
    print("\n".join(h.lines()))


if __name__ == "__main__":
    main()
