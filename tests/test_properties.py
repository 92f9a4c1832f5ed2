# SPDX-License-Identifier: MIT
"""Properties for every input: drawn by hypothesis, with all that a tensor can be, and symmetries.

Drawn are mode, sizes, dtypes, layouts (expanded, transposed, sliced, with the negative bit),
values (of any scale, not finite), options and the layout of grad_output (strategies.py). The draws
are the same in every run; HYPOTHESIS_PROFILE names another profile.
"""

import math

import operators
import torch
from conftest import Problem, problem
from data import MODES, f64, form, leaves
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import problems

from hex import hex_loss, info_nce, reference

# ---- whatever comes -----------------------------------------------------------------------------


@given(problems())
def test_any_input_gives_a_loss_of_the_right_shape_and_nan_exactly_where_the_oracle_does(p):
    inputs = leaves(*p.inputs)
    loss = p.loss(*inputs)
    assert loss.shape == (p.rows,)
    assert loss.dtype == p.dtype
    truth = p.reference(*(z.to(p.dtype) for z in p.inputs), tau=f64(p.tau))[0]
    assert torch.equal(loss.isnan(), truth.isnan())
    if p.variant == "paper":
        assert (loss[~loss.isnan()] >= 0).all()
        assert loss[~loss.isnan()].isfinite().all()
    loss.sum().backward()
    for z in inputs:
        assert z.grad.shape == z.shape
        assert z.grad.dtype == z.dtype


@given(problems())
def test_any_input_gives_the_bits_of_its_contiguous_copy(p):
    copies = p.with_(inputs=tuple(z.clone(memory_format=torch.contiguous_format) for z in p.inputs))
    a, b = p.ours(), copies.ours()
    assert torch.equal(a.loss.nan_to_num(-1), b.loss.nan_to_num(-1))
    for name in p.names:
        assert torch.equal(a.grads[name].nan_to_num(-7), b.grads[name].nan_to_num(-7))


@given(problems(), st.sampled_from(("cat", "column", "transposed", "negative", "expanded", "step")))
def test_any_grad_output_gives_the_bits_of_its_contiguous_copy(p, layout):
    grad = p.grad_output()
    grad = {
        "cat": lambda: torch.cat([grad, grad])[p.rows :],
        "column": lambda: torch.stack([grad, grad], 1)[:, 1],
        "transposed": lambda: torch.stack([grad, grad]).T.contiguous().T[1],
        "negative": lambda: torch._neg_view(-grad),
        "expanded": lambda: grad[:1].expand(p.rows) if p.rows else grad,
        "step": lambda: torch.stack([grad, -grad], 1).flatten()[::2],
    }[layout]()
    a, b = p.ours(grad), p.ours(grad.clone(memory_format=torch.contiguous_format))
    for name in p.names:
        assert torch.equal(a.grads[name].nan_to_num(-7), b.grads[name].nan_to_num(-7))


@given(problems(), st.floats(0, 1), st.booleans())
def test_any_input_gives_a_threshold_within_the_rows_or_nan(p, quantile, over_negatives):
    z0, z1, negatives, _, _, mode = p.raw()[:6]
    got = operators.threshold(z0, z1, negatives, mode, quantile, over_negatives)
    over = "negatives" if over_negatives else "all"
    wide = (z.to(p.dtype) for z in (z0, z1, negatives))
    wanted = reference.threshold(*wide, p.mode, quantile, over)
    assert got.isnan() == wanted.isnan()
    low, high = operators.row_range(z0, z1, negatives, mode)
    bad = torch.isnan(low)
    assert torch.equal(bad, high.isnan())
    assert ((-1 <= low) & (low <= high) & (high <= 1))[~bad].all()
    if not got.isnan() and not over_negatives:
        assert low.double().mean() - 1e-12 <= got <= high.double().mean() + 1e-12


# ---- identities ---------------------------------------------------------------------------------


@given(problems(special=False, minimum=1))
def test_the_mean_of_losses_is_between_the_least_and_the_greatest(p):
    rows = p.loss(*p.inputs)
    assume(rows.isfinite().all())
    mean = p.loss(*p.inputs, reduction="mean")
    slack = torch.finfo(p.dtype).eps * rows.abs().max()
    assert rows.min() - slack <= mean <= rows.max() + slack


@given(problems(special=False, minimum=1))
def test_infonce_is_what_every_form_is_at_an_infinite_threshold(p):
    at = p.with_(eps=f64(math.inf))
    name = p.mode if len(p.inputs) == 2 else "ntxent"
    decoupled = form(p.variant)["decoupled"]
    options = dict(temperature=p.tau, decoupled=decoupled, mode=name, reduction="none")
    wanted = info_nce(*p.inputs, **options)
    assert torch.equal(at.loss(*p.inputs).nan_to_num(-1), wanted.nan_to_num(-1))


@given(problems(special=False, minimum=1), st.integers(-6, 6))
def test_a_power_of_two_changes_no_bit_of_the_loss(p, exponent):
    """The draws are of moderate size, so no element leaves the range of float16."""
    scaled = tuple(z * 2.0**exponent for z in p.inputs)
    back = all(torch.equal(a * 2.0**-exponent, z) for a, z in zip(scaled, p.inputs, strict=True))
    assume(back)  # no bit fell off a subnormal number
    assert torch.equal(p.loss(*scaled).nan_to_num(-1), p.loss(*p.inputs).nan_to_num(-1))


@given(problems(special=False, minimum=1), st.integers(0, 2**20))
def test_a_rotation_of_the_features_changes_only_rounding(p, seed):
    """A signed permutation, exact in every dtype: the sums run in another order."""
    D = p.inputs[0].shape[1]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(D, generator=generator)
    sign = torch.randint(2, (D,), generator=generator) * 2 - 1
    rotated = p.with_(inputs=tuple((z * sign.to(z.dtype))[..., order] for z in p.inputs))
    near = rotated.with_(eps=f64(math.inf), tau=max(p.tau, 0.1))  # where no membership can flip
    a, b = near.loss(*rotated.inputs), near.loss(*p.inputs)
    # each of up to 40 products and 18 terms rounds once, over tau
    slack = 64 * torch.finfo(p.dtype).eps / near.tau
    torch.testing.assert_close(a, b, rtol=slack, atol=slack, equal_nan=True)


@given(problems(special=False, minimum=1))
def test_every_gradient_is_orthogonal_to_its_row(p):
    grads = p.ours().grads
    for name, z in zip(p.names, p.inputs, strict=False):
        g, z = grads[name].double(), z.double()
        along = (g * z).sum(-1).abs()
        # the gradient's own rounding, and that of the 1/tau-sized terms it is the sum of
        ulp = torch.finfo(grads[name].dtype).eps
        terms = 2 * p.grad_output().abs().max() * p.rows / p.tau * p.condition
        bound = ulp * (g.norm(dim=-1) * z.norm(dim=-1)) + 16 * torch.finfo(p.dtype).eps * terms
        subnormal = torch.finfo(grads[name].dtype).tiny * ulp * z.abs().sum(-1)
        assert (along <= bound + subnormal).all()


def everything(p: Problem):
    """The loss of each row and every gradient of their sum."""
    result = p.ours(torch.ones_like(p.grad_output()))
    return (result.loss, *result.grads.values())


# ---- symmetries ---------------------------------------------------------------------------------


def test_swapping_the_views_swaps_the_rows_and_the_gradients():
    for mode in ("ntxent", "cross"):
        for dtype in (torch.float64, torch.float32):
            p = problem("cluster", 13, 7, mode, dtype=dtype)
            loss, dz0, dz1, _ = everything(p)
            swapped, ez1, ez0, _ = everything(p.with_(inputs=p.inputs[::-1]))
            ulp = torch.finfo(dtype).eps
            torch.testing.assert_close(swapped.roll(13), loss, rtol=64 * ulp, atol=64 * ulp)
            torch.testing.assert_close(ez0, dz0, rtol=0, atol=64 * ulp * dz0.abs().max().item())
            torch.testing.assert_close(ez1, dz1, rtol=0, atol=64 * ulp * dz1.abs().max().item())


def test_reordering_the_images_reorders_the_rows():
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    for mode in MODES:
        p = problem("cluster", 13, 7, mode)
        loss, *grads, _ = everything(p)
        moved = [z if mode == "unpaired" and k == 2 else z[order] for k, z in enumerate(p.inputs)]
        got, *moved_grads, _ = everything(p.with_(inputs=tuple(moved)))
        rows = torch.cat([order, order + 13])[: p.rows] if p.rows > 13 else order
        torch.testing.assert_close(got, loss[rows], rtol=1e-13, atol=1e-14)
        for k, (a, b) in enumerate(zip(moved_grads, grads, strict=True)):
            b = b if mode == "unpaired" and k == 2 else b[order]
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13 * b.abs().max().item())


def test_modes_contain_each_other():
    """cross is query both ways, and shared negatives are own negatives that are all alike."""
    z0, z1, queue = problem("cluster", 13, 7, "unpaired", K=11).inputs
    options = dict(eps=0.4, reduction="none")
    both = hex_loss(z0, z1, mode="cross", **options)
    halves = [hex_loss(*z, mode="query", **options) for z in ((z0, z1), (z1, z0))]
    torch.testing.assert_close(both, torch.cat(halves), rtol=1e-13, atol=1e-14)
    shared = hex_loss(z0, z1, queue, **options)
    own = hex_loss(z0, z1, queue.expand(13, 11, 7), **options)
    torch.testing.assert_close(shared, own, rtol=1e-13, atol=1e-14)
    for mode in ("query", "cross"):
        assert torch.equal(hex_loss(z0, z1, queue, mode=mode, **options), shared)
    columns = torch.tensor([[j for j in range(13) if j != i] for i in range(13)])
    query = hex_loss(z0, z1, z1[columns], **options)
    torch.testing.assert_close(query, halves[0], rtol=1e-13, atol=1e-14)


def test_a_negative_orthogonal_to_all_adds_exactly_one_to_the_rest():
    z0, z1, queue = (z.clone() for z in problem("cluster", 9, 7, "unpaired").inputs)
    for z in (z0, z1, queue):
        z[:, -1] = 0
    orthogonal = torch.eye(7, dtype=torch.float64)[-1:]
    tau, options = 0.2, dict(eps=0.4, temperature=0.2, reduction="none")
    p = torch.nn.functional.cosine_similarity(z0, z1)
    before = hex_loss(z0, z1, queue, **options)
    after = hex_loss(z0, z1, torch.cat([queue, orthogonal]), **options)
    scale = torch.exp(p / tau)
    torch.testing.assert_close(scale * after.exp() - scale * before.exp(), torch.ones_like(p))
