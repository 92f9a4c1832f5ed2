# SPDX-License-Identifier: MIT
"""The HEX loss in place of open_clip's ClipLoss, with the same arguments and form of the result.

open_clip itself is not imported. The mathematics is that of `HEXLoss` in mode "cross".
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .checks import (
    Variant,
    check_bias,
    check_flag,
    check_has_numbers,
    check_temperature,
    check_views,
)
from .contrastive import Threshold
from .loss import HEXLoss

__all__ = ["HEXClipLoss"]


class HEXClipLoss(HEXLoss):
    """The HEX loss of images and texts in place of open_clip's `ClipLoss`.

    Let c_ij be the cosine of image i and text j, s the scale that the model learns, and l = s c.
    Let L_i be the loss of a row in mode "cross", where i is its own positive and all others are
    negatives. Then::

        loss = ( mean_i L_i(images against texts) + mean_i L_i(texts against images) ) / 2

    With `threshold=None` this is ClipLoss. The logits are never stored.

    In open_clip's releases, use this loss in place of `create_loss(args)`. In versions with tasks,
    change `create_task` so that it returns `CLIPTask(model, loss=HEXClipLoss())`.

    Args:
        threshold, beta, tau_plus, variant, decoupled: as in `HEXLoss`.
        gather_distributed: as in `HEXLoss`, but True by default, because ClipLoss gathers as well.
            With True, the value and the gradient are those of ClipLoss with gather_with_grad=True
            and local_loss=False.
        process_group, check_sizes, cache_bytes: as in `HEXLoss`.

    Shape:
        image_features, text_features: (B, D), float64, float32, bfloat16 or float16. Rows may have
            any length, because they are normalised here.
        logit_scale: a number or a tensor of one element, the inverse of the temperature.
        Result: 0-d. It is float64 if an input is float64, and otherwise float32.

    Attributes:
        threshold, last, statistics(), set_epoch(): as in `HEXLoss`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value. The message names it.

    Example:
        >>> import torch
        >>> from hex.open_clip import HEXClipLoss
        >>> loss = HEXClipLoss()
        >>> model_out = {
        ...     "image_features": torch.randn(256, 64, requires_grad=True),
        ...     "text_features": torch.randn(256, 64, requires_grad=True),
        ...     "logit_scale": torch.tensor(14.3),
        ... }
        >>> losses = loss(**model_out, output_dict=True)
        >>> losses["contrastive_loss"].backward()

    Source: Radford et al. 2021 (arXiv 2103.00020); Kokilepersaud et al., WACV 2025 (arXiv
    2410.23200).
    """

    shown: ClassVar[tuple[str, ...]] = (
        "beta",
        "tau_plus",
        "variant",
        "decoupled",
        "gather_distributed",
    )

    def __init__(
        self,
        *,
        threshold: Threshold = "adaptive",
        beta: float = 1.0,
        tau_plus: float = 0.1,
        variant: Variant = "paper",
        decoupled: bool = False,
        gather_distributed: bool = True,
        process_group: Any = None,
        check_sizes: bool = True,
        cache_bytes: int | None = None,
    ) -> None:
        super().__init__(
            threshold=threshold,
            beta=beta,
            tau_plus=tau_plus,
            variant=variant,
            decoupled=decoupled,
            mode="cross",
            gather_distributed=gather_distributed,
            process_group=process_group,
            check_sizes=check_sizes,
            cache_bytes=cache_bytes,
        )

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch. With output_dict, the result is {"contrastive_loss": loss}.

        Args:
            image_features, text_features: (B, D). Row i of one and row i of the other are a pair.
            logit_scale: exp of the model's parameter. The parameter gets its gradient.
            logit_bias: None or, for a model that has a bias, a number or a tensor of one element.
                It does not change the loss, because adding one number to all logits does not change
                the softmax. Its gradient is 0, as in ClipLoss, and not missing, because DDP would
                refuse a missing gradient.
            output_dict: whether to return a dict.
        """
        check_views(image_features, text_features, ("image_features", "text_features"))
        temperature = _inverse(logit_scale, image_features)
        check_bias("logit_bias", logit_bias, image_features)
        output_dict = check_flag("output_dict", output_dict)
        value: Tensor = super().forward(image_features, text_features, temperature=temperature)
        if isinstance(logit_bias, Tensor):
            value = value + 0 * logit_bias.to(value).sum()
        return {"contrastive_loss": value} if output_dict else value


def _inverse(logit_scale: Tensor | float, like: Tensor) -> Tensor | float:
    """The temperature of a logit_scale: a number, or a 0-d tensor if logit_scale is a tensor."""
    scale = check_temperature(logit_scale, "logit_scale")
    if isinstance(scale, Tensor):
        check_has_numbers("logit_scale", scale, like.device)
        return 1 / scale.reshape(()).to(torch.float64)  # or it would round once more
    if 1 / scale == math.inf:  # torch.compile does not trace math.isinf
        raise ValueError(f"logit_scale: got {scale}, wanted a number with a finite inverse")
    return 1 / scale
