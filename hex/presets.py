# SPDX-License-Identifier: MIT
"""The authors' own settings by name: their thresholds, and how they add HEX to another loss.

The settings come from their code, https://github.com/olivesgatech/HEX at commit c3002ed
(docs/released.md). To repeat their training, combine the settings with `variant="released"`:
`HEXLoss(threshold=authors_threshold("simclr"), variant="released")`.
"""

from typing import Literal, get_args

from torch import Tensor

from .checks import as_float, check_candidate, check_choice, check_number, is_number, shown
from .threshold import ThresholdTracker

__all__ = ["authors_mix", "authors_threshold"]

Threshold = Literal[
    "simclr", "nnclr", "all4one",
    "step", "step-imagenet-simclr", "step-imagenet-nnclr", "step-cifar", "cosine",
]  # fmt: skip
Method = Literal["barlow", "vicreg"]

# Their epoch_step in scripts/pretrain, for runs of 100, 100 and 400 epochs, in which eps falls from
# 0.9 to 0.5, 0.6 and 0.6.
_EVERY = {"step-imagenet-simclr": 20, "step-imagenet-nnclr": 25, "step-cifar": 100}


def authors_threshold(
    name: Threshold, *, epochs: int | None = None, every: int | None = None
) -> ThresholdTracker:
    """A new tracker with one of the authors' schedules of the threshold eps, a cosine.

    | name | eps |
    |---|---|
    | "simclr" | adaptive with over="all"; InfoNCE while epoch <= 10 |
    | "nnclr" | the same, but 0.9 while epoch <= 10 (rows [neighbours; predictions], "ntxent") |
    | "all4one" | as "nnclr"; one for the loss of the neighbours, one for that of the centroids |
    | "step" | 0.9, minus 0.1 after every `every` epochs, for cosines scaled to [0, 1] in each row |
    | "step-imagenet-simclr" | "step" every 20 epochs, as in their run of 100 epochs |
    | "step-imagenet-nnclr" | "step" every 25 epochs, as in their run of 100 epochs |
    | "step-cifar" | "step" every 100 epochs, as in six of their seven runs of 400 epochs |
    | "cosine" | from 0.9 to 0.3 over `epochs`, for scaled cosines, compounded as in their code |

    For another length of training, choose another `every`: once eps is below 0, the whole row is in
    H, and the released loss is 0.

    Args:
        name: a name in the table.
        epochs: the number of epochs of the training, for "cosine" only.
        every: the number of epochs from one drop to the next, for "step" only.

    Returns:
        A `ThresholdTracker`, for the argument `threshold` of a loss.

    Raises:
        TypeError, ValueError: the name is unknown, or `epochs` or `every` is missing, is given for
            a name that does not use it, or is out of range.

    Example:
        >>> from hex import HEXLoss
        >>> from hex.presets import authors_threshold
        >>> criterion = HEXLoss(0.1, threshold=authors_threshold("simclr"), variant="released")

    Source: solo/losses/simclr.py and solo/losses/nnclr.py in their repository, and the methods that
    call them (All4One: with type 'adaptive').
    """
    check_choice("name", name, get_args(Threshold))
    if (epochs is not None) != (name == "cosine"):
        wanted = "the number of epochs" if name == "cosine" else f"None for {name!r}"
        raise ValueError(f"epochs: got {shown(epochs)}, wanted {wanted}")
    if (every is not None) != (name == "step"):
        wanted = "a number of epochs" if name == "step" else f"None for {name!r}"
        raise ValueError(f"every: got {shown(every)}, wanted {wanted}")
    if name == "simclr":
        return ThresholdTracker.adaptive(over="all", warmup_epochs=11)
    if name in ("nnclr", "all4one"):
        return ThresholdTracker.adaptive(over="all", warmup_epochs=11, warmup_threshold=0.9)
    if (falls := _EVERY.get(name, every)) is not None:
        return ThresholdTracker.step(0.9, 0.1, falls, normalize_rows=True)
    assert epochs is not None
    return ThresholdTracker.cosine(0.9, 0.3, epochs, normalize_rows=True, compounded=True)


def authors_mix(
    method: Method, hex_loss: Tensor, base: Tensor | float, alpha: float = 0.1
) -> Tensor:
    """HEX plus a loss that is not InfoNCE, with the weights of the authors' adaptive form.

        "barlow"    alpha hex_loss + (1 - alpha) base
        "vicreg"    5 alpha hex_loss + (1 - alpha) base

    Args:
        method: "barlow" (Barlow Twins) or "vicreg".
        hex_loss: the value of a `HEXLoss` on both projections, 0-d.
        base: the value of the method's own loss, 0-d or a number.
        alpha: in [0, 1]. Only one of the authors' configurations names it, and it has 0.1.

    Returns:
        0-d.

    Raises:
        TypeError, ValueError: the method is unknown, or alpha is not a number in [0, 1].

    Example:
        >>> import torch
        >>> from hex import HEXLoss
        >>> from hex.presets import authors_mix
        >>> z0, z1 = torch.randn(2, 256, 512)
        >>> base = (z0 - z1).square().mean()  # put the loss of Barlow Twins here
        >>> loss = authors_mix("barlow", HEXLoss(variant="released")(z0, z1), base)

    Source: solo/methods/barlow_twins.py and solo/methods/vicreg.py in the authors' repository.
    (Their form with a fixed threshold is hex + base.)
    """
    check_choice("method", method, get_args(Method))
    alpha = check_number("alpha", alpha, 0, 1)
    check_candidate("hex_loss", hex_loss)
    if is_number(base):
        base = as_float("base", base)
    else:
        check_candidate("base", base)
    weight = alpha * (5 if method == "vicreg" else 1)
    return weight * hex_loss + (1 - alpha) * base
