# SPDX-License-Identifier: MIT
"""A batch and the methods that are timed on it, each checked first; results as they are recorded.

A method's loss and gradient of the very batch it is timed on have to be those of hex.reference in
float64: a difference ends the run (peers.Mismatch).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import measure
import peers
import torch
from batches import Batch

Result = dict[str, Any]


@dataclasses.dataclass
class Case:
    """A batch; by method that gave the right loss and gradient on it, its step and peak."""

    name: str
    batch: Batch
    data: str = "clusters"
    steps: dict[str, measure.Step] = dataclasses.field(default_factory=dict)
    peak_mb: dict[str, float] = dataclasses.field(default_factory=dict)
    flop: dict[str, float] = dataclasses.field(default_factory=dict)

    def result(self, method: str, ms: list[float], **more: Any) -> Result:
        """What is recorded: samples in ms, MB of 10^6 bytes."""
        dtype = str(self.batch.z0.dtype).removeprefix("torch.")
        result = {"case": self.name, "method": method, "rows": self.batch.rows}
        result |= {"candidates": self.batch.candidates, "features": self.batch.z0.shape[1]}
        result |= {"dtype": dtype, "mode": self.batch.mode, "data": self.data, **more}
        if method in self.peak_mb:
            result["peak_mb"] = round(self.peak_mb[method], 2)
        if method in self.flop:
            result["flop"] = self.flop[method]
        return result | {"ms": [float(f"{sample:.4g}") for sample in ms]}


def prepare(case: Case, methods: Sequence[peers.Method], notes: list[str]) -> Case:
    """Checks the methods that take the batch, and measures their memory. A library that is missing
    goes to the notes."""
    right: dict[str, peers.Result] = {}
    for method in methods:
        if not method.takes(case.batch):
            continue
        progress(f"{case.name}: checking {method.name}")
        if method.loss not in right:
            right[method.loss] = peers.truth(case.batch, method.loss)
        try:
            step = method.step(case.batch)
        except ImportError as error:
            if (note := f"{method.name} is left out: {error}") not in notes:
                notes.append(note)
            continue
        peers.check(method, case.batch, step(), right[method.loss])
        case.steps[method.name] = step
        case.peak_mb[method.name] = measure.peak_mb(step)
    return case


def timed(
    cases: Sequence[Case],
    repeats: int,
    heap: str,
    **more: Any,
) -> list[Result]:
    """Samples of every method of all these cases, by turns: CPU time on one thread."""
    progress(f"{', '.join(case.name for case in cases)}: timing, {heap} heap")
    steps = {(case.name, name): step for case in cases for name, step in case.steps.items()}
    samples = measure.times(steps, repeats, measure.clock(1))
    return [
        case.result(name, samples[case.name, name], heap=heap, **more)
        for case in cases
        for name in case.steps
    ]


def in_threads(step: measure.Step, threads: int) -> measure.Step:
    """The step on so many threads of torch."""

    def run() -> object:
        torch.set_num_threads(threads)
        return step()

    return run


def progress(what: str) -> None:
    """One line, written over and over, for a person who waits."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
