# SPDX-License-Identifier: MIT
"""The gradient: what it owes to grad_output, which input gets one, its rounding, and that it is the
one of differences.

That it is plain PyTorch's is in test_values.py; the second derivative and torch.func are in
test_transforms.py.
"""

import itertools
import math

import pytest
import torch
from conftest import BY_DOTS, Problem, problem
from data import FORMS, MODES, f64, leaves

from hex import HEXLoss, hex_loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_gradient_is_the_float32_gradient_rounded_to_nearest_even(dtype, device):
    if BY_DOTS and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("this level rounds the terms of a bfloat16 gradient too")
    ties = 0
    # the gradients of large rows are subnormal in float16
    for mode, scale in itertools.product(MODES, (1.0, 2.0**12)):
        half = problem("cluster", 64, 1000, mode, K=7, dtype=dtype, device=device, near=0.6)
        half = half.with_(inputs=tuple(z * scale for z in half.inputs))
        single = half.with_(inputs=tuple(z.float() for z in half.inputs))
        got, wide = half.ours().grads, single.ours().grads
        assert torch.equal(got["tau"], wide["tau"])
        for name in half.names[:-1]:
            assert torch.equal(got[name], wide[name].to(dtype))
            error = wide[name] - got[name].float()
            other = wide[name] + error  # as far away, on the other side
            ties += ((error != 0) & (other == other.to(dtype).float())).sum().item()
    assert ties > 0


# ---- grad_output --------------------------------------------------------------------------------


def layouts_of(grad):
    """The same numbers as grad, (N,), in every layout that autograd hands to a backward."""
    n = grad.shape[0]
    yield "a slice of a concatenation", torch.cat([grad, grad, grad])[n : 2 * n]
    yield "a column", torch.stack([grad] * 3, 1)[:, 1]
    yield "a transposed view", torch.stack([grad] * 2).T.contiguous().T[0]
    yield "every third", torch.stack([grad, grad + 1, grad - 1], 1).flatten()[::3]
    yield "the negative bit", torch._neg_view(-grad)
    yield "an offset", torch.cat([grad[:3], grad])[3:]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_layout_of_grad_output_gives_the_same_bits(mode, dtype, device):
    p = problem("cluster", 13, 7, mode, dtype=dtype, device=device)
    wanted = p.ours(p.grad_output()).grads
    for name, grad in layouts_of(p.grad_output()):
        assert torch.equal(grad, p.grad_output()), name
        got = p.ours(grad).grads
        assert all(torch.equal(got[k], wanted[k]) for k in wanted), name
    for value in (1.0, -0.75):
        one = torch.full((), value, dtype=p.dtype, device=device)
        wanted = p.ours(one.repeat(p.rows)).grads
        got = p.ours(one.expand(p.rows)).grads
        assert all(torch.equal(got[k], wanted[k]) for k in wanted), "expanded"


def test_rows_used_in_several_places_add_up(device):
    """cat, an expanded sum, an index and a transposed product, as autograd combines them."""
    p = problem("cluster", 13, 7, device=device)
    (z0, z1), ones = p.inputs, torch.ones(p.rows, 3, dtype=torch.float64, device=device)
    uses = {
        "cat": (lambda L: torch.cat([2 * L, L[:0], -L]) @ ones[:1].expand(52, 3)[:, 0], 1.0),
        "sum of a matrix": (lambda L: L.expand(3, p.rows).sum(), 3.0),
        "outer product": (lambda L: (L[:, None] @ ones[:1]).T.sum(), 3.0),
        "every second": (lambda L: L.reshape(p.rows // 2, 2)[:, 1].sum(), None),
    }
    for name, (use, factor) in uses.items():
        a, b = leaves(z0, z1)
        use(p.loss(a, b)).backward()
        grad = torch.full((p.rows,), factor or 0.0, dtype=torch.float64, device=device)
        if factor is None:
            grad[1::2] = 1
        wanted = p.ours(grad).grads
        torch.testing.assert_close(a.grad, wanted["z0"], rtol=1e-13, atol=1e-15, msg=name)
        torch.testing.assert_close(b.grad, wanted["z1"], rtol=1e-13, atol=1e-15, msg=name)


@pytest.mark.parametrize("B", [13, 299])
@pytest.mark.parametrize("mode", MODES)
def test_mean_and_sum_spread_grad_output_over_the_rows(mode, B, device):
    p = problem("cluster", B, 7, mode, device=device)
    factor = torch.tensor(-1.75, dtype=torch.float64, device=device)
    for reduction, share in (("sum", 1.0), ("mean", 1 / p.rows)):
        inputs, tau = leaves(*p.inputs), f64(p.tau).to(device).requires_grad_()
        loss = p.loss(*inputs, tau=tau, reduction=reduction)
        got = torch.autograd.grad(loss, (*inputs, tau), factor)
        wanted = p.ours(factor * share * torch.ones_like(p.grad_output())).grads.values()
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15 * b.abs().max().item())


def test_a_grad_output_of_zero_gives_zero_and_of_nan_gives_nan(device):
    for mode in MODES:
        p = problem("cluster", 9, 5, mode, device=device)
        assert all((g == 0).all() for g in p.ours(torch.zeros_like(p.grad_output())).grads.values())
        grads = p.ours(torch.full_like(p.grad_output(), math.nan)).grads
        assert all(g.isnan().all() for g in grads.values())


# ---- who gets one -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_what_needs_no_gradient_gets_none_and_changes_no_other(mode, device):
    p = problem("cluster", 9, 5, mode, device=device)
    everything = p.ours(torch.ones_like(p.grad_output())).grads
    for mask in range(2 ** len(p.names)):
        tensors = [*p.inputs, f64(p.tau).to(device)]
        tensors = [t.clone().requires_grad_(bool(mask >> k & 1)) for k, t in enumerate(tensors)]
        loss = p.loss(*tensors[:-1], tau=tensors[-1], reduction="sum")
        assert loss.requires_grad == (mask > 0)
        if mask:
            loss.backward()
        for name, t in zip(p.names, tensors, strict=True):
            if t.requires_grad:
                assert torch.equal(t.grad, everything[name])
            else:
                assert t.grad is None


def test_the_threshold_gets_no_gradient(device):
    z0, z1 = leaves(*problem("cluster", 9, 5, device=device).inputs)
    eps = f64(0.3).to(device).requires_grad_()
    hex_loss(z0, z1, eps=eps).backward()
    assert eps.grad is None
    assert z0.grad is not None


def test_one_tensor_in_every_place_gets_the_sum(device):
    z = problem("cluster", 9, 5, device=device).inputs[0]
    split = leaves(z, z, z)
    hex_loss(*split, eps=0.3).backward()
    (one,) = leaves(z)
    hex_loss(one, one, one, eps=0.3).backward()
    torch.testing.assert_close(one.grad, sum(s.grad for s in split), rtol=1e-13, atol=1e-15)


def test_a_later_write_to_the_threshold_does_not_change_the_gradient(device):
    z0, z1 = leaves(*problem("cluster", 9, 5, device=device).inputs)
    wanted = torch.autograd.grad(hex_loss(z0, z1, eps=0.3), z0)[0]
    eps = f64(0.3).to(device)
    loss = hex_loss(z0, z1, eps=eps)
    eps.fill_(5.0)
    assert torch.equal(torch.autograd.grad(loss, z0)[0], wanted)


def test_two_calls_before_one_backward_work(device):
    criterion = HEXLoss(0.1)
    batches = [problem("cluster", 91, 5, seed=seed, device=device).inputs for seed in (0, 1)]
    singles = []
    for z0, z1 in batches:
        a, b = leaves(z0, z1)
        criterion(a, b).backward()
        singles.append(a.grad)
    leaf = [leaves(*z) for z in batches]
    (criterion(*leaf[0]) + criterion(*leaf[1])).backward()
    for (a, _), wanted in zip(leaf, singles, strict=True):
        assert torch.equal(a.grad, wanted)


def test_the_temperature_keeps_its_dtype(device):
    z0, z1 = problem("cluster", 9, 5, device=device).inputs
    wanted = None
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        tau = torch.tensor(0.125, dtype=dtype, device=device, requires_grad=True)
        hex_loss(z0, z1, eps=0.3, temperature=tau).backward()
        assert tau.grad.dtype == dtype
        wanted = tau.grad.item() if wanted is None else wanted
        assert tau.grad.item() == pytest.approx(wanted, rel=torch.finfo(dtype).eps)


# ---- by differences -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_differences_of_the_loss(mode, variant, device):
    """In float64 and tighter than gradcheck's own tolerances: central differences of 1e-5 err by
    1e-10 of the third derivative, which tau = 0.4 keeps of order 1e2, and 1e-16 / 1e-5 by rounding.
    """
    for tau_plus, beta in ((0.1, 1.0), (0.0, 0.0), (0.5, 1.7), (0.9, 0.5)):
        p = problem(
            "gauss", 4, 5, mode, K=6, near=0.1, tau=0.4, beta=beta, tau_plus=tau_plus,
            variant=variant, device=device,
        )  # fmt: skip

        def loss(*tensors, p: Problem = p):
            return p.loss(*tensors[:-1], tau=tensors[-1])

        tensors = leaves(*p.inputs, f64(p.tau).to(device))
        assert torch.autograd.gradcheck(loss, tensors, eps=1e-5, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_is_orthogonal_to_its_row(mode, device):
    for dtype in (torch.float64, torch.float32):
        p = problem("cluster", 23, 12, mode, dtype=dtype, device=device)
        grads = p.ours().grads
        for name, z in zip(p.names, p.inputs, strict=False):
            along = (grads[name].double() * z.double()).sum(-1)
            size = grads[name].double().norm(dim=-1) * z.double().norm(dim=-1)
            # D terms, each rounded once; and the scale of the row's terms before the projection
            assert (along.abs() <= 12 * torch.finfo(dtype).eps * size.max()).all()
