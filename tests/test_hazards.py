# SPDX-License-Identifier: MIT
"""Questions that contrastive losses in use get wrong, asked of ours: it must pass them all.

Cold temperatures, half precision, degenerate batches, and the machinery around a loss. InfoNCE as
it is usually written fails some of them. The cases that are exact by definition are in
test_special_cases.py.
"""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import problem

from hex import HEXLoss, InfoNCELoss

LOSSES = {
    "InfoNCELoss": InfoNCELoss,
    "HEXLoss adaptive": HEXLoss,
    "HEXLoss": lambda tau: HEXLoss(tau, threshold=0.2),
    "HEXLoss excluded": lambda tau: HEXLoss(tau, threshold=0.2, variant="excluded"),
    "HEXLoss released": lambda tau: HEXLoss(tau, threshold=0.2, variant="released"),
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.fixture(params=[name for name in LOSSES if "released" not in name])
def paper(request):
    """Those whose definition is finite and positive in every case."""
    return LOSSES[request.param]


def views(B=16, D=32, dtype=torch.float32, noise=0.3):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, B, D, generator=generator, dtype=torch.float64)
    return a.to(dtype), (a + noise * b).to(dtype)


def run(criterion, a, b):
    """The loss and its gradients in both views."""
    a, b = (z.detach().clone().requires_grad_() for z in (a, b))
    value = criterion(a, b)
    value.sum().backward()
    return value.detach(), a.grad, b.grad


def finite(*tensors):
    return all(t.isfinite().all() for t in tensors)


# ---- temperature --------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.02, 0.01, 0.005, 0.001])
def test_a_cold_temperature_is_finite(loss, tau):
    assert finite(*run(loss(tau), *views(noise=1.0)))


def test_positives_far_apart_at_a_cold_temperature_are_finite_and_right(paper):
    a, b = views(noise=0.1)
    value, *grads = run(paper(0.01), a, -b)
    truth, *_ = run(paper(0.01), a.double(), -b.double())
    assert finite(value, *grads)
    slack = 2 * torch.finfo(torch.float32).eps / 0.01  # cosines right to an ulp, over tau
    assert value.item() == pytest.approx(truth.item(), rel=slack)


def test_a_small_loss_keeps_its_digits(paper):
    a, b = views(noise=0.01, D=512)
    value = paper(0.05)(a, b)
    truth = paper(0.05)(a.double(), b.double())
    assert truth < 1e-5
    # cosines right to an ulp, over tau
    slack = 2 * torch.finfo(torch.float32).eps / 0.05
    assert value.item() == pytest.approx(truth.item(), rel=slack)


@pytest.mark.parametrize("tau", [0.0, -0.1, math.nan, math.inf])
def test_a_temperature_that_is_no_positive_number_is_refused(loss, tau):
    with pytest.raises(ValueError, match="temperature"):
        loss(tau)
    with pytest.raises(ValueError, match="temperature"):
        loss(0.1)(*views(), temperature=tau)


# ---- half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, tau",
    [(torch.float16, 0.5), (torch.float16, 0.1), (torch.float16, 0.05), (torch.bfloat16, 0.1)],
    ids=str,
)
def test_half_inputs_give_the_loss_of_the_same_numbers_in_float64(loss, dtype, tau):
    a, b = views(64, dtype=dtype)
    value, *grads = run(loss(tau), a, b)
    truth, *_ = run(loss(tau), a.double(), b.double())
    assert finite(value, *grads)
    assert value.dtype == torch.float32
    slack = 4 * torch.finfo(torch.float32).eps / tau  # cosines to a few ulp, and N rows of them
    assert value.item() == pytest.approx(truth.item(), rel=slack, abs=slack)


# ---- degenerate batches -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_of_zeros_gets_no_gradient(loss, dtype):
    a, b = views(dtype=dtype)
    a[3] = 0
    value, da, db = run(loss(0.1), a, b)
    assert finite(value, da, db)
    assert (da[3] == 0).all()
    assert max(da.abs().max(), db.abs().max()) < 100  # its terms are 1 / (tau |z|), about 2


def test_one_image_has_loss_zero_and_none_too(loss):
    for B in (1, 0):
        value, *grads = run(loss(0.1), *views(B))
        assert value == 0
        assert all((g == 0).all() for g in grads)


def test_a_collapsed_batch_is_finite(loss):
    a, _ = views()
    same = a[:1].repeat(16, 1)
    value, *grads = run(loss(0.1), same, same)
    assert finite(value, *grads)
    near = same + 1e-4 * a
    assert finite(*run(loss(0.1), near, near.flip(0)))


def test_a_collapsed_batch_has_the_loss_of_guessing():
    same = views()[0][:1].repeat(16, 1)
    assert InfoNCELoss(0.1)(same, same).item() == pytest.approx(math.log(31), rel=1e-6)


@pytest.mark.parametrize("scale", [1e20, 1e-23, 1e37, 1e-37])
def test_the_scale_of_the_embedding_changes_nothing(loss, scale):
    a, b = views()
    wanted, *_ = run(loss(0.1), a, b)
    value, *grads = run(loss(0.1), a * scale, b * scale)
    assert finite(value)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    if scale > 1e-30:  # below, the true gradient overflows
        assert finite(*grads)


def test_nan_is_not_swallowed(loss):
    for bad in (math.nan, math.inf):
        a, b = views()
        a[2, 1] = bad
        assert loss(0.1)(a, b).isnan()


def test_a_duplicate_of_the_anchor_among_the_negatives_is_finite(loss):
    a, b = views()
    a[1] = b[0] = a[0]
    assert finite(*run(loss(0.01), a, b))


# ---- the machinery around -----------------------------------------------------------------------


def test_strides_do_not_matter(loss):
    a, b = views()
    moved = (z.t().contiguous().t() for z in (a, b))
    for x, y in zip(run(loss(0.1), a, b), run(loss(0.1), *moved), strict=True):
        assert torch.equal(x, y)


def test_the_gradient_honours_a_strided_grad_output():
    p = problem("gauss", 8, 5, dtype=torch.float32)
    grad = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))[:, 1]
    a, b = p.ours(grad).grads, p.ours(grad.contiguous()).grads
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_first_and_second_derivatives_match_differences(loss):
    a, b = (z.requires_grad_() for z in views(4, 5, torch.float64, noise=1.0))
    assert torch.autograd.gradcheck(loss(0.5), (a, b))
    assert torch.autograd.gradgradcheck(loss(0.5), (a, b), fast_mode=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on the first use of jvp
def test_forward_mode_is_refused_and_not_silently_zero(loss):
    a, b = views(4, 5)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda a: loss(0.5)(a, b), (a,), (torch.ones_like(a),))


def test_copies_are_the_loss(loss):
    a, b = views()
    criterion = loss(0.1)
    wanted = criterion(a, b)
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(copied(a, b), wanted)


def test_the_number_of_threads_changes_no_bit(loss, threads):
    a, b = views(512, 64)
    got = []
    for n in (1, 2, 3):
        threads(n)
        got.append(run(loss(0.1), a, b))
    for other in got[1:]:
        assert all(torch.equal(x, y) for x, y in zip(got[0], other, strict=True))


def test_inference_mode_and_no_grad_give_the_same_loss(loss):
    a, b = views()
    wanted = loss(0.1)(a, b)
    with torch.inference_mode():
        assert torch.equal(loss(0.1)(a.clone(), b.clone()), wanted)
    with torch.no_grad():
        assert torch.equal(loss(0.1)(a, b), wanted)


def test_autocast_changes_nothing(loss):
    a, b = views()
    wanted = run(loss(0.1), a, b)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(loss(0.1), a, b)
    assert got[0].dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


# ---- the questions can be failed ----------------------------------------------------------------


def plain(tau):
    """InfoNCE as it is usually written: the cross-entropy of the logits, itself masked."""

    def loss(z0, z1):
        z = F.normalize(torch.cat([z0, z1]))
        logits = (z @ z.T / tau).masked_fill(torch.eye(len(z), dtype=torch.bool), -math.inf)
        return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z0)))

    return loss


@pytest.mark.parametrize(
    "question",
    [
        test_a_small_loss_keeps_its_digits,
        test_one_image_has_loss_zero_and_none_too,
        lambda loss: test_a_row_of_zeros_gets_no_gradient(loss, torch.float32),
        lambda loss: test_half_inputs_give_the_loss_of_the_same_numbers_in_float64(
            loss, torch.bfloat16, 0.1
        ),
    ],
    ids=["small loss", "no image", "row of zeros", "bfloat16"],
)
def test_the_usual_infonce_fails(question):
    with pytest.raises(AssertionError):
        question(plain)
