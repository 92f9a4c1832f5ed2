# SPDX-License-Identifier: MIT
"""Encoders: a backbone from torchvision, from timm or from here, and SimCLR's projection head."""

import torch
from lightly.models.modules.heads import ProjectionHead
from torch import nn

from common.vision import torchvision


def backbone(name: str = "small", image_size: int = 32) -> tuple[nn.Module, int]:
    """An untrained network from images (B, 3, H, W) to features (B, width), and width.

    Args:
        name: "small", for images of 8 x 8 to 32 x 32 on a CPU; or "quick", for studies with many
            runs on a CPU; or a model of torchvision ("resnet18", "resnet50"); or a model of timm
            ("timm:resnet10t").
        image_size: side of the images in pixels.

    Raises:
        ValueError: there is no such model.
    """
    network, width = _network(name, image_size)
    return network.to(memory_format=torch.channels_last), width  # faster for convolutions


def projector(width: int, features: int) -> nn.Module:
    """SimCLR's projection head. The loss sees its output, and only the backbone is used later.

    lightly's SimCLRProjectionHead normalises the output too, which the paper does not.
    """
    return ProjectionHead([
        (width, width, nn.BatchNorm1d(width), nn.ReLU(), True),  # with a bias
        (width, features, None, None),
    ])  # fmt: skip


def _network(name: str, image_size: int) -> tuple[nn.Module, int]:
    if name == "small":
        return _convolutions((32, 1), (64, 2), (128, 2)), 128  # 0.1 million weights
    if name == "quick":  # 0.2 million; half the time of "small", as no layer has full size
        return _convolutions((24, 2), (48, 2), (96, 1), (192, 2)), 192
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"))
    try:
        model = torchvision.models.get_model(name, weights=None)
    except ValueError:
        raise ValueError(
            f"--backbone: got {name!r}, wanted 'small', 'quick', a model of torchvision or "
            "'timm:NAME'"
        ) from None
    if isinstance(model, torchvision.models.ResNet) and image_size <= 64:
        # For small images SimCLR does without the first two layers' reduction by a factor of 4.
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    # The classifier is the last linear layer. Its name differs from model to model.
    path, layer = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return model, layer.in_features


def _timm(name: str) -> tuple[nn.Module, int]:
    try:
        import timm
    except ModuleNotFoundError:
        raise ValueError(f"--backbone: 'timm:{name}' needs timm: pip install timm") from None
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--backbone: timm has no {name!r}: {error}") from None
    return model, getattr(model, "head_hidden_size", model.num_features)


def _convolutions(*layers: tuple[int, int]) -> nn.Module:
    """3 x 3 convolutions with (channels, stride) each, then the mean over positions."""
    modules: list[nn.Module] = []
    channels_in = 3
    for channels, stride in layers:
        convolution = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        modules += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
        channels_in = channels
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten())
