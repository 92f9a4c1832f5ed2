# SPDX-License-Identifier: MIT
"""What is in H: how much of it is of the anchor's own class, where labels are known.

The loss needs no labels, and its statistics (`criterion.statistics()`) use none. Where a data set
has labels, `class_share` tells during training what the threshold selects. In a training loop
of your own, with `writer` a SummaryWriter of torch.utils.tensorboard or of tensorboardX::

    for name, value in criterion.statistics().items():
        writer.add_scalar(f"hex/{name}", value, step)
    writer.add_scalar("hex/class_share", class_share(z0, z1, labels, criterion.last.eps), step)

With Lightning, `hex.lightning.HEXCallback` logs all of them. `hex.plots` draws them.
"""

import torch
from torch import Tensor

from .checks import (
    Mode,
    check_eps,
    check_ignored,
    check_labels,
    check_mode,
    check_negatives,
    check_views,
)
from .problem import _ignored_shapes, eps_tensor
from .reference import _dots, _unit_rows

__all__ = ["class_share"]

_NUMBERS = 2**20  # cosines in memory at a time: 4 MiB of float32


def class_share(
    z0: Tensor,
    z1: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    *,
    mode: Mode = "ntxent",
    negatives: Tensor | None = None,
    negative_labels: Tensor | None = None,
    ignored: Tensor | None = None,
) -> Tensor:
    """The share of the members of all H(i) that are of the class of their anchor i::

        H(i) = { negatives j of i : c_ij > eps },   c_ij the cosine of i and j
        share = sum_i |{ j in H(i) : y_j = y_i }| / sum_i |H(i)|,   y the labels

    The anchors, their negatives and H are those of
    `HEXLoss(mode=mode)(z0, z1, negatives, ignored=ignored)`: an anchor, its positive and what is
    ignored are not among its negatives. With eps=-math.inf H holds all negatives, and the share is
    what chance gives.

    It says how many of the negatives in H are false negatives. The paper's form of the loss repels
    H, and expects only a share tau_plus of it to be of the anchor's class. The released form leaves
    H out (docs/guides/what_h_holds.md).

    The cosines are computed in blocks of anchors, without gradients, so that memory does not grow
    with B². It takes one to four times as long as the similarity matrix in plain PyTorch.

    Args:
        z0, z1: (B, D), the two views that the loss was given.
        labels: (B,) integers, the class of each image.
        eps: the threshold, a cosine: a number, a 0-d tensor, or (N,), one for each anchor.
            `criterion.last.eps` is that of the last batch. (With `by_positive` and with
            `normalize_rows` each anchor has a threshold of its own, and `last.eps` is their mean.)
        mode: that of the loss.
        negatives: None, (K, D) or (B, K, D), as the loss was given them.
        negative_labels: (K,) or (B, K) integers, the classes of the negatives, if there are any.
        ignored: None, or the negatives that do not count, as the loss was given them.

    Returns:
        0-d float64 on the device of z0, in [0, 1]. It is NaN if no H has a member, as with the eps
        of a warm-up, +inf. It does not synchronise with the device.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value. The text names it.

    Example:
        >>> import torch
        >>> from hex.watch import class_share
        >>> labels = torch.tensor([0, 0, 1])
        >>> z0 = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
        >>> class_share(z0, z0, labels, eps=0.5)
        tensor(1., dtype=torch.float64)
        >>> class_share(z0, z0, labels, eps=-torch.inf)  # all negatives
        tensor(0.3333, dtype=torch.float64)
    """
    check_mode(mode)
    check_views(z0, z1)
    images, device = z0.shape[0], z0.device
    labels = check_labels("labels", labels, (images,), device)
    if negatives is not None:
        check_negatives(negatives, z0)
        of_negatives = tuple(negatives.shape[:-1])
        negative_labels = check_labels("negative_labels", negative_labels, of_negatives, device)
    elif negative_labels is not None:
        raise ValueError("negative_labels: got some, wanted None without negatives")
    if ignored is not None:
        ignored = check_ignored(ignored, _ignored_shapes(z0, negatives, mode), device)
    both = negatives is None and mode != "query"
    check_eps(eps, 2 * images if both else images)
    with torch.no_grad():
        thresholds = eps_tensor(eps, z0).expand(2 * images if both else images)
        used = (z0, z1) if negatives is None else (z0, z1, negatives)
        dtype = torch.float64 if any(z.dtype == torch.float64 for z in used) else torch.float32
        u0, u1 = _unit_rows(z0.to(dtype)), _unit_rows(z1.to(dtype))
        index = torch.arange(images, device=device)[:, None]
        if negatives is not None:
            none = index[:, :0]
            counts = _counts(
                u0, negatives.to(dtype), labels, negative_labels, thresholds, none, ignored
            )
        elif mode == "ntxent":
            own = torch.cat([index, index + images], 1).repeat(2, 1)  # the anchor, the positive
            u, of_both = torch.cat([u0, u1]), labels.repeat(2)
            counts = _counts(u, u, of_both, of_both, thresholds, own, ignored)
        else:
            there = back = ignored
            if ignored is not None and ignored.shape[0] != images:  # by anchors
                there, back = ignored.chunk(2)
            counts = _counts(u0, u1, labels, labels, thresholds[:images], index, there)
            if mode == "cross":
                counts += _counts(u1, u0, labels, labels, thresholds[images:], index, back)
        return counts[0].to(torch.float64) / counts[1]


def _counts(
    u: Tensor, candidates: Tensor, labels: Tensor, their_labels: Tensor | None, eps: Tensor,
    not_negatives: Tensor, ignored: Tensor | None,
) -> Tensor:  # fmt: skip
    """How many members of all H are of the anchor's class, and how many there are: (2,) int64.

    Args:
        u: (N, D), unit rows, the anchors.
        candidates: (M, D), or (N, M, D), each anchor's own.
        labels, their_labels: (N,), and (M,) or (N, M).
        eps: (N,) float64.
        not_negatives: (N, k), the candidates that are none.
        ignored: None, or (n, m) bool, True for candidates that do not count. It repeats over the
            rows and the columns.
    """
    assert their_labels is not None
    counts = torch.zeros(2, dtype=torch.int64, device=u.device)
    shared = candidates.dim() == 2
    numbers = candidates.shape[0] if shared else candidates[:1].numel()
    rows = max(1, _NUMBERS // max(1, numbers))
    if shared:
        candidates = _unit_rows(candidates)
    for start in range(0, u.shape[0], rows):
        block = slice(start, start + rows)
        if shared:
            c = _dots(u[block], candidates)
        else:
            c = _dots(_unit_rows(candidates[block]), u[block, None]).squeeze(-1)
        # float32 would round eps, which is float64.
        hard = c.clamp(max=1).to(torch.float64) > eps[block, None]
        hard.scatter_(1, not_negatives[block], False)
        if ignored is not None:
            index = torch.arange(start, start + len(hard), device=u.device) % ignored.shape[0]
            hard &= ~ignored[index].repeat(1, hard.shape[1] // max(1, ignored.shape[1]))
        same = labels[block, None] == (their_labels if shared else their_labels[block])
        counts += torch.stack([(hard & same).sum(), hard.sum()])
    return counts
