# SPDX-License-Identifier: MIT
"""The schedules of ThresholdTracker: eps by the epoch, eager and compiled."""

import math
import warnings

import pytest
import torch
from data import INF

from hex import HEXLoss, ThresholdTracker


def trajectory(tracker, epochs) -> list[float]:
    seen = []
    for epoch in epochs:
        tracker.set_epoch(epoch)
        eps = tracker.current()
        assert eps.dtype == torch.float64 and eps.shape == ()
        assert eps == tracker.value
        seen.append(eps.item())
    return seen


def test_fixed_is_fixed():
    for t in (0.3, INF, -INF, 2):
        assert trajectory(ThresholdTracker.fixed(t), [0, 1, 100]) == [t] * 3


def test_step_drops_every_so_many_epochs_and_stops_at_minus_one():
    tracker = ThresholdTracker.step(0.9, 0.1, 25)
    got = trajectory(tracker, [0, 24, 25, 49, 50, 400, 475, 10_000])
    assert got == pytest.approx([0.9, 0.9, 0.8, 0.8, 0.7, -0.7, -1.0, -1.0], abs=1e-15)
    assert got[-1] == -1.0


def test_cosine_runs_from_its_start_to_its_end_and_holds_it():
    got = trajectory(ThresholdTracker.cosine(0.9, 0.3, 10), [0, 5, 9, 10, 11, 1000])
    nearly = 0.3 + 0.6 * (1 + math.cos(math.pi * 0.9)) / 2
    assert got == pytest.approx([0.9, 0.6, nearly, 0.3, 0.3, 0.3], abs=1e-15)
    assert got[0] == 0.9 and got[3:] == [0.3] * 3


def test_compounded_cosine_is_a_schedule_that_overwrites_its_own_start():
    epochs = 60
    got = trajectory(ThresholdTracker.cosine(0.9, 0.3, epochs, compounded=True), range(epochs + 5))
    t, wanted = 0.9, []
    for epoch in range(epochs + 1):
        t = 0.3 + (t - 0.3) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        wanted.append(t)
    assert got == pytest.approx([*wanted, *[0.3] * 4], abs=1e-15)
    halfway = next(epoch for epoch, t in enumerate(got) if t < 0.6)
    assert halfway == pytest.approx(0.94 * epochs ** (2 / 3), abs=1)


def test_a_schedule_without_epochs_stays_at_its_start():
    with torch.no_grad():
        assert ThresholdTracker.step(0.9, 0.1, 25).current() == 0.9
        assert ThresholdTracker.cosine(0.9, 0.3, 10).current() == 0.9
        assert ThresholdTracker.cosine(0.9, 0.3, 10, compounded=True).current() == 0.9


@pytest.mark.parametrize(
    "make",
    [
        lambda: ThresholdTracker.fixed(0.5),
        lambda: ThresholdTracker.step(0.9, 0.1, 2),
        lambda: ThresholdTracker.cosine(0.9, 0.3, 5),
        lambda: ThresholdTracker.cosine(0.9, 0.3, 5, compounded=True),
    ],
    ids=["fixed", "step", "cosine", "compounded"],
)
def test_a_schedule_compiles_once_for_all_epochs(make):
    torch._dynamo.reset()
    tracker, eager = make(), make()
    step = torch.compile(tracker.current, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for epoch in range(8):
            tracker.set_epoch(epoch)
            eager.set_epoch(epoch)
            assert step() == eager.current()


@pytest.mark.parametrize(
    "make",
    [
        lambda: 1.5,
        lambda: ThresholdTracker.fixed(1, normalize_rows=True),
        lambda: ThresholdTracker.step(1.5, 0.0, 2),
        lambda: ThresholdTracker.cosine(1.5, 1.0, 5),
    ],
)
def test_a_threshold_that_no_cosine_is_above_warns_where_it_is_made(make):
    with pytest.warns(UserWarning, match="no cosine is above 1.*, which is InfoNCE") as caught:
        HEXLoss(threshold=make())
    assert caught[0].filename == __file__
    HEXLoss(threshold=make(), variant="released")  # decoupled InfoNCE


def test_a_threshold_that_some_cosine_can_be_above_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HEXLoss(threshold=INF)
        HEXLoss(threshold=0.999)
        HEXLoss(threshold=ThresholdTracker.step(1.5, 0.1, 2))
        HEXLoss(threshold=ThresholdTracker.cosine(1.5, 0.3, 5))
