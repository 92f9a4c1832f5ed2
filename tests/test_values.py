# SPDX-License-Identifier: MIT
"""The loss of each row and every gradient, against plain PyTorch.

conftest.py has the comparison. Here most batches are small and go row by row; those that go by
tiles are in test_tiles.py. What a gradient owes to grad_output is in test_gradient.py, what is bit
for bit the same or exactly zero in test_special_cases.py, the accuracy where the cosines are exact
in test_promised_accuracy.py.
"""

import itertools

import operators
import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, at_the_floor, check, eps_of_each_row, problem
from data import FORMS, INF, KINDS, MODES, f64

from hex import hex_loss, info_nce, ops, reference

OPTIONS = [
    {"tau": 0.1, "beta": 1.0, "tau_plus": 0.1},
    {"tau": 0.5, "beta": 0.0, "tau_plus": 0.0},
    {"tau": 0.07, "beta": 0.5, "tau_plus": 0.9},
    {"tau": 0.2, "beta": 2.0, "tau_plus": 0.1},
    {"tau": 0.1, "variant": "released"},
    {"tau": 0.2, "variant": "excluded"},
    {"tau": 0.1, "tau_plus": 0.3, "variant": "paper decoupled"},
    {"tau": 0.07, "variant": "excluded decoupled"},
]
SIZES = [(2, 1), (13, 3), (33, 65)]  # none fills a vector or a tile


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_and_gradient_is_as_good_as_torch(kind, mode, dtype, device):
    """Every option of every kind in every mode, the sizes in turn."""
    for k, options in enumerate(OPTIONS):
        turn = k + KINDS.index(kind) + MODES.index(mode)
        near = (-0.3, 0.3, 0.7)[turn // 3 % 3]
        B, D = SIZES[turn % 3]
        check(problem(kind, B, D, mode, dtype=dtype, device=device, near=near, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_each_row_may_have_its_own_threshold(mode, dtype, device):
    for variant in FORMS:
        p = eps_of_each_row(
            problem("cluster", 23, 9, mode, K=19, dtype=dtype, device=device, variant=variant)
        )
        check(p)
        hard = operators.forward(*p.raw())[1][ops.COUNT]
        assert len(hard.unique()) > 4
    strided = p.with_(eps=torch.stack([p.eps, -p.eps], 1)[:, 0])
    assert torch.equal(strided.loss(*p.inputs), p.loss(*p.inputs))


@pytest.mark.parametrize("D", [300, 1000])
@pytest.mark.parametrize("mode", MODES)
def test_many_features_are_summed_in_slices(mode, D, device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(problem("cluster", 21, D, mode, dtype=dtype, device=device, near=0.6))


# B, K: blocks of few rows; of more rows; more candidates than are gathered at a time (512)
@pytest.mark.parametrize("mode, B, K", [
    ("ntxent", 131, 0), ("ntxent", 259, 0), ("query", 131, 0), ("query", 517, 0), ("cross", 131, 0),
    ("unpaired", 131, 61), ("unpaired", 790, 31), ("unpaired", 31, 1030), ("paired", 131, 61),
    ("paired", 5, 1030),
])  # fmt: skip
def test_many_rows_and_candidates_are_done_in_blocks(mode, B, K, device):
    """Row by row, for which beta is above 1; none of the blocks and slices is full at the end."""
    for variant in FORMS:
        p = problem("cluster", B, 17, mode, K=K, dtype=torch.float32, device=device, near=0.8)
        check(p.with_(variant=variant, beta=1.5))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tau", [0.05, 0.02, 0.01, 0.003, 0.001])
def test_a_cold_temperature_is_as_good_as_torch(tau, mode, device):
    kinds = ("gauss", "cluster", "near_collapsed", "zero_rows")
    dtypes = (torch.float64, torch.float32, torch.float16)
    for k, (dtype, kind) in enumerate(itertools.product(dtypes, kinds)):
        p = problem(kind, 15, 33, mode, tau=tau, dtype=dtype, device=device)
        check(p.with_(beta=(0.5, 1.0, 2.0)[(k + k // 4) % 3]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tau", [0.02, 0.003, 0.001])
def test_a_cold_temperature_without_the_positive_in_the_denominator_is_as_good_as_torch(
    tau, mode, device
):
    """The positive's exponential overflows beside those of the negatives, which may all be in H."""
    kinds = ("gauss", "clamped", "cluster")
    for k, (dtype, kind) in enumerate(itertools.product(DTYPES[:2], kinds)):
        p = problem(kind, 15, 33, mode, tau=tau, dtype=dtype, device=device, near=0.2)
        for variant in FORMS[3:]:
            for tau_plus in (0.0, 0.1, 0.9):
                check(p.with_(variant=variant, tau_plus=tau_plus, beta=(0.5, 1.0, 2.0)[k % 3]))
            check(p.with_(variant=variant, eps=f64(-2.0).to(device)))


@pytest.mark.parametrize("mode", MODES)
def test_rows_at_the_floor_are_as_good_as_torch(mode, device):
    for dtype in DTYPES:
        for tau in (0.3, 0.1, 0.05):
            p = problem("clamped", 33, 10, mode, tau=tau, tau_plus=0.9, dtype=dtype, device=device)
            assert at_the_floor(p).sum() > p.rows / 4
            check(p)
    assert not at_the_floor(p.with_(tau_plus=0.0)).any()  # then R is at least what the floor is


@pytest.mark.parametrize("mode", MODES)
def test_each_input_may_have_its_own_dtype(mode, device):
    mixtures = [
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float16, torch.float64, torch.float32),
        (torch.bfloat16, torch.float16, torch.float64),
    ]
    for dtypes in mixtures:
        p = problem("cluster", 14, 9, mode, dtype=dtypes, device=device, near=0.6)
        check(p)
        assert p.loss(*p.inputs).dtype == p.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_mean_and_sum_are_those_of_the_rows(mode, dtype, device):
    for variant in FORMS:
        p = problem("cluster", 19, 6, mode, dtype=dtype, device=device, variant=variant)
        rows = p.loss(*p.inputs).double()
        # The rows and the result are rounded to the dtype; both sums add up in float64, and each
        # addition rounds by at most half an ulp of the sum of magnitudes.
        relative = 2 * torch.finfo(dtype).eps + p.rows * torch.finfo(torch.float64).eps
        for reduction, wanted in (("mean", rows.mean()), ("sum", rows.sum())):
            got = p.loss(*p.inputs, reduction=reduction)
            assert got.dtype == dtype
            slack = relative * rows.abs().sum() / (p.rows if reduction == "mean" else 1)
            assert abs(got.double() - wanted) <= slack


@pytest.mark.parametrize("mode", MODES)
def test_every_layout_of_the_inputs_gives_the_same_bits(mode, device):
    def slice_of_more(z):
        return torch.cat([z, z, z], -1)[..., z.shape[-1] : 2 * z.shape[-1]]

    def transposed(z):
        return z.mT.contiguous().mT

    def every_other(z):
        return torch.stack([z, z.neg()], -1).flatten(-2)[..., ::2]

    def negative_bit(z):
        return torch._neg_view(z.neg())

    def with_an_offset(z):
        return torch.cat([z[:1], z])[1:]

    for dtype in DTYPES:
        p = problem("cluster", 11, 9, mode, dtype=dtype, device=device, near=0.6)
        wanted = p.loss(*p.inputs)
        for layout in (slice_of_more, transposed, every_other, negative_bit, with_an_offset):
            inputs = [layout(z) for z in p.inputs]
            for z, original in zip(inputs, p.inputs, strict=True):
                assert torch.equal(z, original)
            assert torch.equal(p.loss(*inputs), wanted), layout


def test_an_expanded_row_is_that_row_repeated(device):
    row = torch.randn(1, 9, generator=torch.Generator().manual_seed(0)).to(device)
    z0, z1 = problem("gauss", 12, 9, dtype=torch.float32, device=device).inputs
    same = row.expand(12, 9)
    assert same.stride() == (0, 1)
    for negatives in (None, same, same.expand(12, 12, 9)):
        for arguments in ((same, z1, negatives), (z0, same, negatives)):
            copies = [a if a is None else a.contiguous() for a in arguments]
            losses = [hex_loss(*a, eps=0.2, reduction="none") for a in (arguments, copies)]
            assert torch.equal(*losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_infonce_is_the_cross_entropy_of_the_cosines(dtype, device):
    p = problem("cluster", 17, 12, dtype=dtype, device=device)
    z0, z1 = p.inputs
    u0, u1 = F.normalize(z0.double()), F.normalize(z1.double())
    u = torch.cat([u0, u1])
    itself = torch.eye(34, dtype=torch.bool, device=device)
    target = torch.arange(34, device=device)
    wanted = {
        "ntxent": F.cross_entropy((u @ u.T / 0.2).masked_fill(itself, -INF), target.roll(17)),
        "query": F.cross_entropy(u0 @ u1.T / 0.2, target[:17]),
        "cross": (
            F.cross_entropy(u0 @ u1.T / 0.2, target[:17])
            + F.cross_entropy(u1 @ u0.T / 0.2, target[:17])
        )
        / 2,
    }
    # cosines to an ulp, over tau; the loss is of order 1
    tolerance = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps / 0.2
    for mode, value in wanted.items():
        got = info_nce(z0, z1, temperature=0.2, mode=mode)
        assert got.item() == pytest.approx(value.item(), abs=tolerance), mode
    negatives = u.flip(1)
    logits = torch.cat([(u0 * u1).sum(1, keepdim=True), u0 @ negatives.T], 1)
    value = F.cross_entropy(logits / 0.2, torch.zeros(17, dtype=torch.int64, device=device))
    for given in (negatives, negatives.expand(17, 34, 12)):
        got = info_nce(z0, z1, given.to(dtype), temperature=0.2)
        assert got.item() == pytest.approx(value.item(), abs=tolerance)


def test_the_threshold_is_compared_in_float64(device):
    """A float64 eps between a float32 cosine and its neighbour is not rounded onto it."""
    z = torch.tensor([[1.0, 0.0]], device=device)
    negative = torch.tensor([[0.75, 0.6614378]], device=device)
    cosine = reference.cosines(z, z, negative, "unpaired")[0][0, 1].double()
    for eps, inside in ((cosine, 0), (cosine - 1e-12, 1), (cosine + 1e-12, 0)):
        stats = operators.forward(z, z, negative, eps, f64(0.1), 3, 0, 0, 1.0, 0.1, False, False)[1]
        assert stats[ops.COUNT].item() == inside
