# SPDX-License-Identifier: MIT
"""Batches of nothing: no images, no negatives, no features, no columns. Every loss, threshold and
option has the loss 0 and gradients of 0, by the kernels and by the composed formulas.
"""

import itertools

import operators
import pytest
import torch
from conftest import DTYPES, problem, without_kernels
from data import MODES as ALL_MODES
from data import f64, leaves

from hex import (
    HEXCrossEntropyLoss,
    HEXLoss,
    HEXSupConLoss,
    InfoNCELoss,
    ThresholdTracker,
    batch_threshold,
    ops,
)

MODES = ("ntxent", "query", "cross")
VARIANTS = ("paper", "released", "excluded")
SCHEDULES = {
    "adaptive": lambda: ThresholdTracker.adaptive(over="negatives"),
    "whole": lambda: ThresholdTracker.adaptive(over="all"),
    "lagged": lambda: ThresholdTracker.adaptive(over="negatives", lagged=True, momentum=0.5),
    "warm-up": lambda: ThresholdTracker.adaptive(over="negatives", warmup_epochs=1),
    "fixed": lambda: ThresholdTracker.fixed(0.3),
    "rows": lambda: ThresholdTracker.fixed(0.3, normalize_rows=True),
    "none": lambda: None,
}


@pytest.fixture(params=[True, False], ids=["kernels", "composed"])
def kernels(request, monkeypatch):
    if not request.param:
        without_kernels(monkeypatch)


def leaf(*shape):
    return torch.zeros(shape, requires_grad=True)


def check_nothing(criterion, inputs, *args, **kwargs):
    """Loss 0 and gradients of 0, and a batch that comes after is none the worse for it."""
    for reduction in ("mean", "sum", "none"):
        criterion.reduction = reduction
        value = criterion(*inputs, *args, **kwargs)
        if reduction == "none":
            assert (value == 0).all()
        else:
            assert value == 0 and not torch.signbit(value)
        for grad in torch.autograd.grad(value.sum(), inputs, allow_unused=True):
            assert grad is None or (grad == 0).all()
        if criterion.threshold is not None and inputs[0].shape[0] == 0:
            assert criterion.threshold.state[2] == 0  # updates
        assert criterion.last.hard == 0 and criterion.last.share == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ALL_MODES)
def test_the_loss_of_an_empty_batch_stays_in_the_graph(mode, variant, dtype):
    p = problem("gauss", 5, 3, mode, dtype=dtype, variant=variant)
    empty = [z[:0] for z in p.inputs]
    if mode == "unpaired":
        empty[2] = p.inputs[2]
    for reduction, shape in (("none", (0,)), ("mean", ()), ("sum", ())):
        inputs = leaves(*empty)
        loss = p.loss(*inputs, reduction=reduction)
        assert loss.shape == shape
        assert loss.dtype == p.dtype
        assert (loss == 0).all()
        loss.sum().backward()
        assert all(z.grad.shape == z.shape and (z.grad == 0).all() for z in inputs)


def test_an_empty_batch_has_no_threshold():
    z = torch.empty(0, 4)
    for over in ("all", "negatives"):
        assert batch_threshold(z, z, over=over).isnan()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the threshold, that nothing is learnt
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_of_views_has_loss_0(mode, schedule, kernels):
    variant = VARIANTS[(MODES.index(mode) + list(SCHEDULES).index(schedule)) % 3]

    def criterion():
        return HEXLoss(0.1, threshold=SCHEDULES[schedule](), mode=mode, variant=variant)

    empty, nobody = leaf(0, 5), torch.zeros(0, dtype=torch.int64)
    for D in (5, 0):
        z = leaf(0, D), leaf(0, D)
        check_nothing(criterion(), z)
        check_nothing(criterion(), z, groups=nobody)
        check_nothing(criterion(), z, guide=(empty, empty))
        check_nothing(criterion(), (leaf(1, D), leaf(1, D)))  # without negatives


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the threshold, that nothing is learnt
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_empty_batch_with_negatives_has_loss_0(schedule, kernels):
    variant = VARIANTS[list(SCHEDULES).index(schedule) % 3]

    def criterion():
        return HEXLoss(0.1, threshold=SCHEDULES[schedule](), variant=variant)

    empty, nobody = leaf(0, 5), torch.zeros(0, dtype=torch.int64)
    others = torch.zeros(7, dtype=torch.int64)
    for D in (5, 0):
        z = leaf(0, D), leaf(0, D)
        check_nothing(criterion(), (*z, leaf(7, D)))
        check_nothing(criterion(), (*z, leaf(0, D)))
        check_nothing(criterion(), (*z, leaf(0, 7, D)))
        check_nothing(criterion(), (*z, leaf(0, 0, D)))
        check_nothing(criterion(), (*z, leaf(7, D)), groups=(nobody, others))
        check_nothing(criterion(), (*z, leaf(7, D)), guide=(empty, empty, leaf(7, 5)))
        check_nothing(criterion(), (*z, leaf(0, 7, D)), groups=(nobody, torch.zeros(0, 7).long()))
        check_nothing(criterion(), (*z, leaf(0, 7, D)), guide=(empty, empty, leaf(0, 7, 5)))
        # rows without negatives
        check_nothing(criterion(), (leaf(4, D), leaf(4, D), leaf(0, D)))
        check_nothing(criterion(), (leaf(4, D), leaf(4, D), leaf(4, 0, D)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the threshold, that nothing is learnt
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("positives", ["outside", "inside"])
def test_an_empty_batch_of_labels_has_loss_0(positives, schedule, kernels):
    variant = VARIANTS[(len(positives) + list(SCHEDULES).index(schedule)) % 3]

    def criterion():
        return HEXSupConLoss(
            0.1, threshold=SCHEDULES[schedule](), variant=variant, positives=positives
        )

    nobody = torch.zeros(0, dtype=torch.int64)
    for D in (5, 0):
        for shape in ((0, D), (0, 2, D)):
            check_nothing(criterion(), (leaf(*shape),), nobody)
            check_nothing(criterion(), (leaf(*shape),), nobody, groups=nobody)
        check_nothing(criterion(), (leaf(0, 2, D),))
        check_nothing(criterion(), (leaf(0, 2, D),), mask=torch.zeros(0, 0, dtype=torch.bool))
        check_nothing(criterion(), (leaf(1, D),), torch.zeros(1, dtype=torch.int64))
        check_nothing(criterion(), (leaf(3, D),), torch.arange(3))  # no positives


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the threshold, that nothing is learnt
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("self_column", [False, True])
def test_an_empty_batch_of_logits_has_loss_0(self_column, schedule, kernels):
    variant = VARIANTS[(self_column + list(SCHEDULES).index(schedule)) % 3]
    for C in (4, 1, 0):
        criterion = HEXCrossEntropyLoss(
            0.1, threshold=SCHEDULES[schedule](), self_column=self_column, variant=variant
        )
        check_nothing(criterion, (leaf(0, C),), torch.zeros(0, dtype=torch.int64))


def test_an_empty_batch_of_the_baseline_has_loss_0(kernels):
    check_nothing(InfoNCELoss(0.1), (leaf(0, 5), leaf(0, 5)))


@pytest.mark.parametrize("N, M, D", [(0, 0, 3), (0, 4, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
def test_the_operators_of_pairs_take_sides_of_nothing(N, M, D, kernels):
    x, x1, y = leaf(N, D), leaf(N, D), leaf(M, D)
    none, nobody, no_groups, no_guide = operators.nothing(x.detach())
    for mode, *others in (("ntxent", x[:0], x[:0]), ("query", y, x[:0]), ("unpaired", x1, y)):
        z, code = (x, *others), ops.MODES[mode]
        n = sum(len(part) for part in z)
        ids = none.new_zeros(n)
        for groups, guide in ((no_groups, no_guide), (ids, no_guide), (no_groups, leaf(n, 2))):
            value, seen = ops.loss(
                (*z, ids, nobody, groups, guide),
                f64(0.1),
                f64(0.1),
                (code, 1, 1, 1.0, 0, 0.1, False),
            )
            hard, share = ops.hard_and_share(seen)
            value.backward()
            assert value.isfinite() and hard.shape == share.shape == (N,)
        measured = *z, ids, nobody, f64(0.1), code, True, False
        low, high = ops.row_range(*measured)
        assert low.shape == high.shape == (N,)
        for over in ("all", "negatives"):
            eps = ops.quantile(*measured, 0.5, over)
            assert eps.isnan() or N > 0


@pytest.mark.parametrize("mode", range(5))
def test_the_operators_of_views_take_batches_of_nothing(mode, kernels):
    for B, K, D in itertools.product((0, 1, 3), (0, 2), (0, 4)):
        shapes = (B, D), (B, D), (0, D) if mode < 3 else (K, D) if mode == 3 else (B, K, D)
        inputs = [leaf(*shape) for shape in shapes]
        value, seen = ops.loss(
            (*inputs, *operators.nothing(inputs[0].detach())), f64(0.1), f64(0.1),
            (mode, 1, 0, 1.0, 0, 0.1, False),
        )  # fmt: skip
        hard, _ = ops.hard_and_share(seen)
        value.backward()
        assert value.isfinite()
        ids, mask, _, _ = operators.nothing(inputs[0].detach())
        measured = *inputs, ids, mask, f64(0.1), mode, False, False
        low, high = ops.row_range(*measured)
        assert low.shape == high.shape == hard.shape
        for over in ("all", "negatives"):
            eps = ops.quantile(*measured, 0.5, over)
            assert eps.isnan() or B > 0
