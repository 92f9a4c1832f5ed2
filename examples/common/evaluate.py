# SPDX-License-Identifier: MIT
"""Measures how good frozen features are: nearest neighbours and linear probes, by scikit-learn.

`check_finite` finds out, after an epoch, whether the training has diverged.
"""

import math
from itertools import islice

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from common.data import Split
from hex import ThresholdTracker

Features = tuple[np.ndarray, np.ndarray]  # (N, D) float32, (N,) labels


class Diverged(Exception):
    """A training has reached numbers that are not finite. The text is meant for the user."""


@torch.no_grad()
def features(network: nn.Module, split: Split, batches: int | None = None) -> Features:
    """The network's output, in evaluation mode, for the images of a split, and their labels.

    Args:
        batches: how many batches of images to take, from the first on. None takes all.

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
    """The class that the nearest training rows, by cosine, vote for, for each row of x.

    Labels may also be (N, k), which are k labelings of the same rows. The result is then (rows, k).
    """
    train_x, train_y = train
    voters = KNeighborsClassifier(min(neighbours, len(train_y)), weights="distance")
    return voters.fit(_unit(train_x), train_y).predict(_unit(x))


def knn_accuracy(train: Features, test: Features, neighbours: int = 20) -> float:
    """The share of test images whose nearest training images, by cosine, vote for their class."""
    return float(np.mean(knn_predictions(train, test[0], neighbours) == test[1]))


def linear_predictions(
    train: Features, x: np.ndarray, per_class: int | None = None, draws: int = 10
) -> np.ndarray:
    """The classes that logistic regression gives the rows of x, (draws, N), or (1, N) with None.

    Args:
        per_class: how many labelled training images each class has. None takes all.
        draws: how many random choices of these images are made, which are always the same.
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
    """Accuracy, in [0, 1], of logistic regression on the features. See `linear_predictions`."""
    return float(np.mean(linear_predictions(train, test[0], per_class, draws) == test[1]))


def scores(train: Features, test: Features) -> list[float]:
    """Accuracy of nearest neighbours and of linear probes with 1, 5 and all labels per class."""
    probes = [linear_probe(train, test, per_class) for per_class in (1, 5, None)]
    return [knn_accuracy(train, test), *probes]


def check_finite(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    losses: list[float],
    images: Split,
    scaled: bool = False,
) -> None:
    """Checks, after an epoch, everything from which the next epoch or a resumed run would start.

    Args:
        model: has a `backbone`.
        epoch: counted from 0.
        losses: those of the epoch's steps.
        images: one batch of these is passed through the backbone.
        scaled: whether a GradScaler is in use. It leaves out steps whose gradient is not finite, so
            that a loss that is not finite does no harm.

    Raises:
        Diverged: something is not finite.
    """
    for step, loss in enumerate(losses, 1):
        if not (math.isfinite(loss) or scaled):
            raise Diverged(f"the loss of step {step} of epoch {epoch + 1} is {loss}")
    state = [x for of in optimizer.state.values() for x in of.values() if isinstance(x, Tensor)]
    for module in model.modules():
        if not isinstance(module, ThresholdTracker):  # its eps may be infinite
            state += module.parameters(recurse=False)
            state += module.buffers(recurse=False)
    if not all(x.isfinite().all() for x in state):
        raise Diverged(f"after epoch {epoch + 1} not all weights and moments are finite")
    features(model.backbone, images, batches=1)


def _choose(labels: np.ndarray, per_class: int, random: np.random.Generator) -> np.ndarray:
    return np.concatenate(
        [random.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)]
    )


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
