# SPDX-License-Identifier: MIT
"""`ignored` in the losses and functions: negatives that do not count, against an InfoNCE that fills
them with -inf, and against the same rows with these negatives removed.

The kernels' values and derivatives are in test_masks.py, the texts of errors in test_errors.py, and
the loss of many ranks in test_distributed.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import without_kernels
from data import MODES, batch, f64
from torch import Tensor

from hex import (
    HEXLoss,
    HEXSupConLoss,
    InfoNCELoss,
    ThresholdTracker,
    batch_threshold,
    hex_cross_entropy,
    hex_loss,
    hex_sup_con,
    info_nce,
)

B, D, K, TAU = 16, 6, 11, 0.2
LABELS = torch.arange(B) * 5 % 4
SAME = LABELS[:, None] == LABELS


def draw(*shape: int, share: float = 0.4, seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def inputs(mode: str) -> list[Tensor]:
    return [z.requires_grad_() for z in batch("cluster", B, D, mode, K) if z is not None]


def shapes(mode: str) -> list[tuple[int, ...]]:
    return {
        "ntxent": [(B, B), (2 * B, 2 * B)],
        "query": [(B, B)],
        "cross": [(B, B), (2 * B, B)],
        "unpaired": [(B, K), (K,)],
        "paired": [(B, K)],
    }[mode]


CASES = [(mode, shape) for mode in MODES for shape in shapes(mode)]
every = pytest.mark.parametrize("mode, shape", CASES)


def name_of(mode: str) -> str:
    return mode if mode in ("ntxent", "query", "cross") else "ntxent"


def logits_of(mode: str, z: list[Tensor], ignored: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes by hand: similarities / tau with -inf where a negative does not count, and
    the column of the positive."""
    u0, u1, *rest = (F.normalize(x, dim=-1) for x in z)
    image = torch.arange(B)
    if mode == "ntxent":
        u = torch.cat([u0, u1])
        s = (u @ u.T / TAU).fill_diagonal_(-math.inf)
        target = (torch.arange(2 * B) + B) % (2 * B)
        out = ignored.repeat(2 * B // len(ignored), 2 * B // len(ignored))
    elif mode == "query":
        s, target, out = u0 @ u1.T / TAU, image, ignored
    elif mode == "cross":
        s = u0 @ u1.T / TAU
        s, target = torch.cat([s, s.T]), image.repeat(2)
        out = ignored.repeat(2 * B // len(ignored), 1)
    else:
        others = u0 @ rest[0].T if mode == "unpaired" else (rest[0] @ u0[:, :, None]).squeeze(2)
        own = (u0 * u1).sum(1, keepdim=True)
        s, target = torch.cat([own, others], 1) / TAU, torch.zeros_like(image)
        out = F.pad(ignored.expand(B, K), (1, 0))
    is_target = F.one_hot(target, s.shape[1]).bool()
    return s.masked_fill(out & ~is_target, -math.inf), target


@every
def test_info_nce_is_that_of_logits_with_minus_infinity(mode, shape):
    ignored = draw(*shape)
    z = inputs(mode)
    ours = info_nce(*z, ignored=ignored, temperature=TAU, mode=name_of(mode), reduction="none")
    plain = F.cross_entropy(*logits_of(mode, z, ignored), reduction="none")
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-13)
    weights = torch.linspace(-1, 1, len(ours), dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(x @ weights, z) for x in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    module = InfoNCELoss(TAU, mode=name_of(mode), reduction="none")
    assert torch.equal(module(*z, ignored=ignored), ours)


@every
@pytest.mark.parametrize("decoupled", (False, True))
@pytest.mark.parametrize("variant", ("paper", "released", "excluded"))
def test_hex_is_that_of_logits_with_minus_infinity(mode, shape, variant, decoupled):
    ignored, eps = draw(*shape), 0.4
    z = inputs(mode)
    options = {"eps": eps, "variant": variant, "decoupled": decoupled, "reduction": "none"}
    ours = hex_loss(*z, ignored=ignored, temperature=TAU, mode=name_of(mode), **options)
    plain = hex_cross_entropy(*logits_of(mode, z, ignored), temperature=TAU, **options)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x.sum(), z) for x in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every
def test_the_threshold_and_the_statistics_count_what_remains(mode, shape):
    ignored = draw(*shape)
    z = [x.detach() for x in inputs(mode)]
    logits, target = logits_of(mode, z, ignored)
    negative = ~F.one_hot(target, logits.shape[1]).bool() & (logits > -math.inf)
    quantiles = []
    for row, among in zip(logits * TAU, negative, strict=True):
        c = row[among].sort().values
        quantiles.append(c[round(0.9 * (len(c) - 1))])
    wanted = torch.stack(quantiles).mean()
    options = {"mode": name_of(mode)}
    eps = batch_threshold(*z, ignored=ignored, quantile=0.9, **options)
    torch.testing.assert_close(eps, wanted, rtol=1e-12, atol=0)
    criterion = HEXLoss(TAU, threshold=ThresholdTracker.adaptive(0.9), **options)
    criterion(*z, ignored=ignored)
    found = criterion.statistics()
    assert found["eps"] == eps.item()
    hard = ((logits * TAU > eps) & negative).sum(1).double().mean()
    assert found["hard"] == pytest.approx(hard.item(), abs=1e-12)


def test_padded_negatives_are_those_of_each_row_alone():
    """Rows with fewer negatives than others, filled up with what may be any numbers."""
    z0, z1, negatives = (z.detach() for z in inputs("paired"))
    lengths = torch.arange(B) % (K + 1)  # one has none, one has all
    ignored = torch.arange(K) >= lengths[:, None]
    padded = negatives.masked_fill(ignored[..., None], math.nan).requires_grad_()
    rows = hex_loss(z0, z1, padded, ignored=ignored, eps=0.3, temperature=TAU, reduction="none")
    (gradient,) = torch.autograd.grad(rows.sum(), padded)
    assert torch.equal(gradient[ignored], torch.zeros_like(gradient[ignored]))
    for i, n in enumerate(lengths):
        its = negatives[i : i + 1, :n].clone().requires_grad_()
        alone = hex_loss(z0[i : i + 1], z1[i : i + 1], its, eps=0.3, temperature=TAU)
        torch.testing.assert_close(rows[i], alone, rtol=1e-12, atol=1e-14)
        (its,) = torch.autograd.grad(alone, its)
        torch.testing.assert_close(gradient[i, :n], its[0], rtol=1e-11, atol=1e-13)


def test_rows_of_a_queue_that_none_sees_are_as_if_removed():
    z0, z1, queue = inputs("unpaired")
    ignored = draw(K)
    z = z0, z1, queue
    kept = queue[~ignored]
    for tracker in (ThresholdTracker.adaptive(0.8), ThresholdTracker.adaptive(0.8, over="all")):
        criterion = HEXLoss(TAU, threshold=tracker)
        ours = criterion(*z, ignored=ignored)
        found = criterion.statistics()
        other = HEXLoss(TAU, threshold=ThresholdTracker.adaptive(0.8, over=tracker.over))
        wanted = other(z0, z1, kept)
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0)
        assert found == pytest.approx(other.statistics(), rel=1e-12)
    gradient, wanted = (torch.autograd.grad(x, queue)[0] for x in (ours, wanted))
    torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-14)
    assert not gradient[ignored].any()


def test_the_same_image_twice_in_a_batch_can_be_ignored():
    """By its duplicates' ids: no view of one is a negative of the other."""
    z0, z1 = (z.detach() for z in inputs("ntxent"))
    twice = [torch.cat([z, z[:3]]) for z in (z0, z1)]
    ids = torch.cat([torch.arange(B), torch.arange(3)])
    rows = info_nce(*twice, ignored=ids[:, None] == ids, temperature=TAU, reduction="none")
    for i in range(3):  # the copy has the loss of the first
        torch.testing.assert_close(rows[i], rows[B + i], rtol=1e-12, atol=0)
    u = F.normalize(torch.cat(twice), dim=1)
    image = ids.repeat(2)
    s = (u @ u.T / TAU).masked_fill(image[:, None] == image, -math.inf)
    own = (u[: len(ids)] * u[len(ids) :]).sum(1).repeat(2) / TAU
    plain = torch.logaddexp(s.logsumexp(1), own) - own
    torch.testing.assert_close(rows, plain, rtol=1e-12, atol=1e-13)


# ---- several positives --------------------------------------------------------------------------


def sup_con_by_hand(x: Tensor, positive: Tensor, ignored: Tensor, inside: bool) -> Tensor:
    """L_out of SupCon, or L_in, of rows (N, D) with (N, N) masks."""
    u = F.normalize(x, dim=1)
    s = u @ u.T / TAU
    own = torch.eye(len(x), dtype=torch.bool)
    positive = positive & ~own
    denominator = s.masked_fill(own | (ignored & ~positive), -math.inf).logsumexp(1)
    if inside:
        loss = denominator - s.masked_fill(~positive, -math.inf).logsumexp(1)
    else:
        loss = denominator - (s * positive).sum(1) / positive.sum(1)
    return torch.where(positive.any(1), loss, 0.0)


@pytest.mark.parametrize("positives", ("outside", "inside"))
@pytest.mark.parametrize("by", ("labels", "mask", "views"))
def test_sup_con_is_that_of_logits_with_minus_infinity(by, positives):
    ignored = draw(B, B)
    z0, z1 = inputs("ntxent")
    features = torch.stack([z0, z1], 1)
    given = {"labels": {"labels": LABELS}, "mask": {"mask": draw(B, B, seed=5)}, "views": {}}[by]
    marked = given.get("mask", SAME if by == "labels" else torch.eye(B, dtype=torch.bool))
    criterion = HEXSupConLoss(TAU, threshold=None, positives=positives, reduction="none")
    rows = criterion(features, **given, ignored=ignored)
    plain = sup_con_by_hand(
        torch.cat([z0, z1]), marked.repeat(2, 2), ignored.repeat(2, 2), positives == "inside"
    )
    torch.testing.assert_close(rows, plain, rtol=1e-11, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (z0, z1)) for x in (rows, plain)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_rows_by_themselves_have_a_mask_of_their_own():
    x, _ = inputs("ntxent")
    ignored = draw(B, B)
    rows = hex_sup_con(x, LABELS, eps=2.0, ignored=ignored, temperature=TAU, reduction="none")
    plain = sup_con_by_hand(x, SAME, ignored, False)
    torch.testing.assert_close(rows, plain, rtol=1e-11, atol=1e-12)


def test_labels_and_a_mask_say_the_same_beside_ignored():
    features = torch.stack(inputs("ntxent"), 1)
    for variant in ("paper", "released", "excluded"):
        options = {"eps": 0.3, "ignored": draw(B, B), "reduction": "none", "variant": variant}
        by_labels = hex_sup_con(features, LABELS, **options)
        assert torch.equal(hex_sup_con(features, mask=SAME, **options), by_labels)


def test_positives_of_all_ignored_rows_still_attract():
    features = torch.stack(inputs("ntxent"), 1)
    everything = torch.ones(B, B, dtype=torch.bool)
    loss = hex_sup_con(features, LABELS, eps=0.3, ignored=everything, temperature=TAU)
    rows = torch.cat([z.detach() for z in inputs("ntxent")])
    ids = LABELS.repeat(2)
    plain = sup_con_by_hand(rows, ids[:, None] == ids, everything.repeat(2, 2), False)
    torch.testing.assert_close(loss, plain.mean(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("by", ("labels", "mask"))
def test_a_released_batch_without_positives_is_not_counted_as_one_of_loss_0(by, recwarn):
    """The tracker warns where all losses are 0, but not where that is for want of positives."""
    z, _ = inputs("ntxent")
    criterion = HEXSupConLoss(TAU, threshold=0.5, variant="released")
    alone = {"labels": torch.arange(B)} if by == "labels" else {"mask": torch.eye(B)}
    for epoch in range(2):
        criterion.set_epoch(epoch)
        for _ in range(3):
            criterion(z, **alone, ignored=draw(B, B)).backward()
    assert not recwarn.list


# ---- H by other means ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ("groups", "guide"))
@every
def test_groups_and_guides_leave_the_same_negatives_out(mode, shape, how, monkeypatch):
    """As the formulas on a device without kernels do."""
    z, guide = inputs(mode), tuple(x.detach() for x in batch("gauss", B, D, mode, K)
                                   if x is not None)  # fmt: skip
    groups = LABELS
    if len(z) == 3:
        groups = (LABELS, torch.arange(z[2].shape[:-1].numel()).view(z[2].shape[:-1]) % 4)
    given = {"groups": groups} if how == "groups" else {"guide": guide}
    ignored = draw(*shape)

    def results() -> list[Tensor]:
        criterion = HEXLoss(TAU, threshold=ThresholdTracker.adaptive(0.8), mode=name_of(mode))
        value = criterion(*z, ignored=ignored, **given)
        return [value, *criterion.last, *torch.autograd.grad(value, z)]

    ours = results()
    without_kernels(monkeypatch)
    for a, b in zip(ours, results(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("mode", ("ntxent", "query", "unpaired", "paired"))
def test_rows_scaled_to_their_range_do_not_see_what_is_ignored(mode):
    z = [x.detach() for x in inputs(mode)]
    ignored = draw(*shapes(mode)[0])
    tracker = ThresholdTracker.fixed(0.7, normalize_rows=True)
    criterion = HEXLoss(TAU, threshold=tracker, mode=name_of(mode), reduction="none")
    rows = criterion(*z, ignored=ignored)
    logits, target = logits_of(mode, z, ignored)
    c = logits * TAU
    low = c.masked_fill(c == -math.inf, math.inf).amin(1)
    high = torch.ones(len(c), dtype=c.dtype) if mode == "ntxent" else c.amax(1)  # with itself
    eps = low + 0.7 * (high - low)
    plain = hex_cross_entropy(logits, target, eps=eps, temperature=TAU, reduction="none")
    torch.testing.assert_close(rows, plain, rtol=1e-10, atol=1e-12)


# ---- what torch does with it --------------------------------------------------------------------


@every
def test_a_second_derivative_and_the_formulas_alone_agree(mode, shape, monkeypatch):
    ignored = draw(*shape)
    z = inputs(mode)

    def loss(*z: Tensor) -> Tensor:
        return hex_loss(*z, ignored=ignored, eps=0.3, temperature=TAU, mode=name_of(mode))

    def twice() -> list[Tensor]:
        first = torch.autograd.grad(loss(*z), z, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), z)]

    ours = twice()
    without_kernels(monkeypatch)
    for a, b in zip(ours, twice(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every
def test_vmap_takes_one_of_each(mode, shape):
    ignored = torch.stack([draw(*shape, seed=k) for k in range(3)])
    z = inputs(mode)

    def loss(ignored: Tensor) -> Tensor:
        return hex_loss(*z, ignored=ignored, eps=0.3, temperature=TAU, mode=name_of(mode))

    together = torch.vmap(loss)(ignored)
    assert torch.equal(together, torch.stack([loss(each) for each in ignored]))


def test_vmap_over_one_for_several_positives():
    x, _ = inputs("ntxent")
    ignored = torch.stack([draw(B, B, seed=k) for k in range(3)])
    for given in ({"labels": LABELS}, {"mask": SAME}):

        def loss(ignored: Tensor, given=given) -> Tensor:
            return hex_sup_con(x, **given, ignored=ignored, eps=0.3)

        assert torch.equal(torch.vmap(loss)(ignored), torch.stack([loss(m) for m in ignored]))


@every
def test_shapes_come_out_right_on_the_meta_device(mode, shape):
    z = [x.detach().to("meta") for x in inputs(mode)]
    ignored = torch.zeros(shape, dtype=torch.bool, device="meta")
    rows = HEXLoss(reduction="none", threshold=0.3, mode=name_of(mode))(*z, ignored=ignored)
    assert rows.is_meta and len(rows) == (2 * B if mode in ("ntxent", "cross") else B)


@pytest.mark.parametrize("images", (0, 1, 2))
def test_few_images_have_few_negatives_to_ignore(images):
    z = torch.ones(images, D, dtype=torch.float64, requires_grad=True)
    for mode in ("ntxent", "query", "cross"):
        everything = torch.ones(images, images, dtype=torch.bool)
        loss = hex_loss(z, z * 2, ignored=everything, eps=0.3, mode=mode)
        assert loss == 0 and not torch.autograd.grad(loss, z)[0].any()
    for negatives in (z, z[:, None]):
        everything = torch.ones(negatives.shape[:-1], dtype=torch.bool)
        assert hex_loss(z, z, negatives, ignored=everything, eps=0.3) == 0
    none = torch.zeros(images, 0, dtype=torch.bool)
    assert hex_loss(z, z, z[:0], ignored=none, eps=0.3) == 0


def test_a_bool_of_any_byte_but_0_is_true():
    z0, z1 = inputs("query")
    truth = draw(B, B)
    bytes_ = truth.to(torch.uint8) * (3 + torch.arange(B, dtype=torch.uint8))
    odd = bytes_.view(torch.bool)
    loss = [info_nce(z0, z1, ignored=m, mode="query") for m in (truth, odd)]
    assert torch.equal(*loss)


def test_nothing_ignored_is_no_mask():
    for mode, shape in CASES:
        z = inputs(mode)
        options = {"eps": 0.3, "mode": name_of(mode), "reduction": "none"}
        none = torch.zeros(shape, dtype=torch.bool)
        torch.testing.assert_close(
            hex_loss(*z, ignored=none, **options), hex_loss(*z, **options), rtol=1e-12, atol=1e-13
        )


def test_the_threshold_does_not_count_rows_without_negatives():
    z0, z1 = (z.detach() for z in inputs("query"))
    ignored = torch.zeros(B, B, dtype=torch.bool)
    ignored[3:] = True
    eps = batch_threshold(z0, z1, ignored=ignored, mode="query", quantile=0.5)
    c = F.normalize(z0, dim=1) @ F.normalize(z1, dim=1).T
    rows = [torch.cat([c[i, :i], c[i, i + 1 :]]).sort().values[round(0.5 * (B - 2))]
            for i in range(3)]  # fmt: skip
    torch.testing.assert_close(eps, torch.stack(rows).mean(), rtol=1e-12, atol=0)
    assert batch_threshold(z0, z1, ignored=~f64(0.0).bool().expand(B, B), mode="query").isnan()
