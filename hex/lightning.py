# SPDX-License-Identifier: MIT
"""A callback for Lightning that tells the losses the epoch and logs their statistics.

It works with both `lightning` and `pytorch_lightning`. Neither is needed by the rest of hex-ssl.
"""

import importlib
import sys
from typing import Any

from torch import nn

from .contrastive import ContrastiveLoss

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
    training batch it logs three figures by step, as often as the Trainer's `log_every_n_steps`
    says: the threshold eps, a cosine, as `hex/eps`, the mean |H| as `hex/hard`, and the mean share
    of the local term in the denominator as `hex/share`. If there are several losses, the name of
    each is inserted: `hex/criterion/eps`. When an epoch or the training ends, a loss warns if H was
    empty for the whole epoch.

    The losses must be submodules of the LightningModule. The state of the threshold is then part of
    its checkpoints.

    Args:
        prefix: the beginning of the names in the log.

    Raises:
        TypeError: prefix is not a str.
        ImportError: Lightning is not installed. It is raised when hex.lightning is imported.

    Example:
        >>> from hex.lightning import HEXCallback
        >>> callback = HEXCallback()  # Trainer(callbacks=[callback])
    """

    def __init__(self, prefix: str = "hex/") -> None:
        super().__init__()
        if not isinstance(prefix, str):
            raise TypeError(f"prefix: got {type(prefix).__name__}, wanted a str")
        self.prefix = prefix

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        for loss in self.losses(pl_module).values():
            loss.set_epoch(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        losses = self.losses(pl_module)
        figures: dict[str, Any] = {}
        for name, loss in losses.items():
            if (last := loss.last) is not None:
                of = f"{name}/" if len(losses) > 1 else ""
                figures |= {f"{self.prefix}{of}{k}": v for k, v in last._asdict().items()}
        if figures:
            pl_module.log_dict(figures, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for loss in self.losses(pl_module).values():
            loss.threshold.look(ended=True)

    @staticmethod
    def losses(module: nn.Module) -> dict[str, Any]:
        """The HEX losses in a module that have a threshold, keyed by their names in it."""
        return {
            name: loss
            for name, loss in module.named_modules()
            if isinstance(loss, ContrastiveLoss) and loss.threshold is not None
        }
