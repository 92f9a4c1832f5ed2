# SPDX-License-Identifier: MIT
"""The authors' settings by name, and that the released variant repeats their published numbers."""

import math

import pytest
import torch
from data import f64, inputs, vectors

from hex import HEXLoss, ThresholdTracker
from hex.presets import authors_mix, authors_threshold


def over_epochs(tracker: ThresholdTracker, epochs, candidate: float | None = None):
    values = []
    for epoch in epochs:
        tracker.set_epoch(epoch)
        if candidate is None:
            values.append(tracker.current().item())
        else:
            values.append(tracker.update(f64(candidate), store=True).item())
    return values


def test_simclr_warms_up_for_eleven_epochs_with_info_nce_and_the_others_with_a_fixed_threshold():
    assert over_epochs(authors_threshold("simclr"), (0, 10, 11), 0.5) == [math.inf, math.inf, 0.5]
    for name in ("nnclr", "all4one"):
        assert over_epochs(authors_threshold(name), (0, 10, 11), 0.5) == [0.9, 0.9, 0.5]
    for name in ("simclr", "nnclr", "all4one"):
        assert authors_threshold(name).quantile == 0.99
        assert authors_threshold(name).over == "all"


def test_the_fixed_schedules_are_of_scaled_rows_and_fall_as_theirs_do():
    cosine = authors_threshold("cosine", epochs=100)
    assert cosine.normalize_rows
    for name, every in (
        ("step-imagenet-simclr", 20), ("step-imagenet-nnclr", 25), ("step-cifar", 100), ("step", 7)
    ):  # fmt: skip
        step = authors_threshold(name, every=7 if name == "step" else None)
        assert step.normalize_rows
        falls = over_epochs(step, (0, every - 1, every, 2 * every))
        assert falls == pytest.approx([0.9, 0.9, 0.8, 0.7])
    start, values = 0.9, []
    for epoch in range(1, 31):  # their code overwrites its start in every epoch
        start = 0.3 + (start - 0.3) * (1 + math.cos(math.pi * epoch / 100)) / 2
        values.append(start)
    assert over_epochs(cosine, range(1, 31)) == pytest.approx(values, rel=1e-12)


def test_each_call_gives_a_tracker_of_its_own():
    assert authors_threshold("simclr") is not authors_threshold("simclr")


def test_the_additive_term_is_weighted_as_theirs():
    z0, z1 = torch.randn(2, 8, 5, dtype=torch.float64, requires_grad=True)
    base = z0.square().mean()
    value = HEXLoss(threshold=0.5)(z0, z1)
    torch.testing.assert_close(authors_mix("barlow", value, base), 0.1 * value + 0.9 * base)
    torch.testing.assert_close(authors_mix("vicreg", value, base, 0.2), value + 0.8 * base)
    assert authors_mix("barlow", value, base, 0.0) == base


@pytest.mark.parametrize("call, text", [
    (lambda: authors_threshold("byol"), "name: got 'byol', wanted one of 'simclr'"),
    (lambda: authors_threshold("cosine"), "epochs: got None, wanted the number of epochs"),
    (lambda: authors_threshold("step", epochs=9), "epochs: got 9, wanted None for 'step'"),
    (lambda: authors_threshold("step"), "every: got None, wanted a number of epochs"),
    (lambda: authors_threshold("step-cifar", every=9), "every: got 9, wanted None for"),
    (lambda: authors_mix("dino", f64(1.0), f64(1.0)), "method: got 'dino'"),
    (lambda: authors_mix("barlow", f64(1.0), f64(1.0), 1.5), "alpha: got 1.5"),
])  # fmt: skip
def test_a_bad_argument_is_named(call, text):
    with pytest.raises(ValueError) as error:
        call()
    assert text in str(error.value)


@pytest.mark.filterwarnings("ignore:ThresholdTracker. the 0.99 quantile")  # theirs, small or not
@pytest.mark.parametrize("name", sorted({c["name"] for c in vectors() if "released" in c["name"]}))
def test_the_released_variant_repeats_the_authors_code_to_1e_6(name):
    """The modules, threshold and all, on the kernels; test_reference.py holds the reference."""
    cases = [case for case in vectors() if case["name"] == name]
    for case in cases:
        if name == "hex_released_fixed":
            tracker = ThresholdTracker.fixed(case["threshold"], normalize_rows=True)
        elif name == "hex_released_nnclr_warm":
            tracker = authors_threshold("nnclr")
            tracker.set_epoch(0)
        else:
            tracker = ThresholdTracker.adaptive(over="all")
        z = torch.from_numpy(inputs(case["kind"], case["B"], case["D"], case["seed"]))
        z.requires_grad_()
        module = HEXLoss(case["tau"], threshold=tracker, variant="released")
        loss = module(*z.chunk(2))
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.item() == pytest.approx(case["loss"], rel=1e-6, abs=1e-12), case
        close = pytest.approx(case["grad_head"], rel=0, abs=1e-6 * case["grad_norm"] + 1e-13)
        assert grad.flatten()[:8].tolist() == close, case
    assert len(cases) >= 4


def test_the_method_s_own_loss_may_be_a_number():
    assert authors_mix("barlow", torch.tensor(1.0), 2.0) == authors_mix(
        "barlow", torch.tensor(1.0), torch.tensor(2.0)
    )
