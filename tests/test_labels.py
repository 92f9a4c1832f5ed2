# SPDX-License-Identifier: MIT
"""Labels, groups, guides and logits through torch.ops.hex: values, gradients and thresholds against
reference.py.

What torch asks of an operator is in test_ops.py, what the kernels refuse in test_refused_calls.py,
and the modules and functions on top are in test_sup_con.py, test_logits.py and
test_groups_and_guides.py.
"""

import dataclasses
import itertools
import math

import operators
import pytest
import torch
from conftest import DTYPES, problem
from data import FORMS as OF_VIEWS
from data import MODES, f64, form, leaves, views
from labelled_problems import PAIRINGS, SOURCES, Call, check, labelled, logits
from torch import Tensor

from hex import ops, reference

FORMS = tuple(itertools.product(OF_VIEWS, ("outside", "inside")))


def everything(dtype: torch.dtype) -> list[Call]:
    """Every pairing, source of H and form once, in a dtype, at sizes that divide nothing."""
    calls = []
    for k, (pairing, source, (variant, positives)) in enumerate(
        itertools.product(PAIRINGS, SOURCES, FORMS)
    ):
        N, D, M = ((2, 1, 1), (23, 7, 31), (67, 33, 41))[k % 3]
        masked = pairing == "self" and k % 2 == 1
        calls.append(labelled(N, D, pairing, source, M=M, masked=masked, dtype=dtype, seed=k,
                              variant=variant, positives=positives,
                              beta=(1.0, 0.0, 0.5)[k // 3 % 3]))  # fmt: skip
    for k, variant in enumerate(OF_VIEWS):
        for N, C in ((1, 1), (19, 37), (5, 1031)):
            calls.append(logits(N, C, dtype=dtype, variant=variant, seed=k))
    return calls


def check_half() -> int:
    """Of these, every second in float32 and the others in float64, for test_isa.py. How many."""
    half = everything(torch.float32)[::2] + everything(torch.float64)[1::2]
    for p in half:
        check(p)
    return len(half)


# ---- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_compute_what_the_reference_computes(dtype):
    for p in everything(dtype):
        check(p)


@pytest.mark.parametrize("positives", ("outside", "inside"))
@pytest.mark.parametrize("variant", OF_VIEWS)
def test_rows_of_which_all_or_no_negatives_are_in_h_are_as_exact(variant, positives):
    """Of several positives, one, or none; with the temperature's derivative."""
    for k, (pairing, dtype) in enumerate(itertools.product(PAIRINGS, DTYPES[:2])):
        for labels in (1, 3, 40):
            p = labelled(23, 7, pairing, M=9, dtype=dtype, labels=labels, seed=k, variant=variant,
                         positives=positives)  # fmt: skip
            for eps in (-2.0, 2.0, math.inf):
                check(dataclasses.replace(p, tensors=(*p.tensors[:-2], f64(eps), p.tensors[-1])))


@pytest.mark.parametrize("tau", (0.005, 0.03, 0.5))
@pytest.mark.parametrize("kind", ("gauss", "near_collapsed", "collapsed", "zero_rows", "clamped"))
def test_hard_batches_and_temperatures_are_as_exact(kind, tau):
    for positives, dtype in itertools.product(("outside", "inside"), DTYPES[:2]):
        source = "groups" if "collapsed" in kind else "cosines"  # there is no gap for eps
        tau_plus = 0.9 if kind == "clamped" else 0.1
        for variant, share in (("paper", tau_plus), *((OF_VIEWS[3], x) for x in (0.0, tau_plus))):
            check(labelled(26, 17, "self", source, kind=kind, tau=tau, positives=positives,
                           dtype=dtype, tau_plus=share, labels=13, variant=variant))  # fmt: skip


@pytest.mark.parametrize("p", (labelled(7, 3), labelled(7, 3, "pair", M=5, positives="inside"),
                               labelled(4, 3, "queue", "guide", M=5), labelled(7, 3, masked=True),
                               labelled(7, 3, "self", "groups", variant="released"),
                               logits(3, 7), logits(3, 7, variant="released"),
                               labelled(7, 3, variant="paper decoupled"),
                               labelled(7, 3, positives="inside", variant="paper decoupled"),
                               logits(3, 7, variant="excluded")),
                         ids=str)  # fmt: skip
def test_first_and_second_derivatives_are_those_of_finite_differences(p):
    inputs = [p.tensors[k].clone() for k in p.places]
    if p.name == "logits":  # a step from -inf leads nowhere
        inputs[0] = inputs[0].masked_fill(inputs[0] == -math.inf, -3.0)
    inputs = [z.requires_grad_() for z in inputs]
    assert torch.autograd.gradcheck(p.rows, inputs)
    assert torch.autograd.gradgradcheck(p.rows, inputs, fast_mode=True)


@pytest.mark.parametrize("variant", OF_VIEWS)
@pytest.mark.parametrize("source", ("groups", "guide"))
@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_views_are_those_of_finite_differences(mode, source, variant):
    p = problem("cluster", 5, 3, mode, K=4, variant=variant, tau=0.3)
    z0, z1, negatives, eps, _, code, reduction, *_ = p.raw()
    n = len(z0) + len(z1) + negatives.shape[:-1].numel()
    ids, mask, groups, guide = operators.nothing(z0)
    if source == "groups":
        groups = torch.arange(n) % 3
    else:
        guide = views("cluster", n, 4, seed=2)[0]
        eps = guide.new_tensor(0.2)
    options = form(variant)
    of_form = ops.VARIANTS[options["variant"]], p.tau_plus, options["decoupled"]
    rule = code, reduction, 0, p.beta, *of_form

    def loss(tau: Tensor, *z: Tensor) -> tuple[Tensor, ...]:
        inputs = *(*z, negatives)[:3], ids, mask, groups, guide
        value, seen = ops.loss(inputs, eps, tau, rule)
        return value, *ops.hard_and_share(seen)

    def rows(*inputs: Tensor) -> Tensor:
        return loss(*inputs)[0]

    inputs = leaves(f64(p.tau), *p.inputs)
    assert (loss(*inputs)[1] > 0).any()
    assert torch.autograd.gradcheck(rows, inputs)
    assert torch.autograd.gradgradcheck(rows, inputs, fast_mode=True)


def rows_of(p: Call, **changes: Tensor) -> Tensor:
    """The operator's loss of each row, of other tensors."""
    names = {"x": 0, "ids": 2, "eps": -2, "tau": -1}
    tensors = list(p.tensors)
    for name, value in changes.items():
        tensors[names[name]] = value
    op, arguments = dataclasses.replace(p, tensors=tuple(tensors)).forward()
    return op(*arguments)[0]


def test_rows_without_a_positive_give_0_and_see_nan():
    p = labelled(8, 3, labels=5, seed=3)
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    loss = rows_of(p, ids=ids)
    assert torch.equal(loss[2:], torch.zeros(6, dtype=torch.float64))
    assert (loss[:2] > 0).all()
    bad = p.tensors[0].clone()
    bad[7, 0] = math.nan
    assert rows_of(p, x=bad, ids=ids).isnan().all()


@pytest.mark.parametrize("positives", ("outside", "inside"))
def test_rows_with_one_positive_and_no_negative_are_0(positives):
    p = labelled(2, 3, positives=positives)
    loss = rows_of(p, ids=torch.zeros(2, dtype=torch.int64))
    assert torch.equal(loss, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("p", (labelled(), logits()), ids=("labelled", "logits"))
def test_a_threshold_or_temperature_that_is_nan_gives_nan(p):
    nan = f64(math.nan)
    assert rows_of(p, eps=nan).isnan().all()
    assert rows_of(p, tau=nan).isnan().all()
    assert p.plain(p.tensors[0], nan)[0].isnan().all()
    assert rows_of(p, tau=f64(-0.1)).isnan().all()


@pytest.mark.parametrize(
    "p", (labelled(301, 40, labels=30), labelled(301, 40, "queue", "guide", M=301),
          labelled(302, 40, masked=True), logits(150, 600)), ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_results_are_the_same_bits_for_any_number_of_threads(p, dtype, threads):
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(p.values(p.rows, dtype))
    for rows, grads in results[1:]:
        assert torch.equal(rows, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


# ---- thresholds ---------------------------------------------------------------------------------


def check_thresholds(p: Call, self_column: bool = False) -> None:
    """Quantiles and ranges against those of the reference in float64."""
    allowed = 4 * torch.finfo(p.dtype).eps * (1 if p.name == "logits" else 7**0.5)
    measured = p.measured(self_column)
    table = reference.problem_table(*(z.double() for z in measured[:3]), *measured[3:])
    for over, quantile in itertools.product(("all", "negatives"), (0.0, 0.7, 0.9, 0.99, 1.0)):
        ours = ops.quantile(*measured, quantile, over)
        assert abs(ours - reference.quantile_of(table, quantile, over)) <= allowed
    for a, b in zip(ops.row_range(*measured), reference.range_of(table), strict=True):
        assert (a - b).abs().max() <= allowed


@pytest.mark.parametrize("pairing, masked", (("self", False), ("self", True), ("pair", False),
                                             ("queue", False)))  # fmt: skip
def test_quantiles_and_ranges_are_those_of_the_reference(pairing, masked):
    for dtype in DTYPES:
        check_thresholds(labelled(23, 7, pairing, masked=masked, dtype=dtype))


@pytest.mark.parametrize("self_column", (False, True))
def test_quantiles_and_ranges_of_logits_are_those_of_the_reference(self_column):
    for dtype in DTYPES:
        check_thresholds(logits(dtype=dtype), self_column)


def test_the_self_similarity_is_exactly_1_and_rows_without_negatives_are_passed_over():
    p = labelled(12, 5, dtype=torch.float32)
    x, z1, negatives, ids, *rest = p.measured()
    assert ops.quantile(x, z1, negatives, ids, *rest, 1.0, "all") == 1
    one = torch.zeros_like(ids)
    assert ops.quantile(x, z1, negatives, one, *rest, 0.9, "negatives").isnan()
    bad = x.clone()
    bad[3, 1] = math.inf
    assert ops.quantile(bad, z1, negatives, ids, *rest, 0.9, "negatives").isnan()


def test_strided_inputs_are_read_right():
    for p in (
        labelled(11, 6, "pair", "guide"),
        labelled(10, 6, masked=True),
        labelled(10, 6, source="groups"),
        logits(7, 9),
    ):
        for op, arguments in (p.forward(), p.backward(), p.quantile()):
            strided = [a.mT.contiguous().mT if k < 8 and torch.is_tensor(a) and a.dim() == 2 else
                       a.repeat_interleave(2)[::2] if torch.is_tensor(a) and a.dim() == 1 and
                       not a.is_floating_point() else a
                       for k, a in enumerate(arguments)]  # fmt: skip
            for a, b in zip(op(*arguments), op(*strided), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("variant", OF_VIEWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_logit_of_infinity_makes_loss_count_share_and_gradient_of_its_row_nan(dtype, variant):
    p = logits(19, 37, dtype=dtype, variant=variant, left_out=0.0)
    for of, eps in itertools.product((0, 1), (math.inf, 1.5, 0.3, -2.0)):  # the target, another
        values = p.tensors[0].clone()
        values[3, (p.tensors[1][3] + of) % 37] = math.inf
        q = dataclasses.replace(p, tensors=(values, p.tensors[1], f64(eps), p.tensors[3]))
        loss, stats, _ = torch.ops.hex.forward(*q.forward()[1])
        for ours, plain in zip((loss, stats[ops.COUNT], stats[ops.SHARE]), q.plain(), strict=True):
            assert ours[3].isnan() and torch.equal(ours.isnan(), plain.isnan())
        _, (gradient, of_tau) = q.values(q.rows, dtype)
        assert of_tau.isnan() and gradient[3].isnan().all() and gradient[:3].isfinite().all()
