# SPDX-License-Identifier: MIT
"""A callback for Lightning that tells the losses the epoch and logs their statistics.

With labels it also logs how much of H is of the anchor's class (watch.py). It works with both
`lightning` and `pytorch_lightning`, neither of which is needed by the rest of hex-ssl.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._calls import warn
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
    It is computed only for the steps that are logged, from the arguments of the last call of the
    loss in the step, which the callback keeps until the step ends. With a guide it is of the H that
    the guide gives. It is left out where groups give H, and where the loss is called in a compiled
    graph. With `gather_distributed` each rank counts its own images alone, as anchors and as
    candidates, at the eps of all ranks; what is logged is the number of rank 0.

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
        self._calls: dict[str, _Call] = {}  # by the name of the loss; empty between steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
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
        if self.labels is None or not _is_logged(trainer):
            return
        for name, loss in self.losses(pl_module).items():
            if isinstance(loss, HEXLoss):
                self._calls[name] = _Call(loss)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        calls = self._forget()
        losses = self.losses(pl_module)
        figures: dict[str, Any] = {}
        for name, loss in losses.items():
            if (last := loss.last) is not None:
                of = f"{name}/" if len(losses) > 1 else ""
                figures |= {f"{self.prefix}{of}{k}": v for k, v in last._asdict().items()}
                arguments = calls[name].arguments if name in calls else None
                if arguments is not None:
                    share = _share(loss, arguments, self._labels_of(batch))
                    if share is not None:
                        figures[f"{self.prefix}{of}class_share"] = share
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
        return {**self.__dict__, "_calls": {}}

    def _forget(self) -> "dict[str, _Call]":
        """Ends the watch over the losses, and returns what was seen."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.hook.remove()
        return calls

    def _labels_of(self, batch: Any) -> Any:
        if callable(self.labels):
            return self.labels(batch)
        try:
            return batch[self.labels]
        except (IndexError, KeyError, TypeError) as error:
            raise type(error)(
                f"labels: got {self.labels!r}, wanted an index or a key of a batch, which is a "
                f"{type(batch).__name__} here: {error}"
            ) from None

    @staticmethod
    def losses(module: nn.Module) -> dict[str, Any]:
        """The HEX losses in a module that have a threshold, keyed by their names in it."""
        return {
            name: loss
            for name, loss in module.named_modules()
            if isinstance(loss, ContrastiveLoss) and loss.threshold is not None
        }


class _Call:
    """A hook of a loss, with the arguments of its last call, by name, once it has seen one."""

    def __init__(self, loss: HEXLoss) -> None:
        self.arguments: dict[str, Any] | None = None
        self.hook = loss.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, loss: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():  # in a graph they have no values
            self.arguments = inspect.signature(loss.forward).bind(*args, **kwargs).arguments

    def __reduce__(self) -> tuple[Any, ...]:
        """A model that is copied or saved in the middle of a step gets a hook that keeps nothing,
        for nobody would remove it."""
        return _no_call, ()


def _no_call() -> Callable[..., None]:
    return _see_nothing


def _see_nothing(*_: Any) -> None:
    pass


def _is_logged(trainer: Any) -> bool:
    """Whether Lightning will give the figures of this step to the loggers."""
    return bool(trainer.fast_dev_run or trainer._logger_connector.should_update_logs)


def _share(loss: HEXLoss, arguments: dict[str, Any], labels: Any) -> Tensor | None:
    """`class_share` of a call of the loss; None if groups gave H."""
    if arguments.get("groups") is not None:
        return None
    z0, z1 = list(arguments.values())[:2]  # HEXClipLoss has names of its own for them
    negatives = arguments.get("negatives")
    if (guide := arguments.get("guide")) is not None:
        z0, z1, negatives = guide if len(guide) == 3 else (*guide, None)
    of_negatives = None
    if isinstance(labels, (tuple, list)):
        labels, of_negatives = labels
    assert loss._last is not None
    return class_share(
        z0, z1, labels, loss._last[0],  # eps, of each row if the rows have thresholds of their own
        mode=loss.mode, negatives=negatives,
        negative_labels=None if negatives is None else of_negatives,
    )  # fmt: skip
