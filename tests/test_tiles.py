# SPDX-License-Identifier: MIT
"""From 192 candidates on, the modes that share them are computed by tiles, with one shift for all
rows, and the adaptive loss finds its threshold and its sums in one pass (csrc/cpu/tiles.h,
onepass.h).

What every batch must give is in the other files, mostly with fewer rows; here are sizes around the
blocks, batches that the shortlists do not fit, and the one call against the two that it replaces.
Labels and groups by tiles are in test_labels_by_tiles.py.
"""

import itertools
import math

import operators
import pytest
import torch
from conftest import (
    DTYPES,
    Problem,
    assert_as_good_as_torch,
    check,
    eps_of_each_row,
    problem,
)
from data import FORMS, KINDS, MODES, f64
from torch import Tensor

from hex import HEXLoss, InfoNCELoss, ThresholdTracker, ops, reference
from hex.state import CANDIDATE, SKIPPED

TILED = ("ntxent", "query", "cross", "unpaired")
RULES = {
    "all": {},
    "negatives": {"over": "negatives"},
    "median": {"quantile": 0.5},  # no shortlist: half of a row would be on it
    "lowest": {"quantile": 0.0},
    "highest": {"quantile": 1.0, "over": "negatives"},
    "95": {"quantile": 0.95},
}


def tracker(**options) -> ThresholdTracker:
    return ThresholdTracker.adaptive(**options)


def step(module: HEXLoss, p: Problem) -> tuple[Tensor, ...]:
    """Loss, gradients, eps, and |H| and share of the rows."""
    inputs = [z.detach().clone().requires_grad_() for z in p.inputs]
    value = module(*inputs)
    grads = torch.autograd.grad(value.sum(), inputs)
    eps, *seen = module._last
    return value.detach(), *grads, eps, *ops.hard_and_share(seen)


def hex_of(p: Problem, **options) -> HEXLoss:
    return HEXLoss(mode="ntxent" if p.mode == "unpaired" else p.mode, **options)


def in_two_calls(p: Problem, **options) -> Tensor:
    """The threshold by the operator that computes nothing else."""
    z0, z1, negatives, _, _, mode = p.raw()[:6]
    t = tracker(**options)
    return operators.threshold(z0, z1, negatives, mode, t.quantile, t.over)


# B: the fewest; not of any tile; an even number of blocks, and an odd one
SIZES = (96, 103, 193, 145)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_as_good_as_torch(kind, dtype):
    for k, B in enumerate(SIZES):
        options = ({}, {"tau": 0.06}, {"beta": 0.5, "tau": 1.0}, {"variant": "released"})[k]
        check(problem(kind, B, (3, 17, 33, 40)[k], dtype=dtype, near=(0.8, 0.3)[k % 2], **options))


# B, K: one block of anchors; fewer blocks of anchors than of candidates; more
OF_TWO_SETS = {
    "query": ((192, 0), (207, 0), (391, 0)),
    "cross": ((192, 0), (207, 0), (261, 0)),
    "unpaired": ((40, 1000), (150, 193), (400, 200)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", OF_TWO_SETS)
def test_loss_and_gradients_of_two_sets_are_as_good_as_torch(mode, dtype):
    """Every kind twice, with each size four times."""
    for k, kind in enumerate(KINDS):
        options = (
            {}, {"beta": 0.5, "tau": 1.0}, {"variant": "released"}, {"tau": 0.06},
            {"variant": "paper decoupled"}, {"variant": "excluded"},
        )[k]  # fmt: skip
        for B, K in (OF_TWO_SETS[mode][k % 3], OF_TWO_SETS[mode][(k + 1 + k // 3) % 3]):
            check(problem(kind, B, (3, 33)[k % 2], mode, K=K, dtype=dtype, **options))


# blocks of 192 anchors instead of 96, or of 96 and of 192 instead of 48; features in slices of 256
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode, B, D, K", [
    ("ntxent", 521, 9, 0), ("unpaired", 1601, 9, 203),
    ("ntxent", 101, 270, 0), ("query", 197, 270, 0),
])  # fmt: skip
def test_larger_blocks_and_longer_rows_are_as_good_as_torch(mode, B, D, K, dtype):
    check(problem("cluster", B, D, mode, K=K, dtype=dtype))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("mode", TILED)
def test_cosines_that_were_kept_and_computed_again_give_the_same_bits(mode, dtype):
    for B, K in ((17, 1000), (400, 389)):
        p = problem("cluster", B + (mode != "unpaired") * 190, 40, mode, K=K, dtype=dtype)
        z0, z1, negatives, eps, tau, *options, _ = p.raw()
        given = z0, z1, negatives, eps, tau, *options
        loss, stats, kept = operators.forward(*given, operators.KEEP)
        again, _, nothing = operators.forward(*given, 0)
        assert torch.equal(loss, again)
        assert kept.numel() > p.rows * 190 / 2
        assert nothing.numel() == 0
        code, reduction, _, beta, *_ = options
        one, other = (
            operators.backward(
                p.grad_output(), z0, z1, negatives, tau, stats, k, code, reduction, beta, 15
            )
            for k in (kept, nothing)
        )
        assert all(map(torch.equal, one, other))


def test_the_fake_of_what_is_kept_has_the_size_of_the_real_which_bounds_what_is_used():
    """The rule is written twice, in csrc/cpu/schedule.h and for shapes without data; the sizes lie
    about each of its limits. That the core writes no more than there is room for, AddressSanitizer
    sees, and the backward by these cosines or by its own is the same."""
    most = 24 << 20
    sizes = (1, 15, 16, 95, 96, 97, 192, 193, 384, 385, 512, 513, 1000, 1024, 1025)
    sizes += (1152, 1153, 1248, 1249, 1536, 1537, 1600, 2200, 2400, 2500)
    for mode, B, dtype in itertools.product(MODES, sizes, (torch.float32, torch.float64)):
        K = 3 if mode == "paired" else 191 + B % 2 * 1000
        p = problem("gauss", B, 2, mode, K=K, dtype=dtype, eps=f64(0.5))
        z0, z1, negatives, *_, mode_code = p.raw()[:6]
        room = ops.kept_numbers(z0, z1, negatives, mode_code, 0, 1 << 40)
        for limit in (most, room * dtype.itemsize, room * dtype.itemsize - 1, 1, 0):
            real = operators.forward(*p.raw()[:-1], limit)[2]
            fake = ops.kept_numbers(z0, z1, negatives, mode_code, 0, limit)
            assert real.numel() == fake, (mode, B, dtype, limit)
            assert fake in (room, 2) if limit and room else fake == 0
            assert fake * dtype.itemsize <= max(limit, 2 * dtype.itemsize)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("eps", [-math.inf, -1.5, 0.0, 0.99, 1.0, math.inf])
def test_every_threshold_and_power_is_as_good_as_torch(eps, beta):
    for dtype in (torch.float64, torch.float32):
        mode = "cross" if dtype == torch.float64 else "ntxent"
        p = problem("cluster", 200, 16, mode, dtype=dtype, beta=beta, eps=f64(eps))
        check(p)
        for variant in FORMS[1:]:
            check(p.with_(variant=variant))


@pytest.mark.parametrize("mode", TILED)
def test_each_row_may_have_its_own_threshold(mode):
    for dtype in (torch.float64, torch.float32):
        for variant in FORMS:
            B = {"ntxent": 97, "unpaired": 101}.get(mode, 203)
            p = problem("cluster", B, 9, mode, K=301, dtype=dtype, variant=variant)
            check(eps_of_each_row(p))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_one_call_finds_the_threshold_and_the_loss_of_two(rule, kind):
    narrow = [torch.bfloat16] if kind == "cluster" else []
    for dtype in (torch.float64, torch.float32, *narrow):
        for mode in TILED if dtype == torch.float32 else TILED[list(RULES).index(rule) % 2 :: 2]:
            B = {"ntxent": 151, "unpaired": 101}.get(mode, 251)
            p = problem(kind, B, 24, mode, K=402, dtype=dtype, eps=f64(0.5))
            module = hex_of(p, threshold=tracker(**RULES[rule]), reduction="none")
            loss, *_, eps, count, _ = step(module, p)
            assert torch.equal(eps, in_two_calls(p, **RULES[rule]))
            given = p.with_(eps=eps)
            same, truth = (
                given.reference(*(z.to(t) for z in p.inputs), tau=f64(0.1))
                for t in (p.dtype, torch.float64)
            )
            members = operators.forward(*given.raw())[1][ops.COUNT]
            assert torch.equal(count, members)
            if torch.equal(members.double(), truth[1]):  # else a cosine is within rounding of eps
                assert_as_good_as_torch(
                    loss, same[0], truth[0], tau=0.1, dtype=p.dtype, condition=p.condition
                )


def test_a_row_with_nothing_hard_has_the_bits_of_info_nce():
    for dtype in (torch.float64, torch.float32):
        p = problem("cluster", 301, 24, dtype=dtype)
        plain = InfoNCELoss(reduction="none")(*p.inputs)
        for threshold in (tracker(quantile=0.995), 0.85, 0.9):
            module = HEXLoss(threshold=threshold, reduction="none")
            loss, *_, count, _ = step(module, p)
            assert 0 < (count == 0).sum() < len(count)
            assert torch.equal(loss[count == 0], plain[count == 0])


def classes(B: int, share: float, spread: float) -> Problem:
    """A class of a share of the images, the others anywhere."""
    generator = torch.Generator().manual_seed(B)
    image = torch.randn(B, 32, generator=generator)
    of = int(share * B)
    image[:of] = image[0] + spread * torch.randn(of, 32, generator=generator)
    views = [image + 0.1 * torch.randn(B, 32, generator=generator) for _ in range(2)]
    return Problem(tuple(views), batch=f"a class of {share}")


@pytest.mark.parametrize("share, spread", [(0.02, 0.3), (0.1, 0.3), (0.5, 0.05), (1.0, 0.01)])
@pytest.mark.parametrize("mode", TILED)
def test_shortlists_that_do_not_fit_change_nothing(mode, share, spread):
    """Classes larger than a list, whose rows have thresholds of their own far from the mean."""
    for B in (300, 700):
        p = classes(B, share, spread)
        z0, z1 = p.inputs
        p = p.with_(mode=mode, inputs=(z0[::2], z1[::2], z0) if mode == "unpaired" else (z0, z1))
        module = hex_of(p, reduction="none")
        loss, *_, eps, count, _ = step(module, p)
        assert torch.equal(eps, in_two_calls(p))
        given = p.with_(eps=eps)
        assert torch.equal(count, operators.forward(*given.raw())[1][ops.COUNT])
        two = given.loss(*p.inputs)
        # the same numbers summed in another order: a few ulp of the largest term, over tau
        torch.testing.assert_close(loss, two, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_finite_spoils_every_row_and_leaves_the_threshold():
    p = problem("cluster", 250, 16, dtype=torch.float32)
    module = HEXLoss(reduction="none")
    step(module, p)
    before = module.threshold.state.tolist()
    for bad in (math.nan, math.inf):
        z0 = p.inputs[0].clone()
        z0[77, 3] = bad
        loss, *_, eps, _, _ = step(module, p.with_(inputs=(z0, p.inputs[1])))
        assert loss.isnan().all()
        assert eps.isfinite()
        before[SKIPPED] += 1
        before[CANDIDATE] = 2
        assert module.threshold.state.tolist() == before


@pytest.mark.parametrize("tau", [-0.1, 0.0, math.nan])
def test_a_temperature_that_is_not_positive_spoils_the_loss_but_not_the_threshold(tau):
    p = problem("cluster", 200, 16, dtype=torch.float32, eps=f64(0.5))
    module = HEXLoss(f64(tau), reduction="none")
    loss, *_, eps, _, _ = step(module, p)
    assert loss.isnan().all()
    assert torch.equal(eps, in_two_calls(p))


def test_a_huge_temperature_gives_the_loss_of_guessing():
    p = problem("cluster", 200, 16, dtype=torch.float32, eps=f64(math.inf))
    for tau in (1e6, 1e29, 1e38):
        loss = p.with_(tau=tau).loss(*p.inputs)
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(399)))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_the_bits_are_the_same_for_any_number_of_threads(dtype, threads):
    for mode in TILED:
        for p in (
            problem("cluster", 531, 40, mode, K=900, dtype=dtype, eps=f64(0.5)),
            problem("collapsed", 400, 8, mode, K=200, dtype=dtype),
        ):
            threads(1)
            expected = step(hex_of(p), p)
            for count in (2, 3, 5):
                threads(count)
                assert all(map(torch.equal, step(hex_of(p), p), expected)), (count, mode)


TRACKERS = [
    {},
    {"momentum": 0.7},
    {"monotonic": True},
    {"lagged": True},
    {"momentum": 0.7, "monotonic": True, "lagged": True, "warmup_epochs": 1},
    {"warmup_epochs": 2, "warmup_threshold": 0.7, "over": "negatives"},
]


@pytest.mark.parametrize("options", TRACKERS, ids=str)
@pytest.mark.parametrize("mode", ("ntxent", "query"))
def test_the_kernels_tracker_takes_the_steps_of_the_composed_one(options, mode):
    module, other = (HEXLoss(threshold=tracker(**options), mode=mode) for _ in range(2))
    for number in range(7):
        kind = "gauss" if number % 3 == 2 else "cluster"
        z0, z1 = problem(kind, 199, 11, mode, seed=number, dtype=torch.float32).inputs
        if number == 4:
            z0 = z0 / 0  # not finite
        for m in (module, other):
            m.set_epoch(number // 2)
        module(z0.requires_grad_(), z1)
        p = Problem((z0.detach(), z1), mode)
        eps = other.threshold.update(in_two_calls(p, **options), store=True, anchors=p.rows)
        assert torch.equal(module._last[0], eps), number
        assert torch.equal(module.threshold.state, other.threshold.state), number


def test_evaluation_uses_the_batch_and_keeps_the_state():
    p = problem("cluster", 200, 16, dtype=torch.float32)
    module = HEXLoss()
    before = module.threshold.state.clone()
    with torch.no_grad():
        module(*p.inputs)
    assert module._last[0] == in_two_calls(p)
    assert torch.equal(module.threshold.state, before)


def test_opcheck_of_the_adaptive_operator():
    rule = tracker(momentum=0.5).kernel_rule()
    for mode, B in (("ntxent", 100), ("unpaired", 5), ("ntxent", 0)):  # more are in test_ops.py
        p = problem("gauss", B, 7, mode, dtype=torch.float32, eps=f64(0.5))
        z0, z1, negatives, _, tau, *options, keep = p.raw()
        state = ThresholdTracker.adaptive().state
        arguments = z0, z1, negatives, state, tau, *options, *rule, keep
        torch.library.opcheck(torch.ops.hex.adaptive, operators.arguments("adaptive", *arguments))


def test_the_adaptive_operator_refuses_what_is_no_state():
    z0, z1, negatives, _, tau, *options, keep = problem("gauss", 5, 7).raw()
    rule = tracker().kernel_rule()
    for state, wanted in (
        (torch.zeros(11, dtype=torch.int64), "a dense CPU tensor of float64"),
        (torch.zeros(11), r"float64 of shape \(11,\)"),
        (torch.zeros(4, dtype=torch.float64), r"float64 of shape \(11,\)"),
    ):
        with pytest.raises(RuntimeError, match=f"state: expected {wanted}"):
            operators.adaptive(z0, z1, negatives, state, tau, *options, *rule, keep)
    with pytest.raises(RuntimeError, match="quantile: expected a number in"):
        operators.adaptive(z0, z1, negatives, tracker().state, tau, *options, 2.0, *rule[1:], keep)


def test_the_reference_agrees_on_a_large_batch():
    p = problem("cluster", 1100, 24, dtype=torch.float32)
    *_, eps, count, _ = step(HEXLoss(), p)
    z0, z1 = (z.double() for z in p.inputs)
    truth = reference.threshold(z0, z1, None, "ntxent", 0.99, "negatives")
    assert abs(eps - truth) < 4 * torch.finfo(torch.float32).eps * 24**0.5
    assert 10 < count.mean() < 100  # a hundredth of the row is 22; the mean eps is not each row's
