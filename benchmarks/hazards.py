# SPDX-License-Identifier: MIT
"""26 hard questions to contrastive losses: hex and the others, side by side.

    python benchmarks/hazards.py            a table; exit status 1 if hex fails one
    python benchmarks/hazards.py --json FILE

Tiny temperatures, half precision, rows of zeros, batches of one and of none, huge and tiny
embeddings, losses near 0, derivatives, torch.compile, bad arguments. Each question is put to each
loss as `ask(make)`, with make(tau) a module of two views, (B, D) each, and is answered True or
False; an exception counts as a wrong answer, and its name is shown. CPU, seconds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import libraries
import measure
import table
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hex import HEXLoss, InfoNCELoss, ThresholdTracker

Make = Callable[[float], nn.Module]


class PlainInfoNCE(nn.Module):
    """Cross-entropy of the logits, as it is usually written."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z0, z1]))
        logits = z @ z.T / self.temperature
        logits = logits.masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z0)))


def hex_loss(temperature: float) -> nn.Module:
    """With a quantile over the negatives, since over whole rows H is empty in so small a batch."""
    return HEXLoss(temperature, threshold=ThresholdTracker.adaptive(over="negatives"))


OURS: dict[str, Make] = {"hex HEXLoss": hex_loss, "hex InfoNCELoss": InfoNCELoss}
OTHERS: dict[str, Make] = {
    "plain InfoNCE": PlainInfoNCE,
    "lightly": libraries.lightly,
    "pytorch-metric-learning": libraries.pytorch_metric_learning,
    "info-nce-pytorch": libraries.info_nce_pytorch,
}


# ---- the questions ------------------------------------------------------------------------------


class Answer(NamedTuple):
    loss: Tensor
    gradient: Tensor  # in both views, flat

    @property
    def finite(self) -> bool:
        return bool(self.loss.isfinite().all() and self.gradient.isfinite().all())


def views(
    images: int = 16,
    features: int = 32,
    dtype: torch.dtype = torch.float32,
    noise: float = 0.3,
) -> tuple[Tensor, Tensor]:
    """Gaussian embeddings and the same with noise added; the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(0)
    z0, more = torch.randn(2, images, features, generator=generator, dtype=torch.float64)
    return z0.to(dtype), (z0 + noise * more).to(dtype)


def answer(make: Make, temperature: float, z0: Tensor, z1: Tensor) -> Answer:
    inputs = [z.clone().requires_grad_() for z in (z0, z1)]
    loss = make(temperature)(*inputs)
    gradients = torch.autograd.grad(loss.sum(), inputs)
    return Answer(loss.detach(), torch.cat([g.flatten() for g in gradients]))


def close(a: Tensor, b: Tensor, relative: float) -> bool:
    return abs(a.item() - b.item()) <= relative * abs(b.item())


def finite_at(make: Make, temperature: float) -> bool:
    return answer(make, temperature, *views(noise=1)).finite


def finite_on_opposite_positives(make: Make) -> bool:
    z0, z1 = views(noise=0.1)
    return answer(make, 0.01, z0, -z1).finite


def half_precision(make: Make, dtype: torch.dtype, temperature: float) -> bool:
    """Within two per cent of float64 on the same, rounded, numbers."""
    z0, z1 = views(64, dtype=dtype)
    wanted = answer(make, temperature, z0.double(), z1.double())
    got = answer(make, temperature, z0, z1)
    return got.finite and close(got.loss, wanted.loss, 0.02)


def row_of_zeros(make: Make, dtype: torch.dtype) -> bool:
    z0, z1 = views(dtype=dtype)
    z0[3] = 0
    got = answer(make, 0.1, z0, z1)
    bound = 1e6 if dtype == torch.float32 else 6e4  # float16 ends at 65504
    return got.finite and bool(got.gradient.abs().max() < bound)


def one_pair(make: Make) -> bool:
    """There is nothing to tell apart."""
    got = answer(make, 0.1, *views(1))
    return got.finite and abs(got.loss.item()) < 1e-6 and bool(got.gradient.abs().max() < 1e-5)


def empty_batch(make: Make) -> bool:
    return bool(answer(make, 0.1, *views(0)).loss.isfinite().all())


def all_rows_alike(make: Make) -> bool:
    z = views()[0][:1].repeat(16, 1)
    return answer(make, 0.1, z, z).finite


def scaled_by(make: Make, factor: float) -> bool:
    """Cosines do not depend on length."""
    z0, z1 = views()
    got = answer(make, 0.1, z0 * factor, z1 * factor)
    return got.finite and close(got.loss, answer(make, 0.1, z0, z1).loss, 1e-3)


def loss_near_0(make: Make) -> bool:
    """Relative to float64: a small loss keeps its digits."""
    z0, z1 = views(features=512, noise=0.01)
    wanted = answer(make, 0.05, z0.double(), z1.double()).loss
    return close(answer(make, 0.05, z0, z1).loss, wanted, 1e-4)


def nan_shows(make: Make) -> bool:
    z0, z1 = views()
    z0[2, 1] = math.nan
    return not answer(make, 0.1, z0, z1).loss.isfinite().all()


def strides(make: Make) -> bool:
    z0, z1 = views()
    wanted = answer(make, 0.1, z0, z1).loss
    return close(answer(make, 0.1, z0.T.contiguous().T, z1.T.contiguous().T).loss, wanted, 1e-6)


def first_derivative(make: Make) -> bool:
    inputs = [z.requires_grad_() for z in views(4, 5, torch.float64)]
    return torch.autograd.gradcheck(make(0.3), inputs)


def second_derivative(make: Make) -> bool:
    inputs = [z.requires_grad_() for z in views(3, 4, torch.float64)]
    return torch.autograd.gradgradcheck(make(0.5), inputs)


def compiles_in_one_graph(make: Make) -> bool:
    torch.compiler.reset()
    module, (z0, z1) = make(0.1), views()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    return close(compiled(z0, z1), module(z0, z1), 1e-5)


def copies(make: Make) -> bool:
    module, (z0, z1) = make(0.1), views()
    value = module(z0, z1)
    others = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    return all(torch.equal(other(z0, z1), value) for other in others)


def same_bits_on_two_threads(make: Make) -> bool:
    threads = torch.get_num_threads()
    answers = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            answers.append(answer(make, 0.1, *views(128, 128)))
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def inference(make: Make) -> bool:
    with torch.inference_mode():
        return bool(make(0.1)(*views()).isfinite().all())


def refuses_bad_temperatures(make: Make) -> bool:
    for temperature in (0.0, -0.1, math.nan):
        try:
            make(temperature)(*views())
        except (ValueError, AssertionError):
            continue
        return False
    return True


QUESTIONS: dict[str, Callable[[Make], bool]] = {
    **{f"finite at tau {t}": functools.partial(finite_at, temperature=t)
       for t in (0.02, 0.01, 0.005, 0.001)},
    "finite at tau 0.01, positives opposite": finite_on_opposite_positives,
    **{f"float16, tau {t}: within 2 %":
       functools.partial(half_precision, dtype=torch.float16, temperature=t)
       for t in (0.5, 0.1, 0.05)},
    "bfloat16, tau 0.1: within 2 %":
        functools.partial(half_precision, dtype=torch.bfloat16, temperature=0.1),
    "row of zeros: gradient < 1e6": functools.partial(row_of_zeros, dtype=torch.float32),
    "row of zeros in float16: < 6e4": functools.partial(row_of_zeros, dtype=torch.float16),
    "B = 1: loss 0, gradient 0": one_pair,
    "B = 0: finite": empty_batch,
    "all rows alike: finite": all_rows_alike,
    "embeddings x 1e20: same loss": functools.partial(scaled_by, factor=1e20),
    "embeddings x 1e-23: same loss": functools.partial(scaled_by, factor=1e-23),
    "small loss: within 1e-4": loss_near_0,
    "NaN in, NaN out": nan_shows,
    "any strides": strides,
    "gradcheck": first_derivative,
    "gradgradcheck": second_derivative,
    "torch.compile(fullgraph=True)": compiles_in_one_graph,
    "deepcopy and pickle": copies,
    "same bits on 1 and 2 threads": same_bits_on_two_threads,
    "inference_mode": inference,
    "refuses tau of 0, -0.1, NaN": refuses_bad_temperatures,
}  # fmt: skip


def ask(question: Callable[[Make], bool], make: Make) -> str:
    """ "ok", "wrong", or the name of an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "ok" if question(make) else "wrong"
        except Exception as error:
            return type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="26 hard questions to contrastive losses.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answers there")
    options = parser.parse_args(arguments)
    losses, notes = dict(OURS), []
    for name, make in OTHERS.items():
        try:
            make(0.1)
            losses[name] = make
        except ImportError as error:
            notes.append(f"{name} is left out: {error}")
    answers = {
        text: {name: ask(question, make) for name, make in losses.items()}
        for text, question in QUESTIONS.items()
    }
    right = {name: sum(row[name] == "ok" for row in answers.values()) for name in losses}
    machine = measure.machine()
    table.show(
        f"{len(QUESTIONS)} hard questions",
        ["", *losses],
        [
            *([text, *row.values()] for text, row in answers.items()),
            "Sum",
            ["right", *(f"{n} of {len(QUESTIONS)}" for n in right.values())],
        ],
        [f"B = 16, D = 32 unless said; torch {machine['torch']}, {machine['cpu']}", *notes],
    )
    if options.json:
        content = {"machine": machine, "answers": answers, "right": right}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return int(any(right[name] < len(QUESTIONS) for name in OURS))


if __name__ == "__main__":
    sys.exit(main())
