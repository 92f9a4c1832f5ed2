# SPDX-License-Identifier: MIT
"""Warnings of a threshold with which H was always empty, or all there was, each once and at the
line of the user's code.
"""

import math
import warnings

import pytest
import torch
from torch import nn
from tracked import adaptive, train, views

from hex import HEXLoss, HEXSupConLoss, InfoNCELoss, ThresholdTracker
from hex.open_clip import HEXClipLoss


def epoch_of(loss, number: int, *inputs, of=None) -> None:
    (of or loss).set_epoch(number)
    for _ in range(2):
        train(loss, *inputs)


def test_an_epoch_in_which_nothing_was_hard_is_warned_of_once_at_the_users_line():
    loss = HEXLoss(threshold=0.9999)
    epoch_of(loss, 0, *views(40))
    with pytest.warns(UserWarning, match="no row of epoch 0 had a negative above .*: H was") as got:
        loss.set_epoch(1)
    assert len(got) == 1 and got[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch_of(loss, 1, *views(40))
        loss.set_epoch(2)


def test_an_epoch_in_which_all_was_hard_and_the_released_loss_0_is_warned_of():
    loss = HEXLoss(threshold=-1.5, variant="released")
    epoch_of(loss, 0, *views(40))
    with pytest.warns(UserWarning, match="the loss and its gradient were 0"):
        loss.set_epoch(1)


@pytest.mark.parametrize("options", ({}, {"decoupled": True}), ids=("excluded", "decoupled"))
def test_an_epoch_in_which_all_negatives_were_excluded_is_warned_of(options):
    loss = HEXLoss(threshold=-1.5, variant="excluded", **options)
    epoch_of(loss, 0, *views(40))
    with pytest.warns(UserWarning, match="the loss and its gradient were 0"):
        loss.set_epoch(1)


@pytest.mark.parametrize("threshold", ("adaptive", 0.3))
@pytest.mark.parametrize("kind", (HEXLoss, HEXSupConLoss, HEXClipLoss))
def test_a_released_form_that_is_also_decoupled_is_warned_of_once(kind, threshold):
    with pytest.warns(UserWarning, match="decoupled=True changes nothing") as caught:
        loss = kind(threshold=threshold, variant="released", decoupled=True)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind is HEXLoss:
            epoch_of(loss, 0, *views(40))
        kind(threshold=loss.threshold, variant="released", decoupled=True)


def test_options_that_are_set_later_are_warned_of_as_those_that_a_loss_is_made_with():
    loss = HEXLoss(variant="released")
    with pytest.warns(UserWarning, match="decoupled=True changes nothing") as caught:
        loss.decoupled = True
        loss.variant = "released"
    assert len(caught) == 1 and caught[0].filename == __file__
    loss = HEXLoss(decoupled=True)
    with pytest.warns(UserWarning, match="decoupled=True changes nothing"):
        loss.variant = "released"
    with pytest.warns(UserWarning, match="no cosine is above 1.5, so H is always empty"):
        HEXLoss().threshold = 1.5


def test_where_every_negative_is_ignored_the_warning_says_that_fewer_could_be():
    loss = HEXLoss()
    z, every = views(40), torch.ones(40, 40, dtype=torch.bool)
    loss.set_epoch(0)
    train(lambda *z: loss(*z, ignored=every), *z)
    with pytest.warns(UserWarning, match="larger batches, or fewer ignored negatives"):
        loss.set_epoch(1)


def test_a_released_form_whose_threshold_is_infinite_at_some_time_may_be_decoupled():
    z = views(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_positive = ThresholdTracker.by_positive(warmup_epochs=2)
        for threshold in (None, math.inf, adaptive(warmup_epochs=2), by_positive):
            loss = HEXLoss(threshold=threshold, variant="released", decoupled=True)
            loss.set_epoch(0)
            assert torch.equal(loss(*z), InfoNCELoss(decoupled=True)(*z))


def test_a_loss_of_0_for_want_of_positives_and_a_schedule_that_is_still_to_fall_warn_of_nothing():
    sup_con = HEXSupConLoss(variant="released", threshold=adaptive())
    falling = HEXLoss(threshold=ThresholdTracker.cosine(0.9999, 0.1, 100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch_of(lambda z: sup_con(z, torch.arange(40)), 0, views(40)[0], of=sup_con)
        epoch_of(falling, 0, *views(40))
        for loss in (sup_con, falling):
            loss.set_epoch(1)


def test_the_authors_schedule_beyond_its_own_run_is_warned_of():
    from hex.presets import authors_threshold

    loss = HEXLoss(threshold=authors_threshold("step", every=25), variant="released")
    epoch_of(loss, 250, *views(40))
    with pytest.warns(UserWarning, match="the loss and its gradient were 0"):
        loss.set_epoch(251)


@pytest.mark.parametrize("loss", (
    lambda: HEXLoss(threshold=math.inf),
    lambda: HEXLoss(threshold=None),
    lambda: InfoNCELoss(),
    lambda: HEXLoss(threshold=adaptive(warmup_epochs=5)),
    lambda: HEXLoss(threshold=adaptive(warmup_epochs=5, warmup_threshold=0.9999)),
    lambda: HEXLoss(threshold=-1.5),
    lambda: HEXLoss(threshold=0.3),
))  # fmt: skip
def test_an_epoch_that_is_as_it_was_meant_warns_of_nothing(loss):
    loss = loss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch_of(loss, 0, *views(40))
        loss.set_epoch(1)
        loss.statistics()


def test_groups_are_not_looked_at():
    loss = HEXLoss(threshold=0.9999)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.set_epoch(0)
        loss(*(z.requires_grad_() for z in views(40)), groups=torch.arange(40)).backward()
        loss.set_epoch(1)


def test_without_epochs_statistics_warns_after_a_hundred_batches():
    loss = HEXLoss(threshold=0.9999)
    inputs = views(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(99):
            train(loss, *inputs)
        loss.statistics()
    train(loss, *inputs)
    with pytest.warns(
        UserWarning, match="no row of the last 100 batches had a negative above"
    ) as got:
        loss.statistics()
    assert got[0].filename == __file__


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's
def test_a_compiled_step_counts_without_another_graph():
    torch._dynamo.reset()
    loss = HEXLoss(threshold=0.9999)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    loss.set_epoch(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            train(compiled, *views(40))
    with pytest.warns(UserWarning, match="H was empty"):
        loss.set_epoch(1)


def test_a_warning_of_a_call_is_at_the_line_of_the_call():
    model = nn.Sequential(nn.Identity())
    loss = HEXLoss(threshold=ThresholdTracker.step(0.9, 0.1, 5))
    with pytest.warns(UserWarning, match="set_epoch was never called") as got:
        loss(*views(40))
    assert got[0].filename == __file__
    model.append(HEXLoss(threshold=adaptive(over="all")))
    with pytest.warns(UserWarning, match="of 8 cosines") as got:
        model[1](*views(4))
    assert got[0].filename == __file__


LABELS = torch.arange(40) // 2
SAME = LABELS[:, None] == LABELS
ALL_HARD = {
    "labels": lambda loss, z0, z1: loss(z0, LABELS),
    "mask": lambda loss, z0, z1: loss(z0, mask=SAME),
    "mask and ignored": lambda loss, z0, z1: loss(z0, mask=SAME, ignored=SAME.roll(2, 0)),
    "views and a mask": lambda loss, z0, z1: loss(torch.stack((z0, z1), 1), mask=SAME),
    "views": lambda loss, z0, z1: loss(torch.stack((z0, z1), 1)),
}
WITHOUT_POSITIVES = {
    "labels": lambda loss, z0, z1: loss(z0, torch.arange(40)),
    "mask": lambda loss, z0, z1: loss(z0, mask=torch.eye(40)),
    "mask and ignored": lambda loss, z0, z1: loss(z0, mask=torch.eye(40), ignored=SAME),
    "one view": lambda loss, z0, z1: loss(z0[:, None]),
}


@pytest.mark.parametrize("positives", ("inside", "outside"))
@pytest.mark.parametrize("name", ALL_HARD)
def test_a_labelled_loss_of_0_because_all_was_hard_is_warned_of(name, positives):
    loss = HEXSupConLoss(threshold=-1.5, variant="released", positives=positives)
    epoch_of(lambda *z: ALL_HARD[name](loss, *z), 0, *views(40), of=loss)
    with pytest.warns(UserWarning, match="the loss and its gradient were 0"):
        loss.set_epoch(1)


@pytest.mark.parametrize("name", WITHOUT_POSITIVES)
def test_a_labelled_loss_of_0_for_want_of_positives_is_not(name):
    loss = HEXSupConLoss(threshold=-1.5, variant="released")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch_of(lambda *z: WITHOUT_POSITIVES[name](loss, *z), 0, *views(40), of=loss)
        loss.set_epoch(1)


@pytest.mark.parametrize("variant", ("paper", "released"))
@pytest.mark.parametrize("rows", (False, True))
def test_a_threshold_that_is_never_reached_is_warned_of_in_every_form(variant, rows):
    tracker = ThresholdTracker.fixed(1.5, normalize_rows=rows)
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter("always")
        loss = HEXLoss(threshold=tracker, variant=variant)
        epoch_of(loss, 0, *views(40))
        loss.set_epoch(1)
    assert len(got) == 1 and "H" in str(got[0].message) and "empty" in str(got[0].message)


def test_batches_whose_loss_is_not_finite_say_nothing_of_the_threshold():
    loss = HEXLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch_of(loss, 0, *(math.nan * z for z in views(40)))
        loss.set_epoch(1)


def test_a_batch_without_positives_does_not_hide_that_the_others_had_no_loss():
    loss = HEXSupConLoss(threshold=-1.5, variant="released")
    loss.set_epoch(0)
    for labels in (LABELS, torch.arange(40), LABELS):
        train(lambda z, y=labels: loss(z, y), views(40)[0])
    with pytest.warns(UserWarning, match="the loss and its gradient were 0"):
        loss.set_epoch(1)


def test_a_schedule_that_rises_is_warned_of():
    loss = HEXLoss(threshold=ThresholdTracker.cosine(0.3, 1.5, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch_of(loss, 0, *views(40))
        loss.set_epoch(1)
    epoch_of(loss, 2, *views(40))
    with pytest.warns(UserWarning, match="no row of epoch 2 had a negative above"):
        loss.set_epoch(3)


def test_the_first_batch_of_a_lagged_threshold_is_not_warned_of():
    loss = HEXLoss(threshold=adaptive(lagged=True))
    loss.set_epoch(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(loss, *views(40))
        loss.set_epoch(1)
