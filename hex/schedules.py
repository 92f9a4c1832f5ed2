# SPDX-License-Identifier: MIT
"""The rules of a threshold: the options of each rule with their checks, and the formulas of the
rules that depend only on the epoch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .checks import as_float, check_count, check_flag, check_number, check_over, is_number

__all__ = ["OPTIONS", "at", "checked", "is_falling", "lowest"]

_MOST_FACTORS = 1 << 20  # 8 MiB of them


def at(rule: str, options: dict[str, Any], epoch: Tensor) -> Tensor:
    """The threshold of the rule "fixed", "step" or "cosine", a new 0-d float64 on epoch's device.

    Args:
        epoch: 0-d. It is -1 before the first epoch. An average of several states may be fractional.
    """
    o = options
    if rule == "fixed":
        return torch.full((), o["t"], dtype=torch.float64, device=epoch.device)
    epoch = epoch.round().clamp(min=0)
    if rule == "step":
        drops = epoch.div(o["every"], rounding_mode="floor")
        return torch.clamp(o["start"] - o["drop"] * drops, min=-1)
    if o["compounded"]:  # the product over every epoch so far; the factor of the last is 0
        k = torch.arange(1, o["epochs"] + 1, device=epoch.device)
        factor = torch.where(k <= epoch, _half_cosine(k, o["epochs"]), 1.0).prod()
    else:
        factor = _half_cosine(epoch.clamp(max=o["epochs"]), o["epochs"])
    return torch.add(factor * o["start"], (1 - factor) * o["end"])  # exact at both ends


def lowest(rule: str, options: dict[str, Any]) -> float:
    """The lowest threshold of a schedule. It is -inf where the batches decide."""
    if rule in ("adaptive", "by_positive"):
        return -math.inf
    if rule == "step":
        return -1.0 if options["drop"] > 0 else float(options["start"])
    return float(min(options.get(name, math.inf) for name in ("t", "start", "end")))


def is_ever_infinite(rule: str, options: dict[str, Any]) -> bool:
    """Whether the threshold is +inf at some time: as a fixed number, or in a warm-up."""
    if rule == "adaptive":
        return bool(options["warmup_epochs"]) and options["warmup_threshold"] == math.inf
    if rule == "by_positive":
        return bool(options["warmup_epochs"])
    return options.get("t") == math.inf


def is_falling(rule: str, options: dict[str, Any], value: float) -> bool:
    """Whether a schedule that now stands at `value` will still fall."""
    falls = rule == "step" or (rule == "cosine" and options["start"] > options["end"])
    return falls and value > lowest(rule, options)


def _half_cosine(k: Tensor, epochs: int) -> Tensor:
    """(1 + cos(pi k / epochs)) / 2, from 1 at k = 0 to 0 at k = epochs."""
    return (1 + torch.cos(math.pi * k.to(torch.float64) / epochs)) / 2


def checked(rule: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a rule as plain Python values.

    Raises:
        TypeError, ValueError: an option has the wrong type or is outside its range.
    """
    values = {name: check(name, options[name]) for name, check in OPTIONS[rule].items()}
    # An infinite t has a meaning: InfoNCE, or all in H.
    if values.get("normalize_rows") and "t" in values:
        _finite("t", options["t"])
    if values.get("compounded") and values["epochs"] > _MOST_FACTORS:
        raise ValueError(
            f"epochs: got {values['epochs']}, wanted at most {_MOST_FACTORS} with compounded=True, "
            "for which the factors of all epochs are multiplied"
        )
    return values


def _finite(name: str, value: Any, low: float = -math.inf) -> float:
    if is_number(value) and not math.isfinite(as_float(name, value)):
        raise ValueError(f"{name}: got {value}, wanted a finite number")
    return check_number(name, value, low)


OPTIONS: dict[str, dict[str, Callable[[str, Any], Any]]] = {  # rule: what each option must be
    "adaptive": {
        "quantile": partial(check_number, low=0, high=1),
        "over": check_over,
        "warmup_epochs": partial(check_count, low=0),
        "momentum": partial(check_number, low=0, high=1, open_end=True),
        "monotonic": check_flag,
        "lagged": check_flag,
        "warmup_threshold": check_number,
    },
    "by_positive": {
        "margin": _finite,
        "relative": check_flag,
        "warmup_epochs": partial(check_count, low=0),
    },
    "fixed": {"t": check_number, "normalize_rows": check_flag},
    "step": {
        "start": _finite,
        "drop": partial(_finite, low=0),
        "every": partial(check_count, low=1),
        "normalize_rows": check_flag,
    },
    "cosine": {
        "start": _finite,
        "end": _finite,
        "epochs": partial(check_count, low=1),
        "normalize_rows": check_flag,
        "compounded": check_flag,
    },
}
