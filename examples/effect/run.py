# SPDX-License-Identifier: MIT
"""One run of the study: its images, its training, and the row of its results.

The seed decides which images are trained on, the first weights, the batches and the views. The
losses draw no random numbers, so runs of one seed are pairs. Digests in the rows prove it.
"""

import hashlib
import json
import math
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from common import augment, data, plain
from common.options import AMP, parser_of
from simclr import SimCLR
from torch import Tensor, nn

import hex
from effect.measure import Look, accuracies
from effect.table import Config, Setup

HERE = Path(__file__).parent
CIFAR10_SUPERCLASSES = HERE / "cifar10_superclasses.json"


class Images:
    """The data set, read once into the device's memory, from which the splits of a run are made.

    Args:
        name, root: as in `data.load`.
        device: where the images are kept.
        size: side of the images in pixels, for "folder" only.
        superclasses: a JSON file {class: superclass}. None means CIFAR-10's own for "cifar10", and
            no superclasses for other data.

    Raises:
        DataError: the data is missing or is not what was expected.
    """

    def __init__(
        self,
        name: str,
        root: Path | None,
        device: torch.device,
        size: int = 32,
        superclasses: Path | None = None,
    ) -> None:
        if name == "folder":
            if root is None:
                raise data.DataError("--data folder needs --root, the folder that holds the images")
            self.train, self.test = data.in_memory(root, size, device)
        else:
            self.train, self.test = data.load(name, root, device=device)
        self.name, self.device = name, device
        if superclasses is None and name == "cifar10":
            superclasses = CIFAR10_SUPERCLASSES
        self.superclasses = superclasses and read_superclasses(superclasses, self.train.classes)

    def splits(
        self, setup: Setup, seed: int
    ) -> tuple[data.MemorySplit, data.MemorySplit, data.MemorySplit]:
        """The training images, drawn by the seed, the held-out images and the test images.

        Raises:
            DataError: there are not enough images, or a class does not exist.
        """
        labels = self.train.labels
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held, pool = order[: setup.validation], order[setup.validation :]
        test = torch.arange(len(self.test))
        if setup.classes is not None:
            known = self.train.classes
            if unknown := set(setup.classes) - set(known):
                raise data.DataError(f"no classes {sorted(unknown)}; there are {known}")
            wanted = torch.tensor([known.index(c) for c in setup.classes])
            held, pool = (part[torch.isin(labels[part], wanted)] for part in (held, pool))
            test = test[torch.isin(self.test.labels, wanted)]
        wanted_images = len(pool) if setup.train is None else setup.train
        if len(held) == 0 or not setup.batch <= wanted_images <= len(pool):
            raise data.DataError(
                f"{len(labels)} training images: {len(held)} held out and {len(pool)} left, wanted "
                f"{wanted_images} to train on and batches of {setup.batch}"
            )
        drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(1 + seed))
        digits = self.name == "digits"
        views: list[nn.Module] = [
            augment.digits() if digits else augment.small(size=setup.view) for _ in range(2)
        ]
        return (
            self.train.subset(pool[drawn[:wanted_images]], views),
            self.train.subset(held, views),
            self.test.subset(test, views),
        )


def read_superclasses(path: Path, classes: list[str]) -> Tensor:
    """The superclass of each class, as a number, from a JSON object {class: superclass}.

    Raises:
        DataError: the file is no such object, does not name exactly these classes, or has only one
            superclass.
    """
    try:
        named = json.loads(path.read_text())
    except OSError as error:
        raise data.DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise data.DataError(f"{path}: no JSON: {error}") from None
    if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
        raise data.DataError(f"{path}: wanted an object {{class: superclass}} of names")
    if missing := sorted(set(classes) - set(named)):
        raise data.DataError(f"{path}: no superclass for {', '.join(missing)}")
    if unknown := sorted(set(named) - set(classes)):
        raise data.DataError(f"{path}: there are no classes {', '.join(unknown)}")
    names = sorted(set(named.values()))
    if len(names) < 2:
        raise data.DataError(f"{path}: wanted two superclasses or more, got {names[0]!r} only")
    return torch.tensor([names.index(named[c]) for c in classes])


def run(config: Config, images: Images, commit: str) -> dict[str, Any]:
    """Trains and measures, and returns the row of the results.

    Raises:
        Diverged: training diverged, so there is no row.
    """
    wall, cpu = time.time(), time.process_time()
    setup, device = config.setup, images.device
    train, held, test = images.splits(setup, config.seed)
    description = config.described()
    look = Look(held, images.superclasses, setup.batch)

    torch.manual_seed(config.seed)
    # over="all" was the default when the first rows were made, and rows do not name defaults.
    options = parser_of(SimCLR, "study", over="all").parse_args([])
    vars(options).update(description["options"], backbone=setup.backbone, epochs=setup.epochs)
    model = SimCLR(options, train).to(device)
    weights = digest(*model.parameters())
    if setup.compile:
        model.backbone.compile()
    curves: list[dict[str, Any]] = []
    looks: list[dict[str, Any]] = [{"epoch": 0} | look(model)]
    if config.temperature is not None:
        tables = plain.train(model, train, setup.epochs, setup.batch, setup.lr, AMP[setup.amp])
        for epoch, table in enumerate(tables, 1):
            means = zip(plain.FIGURES, table.mean(0).tolist(), strict=True)
            curve = {name: value if math.isfinite(value) else None for name, value in means}
            curves.append({"epoch": epoch} | curve)
            if epoch in setup.measured:
                looks.append({"epoch": epoch} | look(model))
    trained = time.process_time() - cpu
    draws = digest(torch.get_rng_state())
    scores = accuracies(
        model.backbone, train, {"validation": held, "test": test}, images.superclasses
    )
    return _rounded(
        {
            "key": config.key,
            **description,
            "images": {"train": len(train), "validation": len(held), "test": len(test)},
            "commit": commit,
            "machine": machine(device),
            "cost": {
                "cpu_train": trained,
                "cpu_all": time.process_time() - cpu,
                "wall": time.time() - wall,
            },
            "pairing": {"weights": weights, "draws": draws},
            "curves": curves,
            "looks": looks,
            **scores,
        }
    )


def digest(*tensors: Tensor) -> str:
    """A short digest of the bits of some tensors."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def commit_here() -> str:
    """The commit of these files, followed by + if files of the checkout differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/examples", ":/hex")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine(device: torch.device) -> dict[str, Any]:
    """What a run was made on, for its row."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "hex": hex.__version__,
        "python": platform.python_version(),
    }


def _rounded(value: Any) -> Any:
    """Rounds floats to six significant digits, which keeps accuracies exact and the file small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value
