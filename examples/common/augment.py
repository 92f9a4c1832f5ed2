# SPDX-License-Identifier: MIT
"""The random views of SimCLR (Chen et al. 2020, appendix A), as torchvision transforms.

For images in memory there are two transforms of our own, `RandomWarp` and `RandomColour`, because
torchvision draws one set of random numbers for a whole batch, and image by image it takes about a
millisecond each on a CPU. `RandomWarp` crops, flips, rotates and shifts in one resampling. Images
from files differ in size, so the loader's workers augment them one by one, by torchvision.

All random numbers come from torch's global generator, so a seed or a restored state repeats the
views.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.vision import v2


class RandomWarp(v2.Transform):
    """Shows every image of a float batch (B, C, S, S) through a random window of its own.

    Args:
        area: range of the area of the window, as a share of the image's area.
        ratio: the width of the window is between 1/ratio and ratio times its height.
        flip: probability that left and right are exchanged.
        degrees: greatest rotation in either direction.
        shift: how far the window may leave the image, as a share of its side. Outside is 0.
        size: side of the view in pixels. None is that of the image.
    """

    def __init__(
        self,
        area: tuple[float, float] = (0.2, 1.0),
        ratio: float = 4 / 3,
        flip: float = 0.5,
        degrees: float = 0.0,
        shift: float = 0.0,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.area, self.ratio, self.flip, self.degrees, self.shift, self.size = (
            area, ratio, flip, degrees, shift, size,
        )  # fmt: skip

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        """Affine maps (B, 2, 3) from the view's coordinates to the image's, both in [-1, 1]."""
        images = flat_inputs[0]
        size = images.shape[:1]

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(size).uniform_(low, high)

        area = uniform(*self.area)
        ratio = uniform(-1, 1).mul(math.log(self.ratio)).exp()
        width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
        if self.area[1] <= 1:  # a crop, which must stay inside even if it is long
            width, height = width.clamp(max=1), height.clamp(max=1)
        # The centre may be where the window stays inside the image, and `shift` beyond. The side
        # of the image is 2 units long.
        x = uniform(-1, 1) * ((1 - width).clamp(min=0) + 2 * self.shift)
        y = uniform(-1, 1) * ((1 - height).clamp(min=0) + 2 * self.shift)
        width = torch.where(torch.rand(size) < self.flip, -width, width)
        angle = uniform(-1, 1) * math.radians(self.degrees)
        cos, sin = angle.cos(), angle.sin()
        rows = [
            torch.stack([width * cos, -height * sin, x], dim=1),
            torch.stack([width * sin, height * cos, y], dim=1),
        ]
        return {"theta": torch.stack(rows, dim=1).to(images)}

    def transform(self, inpt: Tensor, params: dict[str, Tensor]) -> Tensor:
        size = (self.size, self.size) if self.size else inpt.shape[2:]
        grid = F.affine_grid(params["theta"], [*inpt.shape[:2], *size], align_corners=False)
        return F.grid_sample(inpt, grid, align_corners=False)


class RandomColour(v2.Transform):
    """Changes brightness, contrast, saturation and hue of every image of a batch.

    The images are (B, 3, H, W) in [0, 1]. It is torchvision's `ColorJitter` with probability 0.8,
    then `RandomGrayscale` with probability 0.2, with two simplifications: the order is fixed, and
    hue rotates the colours about the axis of greys. All of it is then a 3 x 3 matrix and an offset
    for each image.

    Args:
        strength: brightness, contrast and saturation are multiplied by factors in 1 +- strength.
        hue: greatest rotation in either direction, in full turns.
    """

    GREY = (0.299, 0.587, 0.114)

    def __init__(self, strength: float = 0.4, hue: float = 0.1) -> None:
        super().__init__()
        self.strength, self.hue = strength, hue

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Tensor]:
        images = flat_inputs[0]
        n = images.shape[0]
        jittered = (torch.rand(n, 1, 1) < 0.8).float()
        factors = 1 + jittered * torch.empty(3, n, 1, 1).uniform_(-self.strength, self.strength)
        brightness, contrast, saturation = factors
        saturation = torch.where(torch.rand(n, 1, 1) < 0.2, 0.0, saturation)
        turn = jittered * torch.empty(n, 1, 1).uniform_(-self.hue, self.hue) * 2 * math.pi

        one, third = torch.eye(3), torch.full((3, 3), 1 / 3)
        cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
        rotation = turn.cos() * one + (1 - turn.cos()) * third + turn.sin() * cross  # (n, 3, 3)
        grey = torch.tensor(self.GREY).expand(3, 3)
        matrix = rotation @ (saturation * one + (1 - saturation) * grey) * brightness * contrast
        offset = brightness * (1 - contrast)
        return {"matrix": matrix.to(images), "offset": offset.to(images)}

    def transform(self, inpt: Tensor, params: dict[str, Tensor]) -> Tensor:
        grey = inpt.new_tensor(self.GREY)
        mean = torch.einsum("c,bchw->b", grey, inpt)[:, None, None] / inpt[0, 0].numel()
        pixels = params["matrix"] @ inpt.flatten(2) + params["offset"] * mean
        return pixels.clamp(0, 1).view_as(inpt)


# With `local` each of these makes DINO's small crops of a part of the image, else whole views.


def digits(local: bool = False) -> nn.Module:
    """For batches of 8 x 8 digits. There is no flip, because a mirrored 2 is no digit, and no small
    crop in the whole views, because a cropped 7 is a 1."""
    whole = RandomWarp(area=(0.7, 1.4), ratio=1.3, flip=0.0, degrees=15, shift=0.1)
    part = RandomWarp(area=(0.3, 0.6), ratio=1.3, flip=0.0, degrees=15, size=6)
    return v2.Compose([part if local else whole, v2.GaussianNoise(sigma=0.1)])


def small(local: bool = False, size: int | None = None) -> nn.Module:
    """For batches of 32 x 32 photographs (CIFAR), without blur, as in the paper.

    Args:
        size: side in pixels of the views that are not local. None is that of the images.
    """
    warp = RandomWarp(area=(0.05, 0.4), size=16) if local else RandomWarp(size=size)
    return v2.Compose([warp, RandomColour()])


def photograph(size: int, local: bool = False) -> nn.Module:
    """For one photograph of any size. Makes a uint8 view (3, size, size), local 3/7 as large."""
    scale = (0.2, 1.0)
    if local:
        size, scale = max(1, size * 3 // 7), (0.05, 0.4)
    return v2.Compose([
        v2.ToImage(),
        v2.RandomResizedCrop(size, scale=scale, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(size // 20 * 2 + 1, (0.1, 2.0))], p=0.5),
    ])  # fmt: skip
