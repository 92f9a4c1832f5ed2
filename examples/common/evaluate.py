# SPDX-License-Identifier: MIT
"""How good frozen features are: nearest neighbours and linear probes, by scikit-learn."""

from itertools import islice

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

from common.data import Split

Features = tuple[np.ndarray, np.ndarray]  # (N, D) float32, (N,) labels


class Diverged(Exception):
    """A training has come to numbers that are not finite; the text is for the user."""


@torch.no_grad()
def features(network: nn.Module, split: Split, batches: int | None = None) -> Features:
    """What the network, in evaluation mode, makes of the images of a split, and their labels.

    Args:
        batches: of images, the first ones only; None: all.

    Raises:
        Diverged: not all features are finite.
    """
    was_training = network.training
    network.eval()
    rows = torch.cat([network(x).float().cpu() for x in islice(split.images(), batches)])
    network.train(was_training)
    if not rows.isfinite().all():
        raise Diverged("the features of some images are not finite")
    return rows.numpy(), split.labels[: len(rows)].numpy()


def knn_predictions(train: Features, x: np.ndarray, neighbours: int = 20) -> np.ndarray:
    """The votes of the 20 nearest training rows, by cosine, for each row of x.

    Labels may be (N, k), k labelings of the same rows: the votes are so too.
    """
    train_x, train_y = train
    voters = KNeighborsClassifier(min(neighbours, len(train_y)), weights="distance")
    return voters.fit(_unit(train_x), train_y).predict(_unit(x))


def knn_accuracy(train: Features, test: Features, neighbours: int = 20) -> float:
    """Share of test images whose 20 nearest training images, by cosine, vote for their class."""
    return float(np.mean(knn_predictions(train, test[0], neighbours) == test[1]))


def linear_predictions(
    train: Features, x: np.ndarray, per_class: int | None = None, draws: int = 10
) -> np.ndarray:
    """The classes that logistic regression gives the rows of x, (1 or draws, N).

    Args:
        per_class: labelled training images a class; None: all.
        draws: with per_class, the number of random choices of them, always the same.
    """
    train_x, train_y = train
    scale = StandardScaler().fit(train_x)
    train_x, x = scale.transform(train_x), scale.transform(x)
    choices = [slice(None)]
    if per_class is not None:
        choices = [_choose(train_y, per_class, np.random.default_rng(i)) for i in range(draws)]
    fit = LogisticRegression(max_iter=500, tol=1e-3).fit
    return np.stack([fit(train_x[chosen], train_y[chosen]).predict(x) for chosen in choices])


def linear_probe(
    train: Features, test: Features, per_class: int | None = None, draws: int = 10
) -> float:
    """Accuracy of logistic regression on the features, in [0, 1]; `linear_predictions` has more."""
    return float(np.mean(linear_predictions(train, test[0], per_class, draws) == test[1]))


def scores(train: Features, test: Features) -> list[float]:
    """Accuracy of nearest neighbours, and of linear probes with 1, 5 and all labels a class."""
    probes = [linear_probe(train, test, per_class) for per_class in (1, 5, None)]
    return [knn_accuracy(train, test), *probes]


def _choose(labels: np.ndarray, per_class: int, random: np.random.Generator) -> np.ndarray:
    return np.concatenate(
        [random.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)]
    )


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
