# SPDX-License-Identifier: MIT
"""The declared table of the study: the losses, sizes and regimes, and which runs come next.

What is compared is declared here and nowhere else. A run is a `Config`. `plan` lists all runs that
are known so far, the most informative first. Temperatures are chosen by validation scores alone:
`plan` never gets those of the test set, which rows.py removes.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Setup:
    """Everything about a run except its loss and its seed."""

    data: str
    backbone: str
    view: int | None  # side of the views in pixels; None: that of the images
    train: int | None  # how many images to train on, drawn by the seed; None: all not held out
    validation: int  # how many training images are held out, the same for all runs
    epochs: int
    batch: int
    lr: float
    warmup: int  # epochs of warm-up, for the losses that have one
    measured: tuple[int, ...]  # epochs after which the embedding is measured
    amp: str = "off"
    compile: bool = False
    classes: tuple[str, ...] | None = None  # train and test on these only


@dataclass(frozen=True)
class Loss:
    """A loss: its name, and the options of simclr.py that make it."""

    name: str
    family: str
    options: dict[str, Any] = field(hash=False)
    warm: bool = False  # whether it is InfoNCE for the first tenth of the epochs
    like: str | None = None  # the loss whose temperature it takes; None: it is chosen for this loss
    more_temperatures: tuple[float, ...] = ()  # besides those of the study, to choose from

    def for_setup(self, setup: Setup, temperature: float) -> dict[str, Any]:
        """The options of simclr.py in a setup, at a temperature."""
        options: dict[str, Any] = self.options | {"temperature": temperature}
        if self.warm:
            options["warmup"] = setup.warmup
        if options.get("threshold") == "step":  # the authors' schedule: a drop after each quarter
            options["threshold"] = f"step:0.9,0.1,{max(1, setup.epochs // 4)}"
            options["normalize_rows"] = True
        return options


def _hex(variant: str, quantile: float, like: Loss | None = None) -> Loss:
    options = {"loss": "hex", "variant": variant, "quantile": quantile}
    return Loss(f"{variant} q{quantile:g}", variant, options, like=like and like.name)


def _changed(loss: Loss, name: str, options: dict[str, Any], warm: bool = False) -> Loss:
    options = loss.options | options
    return Loss(f"{loss.name} {name}", loss.family, options, warm, loss.name)


def _step(loss: Loss) -> Loss:
    options = {"loss": "hex", "variant": loss.family, "threshold": "step"}
    return Loss(f"{loss.family} step", loss.family, options, like=loss.name)


PAPER, RELEASED = _hex("paper", 0.99), _hex("released", 0.99)
LOSSES = (
    Loss("infonce", "infonce", {"loss": "base"}),
    # With H empty (no cosine is above 2) the released form is InfoNCE without the positive in the
    # denominator, plus a constant.
    Loss("decoupled", "decoupled", {"loss": "hex", "variant": "released", "threshold": "2"}),
    # All negatives are in H, because every cosine is above -2. Its authors train at tau 0.5.
    Loss(
        "hcl", "hcl", {"loss": "hex", "variant": "paper", "threshold": "-2"},
        more_temperatures=(0.5,),
    ),
    PAPER,
    RELEASED,
    _hex("paper", 0.9),
    _hex("released", 0.9),
    # Variants, which take the temperature of the loss with the 0.99 quantile.
    _changed(RELEASED, "warm", {}, warm=True),  # the authors' own
    _step(PAPER),
    _changed(PAPER, "neg", {"over": "negatives"}),
    _hex("paper", 0.95, like=PAPER),
    _changed(PAPER, "warm", {}, warm=True),
    _step(RELEASED),
    _hex("released", 0.95, like=RELEASED),
    _changed(RELEASED, "neg", {"over": "negatives"}),
)  # fmt: skip
BASELINES = ("infonce", "decoupled", "hcl")
FORMS = ("paper", "released")  # families of which the best tuned loss gets more runs
UNTRAINED = Loss("untrained", "untrained", {"loss": "base"})


@dataclass(frozen=True)
class Study:
    """A grid. Temperatures are chosen at the first seed, then the other seeds follow, then more."""

    setup: Setup
    losses: tuple[Loss, ...] = LOSSES
    temperatures: tuple[float, ...] = (0.2, 0.1)
    seeds: tuple[int, ...] = (0, 1, 2)
    more_seeds: tuple[int, ...] = (3, 4)  # for the baselines and the best of each form
    regimes: dict[str, dict[str, Any]] = field(default_factory=dict)  # name: changes of the setup
    whole_regimes: tuple[str, ...] = ()  # the regimes in which every loss runs
    leads: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # regime: losses with more_seeds
    pictures: tuple[str, ...] = ("differences", "threshold", "groups", "geometry", "regimes")


CPU = Setup(
    data="cifar10", backbone="quick", view=24, train=12800, validation=5000, epochs=10, batch=256,
    lr=3e-3, warmup=1, measured=(0, 1, 2, 4, 7, 10),
)  # fmt: skip
GPU = Setup(
    data="cifar10", backbone="resnet18", view=None, train=None, validation=5000, epochs=100,
    batch=256, lr=1e-3, warmup=10, measured=(0, 1, 5, 10, 25, 50, 75, 100), amp="bf16",
    compile=True,
)  # fmt: skip
TINY = Setup(
    data="digits", backbone="small", view=None, train=512, validation=200, epochs=2, batch=256,
    lr=3e-3, warmup=1, measured=(0, 2),
)  # fmt: skip
# Of the batch size: few looks, because only the scores are compared.
BATCH = replace(CPU, measured=(0, 10))
SIBLINGS = "automobile", "cat", "dog", "truck"  # two pairs: a strong hierarchy
STUDIES = {
    "cpu": Study(
        CPU,
        regimes={
            "siblings": {"classes": SIBLINGS},
            "batch 512": {"batch": 512, "epochs": 20, "warmup": 2, "measured": (0, 2, 8, 20)},
            "4 x longer": {"epochs": 40, "warmup": 4, "measured": (0, 4, 10, 20, 40)},
        },
        # named when three seeds had been seen: p was 0.013 there, and 0.05 after Holm's correction
        leads={"batch 512": ("infonce", "paper q0.9")},
    ),
    "gpu": Study(
        GPU,
        regimes={
            "batch 512": {"batch": 512},
            "siblings": {"classes": SIBLINGS},
            "4 x longer": {"epochs": 400, "warmup": 40, "measured": (0, 10, 100, 200, 400)},
        },
        whole_regimes=("batch 512",),
    ),
    # How much of the released form's effect comes from leaving out the positive? Adam's learning
    # rate goes with the square root of the batch. The temperature is the best of the study "cpu".
    "batch": Study(
        BATCH,
        losses=tuple(
            replace(loss, like=None)
            for loss in LOSSES
            if loss.name in ("infonce", "decoupled", "paper q0.99 neg", "released q0.99 neg")
        ),
        temperatures=(0.1,),
        seeds=(0, 1, 2, 3, 4),
        more_seeds=(),
        regimes={
            f"batch {batch}": {"batch": batch, "lr": round(3e-3 * (batch / 256) ** 0.5, 6)}
            for batch in (128, 64, 32)
        },
        pictures=("batches",),
    ),
    # in seconds, on the digits of scikit-learn: to try the machinery
    "tiny": Study(
        TINY,
        losses=tuple(x for x in LOSSES if x.name in ("infonce", "paper q0.9", "released q0.9")),
        more_seeds=(),
    ),
}


@dataclass(frozen=True)
class Config:
    """A run. Runs of the same regime and seed have the same weights, images, batches and views."""

    study: str
    regime: str
    loss: Loss
    temperature: float | None  # None: untrained
    seed: int
    setup: Setup

    @property
    def key(self) -> str:
        tau = "" if self.temperature is None else f" tau={self.temperature:g}"
        return f"{self.study}: {self.regime}: {self.loss.name}{tau} seed={self.seed}"

    def described(self) -> dict[str, Any]:
        """What its row says about it, by which a row is recognised as that of this run."""
        options = {} if self.temperature is None else self.loss.for_setup(
            self.setup, self.temperature
        )  # fmt: skip
        setup = asdict(self.setup)
        setup |= {k: list(v) for k, v in setup.items() if isinstance(v, tuple)}
        return {
            "study": self.study,
            "regime": self.regime,
            "loss": self.loss.name,
            "family": self.loss.family,
            "temperature": self.temperature,
            "seed": self.seed,
            "options": options,
            "setup": setup,
        }


MAIN = "main"  # the regime in which temperatures are chosen


def sizes(study: Study) -> dict[int, str]:
    """The regimes that differ from the main one in the batch size and the learning rate alone, by
    batch size, from the smallest."""
    changed = {regime: changes for regime, changes in study.regimes.items()
               if changes.keys() <= {"batch", "lr"}}  # fmt: skip
    found = {study.setup.batch: MAIN} | {
        changes.get("batch", study.setup.batch): regime for regime, changes in changed.items()
    }
    return dict(sorted(found.items()))


def validation_score(row: dict[str, Any]) -> float:
    """The score by which runs are chosen: the mean of k-NN and linear probe on held-out images."""
    return (row["validation"]["knn"] + row["validation"]["linear"]) / 2


def temperatures(study: Study, loss: Loss) -> tuple[float, ...]:
    """The temperatures from which that of a loss is chosen."""
    return (*study.temperatures, *loss.more_temperatures)


def _config(
    name: str, study: Study, loss: Loss, tau: float | None, seed: int, regime: str = MAIN
) -> Config:
    setup = replace(study.setup, **study.regimes.get(regime, {}))
    return Config(name, regime, loss, tau, seed, setup)


def chosen_temperatures(
    name: str, study: Study, rows: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """The best temperature, by validation, of each loss with rows at all its temperatures.

    Args:
        rows: keyed by "key", without test scores.
    """
    chosen: dict[str, float] = {}
    for loss in study.losses:
        if loss.like is not None:
            continue
        tried = [
            _config(name, study, loss, tau, study.seeds[0]) for tau in temperatures(study, loss)
        ]
        if all(c.key in rows for c in tried):
            scores = {c.temperature: validation_score(rows[c.key]) for c in tried}
            chosen[loss.name] = max(scores, key=scores.__getitem__)
    return chosen | {x.name: chosen[x.like] for x in study.losses if x.like in chosen}


def plan(name: str, study: Study, rows: dict[str, dict[str, Any]]) -> list[Config]:
    """The runs that are known so far, in order. If all of them have rows, the study is over.

    Args:
        rows: keyed by "key", without test scores.
    """
    config = partial(_config, name, study)
    first, later = study.seeds[0], study.seeds[1:]
    tuned = [loss for loss in study.losses if loss.like is None]
    variants = [loss for loss in study.losses if loss.like is not None]
    taus = sorted({tau for loss in tuned for tau in loss.more_temperatures})
    runs = [config(UNTRAINED, None, first)]
    for tau in (*study.temperatures, *taus):
        runs += [config(x, tau, first) for x in tuned if tau in temperatures(study, x)]
    chosen = chosen_temperatures(name, study, rows)
    ready = [loss for loss in tuned if loss.name in chosen]
    runs += [config(x, chosen[x.name], seed) for seed in later for x in ready]
    if len(ready) < len(tuned) or not all(c.key in rows for c in runs):
        return runs

    def mean(loss: Loss) -> float:
        keys = [config(loss, chosen[loss.name], seed).key for seed in study.seeds]
        return sum(validation_score(rows[key]) for key in keys) / len(keys)

    telling = [x for x in tuned if x.name in BASELINES]
    for form in FORMS:
        telling += sorted((x for x in tuned if x.family == form), key=mean)[-1:]

    def in_regimes(seed: int) -> list[Config]:
        return [
            config(x, chosen[x.name], seed, regime) for regime in study.regimes
            for x in (study.losses if regime in study.whole_regimes else telling)
        ]  # fmt: skip

    # First one seed of everything, then all seeds of everything, then more of what matters most.
    runs += [config(x, chosen[x.name], first) for x in variants] + in_regimes(first)
    runs += [config(x, chosen[x.name], seed) for seed in later for x in variants]
    runs += [run for seed in later for run in in_regimes(seed)]
    for seed in study.more_seeds:
        for regime, names in study.leads.items():
            led = [x for x in tuned if x.name in names]
            runs += [config(x, chosen[x.name], seed, regime) for x in led]
    return runs + [config(x, chosen[x.name], seed) for seed in study.more_seeds for x in telling]
