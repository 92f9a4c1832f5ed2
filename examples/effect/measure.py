# SPDX-License-Identifier: MIT
"""What is measured: the accuracy of frozen features, and properties of the embedding.

Accuracies are in [0, 1]. The embedding is measured during training, in evaluation mode, on held-out
training images in two views that are the same for all runs.
"""

import math
from typing import Any

import numpy as np
import torch
from common import evaluate
from common.data import MemorySplit
from simclr import SimCLR
from torch import Tensor
from torch.nn import functional as F

NEAR = 0.01  # the share of a row's negatives that count as near, whatever the loss
LOOKED_AT = 2048  # so many images at most


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the centred rows' normalised singular values (Roy & Vetterli 2007).

    It is between 1, for rows on a line, and the number of columns, for rows with the same spread in
    all directions.
    """
    centred = (rows - rows.mean(0)).double()
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0).sqrt()
    total = values.sum()
    if total == 0:
        return 1.0
    p = values[values > 0] / total
    return float((-p * p.log()).sum().exp())


def rank_within(rows: Tensor, labels: Tensor) -> float:
    """The effective rank of the rows of a class, averaged over the classes. Low: local collapse."""
    ranks = [effective_rank(rows[labels == c]) for c in labels.unique()]
    return sum(ranks) / len(ranks)


def uniformity(z: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over pairs of unit rows, <= 0 (Wang & Isola 2020)."""
    return float(torch.pdist(z).square().mul(-2).exp().mean().log())


def alignment(z0: Tensor, z1: Tensor) -> float:
    """The mean squared distance of the two views' unit rows, >= 0 (Wang & Isola 2020)."""
    return float((z0 - z1).square().sum(1).mean())


class Neighbours:
    """Counts over batches of pairs: all of them, and those of one class or superclass."""

    def __init__(self) -> None:
        self.pairs = self.same_class = self.same_superclass = self.rows = 0.0

    def add(self, chosen: Tensor, same_class: Tensor, same_superclass: Tensor | None) -> None:
        self.rows += len(chosen)
        self.pairs += float(chosen.sum())
        self.same_class += float((chosen & same_class).sum())
        if same_superclass is not None:
            self.same_superclass += float((chosen & same_superclass).sum())

    def shares(self, with_superclass: bool) -> dict[str, float | None]:
        """Pairs per anchor, and the shares of them of the anchor's class and superclass."""
        some = self.pairs > 0
        return {
            "size": self.pairs / self.rows,
            "class": self.same_class / self.pairs if some else None,
            "superclass": self.same_superclass / self.pairs if some and with_superclass else None,
        }


class Look:
    """Measures an embedding on held-out images in two fixed views.

    Args:
        images: the held-out images.
        superclasses: the superclass of each class, or None.
        batch: how many images are in a batch, within which H is measured.
    """

    def __init__(self, images: MemorySplit, superclasses: Tensor | None, batch: int) -> None:
        self.batch = min(batch, len(images))
        n = min(LOOKED_AT, len(images)) // self.batch * self.batch
        self.labels = images.labels[:n]
        self.superclasses = None if superclasses is None else superclasses[self.labels]
        with torch.random.fork_rng(devices=[]):  # so that the views of training stay the same
            torch.manual_seed(0)
            self.views = [images.views(torch.arange(n)[part]) for part in self._batches(n)]

    def _batches(self, n: int) -> list[slice]:
        return [slice(i, i + self.batch) for i in range(0, n, self.batch)]

    @torch.no_grad()
    def __call__(self, model: SimCLR) -> dict[str, Any]:
        was_training = model.training
        model.eval()
        parts = [[model.backbone(view) for view in views] for views in self.views]
        features = [torch.cat(view) for view in zip(*parts, strict=True)]
        z0, z1 = (F.normalize(model.projector(h).float()) for h in features)
        own, near, any_pair = Neighbours(), Neighbours(), Neighbours()
        thresholds = [
            self._pairs(model, z0[part], z1[part], part, own, near, any_pair)
            for part in self._batches(len(self.labels))
        ]
        model.train(was_training)
        labels = self.labels.to(z0.device)
        eps, near_cosine = (sum(x) / len(x) for x in zip(*thresholds, strict=True))
        known = self.superclasses is not None
        return {
            "eps": eps if math.isfinite(eps) else None,
            "own": own.shares(known),
            "near": near.shares(known),
            "near_cosine": near_cosine,
            "chance": any_pair.shares(known),
            "rank": effective_rank(z0),
            "rank_within": rank_within(z0, labels),
            "rank_features": effective_rank(features[0].float()),
            "rank_features_within": rank_within(features[0].float(), labels),
            "uniformity": uniformity(z0),
            "alignment": alignment(z0, z1),
        }

    def _pairs(self, model, z0, z1, part, own, near, any_pair) -> tuple[float, float]:
        """Counts the pairs of a batch. Returns its eps and the least cosine of near pairs, a mean
        over anchors."""

        def same(labels: Tensor) -> Tensor:
            twice = labels[part].repeat(2).to(z0.device)
            return twice[:, None] == twice

        cosines = torch.cat([z0, z1]) @ torch.cat([z0, z1]).T
        n = len(cosines)
        image = torch.arange(n, device=cosines.device) % (n // 2)
        negative = image[:, None] != image
        eps = own_threshold(model.criterion, z0, z1, cosines)
        only = cosines.masked_fill(~negative, -math.inf)
        cosine, nearest = only.topk(max(1, round(NEAR * (n - 2))), dim=1)
        is_near = torch.zeros_like(negative).scatter_(1, nearest, True)
        sames = same(self.labels), None if self.superclasses is None else same(self.superclasses)
        own.add(negative & (cosines > eps), *sames)
        near.add(is_near, *sames)
        any_pair.add(negative, *sames)
        return float(eps.double().mean()), float(cosine[:, -1].mean())


def own_threshold(criterion, z0: Tensor, z1: Tensor, cosines: Tensor) -> Tensor:
    """The eps of a loss for a batch, 0-d or (N, 1). It is +inf for a loss without a threshold."""
    tracker = criterion.threshold
    if tracker is None:
        return torch.full((), math.inf)
    if tracker.adaptive_rule:
        criterion(z0, z1)
        return criterion.last.eps
    eps = tracker.current()
    if tracker.normalize_rows:
        low, high = cosines.aminmax(dim=1, keepdim=True)
        eps = low + eps * (high - low)
    return eps


def accuracies(
    network: torch.nn.Module,
    train: MemorySplit,
    tests: dict[str, MemorySplit],
    superclasses: Tensor | None,
) -> dict[str, dict[str, float | None]]:
    """For each of `tests` the accuracy of k-NN and of linear probes with all labels and with 1 %.

    If there are superclasses, also that of k-NN and of the linear probe for these.
    """
    train_x, train_y = evaluate.features(network, train)
    parts = {name: evaluate.features(network, split) for name, split in tests.items()}
    x = np.concatenate([part[0] for part in parts.values()])
    per_class = max(1, round(0.01 * len(train_y) / len(np.unique(train_y))))
    coarse = None if superclasses is None else superclasses.numpy()
    labelings = [train_y] if coarse is None else [train_y, coarse[train_y]]
    # One search serves all labelings. scikit-learn wants a single one to be flat.
    votes = evaluate.knn_predictions((train_x, np.stack(labelings, 1).squeeze()), x)
    votes = votes.reshape(len(x), -1)
    guesses = {
        "knn": votes[None, :, 0],
        "linear": evaluate.linear_predictions((train_x, train_y), x),
        "linear_1pct": evaluate.linear_predictions((train_x, train_y), x, per_class),
    }
    if coarse is not None:
        guesses["super_knn"] = votes[None, :, 1]
        guesses["super_linear"] = evaluate.linear_predictions((train_x, labelings[1]), x)
    scores: dict[str, dict[str, float | None]] = {}
    start = 0
    for name, (rows, labels) in parts.items():
        here = slice(start, start := start + len(rows))
        scores[name] = {}
        for measure, guess in guesses.items():
            truth = coarse[labels] if measure.startswith("super") else labels
            scores[name][measure] = float(np.mean(guess[:, here] == truth))
    return scores
