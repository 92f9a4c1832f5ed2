# SPDX-License-Identifier: MIT
"""A callback for Lightning that tells the losses the epoch and logs their statistics.

With labels it also logs how much of H is of the anchor's class (watch.py). It works with both
`lightning` and `pytorch_lightning`, neither of which is needed by the rest of hex-ssl.
"""

import importlib
import inspect
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ._calls import is_in_backward, warn
from .contrastive import ContrastiveLoss
from .loss import HEXLoss
from .watch import class_share

__all__ = ["HEXCallback"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _base() -> type:
    """A class derived from the Callback of each package that is already imported, so that either
    Trainer accepts it. If none is, it is derived from that of the first that is installed."""
    bases = [getattr(sys.modules[name], "Callback", None) for name in _PACKAGES
             if name in sys.modules]  # fmt: skip
    for name in _PACKAGES:
        if any(bases):
            break
        try:
            bases.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise  # the package is installed, but something that it needs is not
    found = tuple(base for base in bases if base is not None)
    if not found:
        raise ImportError(
            "hex.lightning needs Lightning, and neither lightning nor pytorch_lightning is "
            "installed: pip install lightning"
        )
    return type("Callback", found, {})


_Callback: Any = _base()


class HEXCallback(_Callback):  # type: ignore[misc]
    """Calls `set_epoch` on every HEX loss of a LightningModule and logs the loss's statistics.

    At the start of each training epoch it calls `set_epoch(trainer.current_epoch)`. After each
    training batch it logs these figures by step, as often as the Trainer's `log_every_n_steps`
    says, to every logger of the Trainer:

    | name | what it is |
    |---|---|
    | `hex/eps` | the threshold, a cosine |
    | `hex/hard` | the mean number of members of H |
    | `hex/share` | the mean share of the local term in the denominator |
    | `hex/class_share` | with `labels`: the share of H that is of the anchor's class |

    If there are several losses, the name of each is inserted: `hex/criterion/eps`. When an epoch or
    the training ends, a loss warns if H was empty for the whole epoch.

    The losses must be submodules of the LightningModule. The state of the threshold is then part of
    its checkpoints. A warning at the start of the training says if there is none.

    `hex/class_share` is for the losses that take two views, `HEXLoss` and those derived from it.
    It is computed only in the steps that are logged, in each call of the loss, and that of the last
    call is logged. No embedding is kept. With a guide it is of the H that the guide gives. It is
    left out where groups give H, and where the loss is called in a compiled graph or under a
    transform of torch.func. With `gather_distributed` each rank counts its own images alone, as
    anchors and as candidates, at the eps of all ranks; what is logged is the number of rank 0. With
    `by_positive` or `normalize_rows` on several ranks it is left out, because the thresholds of the
    rows are not gathered.

    A figure that was logged in an earlier step and is left out in a step, for example because the
    loss was not called, is logged as NaN there.

    Args:
        prefix: the beginning of the names in the log.
        labels: None; or the place of the labels in a batch, an index or a key (`1` where batches
            are `(images, labels)`); or a function that takes a batch and returns them. They are
            (B,) integers. Where the loss is called with negatives, it is a pair, the labels of the
            images and those of the negatives.

    Raises:
        TypeError: prefix is not a str, or labels is not an int, a str or callable.
        TypeError, ValueError: in training, if the labels do not fit the embeddings.
        IndexError, KeyError, TypeError: in training, if a batch has no such place.
        ImportError: Lightning is not installed. It is raised when hex.lightning is imported.

    Example:
        >>> from hex.lightning import HEXCallback
        >>> callback = HEXCallback()  # Trainer(callbacks=[callback])
        >>> callback = HEXCallback(labels=1)  # batches are (images, labels)
        >>> callback = HEXCallback(labels=lambda batch: batch["target"])
    """

    def __init__(
        self, prefix: str = "hex/", *, labels: Callable[[Any], Any] | int | str | None = None
    ) -> None:
        super().__init__()
        if not isinstance(prefix, str):
            raise TypeError(f"prefix: got {type(prefix).__name__}, wanted a str")
        place = isinstance(labels, (int, str)) and not isinstance(labels, bool)
        if labels is not None and not place and not callable(labels):
            raise TypeError(
                f"labels: got {type(labels).__name__}, wanted an index, a key or a function of a "
                "batch"
            )
        self.prefix = prefix
        self.labels = labels
        # By the name of the loss, and empty between steps: the figures that it had before the
        # step, and who watches it.
        self._before: dict[str, Any] = {}
        self._watches: dict[str, _Watch] = {}
        # The names of the figures that there have been in this training, and in this step, which
        # with accumulated gradients has several batches.
        self._known: set[str] = set()
        self._now: set[str] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._known, self._now = set(), set()
        if not any(isinstance(module, ContrastiveLoss) for module in pl_module.modules()):
            warn(
                f"HEXCallback: {type(pl_module).__name__} has no loss of hex among its submodules, "
                "so nothing is logged and no loss is told the epoch. Assign the loss to an "
                "attribute of the module, or put several into a torch.nn.ModuleList"
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        for loss in self.losses(pl_module).values():
            loss.set_epoch(trainer.current_epoch)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._forget()
        losses = self.losses(pl_module)
        self._before = {name: loss._last for name, loss in losses.items()}
        if self.labels is None or not _is_logged(trainer):
            return
        for name, loss in losses.items():
            if isinstance(loss, HEXLoss):
                self._watches[name] = _Watch(loss, partial(self._labels_of, batch))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, watches = self._forget()
        losses = self.losses(pl_module)
        figures: dict[str, Any] = {}
        for name, loss in losses.items():
            of = self.prefix + (f"{name}/" if len(losses) > 1 else "")
            if (last := loss.last) is not None and loss._last is not before.get(name):
                figures |= {of + k: v for k, v in last._asdict().items()}
            if (watch := watches.get(name)) is None:
                continue
            if watch.misfit is not None:
                raise watch.misfit
            if watch.share is not None:
                figures[of + "class_share"] = watch.share
        self._now |= figures.keys()
        if not trainer.fit_loop._should_accumulate():  # the step ends
            if _is_logged(trainer):  # Lightning would send the last value of a missing one again
                figures |= dict.fromkeys(self._known - self._now, math.nan)
            self._known |= self._now
            self._now = set()
        if figures:
            pl_module.log_dict(figures, on_step=True, on_epoch=False, batch_size=1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._forget()  # of a batch with which a hook has ended the epoch

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for loss in self.losses(pl_module).values():
            loss.threshold.look(ended=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before": {}, "_watches": {}}

    def _forget(self) -> "tuple[dict[str, Any], dict[str, _Watch]]":
        """Ends the watch over the losses. Returns what they had before, and what was seen."""
        before, watches = self._before, self._watches
        self._before, self._watches = {}, {}
        for watch in watches.values():
            watch.hook.remove()
        return before, watches

    def _labels_of(self, batch: Any) -> tuple[Any, Any]:
        """The labels of the images, and of the negatives or None."""
        if callable(self.labels):
            labels = self.labels(batch)
        else:
            try:
                labels = batch[self.labels]
            except (IndexError, KeyError, TypeError) as error:
                raise type(error)(
                    f"labels: got {self.labels!r}, wanted an index or a key of a batch, which is a "
                    f"{type(batch).__name__} here: {error}"
                ) from None
        if not isinstance(labels, (tuple, list)):
            return labels, None
        if len(labels) != 2:
            raise ValueError(
                f"labels: got {len(labels)} of them in a {type(labels).__name__}, wanted a tensor, "
                "or the pair of the images' labels and the negatives'"
            )
        return labels[0], labels[1]

    @staticmethod
    def losses(module: nn.Module) -> dict[str, Any]:
        """The HEX losses in a module that have a threshold, keyed by their names in it."""
        return {
            name: loss
            for name, loss in module.named_modules()
            if isinstance(loss, ContrastiveLoss) and loss.threshold is not None
        }


class _Watch:
    """A hook of a loss that computes the `class_share` of each call at once, and keeps the last."""

    def __init__(self, loss: HEXLoss, labels: Callable[[], tuple[Any, Any]]) -> None:
        self.labels = labels  # those of the images, and of the negatives or None
        self.share: Tensor | None = None
        self.misfit: Exception | None = None  # what is wrong with the labels
        self.hook = loss.register_forward_hook(self, with_kwargs=True)

    def __call__(
        self, loss: HEXLoss, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> None:
        # In a graph and under transforms nothing has a value. A backward repeats calls of an
        # activation checkpoint.
        transformed = torch._C._are_functorch_transforms_active()
        if torch.compiler.is_compiling() or transformed or is_in_backward():
            return
        arguments = inspect.signature(loss.forward).bind(*args, **kwargs).arguments
        labels, of_negatives = self.labels()
        try:
            self.share = self._share(loss, arguments, labels, of_negatives)
            self.misfit = None
        except (TypeError, ValueError) as misfit:  # an error if this is the step's last call
            self.share, self.misfit = None, misfit.with_traceback(None)  # whose frames have z0, z1

    @staticmethod
    def _share(
        loss: HEXLoss, arguments: dict[str, Any], labels: Any, of_negatives: Any
    ) -> Tensor | None:
        """None if groups gave H, or if the threshold of each row is not known here."""
        assert loss._last is not None and loss.threshold is not None
        eps = loss._last[0]  # of each row if the rows have thresholds of their own
        by_row = loss.threshold.normalize_rows or loss.threshold.rule == "by_positive"
        if arguments.get("groups") is not None or (by_row and not eps.dim()):
            return None
        z0, z1 = list(arguments.values())[:2]  # HEXClipLoss has names of its own for them
        negatives = arguments.get("negatives")
        if (guide := arguments.get("guide")) is not None:
            z0, z1, negatives = guide if len(guide) == 3 else (*guide, None)
        return class_share(
            z0, z1, labels, eps, mode=loss.mode, negatives=negatives,
            negative_labels=None if negatives is None else of_negatives,
            ignored=arguments.get("ignored"),
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        """A model that is copied or saved in the middle of a step gets a hook that does nothing,
        for nobody would remove it."""
        return _no_watch, ()


def _no_watch() -> Callable[..., None]:
    return _see_nothing


def _see_nothing(*_: Any) -> None:
    pass


def _is_logged(trainer: Any) -> bool:
    """Whether Lightning will give the figures of this step to the loggers."""
    return bool(trainer.fast_dev_run or trainer._logger_connector.should_update_logs)
