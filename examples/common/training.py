# SPDX-License-Identifier: MIT
"""What all methods share: a LightningModule, and `main`, which trains it by Lightning's Trainer.

A script defines a `Method` and passes it to `main`. The folder of a run holds `last.ckpt`, which is
Lightning's checkpoint of its last complete epoch, the logs for TensorBoard and as CSV and, when the
run is over, `result.json`. On the CPU, a run that was stopped and resumed ends with the same bits
as one that was never stopped.
"""

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import data, encoder, runs
from common.evaluate import Diverged
from common.options import LAST, CheckpointError, check_device, kept, make_folder, parse, positive
from common.runs import console
from hex.lightning import HEXCallback

PRECISION = {"off": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def quiet() -> None:
    """Turns off Lightning's advertisements, and its warnings that do not concern these runs."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*LeafSpec.*is deprecated",  # it is Lightning that uses it
        ".*does not have many workers",  # images in memory need none; else --workers says how many
        "Found .* in eval mode at the start of training",  # a network that is frozen
        "torch.distributed.nn.functional.all_reduce is deprecated",  # it is lightly that uses it
        "Experiment logs directory .* exists",  # that of a part of a run that is repeated
    ):
        warnings.filterwarnings("ignore", text)


class Method(LightningModule):
    """A self-supervised method: its networks, the loss of a batch, and what follows a step.

    A subclass must keep all state in modules and buffers, so that the checkpoint has it.

    Args:
        options: the command line.
        images: the images to train on.

    Raises:
        ValueError: an option has an impossible value. The text is meant for the user.
    """

    losses: ClassVar[dict[str, str]]  # what --loss base and --loss hex are, in a few words
    supervised: ClassVar[bool] = False  # whether the last argument of forward is the labels
    local_views: ClassVar[int] = 0  # how many small crops there are besides the two views
    gathers: ClassVar[bool] = False  # whether its loss is that of the whole batch, on all devices
    classes_known: ClassVar[bool] = True  # of all candidates: the log has H's share of the class
    accumulate: int = 1  # how many batches there are in a step of the optimizer
    sync_batchnorm: bool = True  # whether BatchNorm sees the batches of all devices as one

    def __init__(self, options: argparse.Namespace, images: data.Split) -> None:
        super().__init__()
        self.save_hyperparameters(kept(options))  # to the log and the checkpoint
        self.options, self.images = options, images
        self.backbone, self.width = encoder.backbone(options.backbone, images.size)
        self.criterion: nn.Module | None = None  # a loss of hex; HEXCallback tells it the epoch

    @classmethod
    def add_options(cls, add: Callable[..., object]) -> None:
        """Adds the method's own options. `add` is argparse's add_argument."""
        if cls.gathers:
            text = "how many GPUs, or processes on the CPU"
            add("--devices", type=positive, default=1, help=text)

    @classmethod
    def load(cls, options: argparse.Namespace) -> tuple[data.Split, data.Split]:
        """The images to train on and those to test with. It raises as `runs.load` does."""
        return runs.load(options, cls.local_views)

    def forward(self, *views: Tensor) -> Tensor:
        """The loss of a batch, 0-d, from views (B, 3, size, size) in [-1, 1]."""
        raise NotImplementedError

    def training_step(self, items: Any, index: int) -> Tensor:
        views, labels = self.images.prepare(items)
        loss = self(*views, labels) if self.supervised else self(*views)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, items: Any, index: int) -> None:
        if (index + 1) % self.accumulate == 0 or self.trainer.is_last_batch:
            self.after_step(self.trainer.global_step, self.steps)

    def after_step(self, step: int, steps: int) -> None:
        """Called after each step of the optimizer; `step` counts from 1 to `steps`."""

    def finish(self, test: data.Split, seconds: float | None) -> None:
        """Evaluates, after the last epoch. It is called on all ranks."""
        if rank_zero_only.rank == 0:
            runs.finish(type(self), self.options, self.backbone, (self.images, test), seconds)

    def train_dataloader(self) -> DataLoader:
        options, trainer = self.options, self.trainer
        return data.loader(
            self.images,
            options.batch_size,
            options.seed,
            # `current_epoch` is behind when Lightning begins to load for a resumed run.
            lambda: trainer.fit_loop.epoch_progress.current.processed,
            trainer.global_rank,
            trainer.world_size,
        )

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.options.lr, weight_decay=1e-4)
        self.steps = len(self.train_dataloader()) * self.options.epochs
        rule = runs.schedule(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rule, "interval": "step"}}


Begun = tuple[Method, data.Split, dict[str, Any] | None]  # and the test images, the checkpoint


class EachEpoch(Callback):
    """Checks, tests, saves and prints what an epoch has made.

    A training that diverged is stopped before its checkpoint is written over. Rank 0 does the check
    and the test, and the others wait until it tells them what came out.

    Args:
        folder: the run's.
        test: the test images.
        first: how many epochs are done already.
    """

    let_ctrl_c: Callable[[], None]  # raises KeyboardInterrupt if Ctrl-C was pressed

    def __init__(self, folder: Path, test: data.Split, first: int) -> None:
        self.folder, self.test, self.first = folder, test, first
        self.saved = first
        self.ended = ExitStack()  # what the end of an epoch ends: its bar

    def on_train_start(self, trainer: Trainer, model: Method) -> None:
        steps = trainer.num_training_batches
        runs.greet(type(model), model.options, model.images, steps, self.first)

    def on_train_epoch_start(self, trainer: Trainer, model: Method) -> None:
        self.losses: list[Tensor] = []  # read when the epoch is over
        name, steps = f"epoch {trainer.current_epoch + 1}", trainer.num_training_batches
        self.ended.enter_context(bar := runs.progress())
        self.step = partial(bar.advance, bar.add_task(name, total=steps))

    def on_train_batch_end(self, trainer: Trainer, model: Method, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].detach() * model.accumulate)  # Lightning has divided it
        self.step()
        self.let_ctrl_c()

    def on_train_epoch_end(self, trainer: Trainer, model: Method) -> None:
        self.ended.close()
        error, line, epoch = None, "", trainer.current_epoch
        if trainer.is_global_zero:
            losses, parts = torch.stack(self.losses).tolist(), (model.images, self.test)
            (optimizer,) = trainer.optimizers
            try:
                line, accuracy = runs.look(model.options, model, optimizer, parts, epoch, losses)
            except Diverged as diverged:
                error = str(diverged)
            else:
                for logger in trainer.loggers if accuracy is not None else ():
                    logger.log_metrics({"test/knn": accuracy}, trainer.global_step - 1)
        if (error := trainer.strategy.broadcast(error)) is not None:
            raise Diverged(error)
        trainer.save_checkpoint(self.folder / LAST)
        self.saved = epoch + 1
        console.print(line)  # an epoch is printed only after it is saved
        trainer.should_stop = self.saved - self.first == model.options.stop_after
        self.let_ctrl_c()

    def on_exception(self, trainer: Trainer, model: Method, exception: BaseException) -> None:
        self.ended.close()


def main(method: type[Method], arguments: list[str] | None = None, **defaults: object) -> int:
    """Runs a script.

    Args:
        arguments: the command line, by default that of the process.
        defaults: the method's own defaults of options that all methods have.

    Returns:
        The exit status: 0, or 2 for an error that the user can correct, 1 for a training that
        diverged, 130 after Ctrl-C.
    """
    script = Path(sys.modules[method.__module__].__file__).stem

    def prepare() -> Begun:
        return begin(method, *parse(method, script, arguments, **defaults))

    return run(script, prepare, lambda folder: f"python {sys.argv[0]} --resume {folder}")


def run(script: str, prepare: Callable[[], Begun], command: Callable[[Path], str]) -> int:
    """Trains what `prepare` makes, and says in a line what goes wrong.

    Args:
        script: the name with which an error begins.
        command: what continues the run in a folder.

    Returns:
        The exit status of `main`.
    """
    quiet()
    leader = rank_zero_only.rank == 0  # Lightning starts the script again for each other rank
    console.quiet = not leader
    if not leader:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends the others

    def failed(status: int, text: object) -> int:
        if leader or folder is not None:  # what is wrong at the start is wrong on all ranks
            print(f"{script}.py: {text}", file=sys.stderr)
        return status

    folder = None
    try:
        try:
            model, test, state = prepare()
            folder = make_folder(model.options) if leader else Path()
        except ValueError as error:  # a ValueError in training is a fault of the program
            return failed(2, f"error: {error}")
        train(model, test, folder, state)
    except (data.DataError, CheckpointError) as error:
        return failed(2, f"error: {error}")
    except Diverged as error:  # on all ranks; a status would make Lightning kill rank 0
        if not leader:
            return 0
        return failed(1, f"training diverged: {error}; {runs.what_is_kept(folder)}")
    except KeyboardInterrupt:
        text = "interrupted before training"
        if folder is not None:
            text = f"interrupted; {runs.what_is_kept(folder)}"
            if (folder / LAST).exists():
                text += f"\nTo go on: {command(folder)}"
        console.print(text, soft_wrap=True)
        return 130
    return 0


def begin(method: type[Method], options: argparse.Namespace, state: dict[str, Any] | None) -> Begun:
    """The model, with its images, the test images, and the `state` that it was given.

    Raises:
        DataError, CheckpointError, ValueError: the run cannot begin. The text is meant for the
            user.
    """
    if (ranks := int(os.environ.get("WORLD_SIZE", options.devices))) != options.devices:
        raise ValueError(f"--devices: got {options.devices}, and torchrun has {ranks} processes")
    if options.batch_size % options.devices:
        raise ValueError(
            f"--batch-size: got {options.batch_size} for {options.devices} devices, wanted a "
            "multiple of their number"
        )
    seed_everything(options.seed, verbose=False)
    if options.device == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # that "cuda" means
    if options.amp == "fp16" and check_device(options.device).type == "cpu":
        raise ValueError("--amp fp16: wanted a GPU; on a CPU there is bf16")
    images, test = method.load(options)
    model = method(options, images)
    if state is not None:  # Lightning restores it again; here it is seen whether it fits
        runs.restore(model, {"model": state["state_dict"]}, "model")
    return model, test, state


def train(model: Method, test: data.Split, folder: Path, state: dict[str, Any] | None) -> None:
    """Trains, and after the last epoch evaluates."""
    options, first = model.options, state["epoch"] + 1 if state else 0
    each_epoch = EachEpoch(folder, test, first)
    device = check_device(options.device)
    several, gpu = options.devices > 1, device.type == "cuda"
    logs = [
        # TensorBoard drops its entries for steps that are repeated. A CSV file has none after it,
        # so each part of a run has one.
        TensorBoardLogger(
            folder,
            name="",
            version="",
            default_hp_metric=False,
            purge_step=state and state["global_step"],
        ),
        CSVLogger(folder, name="csv", version=f"from-epoch-{first + 1}"),
    ]
    callback = HEXCallback(labels=-1 if model.classes_known else None)
    trainer = Trainer(
        accelerator="gpu" if gpu else device.type,
        devices=[device.index] if gpu and not several else options.devices,
        strategy=DDPStrategy(process_group_backend="nccl" if gpu else "gloo")
        if several
        else "auto",
        # Normalises by the whole batch. torch has it for CUDA only: on the CPU each rank normalises
        # by its own part.
        sync_batchnorm=several and gpu and model.sync_batchnorm,
        accumulate_grad_batches=model.accumulate,
        precision=PRECISION[options.amp],
        max_epochs=options.epochs,
        logger=logs,
        log_every_n_steps=1,
        callbacks=[
            *([callback] if callback.losses(model) else []),  # or there is nothing to tell or log
            LearningRateMonitor("step"),
            each_epoch,
        ],
        enable_progress_bar=False,  # Lightning's counts epochs from 0; EachEpoch has one
        enable_checkpointing=False,  # EachEpoch saves, after its check and before it prints
        enable_model_summary=False,
        use_distributed_sampler=False,  # the loader has one
        default_root_dir=folder,
    )
    start = time.perf_counter()
    with ctrl_c_held_back() as each_epoch.let_ctrl_c:
        try:
            trainer.fit(model, ckpt_path=options.resume, weights_only=True)
        except SystemExit:  # Lightning makes it of Ctrl-C, when it has ended the other ranks
            raise KeyboardInterrupt from None
    if each_epoch.saved == options.epochs:
        seconds = time.perf_counter() - start if first == 0 else None
        model.to(device)  # Lightning leaves it on the CPU
        model.finish(test, seconds)
    console.print(  # which prints on rank 0
        f"checkpoint: {folder / LAST}\nlog: tensorboard --logdir {folder}", soft_wrap=True
    )


@contextmanager
def ctrl_c_held_back() -> Iterator[Callable[[], None]]:
    """Holds Ctrl-C back until the function that it yields is called.

    At another moment the interrupt might leave a lock of TensorBoard taken, and closing the log
    would then wait for ever. A second Ctrl-C is not held back.
    """
    pressed = False

    def remember(*_) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def let() -> None:
        if pressed:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as it is in a process that Ctrl-C does not concern
        signal.signal(signal.SIGINT, remember)
    try:
        yield let
    finally:
        signal.signal(signal.SIGINT, before)
