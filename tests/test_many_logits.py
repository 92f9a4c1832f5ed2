# SPDX-License-Identifier: MIT
"""Rows of thousands of logits, whose threshold and loss come from one reading: the threshold is the
exact quantile, and loss, statistics and gradient are those of the same threshold given beforehand,
as near to float64 as those are. Rows that the reading does not serve are among them.
"""

import functools
import math

import pytest
import torch
from conftest import without_kernels
from data import f64
from test_logits import gradient

from hex import HEXCrossEntropyLoss, ThresholdTracker, hex_cross_entropy

ROWS, COLUMNS, TAU = 7, 5003, 0.1


def make(kind, dtype=torch.float32):
    """Logits and targets; cosines of 0.15 times normal numbers and positives of 0.8, changed."""
    generator = torch.Generator().manual_seed(1)
    c = 0.15 * torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 5002, 17, 512, 4095, 100, 63])
    c[torch.arange(ROWS), target] = 0.8
    if kind == "masked":
        mask = torch.rand(ROWS, COLUMNS, generator=generator) < torch.linspace(0, 1, ROWS)[:, None]
        c[mask.scatter(1, target[:, None], False)] = -math.inf
        c[-2, :4990] = -math.inf  # and its positive
    elif kind == "ties":
        c = (c * 20).round() / 20
    elif kind == "constant":
        c[:] = 0.25
    elif kind == "beyond 1":
        c *= 4
    elif kind == "unlike rows":
        c += torch.linspace(-0.5, 0.5, ROWS)[:, None]
    elif kind == "a few far above":  # and the rest so far below that its exponentials are lost
        c[:, 1000:1040] += 6
        c[torch.arange(ROWS), target] = 7.5
    elif kind == "in runs":  # the sample sees another share than there is
        c[:, 1::2] = c[:, ::2][:, : COLUMNS // 2]
        c[:3] = c[:3].sort(1).values
    elif kind == "not finite":
        c[1, 3], c[3, 9], c[4, target[4]] = math.nan, math.inf, -math.inf
    return (c / TAU).to(dtype), target


KINDS = (
    "plain", "masked", "ties", "constant", "beyond 1", "unlike rows", "a few far above", "in runs",
)  # fmt: skip


def quantiles(logits, target, quantile, over, self_column):
    """Of each row by sorting."""
    c = (logits.to(torch.promote_types(logits.dtype, torch.float32)) * TAU).clamp(-1, 1)
    rows = []
    for row, values, at in zip(c, logits, target.tolist(), strict=True):
        counts = values != -math.inf
        counts[at] = over == "all"
        elements = torch.cat([row[counts], row.new_ones(int(self_column))]).sort().values
        rows.append(elements[round(quantile * (len(elements) - 1))] if len(elements) else math.nan)
    return f64(rows)


@pytest.mark.parametrize("quantile", (0.9, 0.99, 0.998))
@pytest.mark.parametrize(("over", "self_column"), (("negatives", False), ("all", True)))
@pytest.mark.parametrize("kind", KINDS)
def test_the_threshold_is_the_mean_of_the_exact_quantiles(kind, over, self_column, quantile):
    logits, target = make(kind)
    tracker = ThresholdTracker.adaptive(quantile, over=over)
    loss = HEXCrossEntropyLoss(TAU, threshold=tracker, self_column=self_column)
    loss(logits, target)
    rows = quantiles(logits, target, quantile, over, self_column)
    assert loss.last.eps.item() == pytest.approx(rows.nanmean().item(), rel=1e-12)


@pytest.mark.parametrize("beta", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_at_the_same_threshold(kind, dtype, beta):
    logits, target = make(kind, dtype)
    adaptive = HEXCrossEntropyLoss(TAU, beta=beta, reduction="none")
    found = gradient(lambda x: adaptive(x, target), logits)
    eps = adaptive.last.eps.clone()

    def at(x):
        return hex_cross_entropy(x, target, eps=eps, temperature=TAU, beta=beta, reduction="none")

    same = gradient(at, logits)
    truth = gradient(at, logits.double())
    unit = torch.finfo(same[0].dtype).eps
    for ours, theirs, right in zip(found, same, truth, strict=True):
        assert torch.equal(ours.isfinite(), right.isfinite())
        scale = right[right.isfinite()].abs().max().item()
        error, allowed = (
            (x.double() - right)[right.isfinite()].abs().max().item() for x in (ours, theirs)
        )
        assert error <= 2 * allowed + 8 * unit * scale, (error, allowed)


def test_a_batch_that_is_not_finite_has_the_losses_of_the_composed_formulas(monkeypatch):
    logits, target = make("not finite")
    results = []
    for _ in range(2):
        loss = HEXCrossEntropyLoss(TAU, reduction="none")
        found = gradient(functools.partial(loss, target=target), logits)
        results.append((found, loss.threshold.state.clone()))
        without_kernels(monkeypatch)
    (ours, state), (theirs, same) = results
    assert torch.equal(state, same)
    assert ours[0].isnan().sum() >= 2
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_the_bits_do_not_depend_on_threads():
    threads = torch.get_num_threads()
    logits, target = (torch.cat([x, x]) for x in make("unlike rows"))
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(gradient(lambda x: HEXCrossEntropyLoss(TAU)(x, target), logits))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_a_row_with_nothing_above_the_threshold_has_the_bits_of_infonce():
    logits, target = make("unlike rows", torch.float64)
    adaptive = HEXCrossEntropyLoss(TAU, reduction="none")
    ours = gradient(lambda x: adaptive(x, target), logits)
    none = gradient(
        lambda x: hex_cross_entropy(x, target, eps=math.inf, temperature=TAU, reduction="none"),
        logits,
    )
    cosines = (logits * TAU).scatter(1, target[:, None], -1.0)
    empty = cosines.max(1).values < adaptive.last.eps
    assert 0 < empty.sum() < ROWS
    for a, b in zip(ours, none, strict=True):
        assert torch.equal(a[empty], b[empty])
