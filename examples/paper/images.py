# SPDX-License-Identifier: MIT
"""The images of the authors' runs: ImageNet or any folder, CIFAR-10 and CIFAR-100, and their views.

The views are those of the authors' files, by torchvision. Everything is drawn from torch's global
generator, as common/data.py needs it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import data
from common.vision import torchvision, v2
from torch import Tensor, nn
from torch.utils.data import Dataset

from paper.settings import CROP, Settings

CIFAR = {  # the class of torchvision, and the folder of its download
    "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py"),
    "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python"),
}
# The mean and the standard deviation by which the authors scale each channel.
SCALES = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class Pictures(data.PictureSplit):
    """Images with the authors' views, scaled as theirs are. `size` is that of the whole run, also
    where --tiny makes smaller views, so that the backbone is the same."""

    def __init__(
        self, pictures: Dataset, settings: Settings, workers: int, device: torch.device
    ) -> None:
        self.crop, name = settings["crop"], settings["data"]
        views = [view(self.crop, **options) for options in settings["views"]]
        super().__init__(pictures, views, CROP[name], workers, device)
        self._mean, self._std = (torch.tensor(x).view(3, 1, 1) for x in SCALES[name])

    def whole(self) -> nn.Module:
        larger = self.crop * 8 // 7 if self.size > 32 else self.crop  # 256 for 224
        return v2.Compose([
            v2.ToImage(), v2.Resize(larger, antialias=True), v2.CenterCrop(self.crop),
        ])  # fmt: skip

    def crops(self) -> nn.Module:
        """What a probe is trained on."""
        return v2.Compose([
            v2.ToImage(),
            v2.RandomResizedCrop(self.crop, antialias=True),
            v2.RandomHorizontalFlip(),
        ])  # fmt: skip

    def scaled(self, images: Tensor) -> Tensor:
        images = images.to(self._device, non_blocking=True).float() / 255
        return (images - self._mean.to(images)) / self._std.to(images)

    def some(self, fraction: float) -> Tensor:
        """The places of a random share of the images of each class, always the same, sorted."""
        random = np.random.default_rng(0)
        labels = self.labels.numpy()
        places = [random.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
        taken = [of[: max(1, round(fraction * len(of)))] for of in places]
        return torch.from_numpy(np.sort(np.concatenate(taken)))


def view(
    crop: int,
    *,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    blur: float,
    solarize: float,
) -> nn.Module:
    """A random view of an image of any size, uint8 (3, crop, crop). See views.yaml."""
    return v2.Compose([
        v2.ToImage(),
        v2.RandomResizedCrop(
            crop, (0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        ),
        v2.RandomApply([v2.ColorJitter(brightness, contrast, saturation, hue)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur),  # 13: three sigma on each side
        v2.RandomSolarize(128, p=solarize),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip


def load(root: Path, settings: Settings, workers: int, device: torch.device) -> tuple[Any, Any]:
    """The training and the test images, as `Pictures`.

    Args:
        root: a folder with train/<class>/ and val/<class>/ or test/<class>/. For CIFAR it may also
            be a folder with torchvision's download.

    Raises:
        DataError: they are not there. The text is meant for the user.
    """
    if not root.is_dir():
        raise data.DataError(f"--root {root}: there is no such folder")
    kind, folder = CIFAR.get(settings["data"], (None, ""))
    if kind is not None and (root / folder).is_dir():
        try:
            parts = [kind(str(root), train=train) for train in (True, False)]
        except RuntimeError as error:
            raise data.DataError(f"--root {root}: {error}") from None
    else:
        parts = [data.image_folder(part) for part in data.parts_of(root)]
        data.check_classes(root, *(part.classes for part in parts))
    if (most := settings.get("images")) is not None:
        for part in parts:
            _keep(part, torch.linspace(0, len(part) - 1, min(most, len(part))).long().tolist())
    train, test = (Pictures(part, settings, workers, device) for part in parts)
    return train, test


def _keep(pictures: Any, places: list[int]) -> None:
    """Leaves only some of the images of a dataset of torchvision."""
    if hasattr(pictures, "samples"):
        pictures.samples = [pictures.samples[i] for i in places]
    else:
        pictures.data = pictures.data[places]
    pictures.targets = [pictures.targets[i] for i in places]
