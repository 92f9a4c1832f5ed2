# SPDX-License-Identifier: MIT
"""Checkpoints from which a run continues bit for bit, so they include the random generators.

Only tensors and plain values are stored, so that loading never runs code from the file
(`weights_only`).
"""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


class CheckpointError(Exception):
    """There is no checkpoint, or it is not one of ours. The text is meant for the user."""


def save(path: Path, parts: dict[str, Any], **values: Any) -> None:
    """Writes the states of `parts` (anything with a state_dict), `values`, and the generators.

    The file is complete at every moment: an interruption leaves the previous checkpoint.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    unfinished = path.with_suffix(".unfinished")
    torch.save({"parts": state, "values": values, "generators": _generators()}, unfinished)
    os.replace(unfinished, path)


def load(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, for `restore`; the plain values are under "values".

    Raises:
        CheckpointError: the file is missing or was not written by `save`.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        state = None
    if not isinstance(state, dict) or set(state) != {"parts", "values", "generators"}:
        raise CheckpointError(f"{path}: not a checkpoint of these examples")
    return state


def restore(state: dict[str, Any], parts: dict[str, Any]) -> None:
    """Puts the states of a loaded checkpoint into `parts` and the generators.

    Raises:
        CheckpointError: the parts do not fit those that were saved.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(state["parts"][name])
        except (KeyError, ValueError, RuntimeError) as error:
            text = str(error).strip().splitlines()[-1].strip()
            raise CheckpointError(f"the checkpoint's {name} does not fit: {text}") from None
    generators = state["generators"]
    torch.set_rng_state(generators["torch"])
    if torch.cuda.is_available() and generators["cuda"]:
        torch.cuda.set_rng_state_all(generators["cuda"])
    version, internal, gauss = generators["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = generators["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def _generators() -> dict[str, Any]:
    """The states of all random generators."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
    }
