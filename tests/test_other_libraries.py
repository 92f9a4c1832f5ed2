# SPDX-License-Identifier: MIT
"""With the local term off, values and gradients are those of the losses that people use today.

Peers: lightly, pytorch-metric-learning, info-nce-pytorch and open_clip from PyPI, each skipped
where it is not installed, and torch's cross-entropy on logits as SimCLR, MoCo and CLIP code bases
write it. Ours are `InfoNCELoss` and `HEXLoss` without threshold: in float32 to 1e-5 on a batch with
a loss of the usual size, and in float64 to 1e-8 where the loss is small or the rows are nearly one.
There the float32 of the peers is not enough, for their gradient is a softmax minus 1. Then
lightly's loss on inputs of the kinds that its own tests use.

Their training loops are in test_training_in_other_libraries.py.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import problem
from torch import Tensor

from hex import HEXLoss, InfoNCELoss

B, D, K = 37, 19, 53


def of_hex(*args, **options) -> HEXLoss:
    return HEXLoss(*args, threshold=None, **options)


# Each kind of batch at two temperatures, each temperature with both of ours.
BATCHES = pytest.mark.parametrize(
    "kind, tau, ours",
    [("gauss", 0.1, InfoNCELoss), ("gauss", 0.5, of_hex),
     ("cluster", 0.1, of_hex), ("cluster", 0.07, InfoNCELoss),
     ("near_collapsed", 0.5, InfoNCELoss), ("near_collapsed", 0.07, of_hex)],
)  # fmt: skip


def inputs(kind: str, mode: str) -> tuple[Tensor, ...]:
    dtype = torch.float32 if kind == "gauss" else torch.float64
    return problem(kind, B, D, mode, K=K, dtype=dtype).inputs


def value_and_gradients(loss, *z: Tensor) -> tuple[Tensor, ...]:
    z = [x.clone().requires_grad_() for x in z]
    value = loss(*z)
    return value.detach(), *torch.autograd.grad(value, z)


def check(ours, peer, *z: Tensor) -> None:
    """To a part of the value, and of the largest element of each gradient."""
    for a, b in zip(value_and_gradients(ours, *z), value_and_gradients(peer, *z), strict=True):
        assert a.dtype == b.dtype
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=part(b) * b.abs().max().item())


def part(values: Tensor) -> float:
    return 1e-5 if values.dtype == torch.float32 else 1e-8


# ---- lightly ------------------------------------------------------------------------------------


@BATCHES
def test_lightly_ntxent(kind, tau, ours):
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    check(ours(tau), lightly.NTXentLoss(tau), *inputs(kind, "ntxent"))


@BATCHES
def test_lightly_ntxent_with_a_memory_bank(kind, tau, ours):
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    z0, z1, queue = inputs(kind, "unpaired")
    peer = lightly.NTXentLoss(tau, memory_bank_size=(K, D))
    peer.memory_bank.bank = F.normalize(queue)
    check(lambda z0, z1: ours(tau)(z0, z1, queue), peer, z0, z1)


@BATCHES
def test_lightly_ntxent_as_moco_whose_memory_bank_takes_in_the_keys_of_each_step(kind, tau, ours):
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    z0, z1, queue = inputs(kind, "unpaired")
    peer, ours = lightly.NTXentLoss(tau, memory_bank_size=(K, D)), ours(tau)
    peer.memory_bank.bank = F.normalize(queue)
    for shift in range(3):  # K is no multiple of B: the bank's end and its beginning are passed
        bank, keys = peer.memory_bank.bank.clone(), z1.roll(shift, 1)
        check(lambda q, k, bank=bank: ours(q, k, bank), peer, z0, keys)
        assert not torch.equal(peer.memory_bank.bank, bank)


@BATCHES
def test_lightly_ntxent_as_nnclr_is_the_ntxent_mode_of_neighbours_and_predictions(kind, tau, ours):
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    modules = pytest.importorskip("lightly.models.modules", exc_type=ImportError)
    z0, z1, support = inputs(kind, "unpaired")
    neighbours = modules.NNMemoryBankModule(size=(K, D))
    neighbours.bank = F.normalize(support)
    nn0, nn1 = (neighbours(F.normalize(z), update=False) for z in (z0, z1))
    assert not torch.equal(nn0, F.normalize(z0))

    def both_ways(criterion):
        return lambda p0, p1: (criterion(nn0, p1) + criterion(nn1, p0)) / 2

    check(both_ways(ours(tau)), both_ways(lightly.NTXentLoss(tau)), z1, z0)


@BATCHES
def test_lightly_dcl_is_a_loss_without_the_positive_in_its_denominator(kind, tau, ours):
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    peer, decoupled = lightly.DCLLoss(tau), ours(tau, decoupled=True)
    z0, z1 = inputs(kind, "ntxent")
    check(decoupled, peer, z0, z1)
    check(decoupled, peer, z0.double(), z1.double())
    assert decoupled(z0, z1) < ours(tau)(z0, z1)
    z = torch.eye(4)  # far apart
    assert decoupled(z, z) < 0 < ours(tau)(z, z)
    torch.testing.assert_close(decoupled(z, z), peer(z, z))


# ---- pytorch-metric-learning ---------------------------------------------------------------------


@BATCHES
def test_pytorch_metric_learning_ntxent_with_labels(kind, tau, ours):
    losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
    peer, labels = losses.NTXentLoss(tau), torch.arange(B).repeat(2)
    check(ours(tau), lambda z0, z1: peer(torch.cat([z0, z1]), labels), *inputs(kind, "ntxent"))


@BATCHES
@pytest.mark.parametrize("name", ("NTXentLoss", "SupConLoss"))  # one positive: one and the same
def test_pytorch_metric_learning_self_supervised(name, kind, tau, ours):
    losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
    peer = losses.SelfSupervisedLoss(getattr(losses, name)(temperature=tau))
    check(ours(tau), peer, *inputs(kind, "ntxent"))


@BATCHES
def test_pytorch_metric_learning_self_supervised_in_one_direction(kind, tau, ours):
    losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
    peer = losses.SelfSupervisedLoss(losses.NTXentLoss(tau), symmetric=False)
    check(ours(tau, mode="query"), peer, *inputs(kind, "query"))


# ---- info-nce-pytorch ----------------------------------------------------------------------------


@BATCHES
@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize(
    "mode, negative_mode", (("query", "unpaired"), ("unpaired", "unpaired"), ("paired", "paired"))
)
def test_info_nce_pytorch(mode, negative_mode, reduction, kind, tau, ours):
    info_nce = pytest.importorskip("info_nce")
    peer = info_nce.InfoNCE(tau, reduction, negative_mode)
    check(ours(tau, mode="query", reduction=reduction), peer, *inputs(kind, mode))


# ---- open_clip -----------------------------------------------------------------------------------


@BATCHES
def test_open_clip_with_its_learned_scale(kind, tau, ours):
    open_clip = pytest.importorskip("open_clip", exc_type=ImportError)
    image, text = inputs(kind, "cross")
    peer, cross = open_clip.ClipLoss(), ours(mode="cross")
    log_scale = torch.tensor(1 / tau, dtype=image.dtype).log()  # as its models keep it

    def of_features(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
        return peer(F.normalize(image), F.normalize(text), log_scale.exp())

    check(lambda i, t, s: cross(i, t, temperature=1 / s.exp()), of_features, image, text, log_scale)


# ---- cross-entropy on logits, as code bases write it ---------------------------------------------


@BATCHES
def test_simclr_by_a_masked_cross_entropy(kind, tau, ours):
    def peer(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z0, z1]))
        logits = (z @ z.T / tau).masked_fill(torch.eye(2 * B, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, torch.arange(2 * B).roll(B))

    check(ours(tau), peer, *inputs(kind, "ntxent"))


@BATCHES
def test_moco_by_a_cross_entropy_over_the_positive_and_a_queue(kind, tau, ours):
    z0, z1, queue = inputs(kind, "unpaired")
    queue = F.normalize(queue).T.contiguous()  # (D, K), as MoCo keeps it

    def peer(z0: Tensor, z1: Tensor) -> Tensor:
        q, k = F.normalize(z0), F.normalize(z1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / tau
        return F.cross_entropy(logits, torch.zeros(B, dtype=torch.int64))

    check(lambda z0, z1: ours(tau)(z0, z1, queue.T), peer, z0, z1)


@BATCHES
def test_moco_v3_is_2_tau_times_the_loss_of_one_direction(kind, tau, ours):
    def peer(z0: Tensor, z1: Tensor) -> Tensor:
        logits = F.normalize(z0) @ F.normalize(z1).T / tau
        return F.cross_entropy(logits, torch.arange(B)) * (2 * tau)

    query = ours(tau, mode="query")
    check(lambda z0, z1: 2 * tau * query(z0, z1), peer, *inputs(kind, "query"))


@BATCHES
def test_clip_with_its_learned_scale(kind, tau, ours):
    def peer(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
        image, text, labels = F.normalize(image), F.normalize(text), torch.arange(B)
        per_image = log_scale.exp() * image @ text.T
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_image.T, labels)) / 2

    cross = ours(mode="cross")
    image, text = inputs(kind, "cross")
    check(
        lambda image, text, log_scale: cross(image, text, temperature=1 / log_scale.exp()),
        peer,
        image,
        text,
        torch.tensor(1 / tau, dtype=image.dtype).log(),
    )


@BATCHES
def test_none_reduction_is_the_cross_entropy_of_each_row(kind, tau, ours):
    z0, z1 = inputs(kind, "query")
    logits = F.normalize(z0) @ F.normalize(z1).T / tau
    rows = F.cross_entropy(logits, torch.arange(B), reduction="none")
    ours_rows = ours(tau, mode="query", reduction="none")(z0, z1)
    torch.testing.assert_close(ours_rows, rows, rtol=0, atol=part(rows) * rows.max().item())


# ---- lightly, on inputs of its own tests ---------------------------------------------------------

KINDS = {
    "uniform": lambda n, d: torch.rand(n, d),  # one orthant: all cosines are positive
    "normal": lambda n, d: torch.randn(n, d),
    "one-hot": lambda n, d: torch.eye(n, max(n, d)),
    "all one": lambda n, d: torch.ones(n, d),
    "a view and its negative": lambda n, d: torch.randn(n, d).cumsum(0) * (-1) ** torch.arange(d),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", (0.1, 0.5, 7.0))
def test_lightly_ntxent_on_inputs_of_its_own_tests(kind, tau):
    for n, d in itertools.product((1, 2, 7, 20), (2, 63)):
        torch.manual_seed(n * d)
        check_lightly(kind, tau, n, d)


def check_lightly(kind, tau, n, d):
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    z0, z1 = KINDS[kind](n, d), KINDS[kind](n, d)
    if kind == "a view and its negative":
        z1 = -z0
    peer = value_and_gradients(lightly.NTXentLoss(tau), z0, z1)
    truth = value_and_gradients(lightly.NTXentLoss(tau), z0.double(), z1.double())
    for loss in (InfoNCELoss(tau), HEXLoss(tau, threshold=None)):
        for ours, same, true in zip(value_and_gradients(loss, z0, z1), peer, truth, strict=True):
            # Where all terms of a gradient cancel (all one) theirs is rounding; 1e-6 is that of
            # terms of size 1 / tau over the length of a row.
            largest = max(same.abs().max().item(), 0.1 / tau)
            torch.testing.assert_close(ours, same, rtol=0, atol=1e-5 * largest)
            torch.testing.assert_close(ours.double(), true, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("tau", (0.1, 0.5, 1.0))
def test_the_views_can_change_places_as_in_lightly(tau):
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    z0, z1 = torch.rand(2, 9, 16)
    loss = InfoNCELoss(tau)
    torch.testing.assert_close(loss(z0, z1), loss(z1, z0))
    torch.testing.assert_close(loss(z0, z1), lightly.NTXentLoss(tau)(z1, z0))


def test_a_row_of_zeros_has_the_value_of_lightly_and_no_gradient_where_its_own_explodes():
    lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)
    z0, z1 = torch.eye(6, 5), torch.eye(6, 5)  # the last row is 0
    ours, theirs = (
        value_and_gradients(loss, z0, z1) for loss in (InfoNCELoss(), lightly.NTXentLoss(0.1))
    )
    torch.testing.assert_close(ours[0], theirs[0])
    assert theirs[1][-1].abs().max() > 1e9
    assert not ours[1][-1].any()
    torch.testing.assert_close(ours[1][:-1], theirs[1][:-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tau", (0.0, -1.0))
def test_a_temperature_that_lightly_refuses_or_misreads_is_refused(tau):
    with pytest.raises(ValueError, match="temperature"):
        InfoNCELoss(tau)
