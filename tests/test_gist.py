# SPDX-License-Identifier: MIT
"""With the variant "excluded" and a threshold by the positive, HEX is GISTEmbed.

The peer is GISTEmbedLoss of sentence-transformers from PyPI (gist.py). The tests are skipped where
it is not installed. Values and gradients are compared in float64.
"""

import contextlib

import pytest
import torch
from data import views
from gist import TAU, gist
from torch import Tensor
from torch.nn import functional as F

from hex import HEXLoss, ThresholdTracker, hex_cross_entropy, hex_sup_con

B, D = 29, 9
MARGINS = (
    ("absolute", 0.0),
    ("absolute", 0.1),
    ("absolute", -0.02),
    ("relative", 0.0),
    ("relative", 0.15),
)


def columns(number: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """Anchors, positives and maybe negatives, in clusters; and a guide's, of which some negatives
    are nearer than the positive."""
    own = [*views("cluster", B, D), views("cluster", B, D, 0)[0].roll(3, 0)]
    generator = torch.Generator().manual_seed(1)
    turn = torch.randn(D, D + 4, generator=generator, dtype=torch.float64) / 3
    noise = torch.randn(3, B, D + 4, generator=generator, dtype=torch.float64)
    guide = [z @ turn + noise_of / 2 for z, noise_of in zip(own, noise, strict=True)]
    return own[:number], guide[:number]


def by_positive(strategy: str, margin: float) -> ThresholdTracker:
    return ThresholdTracker.by_positive(margin, relative=strategy == "relative")


def agree(ours, peer, own: list[Tensor]) -> None:
    """Values and gradients of some hundred operations in float64, to 1e-10 of the largest."""
    results = []
    for function in (ours, peer):
        z = [x.clone().requires_grad_() for x in own]
        value = function(z)
        results.append([value.detach(), *torch.autograd.grad(value, z)])
    for a, b in zip(*results, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * b.abs().max().item())


@contextlib.contextmanager
def some_are_left_out(criterion: HEXLoss):
    """So that a comparison is of more than InfoNCE."""
    yield
    assert 0 < criterion.statistics()["hard"] < B - 1


@pytest.mark.parametrize("strategy, margin", MARGINS)
def test_mode_query_is_gist_without_pairs_of_anchors_and_of_positives(strategy, margin):
    own, guide = columns()
    criterion = HEXLoss(
        TAU, threshold=by_positive(strategy, margin), variant="excluded", mode="query"
    )
    theirs = gist(strategy, margin, contrast_anchors=False, contrast_positives=False)
    with some_are_left_out(criterion):
        agree(lambda z: criterion(*z, guide=guide), lambda z: theirs(z, guide), own)
    alone = gist("absolute", -9.0, contrast_anchors=False, contrast_positives=False)  # none is out
    assert abs(theirs(own, guide) - alone(own, guide)) > 0.01


@pytest.mark.parametrize("strategy, margin", [m for m in MARGINS if m[1] >= 0])
def test_the_anchors_rows_of_mode_ntxent_are_gist_with_pairs_of_anchors(strategy, margin):
    own, guide = columns()
    criterion = HEXLoss(
        TAU, threshold=by_positive(strategy, margin), variant="excluded", reduction="none"
    )
    theirs = gist(strategy, margin, contrast_anchors=True, contrast_positives=False)
    with some_are_left_out(criterion):
        agree(lambda z: criterion(*z, guide=guide)[:B].mean(), lambda z: theirs(z, guide), own)


def test_without_a_guide_the_embeddings_are_their_own():
    own, _ = columns()
    criterion = HEXLoss(
        TAU, threshold=by_positive("absolute", 0.05), variant="excluded", mode="query"
    )
    theirs = gist("absolute", 0.05, contrast_anchors=False, contrast_positives=False)
    agree(lambda z: criterion(*z), lambda z: theirs(z, [x.detach() for x in z]), own)
    assert criterion.statistics()["hard"] > 0


def test_in_float32_to_the_rounding_of_both():
    """Of a cosine of D features over T: as far apart as a few times D units over T."""
    own, guide = ([x.float() for x in z] for z in columns())
    criterion = HEXLoss(
        TAU, threshold=by_positive("absolute", 0.1), variant="excluded", mode="query"
    )
    theirs = gist("absolute", 0.1, contrast_anchors=False, contrast_positives=False)
    bound = 8 * (D + 4) * 2.0**-24 / TAU
    assert abs(criterion(*own, guide=guide) - theirs(own, guide)) < bound


@pytest.mark.parametrize("strategy, margin", MARGINS)
def test_a_column_of_hard_negatives_are_candidates_with_a_label_that_no_anchor_has(
    strategy, margin
):
    own, guide = columns(3)
    c = F.cosine_similarity(*guide[:2])
    eps = c - (c.abs() * margin if strategy == "relative" else margin)
    anchors = torch.arange(B)
    candidate_labels = torch.cat([anchors, torch.full((B,), -1)])

    def ours(z: list[Tensor]) -> Tensor:  # the lines of docs/guides/threshold.md
        return hex_sup_con(
            z[0], anchors, candidates=torch.cat(z[1:]), candidate_labels=candidate_labels,
            guide=(guide[0], torch.cat(guide[1:])), eps=eps, variant="excluded", temperature=TAU,
        )  # fmt: skip

    theirs = gist(strategy, margin, contrast_anchors=False, contrast_positives=False)
    agree(ours, lambda z: theirs(z, guide), own)
    two = theirs(own[:2], guide[:2])
    assert theirs(own, guide) > two + 0.01


@pytest.mark.parametrize("anchors_too", (True, False))
def test_with_pairs_of_positives_it_is_composed_on_logits(anchors_too):
    own, guide = columns()
    eps = F.cosine_similarity(*guide) - 0.1

    def cosines(a: Tensor, b: Tensor) -> Tensor:
        return F.normalize(a) @ F.normalize(b).T

    def ours(z: list[Tensor]) -> Tensor:
        pairs = [(0, 1), *([(0, 0)] if anchors_too else []), (1, 1)]
        logits = torch.cat([cosines(z[i], z[j]) for i, j in pairs], 1) / TAU
        seen = torch.cat([cosines(guide[i], guide[j]) for i, j in pairs], 1)
        out = seen > eps[:, None]
        out[:, :B].fill_diagonal_(False)  # the positive stays
        rows = logits.masked_fill(out, -torch.inf)
        return hex_cross_entropy(rows, torch.arange(B), eps=torch.inf, temperature=TAU)

    theirs = gist("absolute", 0.1, contrast_anchors=anchors_too, contrast_positives=True)
    agree(ours, lambda z: theirs(z, guide), own)


def test_an_anchor_whose_threshold_is_1_is_a_negative_of_itself_in_theirs_alone():
    """As where its positive is equal to it for the guide. Ours leaves it out in any case."""
    own, guide = columns()
    guide[1] = guide[0]
    criterion = HEXLoss(
        TAU, threshold=by_positive("absolute", 0.0), variant="excluded", reduction="none"
    )
    rows = criterion(*own, guide=guide)[:B]
    theirs = gist("absolute", 0.0, contrast_anchors=True, contrast_positives=False)
    own_too = torch.log(rows.exp() + ((1 - F.cosine_similarity(*own)) / TAU).exp())
    torch.testing.assert_close(theirs(own, guide), own_too.mean(), rtol=1e-10, atol=0)
