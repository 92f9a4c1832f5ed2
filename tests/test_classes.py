# SPDX-License-Identifier: MIT
"""torch.ops.hex.labelled_* and logits_*: values and gradients against reference.py, what torch asks
of an operator, and what the kernels refuse.

The modules and functions on top are in test_sup_con.py, test_logits.py and test_membership.py.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from class_problems import HEX, PAIRINGS, SOURCES, Call, check, labelled, logits
from conftest import DTYPES
from data import f64
from test_isa import FLAGS, skip_unless_available
from torch._subclasses.fake_tensor import FakeTensorMode

from hex import ops, reference

FORMS = tuple(itertools.product(("paper", "released"), ("outside", "inside")))


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
    for k, (source, variant) in enumerate(itertools.product(SOURCES, ("paper", "released"))):
        for N, C in ((1, 1), (19, 37), (5, 1031)):
            calls.append(logits(N, C, source, dtype=dtype, variant=variant, seed=k))
    return calls


def half() -> list[Call]:
    """Of these, every second in float32 and the others in float64."""
    return everything(torch.float32)[::2] + everything(torch.float64)[1::2]


# ---- values and gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_compute_what_the_reference_computes(dtype):
    for p in everything(dtype):
        check(p)


@pytest.mark.parametrize("level", FLAGS)
def test_a_level_computes_what_the_reference_computes(level):
    skip_unless_available(level)
    if level == ops.isa():
        pytest.skip(f"{level} is in use: the other tests here are of it")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HEX_ISA": level}
    result = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.split() == [level, str(len(half()))]


@pytest.mark.parametrize("tau", (0.005, 0.03, 0.5))
@pytest.mark.parametrize("kind", ("gauss", "near_collapsed", "collapsed", "zero_rows", "clamped"))
def test_hard_batches_and_temperatures_are_as_exact(kind, tau):
    for positives, dtype in itertools.product(("outside", "inside"), DTYPES[:2]):
        source = "groups" if "collapsed" in kind else "cosines"  # there is no gap for eps
        tau_plus = 0.9 if kind == "clamped" else 0.1
        check(labelled(26, 17, "self", source, kind=kind, tau=tau, positives=positives,
                       dtype=dtype, tau_plus=tau_plus, labels=13))  # fmt: skip


@pytest.mark.parametrize("p", (labelled(7, 3), labelled(7, 3, "pair", M=5, positives="inside"),
                               labelled(4, 3, "queue", "guide", M=5), labelled(7, 3, masked=True),
                               labelled(7, 3, "self", "groups", variant="released"),
                               logits(3, 7), logits(3, 7, "guide", variant="released")),
                         ids=str)  # fmt: skip
def test_first_and_second_derivatives_are_those_of_finite_differences(p):
    inputs = [p.tensors[k].clone() for k in p.places]
    if p.name == "logits":  # a step from -inf leads nowhere
        inputs[0] = inputs[0].masked_fill(inputs[0] == -math.inf, -3.0)
    inputs = [z.requires_grad_() for z in inputs]
    assert torch.autograd.gradcheck(p.rows, inputs)
    assert torch.autograd.gradgradcheck(p.rows, inputs, fast_mode=True)


def test_rows_without_a_positive_give_0_and_see_nan(device):
    p = labelled(8, 3, labels=5, seed=3)
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    tensors = (p.tensors[0], p.tensors[1], ids, *p.tensors[3:])
    loss = HEX.labelled_forward(*tensors, *p.options(0))[0]
    assert torch.equal(loss[2:], torch.zeros(6, dtype=torch.float64))
    assert (loss[:2] > 0).all()
    bad = p.tensors[0].clone()
    bad[7, 0] = math.nan
    assert HEX.labelled_forward(bad, *tensors[1:], *p.options(0))[0].isnan().all()


def test_rows_with_one_positive_and_no_negative_are_0():
    x = torch.randn(2, 3, dtype=torch.float64)
    p = labelled(2, 3)
    tensors = (x, x[:0], torch.zeros(2, dtype=torch.int64), *p.tensors[3:])
    for positives in (0, 1):
        loss, _ = HEX.labelled_forward(*tensors, 0, 0, 0, positives, 1.0, 0.1)
        assert torch.equal(loss, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("p", (labelled(), logits()), ids=("labelled", "logits"))
def test_a_threshold_or_temperature_that_is_nan_gives_nan(p):
    for place in (-2, -1):
        tensors = list(p.tensors)
        tensors[place] = f64(math.nan)
        op = p.forward()[0]
        assert op(*tensors, *p.options(0))[0].isnan().all()
        assert p.plain(*[tensors[k] for k in p.places])[0].isnan().all() or place == -2
    tensors[-1] = f64(-0.1)
    assert p.forward()[0](*tensors, *p.options(0))[0].isnan().all()


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


@pytest.mark.parametrize("over", ("all", "negatives"))
@pytest.mark.parametrize("pairing, masked", (("self", False), ("self", True), ("pair", False),
                                             ("queue", False)))  # fmt: skip
def test_quantiles_and_ranges_are_those_of_the_reference(pairing, masked, over):
    for dtype, quantile in itertools.product(DTYPES, (0.0, 0.7, 0.99, 1.0)):
        p = labelled(23, 7, pairing, masked=masked, dtype=dtype)
        pairs = (*p.tensors[:5], *p.first)
        wide = (*(z.double() for z in pairs[:2]), *pairs[2:])
        table = reference.labelled_table(*wide)
        allowed = 4 * torch.finfo(p.dtype).eps * 7**0.5
        ours = ops.labelled.threshold(*pairs, quantile, over)
        assert abs(ours - reference.quantile_of(table, quantile, over)) <= allowed
        truth = reference.range_of(table)
        for a, b in zip(ops.labelled.row_range(*pairs), truth, strict=True):
            assert (a - b).abs().max() <= allowed


@pytest.mark.parametrize("self_column", (False, True))
def test_quantiles_and_ranges_of_logits_are_those_of_the_reference(self_column):
    for dtype, over in itertools.product(DTYPES, ("all", "negatives")):
        p = logits(dtype=dtype)
        values, target, _, _, tau = p.tensors
        ours = ops.logits.threshold(values, target, tau, self_column, 0.9, over)
        table = reference.logits_cosines(values.double(), target, tau, self_column)
        allowed = 4 * torch.finfo(p.dtype).eps
        assert abs(ours - reference.quantile_of(table, 0.9, over)) <= allowed
        truth = reference.range_of(table)
        ranges = ops.logits.row_range(values, target, tau, self_column)
        for a, b in zip(ranges, truth, strict=True):
            assert (a - b).abs().max() <= allowed


def test_the_self_similarity_is_exactly_1_and_rows_without_negatives_are_passed_over():
    p = labelled(12, 5, dtype=torch.float32)
    pairs = (*p.tensors[:5], 0)
    assert ops.labelled.threshold(*pairs, 1.0, "all") == 1
    one = (*p.tensors[:2], torch.zeros(12, dtype=torch.int64), *p.tensors[3:5], 0)
    assert ops.labelled.threshold(*one, 0.9, "negatives").isnan()
    bad = p.tensors[0].clone()
    bad[3, 1] = math.inf
    assert ops.labelled.threshold(bad, *pairs[1:], 0.9, "negatives").isnan()


# ---- what torch asks ----------------------------------------------------------------------------


def thresholds(p: Call):
    if p.name == "logits":
        values, target, _, _, tau = p.tensors
        yield HEX.logits_threshold.default, (values, target, tau, 0.9, False, True)
        yield HEX.logits_row_range.default, (values, target, tau, False)
    else:
        yield HEX.labelled_threshold.default, (*p.tensors[:5], *p.first, 0.9, False)
        yield HEX.labelled_row_range.default, (*p.tensors[:5], *p.first)


def described(result):
    result = result if isinstance(result, tuple) else (result,)
    return [(tuple(t.shape), t.stride(), t.dtype) for t in result]


SMALL = (
    labelled(7, 5),
    labelled(7, 5, masked=True, source="guide", dtype=torch.bfloat16),
    labelled(7, 5, "pair", "groups", M=6, dtype=torch.float32),
    labelled(7, 5, "queue", "guide", M=6, dtype=torch.float16),
    logits(7, 6, dtype=torch.float16),
    logits(7, 6, "guide", dtype=torch.float32),
    logits(7, 6, "groups", dtype=torch.bfloat16),
)


@pytest.mark.parametrize("p", SMALL, ids=str)
def test_opcheck(p):
    torch.library.opcheck(*p.forward(len(p.about) % 3))
    torch.library.opcheck(*p.backward((len(p.about) + 1) % 3))
    for op, arguments in thresholds(p):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("p", SMALL, ids=str)
def test_fakes_have_the_shape_strides_and_dtype_of_the_real(p):
    calls = [p.forward(r) for r in range(3)] + [p.backward(n % 3, n) for n in range(8)]
    for op, arguments in [*calls, *thresholds(p)]:
        real = described(op(*arguments))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            faked = [fake.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]
            assert described(op(*faked)) == real


def test_strided_inputs_are_read_right():
    for p in (
        labelled(11, 6, "pair", "guide"),
        labelled(10, 6, masked=True),
        logits(7, 9, "guide"),
    ):
        op, arguments = p.forward()
        strided = [a.mT.contiguous().mT if torch.is_tensor(a) and a.dim() == 2 else
                   a.repeat_interleave(2)[::2] if torch.is_tensor(a) and a.dim() == 1 else a
                   for a in arguments]  # fmt: skip
        assert torch.equal(op(*arguments)[0], op(*strided)[0])


# ---- what the kernels refuse --------------------------------------------------------------------

L, P, Q = labelled(6, 3), labelled(6, 3, "pair", M=4), labelled(6, 3, "queue", M=2)
R = logits(5, 7)
FLOATING = "expected a dense CPU tensor of float64, float32, bfloat16 or float16"


def freed(z):
    z = z.clone()
    z.untyped_storage().resize_(0)
    return z


REFUSED = [
    # call, place of an argument of the forward, its new value, text after "hex::<op>: "
    (L, 0, torch.ones(6), "x: expected a matrix that fits the others"),
    (L, 0, torch.ones(6, 3, dtype=torch.int32), f"x: {FLOATING}"),
    (L, 0, freed(torch.ones(6, 3)), "x: its storage is smaller"),
    (L, 1, torch.ones(1, 3), "y: expected a matrix that fits the others"),
    (L, 2, torch.ones(6), "ids: expected a dense CPU tensor of int64"),
    (L, 2, torch.ones(5, dtype=torch.int64), "ids: expected 6 labels"),
    (L, 2, freed(torch.ones(6, dtype=torch.int64)), "ids: its storage is smaller"),
    (L, 3, torch.ones(6, dtype=torch.int64), "candidate_ids: expected 0 labels"),
    (L, 4, torch.ones(6, 6), "mask: expected a dense CPU tensor of bool"),
    (L, 4, torch.ones(6, 5, dtype=torch.bool), "mask: expected a square matrix"),
    (L, 4, torch.ones(4, 4, dtype=torch.bool), "mask: expected self pairing"),
    (P, 4, torch.ones(6, 6, dtype=torch.bool), "mask: expected self pairing"),
    (L, 5, torch.ones(5, dtype=torch.int64), "groups: expected 6 labels"),
    (P, 5, torch.ones(6, dtype=torch.int64), "candidate_groups: expected 4 labels"),
    (L, 7, torch.ones(5, 2), "guide: expected 6 rows"),
    (P, 7, torch.ones(6, 2), "candidate_guide: expected a matrix that fits the others"),
    (Q, 1, torch.ones(5, 3), "y: expected at least as many rows as x has, 6"),
    (L, 9, torch.ones(5), "eps: expected float32 or float64 of shape () or (rows,)"),
    (L, 10, torch.ones(6), "tau: expected float32 or float64 of shape ()"),
    (L, 11, 3, "pairing: expected 0, 1 or 2"),
    (L, 12, 3, "reduction: expected 0, 1 or 2"),
    (L, 13, 2, "variant: expected 0 or 1"),
    (L, 14, 2, "positives: expected 0 or 1"),
    (L, 15, -1.0, "expected beta >= 0 and tau_plus in [0, 1)"),
    (L, 16, 1.0, "expected beta >= 0 and tau_plus in [0, 1)"),
    (R, 0, torch.ones(5), "logits: expected a matrix"),
    (R, 1, torch.full((5,), 7), "target: expected columns in [0, 7), got 7"),
    (R, 1, torch.full((5,), -1), "target: expected columns in [0, 7), got -1"),
    (R, 1, torch.ones(5), "target: expected a dense CPU tensor of int64"),
    (R, 2, torch.ones(5, 6), "score: expected the shape of the logits"),
    (R, 6, 5, "reduction: expected 0, 1 or 2"),
]


@pytest.mark.parametrize("p, place, value, text", REFUSED)
def test_the_kernels_refuse(p, place, value, text):
    op, arguments = p.forward()
    arguments = list(arguments)
    arguments[place] = value
    with pytest.raises(RuntimeError) as error:
        op(*arguments)
    assert f"hex::{p.name}_forward: {text}" in str(error.value)


def test_groups_and_a_guide_at_once_and_statistics_of_another_shape_are_refused():
    op, arguments = labelled(6, 3, "self", "groups").forward()
    guided = (*arguments[:7], torch.ones(6, 2), torch.ones(0, 2), *arguments[9:])
    with pytest.raises(RuntimeError, match="groups or a guide, not both"):
        op(*guided)
    for p, place in ((L, 11), (R, 5)):
        op, arguments = p.backward()
        with pytest.raises(RuntimeError, match="stats: expected the contiguous"):
            op(*arguments[:place], torch.zeros(9, 6, dtype=torch.float64), *arguments[place + 1 :])


if __name__ == "__main__":
    count = 0
    for call in half():
        check(call)
        count += 1
    print(ops.isa(), count)
