# SPDX-License-Identifier: MIT
"""The authors' own settings by name: their thresholds, and how they add HEX to another loss.

Read in their code, github.com/olivesgatech/HEX at commit c3002ed (docs/released.md). To repeat
their training take `variant="released"` with them: `HEXLoss(threshold=authors_threshold("simclr"),
variant="released")`.
"""

from typing import Literal, get_args

from torch import Tensor

from .checks import check_choice, check_number
from .threshold import ThresholdTracker

__all__ = ["authors_mix", "authors_threshold"]

Threshold = Literal[
    "simclr", "nnclr", "step", "step-imagenet-simclr", "step-imagenet-nnclr", "step-cifar", "cosine"
]
Method = Literal["barlow", "vicreg"]

# epoch_step in scripts/pretrain, of runs of 100, 100 and 400 epochs: 0.9 falls to 0.5, 0.6 and 0.6.
_EVERY = {"step-imagenet-simclr": 20, "step-imagenet-nnclr": 25, "step-cifar": 100}


def authors_threshold(
    name: Threshold, *, epochs: int | None = None, every: int | None = None
) -> ThresholdTracker:
    """A new tracker with the authors' schedule of the threshold.

    | name | eps |
    |---|---|
    | "simclr" | adaptive, over="all"; InfoNCE while epoch <= 10 |
    | "nnclr" | the same, but 0.9 while epoch <= 10 (rows [neighbours; predictions], "ntxent") |
    | "step" | 0.9, minus 0.1 every so many epochs, of cosines scaled to [0, 1] by row |
    | "step-imagenet-simclr" | that every 20 epochs, as in their run of 100 |
    | "step-imagenet-nnclr" | every 25, as in their run of 100 |
    | "step-cifar" | every 100, as in six of their runs of 400 (a seventh has 150) |
    | "cosine" | from 0.9 to 0.3 over `epochs`, scaled by row, the decay compounded as theirs is |

    A step for another length of training needs another `every`: below 0 all of a row is in H, and
    the released loss is 0.

    Args:
        epochs: of the training, for "cosine" and no other.
        every: epochs from one drop to the next, for "step" and no other.

    Raises:
        TypeError, ValueError: another name, or epochs or every missing or not wanted.

    Example:
        >>> from hex import HEXLoss
        >>> from hex.presets import authors_threshold
        >>> criterion = HEXLoss(0.1, threshold=authors_threshold("simclr"), variant="released")

    Source: solo/losses/simclr.py, solo/losses/nnclr.py and the methods that call them.
    """
    check_choice("name", name, get_args(Threshold))
    if (epochs is not None) != (name == "cosine"):
        wanted = "the number of epochs" if name == "cosine" else f"None for {name!r}"
        raise ValueError(f"epochs: got {epochs}, wanted {wanted}")
    if (every is not None) != (name == "step"):
        wanted = "a number of epochs" if name == "step" else f"None for {name!r}"
        raise ValueError(f"every: got {every}, wanted {wanted}")
    if name == "simclr":
        return ThresholdTracker.adaptive(over="all", warmup_epochs=11)
    if name == "nnclr":
        return ThresholdTracker.adaptive(over="all", warmup_epochs=11, warmup_threshold=0.9)
    if (falls := _EVERY.get(name, every)) is not None:
        return ThresholdTracker.step(0.9, 0.1, falls, normalize_rows=True)
    assert epochs is not None
    return ThresholdTracker.cosine(0.9, 0.3, epochs, normalize_rows=True, compounded=True)


def authors_mix(method: Method, hex_loss: Tensor, base: Tensor, alpha: float = 0.1) -> Tensor:
    """HEX added to a loss that is not InfoNCE, as the authors' adaptive form does.

        "barlow"    alpha hex + (1 - alpha) base
        "vicreg"    5 alpha hex + (1 - alpha) base

    Args:
        hex_loss: the value of a `HEXLoss` on both projections. base: the method's own loss.
        alpha: in [0, 1]; 0.1 in the one configuration that names it.

    Raises:
        TypeError, ValueError: another method, or alpha outside [0, 1].

    Example:
        >>> import torch
        >>> from hex import HEXLoss
        >>> from hex.presets import authors_mix
        >>> z0, z1 = torch.randn(2, 256, 512)
        >>> base = (z0 - z1).square().mean()  # in place of Barlow Twins' own
        >>> loss = authors_mix("barlow", HEXLoss(variant="released")(z0, z1), base)

    Source: solo/methods/barlow_twins.py, where the fixed form is hex + base, and vicreg.py.
    """
    check_choice("method", method, get_args(Method))
    check_number("alpha", alpha, 0, 1)
    weight = alpha * (5 if method == "vicreg" else 1)
    return weight * hex_loss + (1 - alpha) * base
