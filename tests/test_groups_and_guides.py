# SPDX-License-Identifier: MIT
"""HEXLoss with groups or a guide, in every mode: what decides H(i) and eps, and what does not.

The kernels' values and derivatives are in test_labels.py.
"""

import itertools

import pytest
import torch
from data import MODES, batch, f64
from torch import Tensor

from hex import (
    HEXLoss,
    InfoNCELoss,
    ThresholdTracker,
    batch_threshold,
    hex_loss,
    hex_sup_con,
    ops,
)
from hex.reference import Table, cosines, row_loss

B, D, K = 17, 6, 11


def inputs(mode: str, kind: str = "cluster") -> tuple[Tensor, ...]:
    return tuple(z for z in batch(kind, B, D, mode, K) if z is not None)


def module(mode: str, **options) -> HEXLoss:
    options = {"threshold": ThresholdTracker.adaptive(0.9, over="negatives")} | options
    return HEXLoss(0.2, mode=mode if mode in ("ntxent", "query", "cross") else "ntxent", **options)


def groups_of(mode: str):
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 4, (B,), generator=generator)
    if mode in ("unpaired", "paired"):
        shape = (K,) if mode == "unpaired" else (B, K)
        return groups, torch.randint(0, 4, shape, generator=generator)
    return groups


def same_group(mode: str) -> Tensor:
    """(N, M) in the layout of reference.cosines."""
    groups = groups_of(mode)
    if mode == "ntxent":
        groups = groups.repeat(2)
        return groups[:, None] == groups
    if mode in ("query", "cross"):
        same = groups[:, None] == groups
        return same if mode == "query" else torch.cat([same, same])
    own, others = groups
    return torch.cat([own[:, None] == own[:, None], own[:, None] == others], 1)


def dense(z: tuple[Tensor, ...], mode: str, hard: Tensor, variant: str) -> Tensor:
    """The loss of each row with H(i) given as a mask of reference.cosines' layout."""
    c, _, negative = cosines(*(*z, None)[:3], mode)
    c_p = cosines(*(*z, None)[:3], mode)[1]
    positive = torch.zeros_like(negative)
    place = (c == c_p[:, None]) & ~negative
    positive[torch.arange(len(c)), place.to(torch.int8).argmax(1)] = True
    return row_loss(Table(c, positive, negative, negative), hard, f64(0.2), 1.0, 0.1, variant)[0]


# ---- groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ("paper", "released", "excluded"))
@pytest.mark.parametrize("mode", MODES)
def test_groups_are_h(mode, variant):
    z = [x.requires_grad_() for x in inputs(mode)]
    for reduction in ("none", "mean", "sum"):
        loss = module(mode, variant=variant, reduction=reduction)
        value = loss(*z, groups=groups_of(mode))
        rows = dense(tuple(z), mode, same_group(mode), variant)
        truth = {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[reduction]
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-11)
        ours = torch.autograd.grad(value.sum(), z)
        for a, b in zip(ours, torch.autograd.grad(truth.sum(), z), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * b.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
def test_with_groups_the_threshold_plays_no_part(mode):
    z = [x.requires_grad_() for x in inputs(mode)]
    loss, fixed = module(mode), module(mode, threshold=0.9)
    before = {name: t.clone() for name, t in loss.state_dict().items()}
    value = loss(*z, groups=groups_of(mode))
    assert torch.equal(value, fixed(*z, groups=groups_of(mode)))
    assert loss.last.eps.isnan()
    assert loss.last.hard > 0
    assert all(torch.equal(t, before[name]) for name, t in loss.state_dict().items())


def test_one_group_each_is_info_nce_and_one_for_all_is_a_threshold_below_every_cosine():
    z0, z1 = inputs("ntxent")
    loss = module("ntxent", beta=0.5)
    torch.testing.assert_close(loss(z0, z1, groups=torch.arange(B)), InfoNCELoss(0.2)(z0, z1))
    everyone = loss(z0, z1, groups=torch.zeros(B, dtype=torch.uint8))
    torch.testing.assert_close(
        everyone, hex_loss(z0, z1, eps=-2.0, temperature=0.2, beta=0.5), rtol=1e-12, atol=0
    )


# ---- a guide ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", (False, True))
@pytest.mark.parametrize("mode", MODES)
def test_the_embeddings_themselves_as_the_guide_change_nothing(mode, rows):
    z = [x.requires_grad_() for x in inputs(mode)]
    tracker = (lambda: ThresholdTracker.fixed(0.8, normalize_rows=True)) if rows else (
        lambda: ThresholdTracker.adaptive(0.9, over="negatives"))  # fmt: skip
    one, other = (module(mode, threshold=tracker(), reduction="none") for _ in range(2))
    ours, plain = one(*z, guide=tuple(z)), other(*z)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-13)
    assert one.last.hard == other.last.hard > 0
    assert torch.equal(one.threshold.value, other.threshold.value)
    grads = (torch.autograd.grad(v.sum(), z) for v in (ours, plain))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
def test_the_guide_decides_membership_and_threshold_and_gets_no_gradient(mode):
    z = [x.requires_grad_() for x in inputs(mode)]
    guide = [torch.cat([x, x.flip(-2)], -1).requires_grad_() for x in inputs(mode, "gauss")]
    loss = module(mode, reduction="none")
    value = loss(*z, guide=tuple(guide))
    shown = mode if mode in ("ntxent", "query", "cross") else "ntxent"
    eps = batch_threshold(*guide, mode=shown, quantile=0.9, over="negatives")
    assert loss.last.eps == eps
    c = cosines(*(*guide, None)[:3], mode)[0]
    truth = dense(tuple(z), mode, c > eps, "paper")
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-11)
    value.sum().backward()
    assert all(g.grad is None for g in guide)
    assert all(x.grad.abs().max() > 0 for x in z)


def test_the_guide_may_have_another_dtype_and_no_threshold_is_info_nce():
    z0, z1 = (z.float() for z in inputs("query"))
    guide = tuple(g.bfloat16() for g in inputs("query", "gauss"))
    loss = module("query", threshold=0.1)(z0, z1, guide=guide)
    assert loss.dtype == torch.float32
    off = module("query", threshold=None)(z0, z1, guide=guide)
    torch.testing.assert_close(off, InfoNCELoss(0.2, mode="query")(z0, z1), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it traces
@pytest.mark.parametrize("mode, by", [("query", "guide"), ("paired", "groups")])
def test_compiled_as_one_graph_it_is_the_same(mode, by):
    torch.compiler.reset()  # each case is a compilation of the same forward
    z = inputs(mode)
    given = {by: inputs(mode, "gauss") if by == "guide" else groups_of(mode)}
    results = []
    for function in (module(mode), torch.compile(module(mode), backend="aot_eager",
                                                 fullgraph=True)):  # fmt: skip
        leaves = [x.clone().requires_grad_() for x in z]
        value = function(*leaves, **given)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_devices_without_kernels_run_the_formulas(monkeypatch):
    for mode in MODES:
        z, guide = inputs(mode), inputs(mode, "gauss")
        kernels = [module(mode)(*z, groups=groups_of(mode)), module(mode)(*z, guide=guide)]
        with monkeypatch.context() as patch:
            patch.setattr(ops, "_KERNELS", {"meta"})
            patch.setattr(ops, "_warned", {"cpu"})
            plain = [module(mode)(*z, groups=groups_of(mode)), module(mode)(*z, guide=guide)]
        for a, b in zip(kernels, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=0)


# ---- errors -------------------------------------------------------------------------------------

Z = torch.ones(4, 3)
ONES = torch.ones(4, dtype=torch.int64)
QUEUE = torch.ones(5, 3)
ERRORS = [
    (dict(groups=ONES[:3]), ValueError, "groups: got shape (3,), wanted (4,)"),
    (dict(groups=ONES.float()), TypeError, "groups: got torch.float32, wanted an integer dtype"),
    (dict(groups=[1, 2, 3, 4]), TypeError, "groups: got list, wanted a torch.Tensor"),
    (dict(groups=ONES, negatives=QUEUE), ValueError, "wanted (groups, negative_groups)"),
    (dict(groups=(ONES, ONES), negatives=QUEUE), ValueError, "groups[1]: got shape (4,)"),
    (dict(groups=ONES, guide=(Z, Z)), ValueError, "groups, guide: got both"),
    (dict(guide=Z), ValueError, "guide: got Tensor, wanted a tuple (g0, g1)"),
    (dict(guide=(Z,)), ValueError, "guide: got (Tensor,), wanted a tuple (g0, g1)"),
    (dict(guide=(Z, Z), negatives=QUEUE), ValueError, "wanted a tuple (g0, g1, g_neg"),
    (
        dict(guide=(Z, Z, Z), negatives=QUEUE),
        ValueError,
        "wanted, except for the last axis, [(4, 3), (4",
    ),
    (dict(guide=(Z[:3], Z[:3])), ValueError, "guide: got [(3, 3), (3, 3)], wanted"),
    (dict(guide=(Z, Z[:3])), ValueError, "guide: g1: got shape (3, 3)"),
    (dict(guide=(Z, Z.int())), TypeError, "guide: g1: got torch.int32"),
]


@pytest.mark.parametrize("dtype", (torch.uint16, torch.uint32, torch.uint64, torch.uint8), ids=str)
def test_labels_and_groups_may_be_unsigned(dtype):
    z, labels = inputs("ntxent")[0], torch.arange(B) % 3
    largest = torch.iinfo(dtype).max - 2
    unsigned = torch.tensor([int(k) + largest for k in labels], dtype=dtype)
    ours = hex_sup_con(z, unsigned, groups=unsigned, reduction="none")
    assert torch.equal(ours, hex_sup_con(z, labels, groups=labels, reduction="none"))


@pytest.mark.parametrize("arguments, error, text", ERRORS)
def test_a_bad_argument_is_named_and_nothing_is_changed(arguments, error, text):
    loss = HEXLoss()
    before = loss.state_dict()
    with pytest.raises(error) as caught:
        loss(**({"z0": Z.clone().requires_grad_(), "z1": Z} | arguments))
    assert text in str(caught.value)
    assert loss.last is None
    pairs = itertools.zip_longest(before.values(), loss.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
