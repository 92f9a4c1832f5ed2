# SPDX-License-Identifier: MIT
"""Labels and groups where there are enough rows for tiles: values and gradients of what
csrc/cpu/tiles.h does by codes, against reference.py.

Fewer rows, masks, guides and logits go block by block and are in test_labels.py.
"""

import dataclasses
import itertools
import math

import operators
import pytest
import torch
from conftest import BY_DOTS, DTYPES, assert_as_good_as_torch
from data import FORMS as OF_VIEWS
from data import MODES, batch, f64, views
from labelled_problems import HEX, check, labelled

from hex import HEXLoss, HEXSupConLoss, hex_sup_con, ops, reference

FORMS = tuple(itertools.product(OF_VIEWS, ("outside", "inside"), (0.0, 1.0, 0.5)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairing", ["self", "pair"])
def test_several_positives_by_tiles(pairing, dtype):
    for k, (variant, positives, beta) in enumerate(FORMS):
        check(labelled(211 + k, 9, pairing, M=199, dtype=dtype, variant=variant, seed=k,
                       positives=positives, beta=beta, labels=(5, 60, 2)[k % 3]))  # fmt: skip


@pytest.mark.parametrize("kind", ("near_collapsed", "collapsed", "zero_rows", "clamped"))
def test_hard_batches_by_tiles(kind):
    for positives, dtype in itertools.product(("outside", "inside"), DTYPES[:2]):
        tau_plus = 0.9 if kind == "clamped" else 0.1
        p = labelled(203, 17, kind=kind, positives=positives, dtype=dtype, tau=0.2,
                     tau_plus=tau_plus, labels=13)  # fmt: skip
        if "collapsed" not in kind:
            check(p)
            continue
        for eps in (-2.0, math.inf):  # there is no gap for eps
            check(dataclasses.replace(p, tensors=(*p.tensors[:-2], f64(eps), p.tensors[-1])))


def groups_of(z: list[torch.Tensor], seed: int = 0) -> torch.Tensor:
    """Of the rows of z0, of z1 and of the negatives."""
    g = torch.Generator().manual_seed(seed)
    own = torch.randint(0, 7, (len(z[0]),), generator=g)
    others = torch.randint(0, 7, (z[2].shape[:-1].numel(),), generator=g) if len(z) > 2 else own[:0]
    return torch.cat([own, own, others])


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_groups_of_views_by_tiles(mode, dtype):
    """And `paired`, which has no tiles, anchor by anchor."""
    for k, (variant, beta) in enumerate(itertools.product((0, 1, 2), (0.0, 1.0, 0.5))):
        check_groups(mode, dtype, variant, beta, k)


def check_groups(mode: str, dtype: torch.dtype, variant: int, beta: float, seed: int) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    B, K = (203, 211) if mode != "paired" else (23, 7)
    z = [x.to(dtype) for x in batch("cluster", B, 9, mode, K, seed) if x is not None]
    groups = groups_of(z, seed)
    z = [*z, z[0][:0]][:3]
    ids, mask, _, guide = operators.nothing(z[0])
    sets, numbers, code = (ids, mask, groups, guide), (f64(0.0), f64(0.1)), ops.MODES[mode]
    weights = torch.randn(2 * B, generator=torch.Generator().manual_seed(1))

    def ours(*leaves):
        return ops.loss((*leaves, *sets), *numbers, (code, 0, 0, beta, variant, 0.1, False))[0]

    def plain(*leaves):
        return reference.problem_rows(*leaves, *sets, *numbers, code, 0, beta, variant, 0.1)[0]

    def by(function, to):
        leaves = [x.to(to).detach().requires_grad_() for x in z]
        rows = function(*leaves)
        weight = weights[: len(rows)].to(rows)
        grads = torch.autograd.grad(rows, leaves, weight, allow_unused=True)
        return rows.detach(), [g for g in grads if g is not None and g.numel()]

    (a, da), (b, db), (c, dc) = by(ours, dtype), by(plain, compute), by(plain, torch.float64)
    condition = 1.1 / 0.9
    how = dict(tau=0.1, dtype=compute, condition=condition, about=(mode, variant, beta))
    assert_as_good_as_torch(a, b, c, scale=20.0, **how)
    for x, *gradients in zip(z, da, db, dc, strict=False):
        mass = 20 * weights.abs().max().item() * condition
        scale = mass / x.double().norm(dim=-1).clamp(min=1e-9).min().item()
        if BY_DOTS and dtype == torch.bfloat16:  # as in conftest.check
            gradients[1] = gradients[1].to(dtype)
        assert_as_good_as_torch(*gradients, scale=scale, **how)


def test_labels_that_are_far_apart_are_told_by_their_rank():
    z = torch.randn(230, 5, generator=torch.Generator().manual_seed(0))
    near = torch.arange(230) % 7
    far = torch.tensor([-(2**62), 2**62, 0, 2**40, 2**40 + 2**32, -1, 2**62 - 1])[near]
    for eps in (0.3, math.inf):
        assert torch.equal(hex_sup_con(z, near, eps=eps), hex_sup_con(z, far, eps=eps))
    # 2^32 apart: the same in the low half of their bits
    other = torch.where(near == 3, 0, near * 2**32)
    alike = torch.where(near == 3, 0, near)
    assert torch.equal(hex_sup_con(z, other, eps=0.3), hex_sup_con(z, alike, eps=0.3))


@pytest.mark.parametrize("positives", ["outside", "inside"])
def test_a_nan_by_tiles_reaches_every_row_that_sees_it(positives):
    z = torch.randn(230, 5, generator=torch.Generator().manual_seed(0))
    z[17, 2] = math.nan
    z.requires_grad_()
    loss = hex_sup_con(z, torch.arange(230) % 7, eps=0.3, positives=positives, reduction="none")
    assert loss.isnan().all()
    (dz,) = torch.autograd.grad(loss.sum(), z)
    assert dz.isnan().all()
    groups = torch.arange(115) % 7
    loss = HEXLoss(reduction="none")(z[:115], z[115:], groups=groups)
    assert loss.isnan().all()


def test_rows_without_a_positive_or_a_negative_by_tiles():
    z = torch.randn(230, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = torch.arange(230)
    alone[:40] = 0  # 40 of one label, the others by themselves
    loss = hex_sup_con(z, alone, eps=0.3, reduction="none")
    assert (loss[:40] > 0).all()
    assert torch.equal(loss[40:], torch.zeros(190, dtype=torch.float64))
    one = torch.zeros(230, dtype=torch.int64)  # no negatives at all
    p = labelled(230, 5, labels=1)
    check(p)
    assert (hex_sup_con(z, one, eps=0.3, positives="inside", reduction="none") == 0).all()


def test_without_h_it_is_supcon_to_the_bit_whatever_the_threads():
    z = torch.randn(430, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(430) % 11

    def step(loss):
        return loss.detach(), *torch.autograd.grad(loss, z)

    plain = step(HEXSupConLoss(threshold=None)(z, labels))
    above = step(hex_sup_con(z, labels, eps=1.0))
    assert all(torch.equal(a, b) for a, b in zip(plain, above, strict=True))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(step(hex_sup_con(z, labels, eps=0.2)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_cosines_that_are_kept_give_the_same_gradient():
    p = labelled(230, 9, dtype=torch.float32)
    _, arguments = p.forward()
    *start, _keep, _tf32 = arguments
    inputs, tau = p.inputs(list(p.tensors)), p.tensors[-1]
    results = []
    for keep in (0, operators.KEEP):
        loss, stats, kept = HEX.forward(*start, keep, False)
        assert kept.numel() > 0 if keep else kept.numel() == 0
        results.append(HEX.backward(p.grad_output(), *inputs, tau, stats, kept, p.code, 0, 1, 1.0,
                                    False, 15))  # fmt: skip
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_nan_in_an_anchors_group_is_left_out_with_it(variant):
    """In the released form; in the paper's it is seen, as by rows."""
    z0, z1 = views("cluster", 130, 5, seed=0)[:2]
    z0[5] = torch.nan
    groups = torch.arange(130) % 3
    rows = HEXLoss(variant=variant, reduction="none")(z0, z1, groups=groups)
    seen = torch.ones(260, dtype=torch.bool)
    if variant == "released":
        seen = torch.cat([groups, groups]) != groups[5]
        seen[[5, 135]] = True
    assert torch.equal(rows.isnan(), seen)
