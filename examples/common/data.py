# SPDX-License-Identifier: MIT
"""Images for the examples: digits (in scikit-learn), CIFAR-10, or a folder of photographs.

A split has `labels` (int64), `classes` (the names of the labels) and `images(batch_size)`, which
are the unchanged images in order. Images are float (B, 3, size, size) in [-1, 1] on the device.
augment.py makes the views. `loader` makes the DataLoader of a training:

    for items in loader(split, batch_size, seed, epoch):
        views, labels = split.prepare(items)
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from common import augment
from common.vision import torchvision, v2

ImageFolder, CIFAR10 = torchvision.datasets.ImageFolder, torchvision.datasets.CIFAR10
NAMES = ("digits", "cifar10", "folder")
DIGITS = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"

Batch = tuple[list[Tensor], Tensor]  # two views, then the small crops; (B,) labels


class DataError(Exception):
    """The data is missing or is not what it should be. The text is meant for the user."""

    def __init__(self, text: str) -> None:
        # DataLoader raises an error of a worker again, with the worker's traceback before the text.
        super().__init__(text.strip().rpartition("DataError: ")[2])


class MemorySplit:
    """uint8 images (N, 1 or 3, H, W) in the device's memory, augmented by whole batches."""

    def __init__(
        self, images: Tensor, labels: Tensor, classes: Sequence[str], augmentations: list[nn.Module]
    ) -> None:
        self._images = images
        self._augmentations = augmentations  # one for each view
        self.labels = labels
        self.classes = list(classes)
        self.size = images.shape[-1]
        self.loading = {"collate_fn": _as_it_is}  # options of DataLoader

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Views and labels of all images, for plain.py. The rest, which fills no batch, is left
        out."""
        order = torch.randperm(len(self))
        for index in order.split(batch_size)[: len(self) // batch_size]:
            yield self.batch(index)

    def dataset(self) -> Dataset:
        return _InMemory(self)

    def prepare(self, items: Batch) -> Batch:
        return items

    def batch(self, index: Tensor) -> Batch:
        """Views and labels of the images at `index`."""
        return self.views(index), self.labels[index].to(self._images.device)

    def views(self, index: Tensor) -> list[Tensor]:
        """Random views of each of the images at `index`."""
        images = self._images[index.to(self._images.device)].float() / 255
        return [_centre(augment(images)) for augment in self._augmentations]

    def subset(self, index: Tensor, augmentations: list[nn.Module] | None = None) -> "MemorySplit":
        """A split of the images at `index`, with other augmentations if they are given."""
        images = self._images[index.to(self._images.device)]
        return MemorySplit(
            images, self.labels[index], self.classes, augmentations or self._augmentations
        )

    def images(self, batch_size: int = 512) -> Iterator[Tensor]:
        for images in self._images.split(batch_size):
            yield _centre(images.float() / 255)


class PictureSplit:
    """Photographs in files, read, decoded and augmented by worker processes.

    Args:
        pictures: a dataset of torchvision, of images as PIL has them and labels, with `targets` and
            `classes`.
        views: makes a view of an image, one for each view.
    """

    def __init__(
        self,
        pictures: Dataset,
        views: list[nn.Module],
        size: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self._folder, self._augmentations = pictures, views
        self.labels = torch.tensor(pictures.targets)
        self.classes = pictures.classes
        self.size, self._device = size, device
        self.loading = {  # options of DataLoader
            "num_workers": workers,
            "pin_memory": device.type == "cuda",
            "worker_init_fn": _leave_ctrl_c_to_the_parent,
            # New workers start in each epoch, with seeds that torch's generator gives them.
            # Persistent ones would have a state that no checkpoint holds.
        }

    def __len__(self) -> int:
        return len(self._folder)

    def dataset(self) -> Dataset:
        return self.as_seen_by(*self._augmentations)

    def prepare(self, items: list[Tensor]) -> Batch:
        """What a model gets, of uint8 views and labels."""
        *views, labels = items
        return [self.scaled(view) for view in views], labels.to(self._device)

    def whole(self) -> nn.Module:
        """What makes a view of the middle of an unchanged image."""
        return v2.Compose([
            v2.ToImage(), v2.Resize(self.size * 8 // 7, antialias=True), v2.CenterCrop(self.size),
        ])  # fmt: skip

    def images(self, batch_size: int = 256) -> Iterator[Tensor]:
        # A generator of its own, because looking at the images must not change later views.
        aside = torch.Generator()
        loader = DataLoader(
            self.as_seen_by(self.whole()), batch_size, generator=aside, **self.loading
        )
        yield from (self.scaled(images) for images, _ in loader)

    def as_seen_by(self, *transforms: nn.Module) -> Dataset:
        """For each image the result of each transform, and then the label."""
        return _Pictures(self._folder, list(transforms))

    def scaled(self, images: Tensor) -> Tensor:
        """Of uint8 images, those that a network gets."""
        return _centre(images.to(self._device, non_blocking=True).float() / 255)


class FolderSplit(PictureSplit):
    """The images below root/<class>/."""

    def __init__(
        self, root: Path, size: int, workers: int, device: torch.device, local_views: int
    ) -> None:
        views = _one_a_view(partial(augment.photograph, size), local_views)
        super().__init__(image_folder(root), views, size, workers, device)


def image_folder(root: Path) -> ImageFolder:
    """The images below root/<class>/.

    Raises:
        DataError: there are none, or a class has none.
    """
    try:
        return ImageFolder(str(root))
    except FileNotFoundError as error:
        raise DataError(f"{root}: {error}") from None


Split = MemorySplit | PictureSplit


def load(
    name: str,
    root: Path | None = None,
    *,
    device: torch.device | str = "cpu",
    size: int = 224,
    workers: int = 0,
    local_views: int = 0,
) -> tuple[Split, Split]:
    """The training and the test split.

    Args:
        name: one of NAMES.
        root: for "cifar10" a folder with cifar-10-batches-py/ (torchvision's download), or with
            train/<class>/*.jpg and test/<class>/*.jpg. For "folder" one with train/<class>/ and
            test/<class>/ or val/<class>/, with images of any size and format that PIL reads.
        device: where the batches are wanted.
        size: side of the views in pixels, for "folder" only.
        workers: how many processes read images, for "folder" only.
        local_views: how many small crops of each image follow the two views.

    Raises:
        DataError: the data is missing or is not what was expected.
    """
    device = torch.device(device)
    if name == "digits":
        return _digits(device, local_views)
    if root is None:
        raise DataError(f"--data {name} needs --root, the folder that holds the images")
    if not root.is_dir():
        raise DataError(f"--root {root}: there is no such folder")
    if name == "cifar10":
        return _cifar10(root, device, local_views)
    return _folders(root, size, workers, device, local_views)


def loader(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: Callable[[], int],
    rank: int = 0,
    ranks: int = 1,
) -> DataLoader:
    """Random views of the images of a split, in random order, for `split.prepare`.

    Order and views follow from seed, epoch and rank. So a run that was stopped needs no state of a
    generator to go on with the same bits.

    Args:
        batch_size: images of all ranks together, a multiple of `ranks`.
        epoch: returns which epoch begins, counted from 0.
    """
    # What does not divide is left out of an epoch: images too few for one each, and the short last
    # batch. So all ranks have as many batches, of one size, and no image is twice in a batch, where
    # it would be its own false negative.
    dataset = split.dataset()
    sampler = DistributedSampler(dataset, ranks, rank, seed=seed, drop_last=True)
    batches = _Batches(sampler, batch_size // ranks, drop_last=True)
    batches.epoch = epoch
    return DataLoader(dataset, batch_sampler=batches, **split.loading)


class _Batches(BatchSampler):
    epoch: Callable[[], int]

    def __iter__(self) -> Iterator[list[int]]:
        # At once, and not with the first batch: then the workers have their seeds already.
        sampler, epoch = self.sampler, self.epoch()
        sampler.set_epoch(epoch)
        mixed = np.random.SeedSequence([sampler.seed, epoch, sampler.rank])
        torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
        return super().__iter__()


def in_memory(
    root: Path, size: int, device: torch.device | str = "cpu"
) -> tuple[MemorySplit, MemorySplit]:
    """`load("folder", root)` with images that are read once and kept in the device's memory.

    It is for many runs on the same photographs, because the views are then made on the device, by
    whole batches.

    Args:
        size: side in pixels of the square from the middle of each image, which is kept. The shorter
            side of the image is scaled to it.

    Raises:
        DataError: the data is missing or is not what was expected.
    """
    parts = [_decoded(folder, size) for folder in parts_of(root)]
    check_classes(root, *(classes for _, _, classes in parts))
    views = [augment.small(), augment.small()]
    train, test = (MemorySplit(x.to(device), y, classes, views) for x, y, classes in parts)
    return train, test


def _digits(device: torch.device, local_views: int) -> tuple[Split, Split]:
    """1797 handwritten digits of 8 x 8 pixels, of which 500, always the same, are for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels.reshape(-1, 1, 8, 8) * 255 / 16).to(device, torch.uint8)
    index = train_test_split(range(len(labels)), test_size=500, stratify=labels, random_state=0)
    labels = torch.tensor(labels)
    views = _one_a_view(augment.digits, local_views)
    train, test = (
        MemorySplit(images[part], labels[part], DIGITS, views) for part in map(list, index)
    )
    return train, test


def _cifar10(root: Path, device: torch.device, local_views: int) -> tuple[Split, Split]:
    if (root / "cifar-10-batches-py").is_dir():
        parts = [_downloaded(root, train) for train in (True, False)]
    elif (root / "train").is_dir() and (root / "test").is_dir():
        parts = [_decoded(root / name) for name in ("train", "test")]
    else:
        raise DataError(
            f"--root {root}: wanted CIFAR-10 there, cifar-10-batches-py/ or train/ and test/ with "
            "a folder of images for each class"
        )
    for (images, labels, _), part in zip(parts, ("training", "test"), strict=True):
        if images.shape[1:] != (3, 32, 32) or labels.unique().numel() != 10:
            raise DataError(
                f"--root {root}: the {part} images are {tuple(images.shape[1:])} in "
                f"{labels.unique().numel()} classes, wanted CIFAR-10's (3, 32, 32) in 10; "
                "--data folder takes any images"
            )
    views = _one_a_view(augment.small, local_views)
    train, test = (MemorySplit(x.to(device), y, classes, views) for x, y, classes in parts)
    return train, test


def _downloaded(root: Path, train: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Images, labels and classes of CIFAR-10, from torchvision's download."""
    try:
        files = CIFAR10(str(root), train=train)
    except RuntimeError as error:
        raise DataError(f"--root {root}: {error}") from None
    images = torch.from_numpy(files.data).permute(0, 3, 1, 2)
    return images.contiguous(), torch.tensor(files.targets), files.classes


def _decoded(folder: Path, size: int | None = None) -> tuple[Tensor, Tensor, list[str]]:
    """Images, labels and classes of all files below folder/<class>/.

    Images are cropped to size x size. With None they stay as they are, and must all have one size.
    """
    try:
        listed = ImageFolder(str(folder))
        with ThreadPoolExecutor() as pool:
            paths = (path for path, _ in listed.samples)
            images = list(pool.map(partial(_decode, size=size), paths))
        return torch.stack(images), torch.tensor(listed.targets), listed.classes
    except (FileNotFoundError, RuntimeError) as error:  # no images, or images of several sizes
        raise DataError(f"{folder}: {error}") from None


def _decode(path: str, size: int | None = None) -> Tensor:
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if size is not None:
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image).transpose(2, 0, 1))
    except OSError as error:
        raise DataError(f"{path}: {error}") from None


def _folders(
    root: Path, size: int, workers: int, device: torch.device, local_views: int
) -> tuple[FolderSplit, FolderSplit]:
    train, test = (FolderSplit(part, size, workers, device, local_views) for part in parts_of(root))
    check_classes(root, train.classes, test.classes)
    return train, test


def parts_of(root: Path) -> tuple[Path, Path]:
    """The folders of the training and of the test images."""
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        raise DataError(
            f"--root {root}: wanted train/ and test/ (or val/) there, with a folder of images for "
            "each class"
        )
    return root / "train", tests[0]


def check_classes(root: Path, train: list[str], test: list[str]) -> None:
    if train != test:
        raise DataError(
            f"--root {root}: train/ has {len(train)} classes and {parts_of(root)[1].name}/ has "
            f"{len(test)}, or their names differ"
        )


class _InMemory(Dataset):
    """The images of a MemorySplit, for a DataLoader: the items of a batch are made together."""

    def __init__(self, split: MemorySplit) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitems__(self, index: list[int]) -> Batch:
        return self._split.batch(torch.tensor(index))


def _as_it_is(batch: Batch) -> Batch:
    return batch


class _Pictures(Dataset):
    """The images of an ImageFolder: the result of each transform, and then the label."""

    def __init__(self, folder: ImageFolder, transforms: list[nn.Module]) -> None:
        self._folder, self._transforms = folder, transforms

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> tuple[Tensor | int, ...]:
        try:
            image, label = self._folder[index]
        except OSError as error:
            raise DataError(f"{self._folder.samples[index][0]}: {error}") from None
        return *(transform(image) for transform in self._transforms), label


def _one_a_view(make: Callable[..., nn.Module], local_views: int) -> list[nn.Module]:
    return [make() for _ in range(2)] + [make(local=True) for _ in range(local_views)]


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _centre(images: Tensor) -> Tensor:
    """From [0, 1] to [-1, 1], and from grey to the three channels that backbones want."""
    return (images * 2 - 1).expand(-1, 3, -1, -1)
