# SPDX-License-Identifier: MIT
"""The linear probe at the end of a run: lightly's LinearClassifier on the frozen backbone.

It runs on all devices of the run. A probe that was stopped goes on after its last whole epoch.
lightly's module belongs to the package pytorch_lightning, and so does its Trainer here.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import runs
from common.data import DataError, loader
from common.options import LAST, check_device
from common.runs import console
from common.training import PRECISION
from lightly.utils.benchmarking import LinearClassifier
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import DDPStrategy
from rich.table import Table
from torch.utils.data import DataLoader, Subset

from paper.images import Pictures


class Probe(LinearClassifier):
    """A linear classifier with the authors' optimizer. `pictures` and `settings` are set later,
    because lightly's module keeps the arguments of its constructor in its checkpoints."""

    pictures: Pictures
    settings: dict[str, Any]
    strict_loading = False  # of a checkpoint without the backbone, which the run's has

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in weights.items() if not k.startswith("model.")}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        return self.pictures.scaled(images), labels

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Counts. Lightning's mean over devices is wrong where they have different numbers of
        images: it rounds the mean of these numbers down."""
        _, accuracies = self.shared_step(batch, batch_idx)
        size = len(batch[1])
        right = {f"right{k}": accuracy * size for k, accuracy in accuracies.items()}
        self.log_dict(right, on_epoch=True, reduce_fx="sum", sync_dist=True, batch_size=size)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.get_trainable_parameters(),
            self.get_effective_lr(),
            momentum=self.settings["momentum"],
            weight_decay=self.settings["weight_decay"],
        )
        drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.settings["drops"])
        return [optimizer], [drops]


class EachEpoch(Callback):
    """Saves a probe after each epoch, in `file`."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Probe) -> None:
        trainer.save_checkpoint(self.file)


def evaluate(run: Any, test: Pictures, seconds: float | None) -> None:
    """Probes the backbone of a run with each share of the labels, and writes result.json.

    Args:
        run: the trained `Run`.
        seconds: how long the training took, if it was not stopped and resumed.
    """
    options, settings = run.options, run.settings
    found = {}
    for fraction in settings["probe"]["fractions"]:
        found[f"{fraction:g}"] = probed(run, test, fraction)
    if run.global_rank:
        return
    table = Table(title=f"Linear probe, accuracy on {len(test)} test images (%)")
    for name in ("labels", "top 1", "top 5"):
        table.add_column(name, justify="right")
    for fraction, (first, fifth) in found.items():
        table.add_row(f"{float(fraction):.0%}", f"{100 * first:.2f}", f"{100 * fifth:.2f}")
    console.print(table)
    result = {"run": options.run, "tiny": "images" in settings, "devices": options.devices}
    result |= {name: settings[name] for name in ("data", "backbone", "loss", "variant", "epochs")}
    result |= {"objective": runs.objective(type(run), options), "seconds": seconds}
    result |= {"seed": settings["seed"], "images": [len(run.images), len(test)], "linear": found}
    file = Path(options.out) / "result.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"result: {file}", soft_wrap=True)


def probed(run: Any, test: Pictures, fraction: float) -> list[float]:
    """The accuracies, in [0, 1], of the right class and of the right class among five.

    Raises:
        DataError: there are not enough images. The text is meant for the user.
    """
    options, settings, images = run.options, run.settings["probe"], run.images
    classes, several = len(images.classes), options.devices > 1
    device = check_device(options.device)
    gpu = device.type == "cuda"
    chosen = Subset(images.as_seen_by(images.crops()), images.some(fraction).tolist())
    # As the authors: an epoch leaves out what fills no batch.
    batch = min(settings["batch"], len(chosen)) // options.devices * options.devices
    if batch == 0:
        raise DataError(
            f"--root {options.root}: {fraction:.0%} of the labels are {len(chosen)} images, wanted "
            f"one for each of the {options.devices} processes"
        )
    torch.manual_seed(run.settings["seed"])
    probe = Probe(
        run.backbone.eval().requires_grad_(False),
        batch // options.devices,
        settings["lr"],
        run.width,
        classes,
        topk=(1, min(5, classes)),
    )
    probe.pictures, probe.settings = images, settings

    last = Path(options.out) / f"probe-{fraction:g}" / LAST
    trainer = Trainer(
        accelerator="gpu" if gpu else device.type,
        devices=[device.index] if gpu and not several else options.devices,
        strategy=DDPStrategy(process_group_backend="nccl" if gpu else "gloo")
        if several
        else "auto",
        precision=PRECISION[options.amp],
        max_epochs=settings["epochs"],
        logger=False,
        callbacks=[EachEpoch(last)],
        num_sanity_val_steps=0,
        limit_val_batches=0,  # only the last epoch's classifier is tested
        enable_checkpointing=False,  # EachEpoch saves
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    own = range(run.global_rank, len(test), options.devices)  # no image on two devices
    tested = DataLoader(Subset(test.as_seen_by(test.whole()), own), batch, **test.loading)
    train = loader(
        SimpleNamespace(dataset=lambda: chosen, loading=images.loading),
        batch,
        run.settings["seed"],
        lambda: trainer.fit_loop.epoch_progress.current.processed,
        run.global_rank,
        options.devices,
    )
    console.print(f"linear probe on {len(chosen)} images, {settings['epochs']} epochs")
    going_on = last if last.exists() else None
    trainer.fit(probe, train, tested, ckpt_path=going_on, weights_only=True)
    trainer.limit_val_batches = 1.0
    (right,) = trainer.validate(probe, tested, verbose=False)
    return [round(right[f"right{k}"]) / len(test) for k in probe.topk]
