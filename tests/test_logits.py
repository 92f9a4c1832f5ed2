# SPDX-License-Identifier: MIT
"""HEXCrossEntropyLoss and hex_cross_entropy: against torch's cross-entropy and against HEXLoss.

The kernels' values and derivatives are in test_labels.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from data import FORMS, batch, f64, form
from torch import Tensor

from hex import HEXCrossEntropyLoss, HEXLoss, ThresholdTracker, hex_cross_entropy, hex_loss, ops
from hex.reference import cosines

B, D, K, TAU = 19, 7, 23, 0.2


def moco(dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """z0, z1, queue; the logits and the target that MoCo makes of them."""
    z = batch("cluster", B, D, "unpaired", K)
    c = cosines(*z, "unpaired")[0]
    return z, (c / TAU).to(dtype), torch.zeros(B, dtype=torch.int64)


def simclr() -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """z0, z1; logits of all pairs without the diagonal, the positive first."""
    z0, z1, _ = batch("cluster", B, D)
    c, p, negative = cosines(z0, z1, None, "ntxent")
    logits = torch.cat([p[:, None], c[negative].reshape(2 * B, -1)], 1) / TAU
    return (z0, z1), logits, torch.zeros(2 * B, dtype=torch.int64)


def gradient(function, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_with_the_local_term_off_it_is_torchs_cross_entropy(dtype, reduction):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(31, 57, generator=generator).to(dtype)
    logits = logits.masked_fill(torch.rand(31, 57, generator=generator) < 0.1, -math.inf)
    target = torch.randint(0, 57, (31,), generator=generator)
    logits[torch.arange(31), target] = 1.5
    ours = HEXCrossEntropyLoss(TAU, threshold=None, reduction=reduction)
    part = 1e-10 if dtype == torch.float64 else 1e-5
    pairs = zip(
        gradient(lambda x: ours(x, target), logits),
        gradient(lambda x: F.cross_entropy(x, target, reduction=reduction), logits),
        strict=True,
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=part * b.abs().max().item())


@pytest.mark.parametrize("variant", FORMS)
def test_on_the_logits_of_a_queue_it_is_hexloss(variant):
    z, logits, target = moco()
    options = dict(eps=0.35, temperature=TAU, beta=0.7, reduction="none", **form(variant))
    ours = hex_cross_entropy(logits, target, **options)
    torch.testing.assert_close(ours, hex_loss(*z, **options), rtol=1e-10, atol=1e-12)


def test_the_gradient_through_the_logits_is_that_of_hexloss_and_so_is_the_temperatures():
    z, _, target = moco()
    results = []
    for through in (True, False):
        leaves = [x.clone().requires_grad_() for x in z]
        tau = f64(TAU).requires_grad_()
        if through:
            logits = cosines(*leaves, "unpaired")[0] / tau
            value = hex_cross_entropy(logits, target, eps=0.35, temperature=tau, tau_plus=0.9)
        else:
            value = hex_loss(*leaves, eps=0.35, temperature=tau, tau_plus=0.9)
        results.append((value, *torch.autograd.grad(value, (*leaves, tau))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * b.abs().max().item())


@pytest.mark.parametrize("over", ("all", "negatives"))
def test_the_threshold_of_a_queue_is_that_of_hexloss(over):
    z, logits, target = moco()

    def tracker():
        return ThresholdTracker.adaptive(0.8, over=over)

    ours, hexloss = HEXCrossEntropyLoss(TAU, threshold=tracker()), HEXLoss(TAU, threshold=tracker())
    x = logits.clone().requires_grad_()
    torch.testing.assert_close(ours(x, target), hexloss(*(v.requires_grad_() for v in z)))
    torch.testing.assert_close(ours.last.eps, hexloss.last.eps, rtol=0, atol=1e-12)
    assert int(ours.threshold.updates) == 1
    assert ours.last.hard == hexloss.last.hard > 0


def test_self_column_adds_the_similarity_with_itself_that_simclr_left_out():
    z, logits, target = simclr()
    thresholds = {}
    for self_column in (False, True):
        tracker = ThresholdTracker.adaptive(0.9, over="all")
        loss = HEXCrossEntropyLoss(TAU, threshold=tracker, self_column=self_column)
        loss(logits, target)
        thresholds[self_column] = loss.last.eps
    hexloss = HEXLoss(TAU, threshold=ThresholdTracker.adaptive(0.9, over="all"))
    hexloss(*z)
    torch.testing.assert_close(thresholds[True], hexloss.last.eps, rtol=0, atol=1e-12)
    assert thresholds[False] < thresholds[True]
    rows = ThresholdTracker.fixed(0.7, normalize_rows=True)
    ours = HEXCrossEntropyLoss(TAU, threshold=rows, self_column=True, reduction="none")
    theirs = HEXLoss(TAU, threshold=ThresholdTracker.fixed(0.7, normalize_rows=True),
                     reduction="none")  # fmt: skip
    torch.testing.assert_close(ours(logits, target), theirs(*z), rtol=1e-10, atol=1e-12)


def test_columns_of_minus_infinity_are_left_out():
    _, logits, target = moco()
    masked = torch.cat([logits, torch.full((B, 3), -math.inf)], 1)
    a = HEXCrossEntropyLoss(TAU, threshold=ThresholdTracker.adaptive(0.8, over="negatives"))
    b = HEXCrossEntropyLoss(TAU, threshold=ThresholdTracker.adaptive(0.8, over="negatives"))
    for x, y in zip(gradient(lambda x: a(x, target), masked),
                    gradient(lambda x: b(x, target), logits), strict=True):  # fmt: skip
        if x.dim():
            assert torch.equal(x[:, -3:], torch.zeros(B, 3))
            x = x[:, :-3]
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("eps", (1.0, 1.5))
def test_nothing_is_hard_from_a_threshold_of_1_on_whatever_the_logits(eps):
    logits = 60 * torch.randn(9, 13, generator=torch.Generator().manual_seed(0))
    assert (logits * 0.1).max() > 2  # times the temperature no cosines
    target = torch.arange(9)
    for values in (logits, logits.double()):
        loss = hex_cross_entropy(values, target, eps=eps, temperature=0.1)
        torch.testing.assert_close(loss, F.cross_entropy(values, target))


def test_nan_reaches_its_row_only_and_leaves_the_tracker_alone():
    _, logits, target = moco()
    bad = logits.clone()
    bad[3, 5] = math.nan
    loss = HEXCrossEntropyLoss(TAU, threshold=ThresholdTracker.adaptive(0.8), reduction="none")
    rows = loss(bad.requires_grad_(), target)
    assert int(loss.threshold.skipped) == 1
    assert loss.threshold.value == math.inf
    assert torch.equal(rows.isnan(), torch.arange(B) == 3)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_logits_under_autocast_give_float32(dtype):
    _, logits, target = moco(dtype)
    x = logits.requires_grad_()
    with torch.autocast("cpu", dtype):
        value = HEXCrossEntropyLoss(TAU, threshold=0.5)(x, target)
    value.backward()
    assert value.dtype == torch.float32
    assert x.grad.dtype == dtype
    wide = hex_cross_entropy(x.double(), target, eps=0.5, temperature=TAU)
    torch.testing.assert_close(value.double(), wide, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it traces
def test_func_vmap_and_a_compiled_graph():
    _, logits, target = moco()

    def loss(x):
        return hex_cross_entropy(x, target, eps=0.3, temperature=TAU)

    x = torch.stack([logits, logits.flip(0)])
    each = torch.stack([loss(x[0]), loss(x[1])])
    torch.testing.assert_close(torch.vmap(loss)(x), each, rtol=0, atol=0)
    value, grad = gradient(loss, logits)
    torch.testing.assert_close(torch.func.grad(loss)(logits), grad, rtol=0, atol=0)
    module = HEXCrossEntropyLoss(TAU, threshold=ThresholdTracker.adaptive(over="negatives"))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradient(lambda x: module(x, target), logits),
                    gradient(lambda x: compiled(x, target), logits), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_in_place_of_the_cross_entropy_of_lightly():
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    z0, z1, _ = batch("cluster", B, D)
    peer = lightly.NTXentLoss(TAU)
    before = peer(z0, z1)
    peer.cross_entropy = HEXCrossEntropyLoss(TAU, threshold=None)
    torch.testing.assert_close(peer(z0, z1), before)
    peer.cross_entropy = HEXCrossEntropyLoss(TAU, threshold=0.35)
    torch.testing.assert_close(peer(z0, z1), hex_loss(z0, z1, eps=0.35, temperature=TAU))


def test_devices_without_kernels_run_the_formulas(monkeypatch):
    _, logits, target = moco()
    module = HEXCrossEntropyLoss(TAU, threshold=ThresholdTracker.adaptive(0.8), self_column=True)
    kernel = gradient(lambda x: module(x, target), logits)
    monkeypatch.setattr(ops, "_KERNELS", {"meta"})
    monkeypatch.setattr(ops, "_warned", {"cpu"})
    plain = gradient(lambda x: module(x, target), logits)
    for a, b in zip(kernel, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


ONES, TARGET = torch.ones(4, 5), torch.zeros(4, dtype=torch.int64)
ERRORS = [
    (([1.0], TARGET), TypeError, "logits: got list, wanted a torch.Tensor"),
    ((ONES.int(), TARGET), TypeError, "logits: got torch.int32, wanted"),
    ((ONES[0], TARGET), ValueError, "logits: got shape (5,), wanted (N, C)"),
    ((ONES, TARGET[:3]), ValueError, "target: got shape (3,), wanted (4,)"),
    ((ONES, ONES), TypeError, "target: got torch.float32, wanted an integer dtype"),
    ((ONES, TARGET + 5), RuntimeError, "target: got 5, wanted a column in [0, 5)"),
    ((ONES, TARGET - 1), RuntimeError, "target: got -1, wanted a column in [0, 5)"),
]


@pytest.mark.parametrize("arguments, error, text", ERRORS)
def test_a_bad_argument_is_named(arguments, error, text):
    module = HEXCrossEntropyLoss(TAU, threshold=0.5)
    with pytest.raises(error) as caught:
        module(*arguments)
    assert text in str(caught.value)
    assert module.last is None


def test_a_bad_option_is_named_and_the_temperature_must_be_given():
    with pytest.raises(TypeError, match="self_column: got int"):
        HEXCrossEntropyLoss(0.1, self_column=1)
    with pytest.raises(TypeError, match="temperature"):
        HEXCrossEntropyLoss()
    assert "self_column=True" in repr(HEXCrossEntropyLoss(0.1, self_column=True))
