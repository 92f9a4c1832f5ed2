# SPDX-License-Identifier: MIT
"""The error of hex's losses and of plain PyTorch's, over temperature, features, rows and dtypes.

    python benchmarks/accuracy.py               all, some minutes: benchmarks/accuracy.jsonl
    python benchmarks/accuracy.py features      a part
    python benchmarks/bench.py --report         writes the picture and tables of docs/numbers.md

Three ways to compute a loss and its gradient are compared on the same numbers:

    "ours"     the functions of hex, by its kernels
    "plain"    PyTorch's operators, with care: F.normalize, a product and F.cross_entropy for
               InfoNCE, hex.reference for HEX; half precision is widened to float32 first
    "formula"  PyTorch's operators as the formula reads, exp(l) and sums of it, in the input's dtype

The truth is exact.py's, in float64, or in NumPy's longdouble for inputs in float64. Many rows have
an objective of some anchors alone: the gradient in all rows follows from these anchors' rows of the
matrix of cosines, which fit into memory, while ours computes the loss of all.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # hex as it is in this folder

import batches
import exact
import measure
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from worker import Results

from hex import hex_cross_entropy, hex_loss, hex_sup_con, info_nce, ops, reference

RECORD = Path(__file__).with_name("accuracy.jsonl")
BETA, TAU_PLUS = 1.0, 0.1
DTYPES = ("float64", "float32", "bfloat16", "float16")
VIEWS = ("InfoNCE", "HEX")  # of two views, "ntxent"
LOGITS = ("cross-entropy", "HEX, logits")
LOSSES = (*VIEWS, "HEX, labels", *LOGITS)
WAYS = ("ours", "plain", "formula")
ERRORS = ("loss", "row", "gradient")  # of the mean, of the worst row, of the worst element
ANCHORS = 61  # of the objective, where there are more rows than DENSE
DENSE = 1100
WRONG = 0.01

TAUS = tuple(float(f"{10 ** (k / 2):.3g}") for k in range(-6, 7))
FEATURES = (1, 2, 3, 7, 33, 129, 1001, 10_007, 100_000)
ROWS = (2, 4, 26, 134, 1030, 8198, 65_536)


class Case(NamedTuple):
    loss: str
    dtype: str
    tau: float
    rows: int
    """N = 2B, or the columns of the logits."""
    features: int = 33
    kind: str = "clusters"
    """Of batches.py; or the name of one of PLACES."""


class Place(NamedTuple):
    """Inputs of which plain PyTorch, or the formula, makes something wrong."""

    what: str
    code: str
    """Of both views, one after the other, or of logits whose targets are the diagonal."""
    loss: str
    dtype: str
    tau: float


_NOISE = "torch.randn(14, 31, generator=torch.Generator().manual_seed(0))"
_ALIKE = "torch.eye(7, 31).repeat(2, 1)"
PLACES = {f"place {k}": Place(*place) for k, place in enumerate((
    ("a loss near 0", _ALIKE, "InfoNCE", "float32", 0.02),
    ("a loss near 0", _ALIKE, "InfoNCE", "float64", 0.01),
    ("a loss near 0", "30 * torch.eye(7)", "cross-entropy", "float32", 1.0),
    ("exp(l) above the type's range", _NOISE, "HEX", "float32", 0.003),
    ("rows shorter than 1e-12", f"1e-13 * {_NOISE}", "InfoNCE", "float32", 0.1),
    ("rows whose squares overflow", f"1e20 * {_NOISE}", "InfoNCE", "float32", 0.1),
    ("rows longer than 65504", f"1.5e4 * {_NOISE}", "HEX", "float16", 0.1),
    ("half precision throughout", f"{_ALIKE} + 0.1", "InfoNCE", "bfloat16", 0.1),
    ("a row of zeros", f"{_NOISE} * (torch.arange(14) != 3)[:, None]", "InfoNCE", "float32", 0.1),
), 1)}  # fmt: skip


class Problem(NamedTuple):
    """The numbers of a case: x (N, D) is both views, one after the other, or logits (S, M)."""

    case: Case
    x: Tensor
    anchors: Tensor
    """(S,), of which the objective is the mean."""
    ids: Tensor
    """(N,) labels, or (S,) targets."""
    positive: Tensor
    negative: Tensor
    """(S, M) bool."""
    eps: float
    gap: float
    """How far eps is from the nearest cosine."""

    @property
    def logits(self) -> bool:
        return self.case.loss in LOGITS

    @property
    def computed_in(self) -> torch.dtype:
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


# ---- inputs --------------------------------------------------------------------------------------


def embeddings(case: Case) -> Tensor:
    """(N, D) of batches.py, in the dtype of the case."""
    if case.kind in PLACES:
        return eval(PLACES[case.kind].code, {"torch": torch}).to(getattr(torch, case.dtype))
    of = batches.Case("", case.rows, case.features, dtype=case.dtype, kind=case.kind)
    return torch.cat(batches.make(of).leaves).detach()


def problem(case: Case) -> Problem:
    x = embeddings(case)
    if case.loss in LOGITS:
        return _of_logits(case, x)
    N = len(x)
    anchors = torch.arange(N)
    if N > DENSE:
        anchors = torch.randperm(N, generator=torch.Generator().manual_seed(N))[:ANCHORS]
    # An image has two views; two images have a label, of which the last of an odd number is alone.
    image = torch.arange(N // 2).repeat(2)
    ids = image // 2 if case.loss == "HEX, labels" else image
    other = torch.arange(N) != anchors[:, None]
    alike = ids == ids[anchors][:, None]
    u = exact.unit_rows(x.double().numpy())[0]
    cosines = torch.from_numpy(u[anchors] @ u.T)
    eps, gap = threshold(cosines[other & ~alike])
    if case.loss == "InfoNCE":
        eps, gap = math.inf, math.inf
    return Problem(case, x, anchors, ids, other & alike, other & ~alike, eps, gap)


def _of_logits(case: Case, x: Tensor) -> Problem:
    """Cosines of some rows with all others over tau, of which the other view is the target."""
    target = torch.arange(len(x))
    if case.kind not in PLACES:
        N, target = len(x), target[: min(ANCHORS, len(x) // 2)]
        u = torch.from_numpy(exact.unit_rows(x.double().numpy())[0])
        x = (u[target + N // 2] @ u.T / case.tau).clamp(-1 / case.tau, 1 / case.tau).to(x.dtype)
        x[torch.arange(len(target)), target + N // 2] = -math.inf  # itself: left out
    positive = torch.arange(x.shape[1]) == target[:, None]
    negative = ~positive & (x > -math.inf)
    eps, gap = threshold(x[negative].double() * case.tau)
    if case.loss == "cross-entropy":
        eps, gap = math.inf, math.inf
    return Problem(case, x, torch.arange(len(target)), target, positive, negative, eps, gap)


def threshold(cosines: Tensor) -> tuple[float, float]:
    """The middle of a wide gap near the 0.9 quantile, and half its width. Where that is wide, no
    rounding decides what is in H."""
    c = cosines.unique()  # ascending
    k = round(0.9 * len(c))
    c = c[max(k - 17, 0) : k + 17]
    if len(c) < 2:
        return 0.5, math.inf
    widest = int(c.diff().argmax())
    low, high = c[widest].item(), c[widest + 1].item()
    return (low + high) / 2, (high - low) / 2


# ---- three ways ----------------------------------------------------------------------------------


def ours(p: Problem, x: Tensor) -> Tensor:
    """The loss of each anchor."""
    hex_options = {"eps": p.eps, "temperature": p.case.tau, "beta": BETA, "tau_plus": TAU_PLUS}
    if p.logits:
        return hex_cross_entropy(x, p.ids, **hex_options, reduction="none")
    if p.case.loss == "HEX, labels":
        return hex_sup_con(x, p.ids, **hex_options, reduction="none")[p.anchors]
    if p.case.loss == "HEX":
        return hex_loss(*x.chunk(2), **hex_options, reduction="none")[p.anchors]
    return info_nce(*x.chunk(2), temperature=p.case.tau, reduction="none")[p.anchors]


def plain(p: Problem, x: Tensor) -> Tensor:
    x = x.to(p.computed_in)
    if p.case.loss == "cross-entropy":
        return F.cross_entropy(x, p.ids, reduction="none")
    if p.case.loss == "InfoNCE":
        u = F.normalize(x)
        itself = ~(p.positive | p.negative)
        logits = (u[p.anchors] @ u.T / p.case.tau).masked_fill(itself, -math.inf)
        return F.cross_entropy(logits, p.positive.int().argmax(1), reduction="none")
    values = x
    if not p.logits:
        u = reference._unit_rows(x)
        values = u[p.anchors] @ u.T
    score = values.detach() * (p.case.tau if p.logits else 1)
    table = reference.Table(values, p.positive, p.negative, p.positive | p.negative)
    eps, tau = (torch.tensor(value, dtype=torch.float64) for value in (p.eps, p.case.tau))
    options = eps, tau, BETA, TAU_PLUS, "paper"
    return reference.decided_loss(table, score, *options, logits=p.logits)[0]


def formula(p: Problem, x: Tensor) -> Tensor:
    tau, logits = p.case.tau, x
    if not p.logits:
        u = F.normalize(x)
        logits = u[p.anchors] @ u.T / tau
    e = torch.exp(logits)
    hard = p.negative & (logits.detach() > p.eps / tau)
    rest, count = p.negative & ~hard, hard.sum(1).to(e)
    among, n_p = (e * p.positive).sum(1), p.positive.sum(1)
    weight = torch.exp(BETA * logits) * hard
    reweighted = count * (weight * e).sum(1) / torch.where(count > 0, weight.sum(1), 1)
    local = (reweighted - TAU_PLUS * count * among / n_p) / (1 - TAU_PLUS)
    local = torch.maximum(local, count * math.exp(-1 / tau))
    mean = torch.where(p.positive, logits, 0).sum(1) / n_p
    return torch.log(among + local + (e * rest).sum(1)) - mean


# ---- errors --------------------------------------------------------------------------------------


class Truth(NamedTuple):
    rows: exact.Rows
    gradient: np.ndarray
    """That of x, of the mean over the anchors times 2^power."""
    power: int
    size: float
    """Of the terms whose sum the largest element of the gradient may be."""


def truth(p: Problem) -> Truth:
    """In a type wider than that of the computation.

    The gradient is scaled as a gradient scaler would have it: by a power of two, up to its 2^16,
    with which the largest element is below 1. Else float16 would have no digits for it.
    """
    wide = np.longdouble if p.computed_in == torch.float64 else np.float64
    values = p.x.double().numpy().astype(wide)
    sets = [mask.numpy() for mask in (p.positive, p.negative)]
    tau, anchors = p.case.tau, p.anchors.numpy()
    if p.logits:
        hard = sets[1] & (values * wide(tau) > p.eps)
        values = np.where(values > -np.inf, values, 0)
        rows = exact.rows(values, *sets, hard, tau, BETA, TAU_PLUS, logits=True)
        gradient, largest = rows.slopes, 0.0
    else:
        u, length = exact.unit_rows(values)
        cosines = u[anchors] @ u.T
        hard = sets[1] & (np.minimum(cosines, 1) > p.eps)
        rows = exact.rows(cosines, *sets, hard, tau, BETA, TAU_PLUS)
        gradient = exact.embedding_gradient(u, length, anchors, rows.slopes)
        largest = float(abs(rows.slopes).sum(1).max() / length[length > 0].min())
    S = len(anchors)
    gradient = gradient / S
    peak = abs(gradient).max()
    power = int(np.clip(-np.frexp(peak)[1], -16, 16)) if peak > 0 else 0
    return Truth(rows, gradient * wide(2) ** power, power, largest / S * 2.0**power)


class Result(NamedTuple):
    loss: np.ndarray
    gradient: np.ndarray


def result(p: Problem, way: Callable[[Problem, Tensor], Tensor], power: int) -> Result:
    x = p.x.clone().requires_grad_()
    rows = way(p, x)
    grad = torch.full_like(rows, 2.0**power / len(rows))
    (gradient,) = torch.autograd.grad(rows, x, grad)
    return Result(rows.detach().double().numpy(), gradient.double().numpy())


def errors(p: Problem, got: Result, right: Truth) -> dict[str, float]:
    """Of the mean loss, relative; of the worst row; of the gradient, relative to its largest.

    What is below the type's smallest normal number is relative to that, and where the gradient is
    nothing, its error to the terms that cancel. What is not finite has an error of infinity.
    """
    tiny = torch.finfo(p.computed_in).tiny
    peak = abs(right.gradient).max()
    size = max(peak, torch.finfo(p.x.dtype).tiny) if peak > 0 else max(right.size, tiny)
    loss = right.rows.loss
    found = (
        abs(got.loss.mean() - loss.mean()) / max(loss.mean(), tiny),
        (abs(got.loss - loss) / np.maximum(loss, tiny)).max(),
        abs(got.gradient - right.gradient).max() / size,
    )
    return {
        name: float(f"{error:.3g}") if np.isfinite(error) else math.inf
        for name, error in zip(ERRORS, found, strict=True)
    }


def rounding(p: Problem, right: Truth) -> dict[str, float]:
    """The errors that rounding alone explains, which ours may have where plain PyTorch has none.

    4 ulp; or what cosines with an error of an ulp of 1 give, which is that over tau, for a loss L
    of any size: |dL/dl| <= 1 - exp(-L) <= L. The instruction sets that multiply bfloat16 rows as
    they are round twice as often. Sums of many features are made of slices of 256, and each of
    these additions rounds by at most half an ulp, 0.29 in the mean of squares: of D / 256 of them
    an ulp times the root is 3.5 standard deviations. All this times the condition of the debiasing.
    In the gradient an ulp counts of the terms that cancel, and its rounding to the dtype. The
    portable level, whose vectors hold two float64 numbers, was seen at 1.3 of this with 10,007
    features, and is given twice as much.
    """
    ulp = torch.finfo(p.computed_in).eps
    of_cosines = 1.0 + (ops.isa() in ("avx512_bf16", "avx512_amx"))
    if not p.logits:
        of_cosines = max(of_cosines, math.sqrt(p.x.shape[1] / 256))
    if ops.isa() == "base" and p.computed_in == torch.float64:
        of_cosines *= 2
    relative = ulp * max(4, of_cosines / p.case.tau)
    loss, of_loss, least = right.rows.loss, right.rows.of_loss, torch.finfo(p.computed_in).tiny
    found = {
        "loss": relative * np.average(of_loss, weights=np.maximum(loss, least)),
        "row": relative * of_loss.max(),
        "gradient": relative * right.rows.of_slopes.max(),
    }
    info, peak = torch.finfo(p.x.dtype), abs(right.gradient).max()
    if peak > 0:
        found["gradient"] += ulp * right.size / max(peak, info.tiny)
    if p.x.dtype != p.computed_in:
        found["gradient"] += info.eps / 2
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def measured(case: Case) -> dict[str, Any]:
    """A result, as it stands in the record: the errors by way, and what rounding explains."""
    p = problem(case)
    right = truth(p)
    found: dict[str, Any] = case._asdict()
    for way in (ours, plain, formula):
        got = result(p, way, right.power)
        found[way.__name__] = errors(p, got, right)
        if case.kind in PLACES:
            found[way.__name__] |= {"value": got.loss.mean()}
    found["rounding"] = rounding(p, right)
    if case.kind in PLACES:
        found["truth"] = float(right.rows.loss.mean())
    elif math.isfinite(p.gap):
        found["gap"] = float(f"{p.gap:.2g}")
    return found


# ---- the grid ------------------------------------------------------------------------------------


def over_temperature() -> Iterator[Case]:
    """Row by row, and by tiles where the temperature admits them."""
    for loss in LOSSES:
        for tau in TAUS:
            for rows, kind in ((134, "clusters"), (134, "tight"), (418, "clusters")):
                for dtype in DTYPES:
                    yield Case(loss, dtype, tau, rows, 33, kind)


def over_features() -> Iterator[Case]:
    for loss in (*VIEWS, "HEX, labels"):
        for features in FEATURES:
            for tau in (0.02, 0.1):
                for dtype in DTYPES:
                    yield Case(loss, dtype, tau, 26, features)


def over_rows() -> Iterator[Case]:
    """Rows, or columns of logits; at most those of two views go to the last."""
    for loss in LOSSES:
        for rows in ROWS[:-1] if loss == "HEX, labels" else ROWS:
            for dtype in DTYPES:
                yield Case(loss, dtype, 0.1, rows)


def places() -> Iterator[Case]:
    for name, place in PLACES.items():
        yield Case(place.loss, place.dtype, place.tau, 0, 0, name)


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "temperature": over_temperature,
    "features": over_features,
    "rows": over_rows,
    "places": places,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = f"what to measure, of {', '.join(PARTS)} (default: all)"
    parser.add_argument("parts", nargs="*", metavar="PART", help=what)
    parser.add_argument(
        "--record", type=Path, metavar="FILE", default=RECORD, help="file to add to"
    )
    options = parser.parse_args(arguments)
    if wrong := [part for part in options.parts if part not in PARTS]:
        parser.error(f"no part {wrong[0]!r}: the parts are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    results = Results(options.record)
    machine = measure.machine("cpu")
    results.on = machine.pop("on")
    results.add("machine", machine)
    for part in options.parts or PARTS:
        begin = time.perf_counter()
        found = [measured(case) for case in PARTS[part]()]
        seconds = round(time.perf_counter() - begin, 1)
        results.add(part, {"seconds": seconds, "results": found})
        print(f"{part}: {len(found)} cases, {seconds} s", flush=True)


if __name__ == "__main__":
    main()
