# SPDX-License-Identifier: MIT
"""The settings of a run: read from its file, checked, made tiny, and shared out among devices.

A file of settings extends another one by name. What a run is in the end is a plain dict, which its
checkpoint holds.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from hex import ThresholdTracker
from hex.presets import authors_threshold

FOLDER = Path(__file__).parent
SHARED = {"all", "views"}  # files that are no runs
RUNS = sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem not in SHARED)
RULES = ("adaptive", "fixed", "step", "cosine")
CROP = {"imagenet": 224, "cifar10": 32, "cifar100": 32}  # pixels

Settings = dict[str, Any]


def _is_text(x: Any) -> bool:
    return isinstance(x, str)


def _is_choice(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(map(_is_text, x))


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < math.inf


def _is_seed(x: Any) -> bool:
    return x == 0 or _is_count(x)


def _is_rule(x: Any) -> bool:
    return _is_text(x) or isinstance(x, dict)


def _are_numbers(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(map(_is_number, x))


Check = tuple[Callable[[Any], bool], str]
TEXT, CHOICE = (_is_text, "a text"), (_is_choice, "a list of texts")
COUNT, NUMBER = (_is_count, "a whole number, 1 or more"), (_is_number, "a number, 0 or more")
RULE = (_is_rule, "the name of a preset, or a rule with its options")

WANTED: dict[str, Check] = {
    "method": TEXT, "loss": TEXT, "variant": TEXT, "precision": TEXT, "views": TEXT,
    "data": CHOICE, "backbone": CHOICE,
    "seed": (_is_seed, "a whole number, 0 or more"),
    "batch": COUNT, "accumulate": COUNT, "epochs": COUNT, "warmup_epochs": COUNT,
    "hidden": COUNT, "features": COUNT,
    "lr": NUMBER, "weight_decay": NUMBER, "momentum": NUMBER, "trust": NUMBER,
    "warmup_start": NUMBER,
    "probe": (lambda x: isinstance(x, dict), "the settings of the probe"),
}  # fmt: skip
OF_METHOD: dict[str, dict[str, Check]] = {
    "simclr": {"temperature": NUMBER},
    "nnclr": {"temperature": NUMBER, "predictor": COUNT, "queue": COUNT},
    "barlow": {"scale": NUMBER, "off_diagonal": NUMBER},
}
OF_HEX: dict[str, dict[str, Check]] = {  # what a method needs with HEX besides the threshold
    "simclr": {},
    "nnclr": {},
    "barlow": {"temperature": NUMBER, "alpha": NUMBER},
}
OF_PROBE: dict[str, Check] = {
    "epochs": COUNT, "batch": COUNT, "lr": NUMBER, "momentum": NUMBER, "weight_decay": NUMBER,
    "drops": (lambda x: isinstance(x, list) and all(map(_is_count, x)), "a list of epochs"),
    "fractions": (
        lambda x: _are_numbers(x) and all(0 < f <= 1 for f in x), "a list of shares of the labels",
    ),
}  # fmt: skip


def read(file: Path) -> Settings:
    """The settings in a file, with those that it extends.

    Raises:
        ValueError: the file is missing, is no YAML, or lacks a setting or has an unknown or
            impossible one. The text is meant for the user.
    """
    settings = _merged(file)
    method, loss = settings.get("method"), settings.get("loss")
    if method not in OF_METHOD:
        raise ValueError(f"{file}: method: got {method!r}, wanted one of {', '.join(OF_METHOD)}")
    if loss not in ("base", "hex"):
        raise ValueError(f"{file}: loss: got {loss!r}, wanted base or hex")
    wanted = WANTED | OF_METHOD[method]
    if loss == "hex":
        wanted |= {"threshold": RULE} | OF_HEX[method]
    _check(file, settings, wanted)
    _check(file, settings["probe"], OF_PROBE, "probe: ")
    if settings["precision"] not in ("32-true", "16-mixed"):
        raise ValueError(
            f"{file}: precision: got {settings['precision']!r}, wanted 32-true or 16-mixed"
        )
    if unknown := set(settings["data"]) - CROP.keys():
        raise ValueError(f"{file}: data: got {', '.join(unknown)}, wanted {', '.join(CROP)}")
    named = yaml.safe_load((FOLDER / "views.yaml").read_text())
    if settings["views"] not in named:
        raise ValueError(
            f"{file}: views: got {settings['views']!r}, wanted one of {', '.join(named)}"
        )
    settings["views"] = named[settings["views"]]
    if loss == "hex":
        try:
            tracker(settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: threshold: {error}") from None
    return settings


def combinations() -> list[tuple[str, str, str, Settings]]:
    """Every run that there can be: its file, data set, network and settings."""
    found = []
    for name in RUNS:
        settings = read(FOLDER / f"{name}.yaml")
        for data in settings["data"]:
            found += [(name, data, backbone, settings) for backbone in settings["backbone"]]
    return found


def chosen(settings: Settings, name: str, value: str | None) -> Settings:
    """With one of the values that a run's file allows for "data" or "backbone", or its first.

    Raises:
        ValueError: the file does not allow it.
    """
    allowed = settings[name]
    if value is not None and value not in allowed:
        raise ValueError(
            f"--{name}: got {value!r}, wanted one of {', '.join(allowed)} for this run"
        )
    return settings | {name: value or allowed[0]}


def tiny(settings: Settings) -> Settings:
    """A run of seconds on a CPU, for a test: the same networks and code, and little of all else.

    The authors' quantile of 0.99 needs longer rows than these, so it is 0.9, and the warm-up ends
    after the first epoch (see `tracker`).
    """
    small = {
        "images": 32,  # of each part; no other run has this setting
        "crop": 8 if settings["crop"] == 32 else 32,
        "batch": 16,
        "accumulate": min(settings["accumulate"], 2),
        "epochs": 2,
        "warmup_epochs": 1,
        "probe": settings["probe"] | {"epochs": 1, "batch": 16, "drops": []},
    }
    for name in ("hidden", "features", "predictor", "queue"):
        if name in settings:
            small[name] = min(settings[name], 128)
    return settings | small


def tracker(settings: Settings) -> ThresholdTracker:
    """The threshold of a run with HEX, new.

    Raises:
        TypeError, ValueError: there is no such preset or rule.
    """
    rule = settings["threshold"]
    if isinstance(rule, str):
        made = authors_threshold(rule)
    else:
        options = dict(rule)
        if (name := options.pop("rule", None)) not in RULES:
            raise ValueError(f"rule: got {name!r}, wanted one of {', '.join(RULES)}")
        made = getattr(ThresholdTracker, name)(**options)
    if "images" in settings and made.adaptive_rule:  # tiny
        few = {"quantile": 0.9, "warmup_epochs": min(1, made.options["warmup_epochs"])}
        made = ThresholdTracker(made.rule, **made.options | few)
    return made


def shared_out(settings: Settings, devices: int) -> tuple[int, int, bool]:
    """How a step of the optimizer is divided among devices.

    The images of a step and the learning rate are the same for any number of devices, and so is the
    number of images that the loss sees together. Batches that one device would take one after the
    other are taken side by side. A batch that is alone in its step is split.

    Returns:
        How many images are loaded at a time on all devices together, how many times there are in a
        step, and whether a batch is split, so that loss and BatchNorm gather.

    Raises:
        ValueError: it cannot be divided.
    """
    batch, accumulate = settings["batch"], settings["accumulate"]
    if accumulate % devices == 0:
        return batch * devices, accumulate // devices, False
    if accumulate == 1 and batch % devices == 0:
        return batch, 1, True
    raise ValueError(
        f"got {devices} processes, wanted a number that divides "
        f"{accumulate if accumulate > 1 else batch}, the "
        f"{'batches' if accumulate > 1 else 'images'} of a step"
    )


def learning_rate(settings: Settings) -> float:
    return settings["lr"] * settings["batch"] * settings["accumulate"] / 256


def described(settings: Settings, devices: int) -> str:
    """What a run is, in a few lines, with the numbers that follow from the others."""
    size, times, split = shared_out(settings, devices)
    batch, batches = settings["batch"], settings["accumulate"]
    how = "one batch" if batches == 1 else f"{batches} batches of {batch}"
    if split and devices > 1:
        how += f", gathered from {devices} processes"
    elif batches > 1:
        how += f", {times} on each of {devices} processes" if devices > 1 else ", in turn"
    lines = [
        f"{settings['method']}, loss {settings['loss']}, {settings['backbone']} on "
        f"{settings['data']}, {settings['epochs']} epochs",
        f"a step: {size * times} images, {how}",
        f"LARS: learning rate {learning_rate(settings):g} = {settings['lr']:g} * {batch} * "
        f"{batches} / 256, weight decay {settings['weight_decay']:g}, warm-up of "
        f"{settings['warmup_epochs']} epochs",
    ]
    if settings["loss"] == "hex":
        lines.append(
            f"HEX: variant {settings['variant']}, threshold {tracker(settings).extra_repr()}"
        )
    return "\n".join(lines)


def differing(one: Settings, two: Settings, before: str = "") -> str:
    """The first setting in which two runs differ, with its two values, or an empty text."""
    for name in sorted(one.keys() | two.keys()):
        a, b = (x.get(name) for x in (one, two))
        if isinstance(a, dict) and isinstance(b, dict):
            if text := differing(a, b, f"{before}{name}: "):
                return text
        elif a != b:
            return f"{before}{name}: got {a!r} with --resume, of a run with {b!r}"
    return ""


def _merged(file: Path) -> Settings:
    try:
        settings = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: got no settings, wanted lines such as method: simclr")
    if (name := settings.pop("extends", None)) is None:
        return settings
    base = _merged(file.with_name(f"{name}.yaml"))
    if isinstance(settings.get("probe"), dict):
        settings["probe"] = base.get("probe", {}) | settings["probe"]
    return base | settings


def _check(file: Path, settings: Settings, wanted: dict[str, Check], of: str = "") -> None:
    for name, (is_right, what) in wanted.items():
        if name not in settings:
            raise ValueError(f"{file}: {of}{name}: is missing, wanted {what}")
        if not is_right(settings[name]):
            raise ValueError(f"{file}: {of}{name}: got {settings[name]!r}, wanted {what}")
    if unknown := sorted(settings.keys() - wanted.keys()):
        raise ValueError(f"{file}: {of}{unknown[0]}: is not known for this run")
