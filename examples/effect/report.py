# SPDX-License-Identifier: MIT
"""The tables of docs/effect.md, drawn from the rows.

The document has blocks between `<!-- study NAME BLOCK -->` and `<!-- end -->`. The function BLOCK
of this file makes the block from the rows of the study NAME. The text outside the blocks is written
by people.
"""

import math
import re
from collections.abc import Callable
from statistics import fmean, median

from effect.differences import (
    ENOUGH,
    MEASURES,
    SCORE,
    Runs,
    Summary,
    compared,
    difference,
    holm,
    pooled_deviation,
    score,
    summary,
)
from effect.rows import Rows, without_test
from effect.table import BASELINES, MAIN, Study, plan, sizes, temperatures

BLOCK = re.compile(r"(<!-- study (\w+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
TITLES = {
    "infonce": "InfoNCE",
    "decoupled": "decoupled InfoNCE",
    "hcl": "HCL",
    "untrained": "untrained",
}


def title(loss: str) -> str:
    """The name of a loss, for people."""
    words = {
        "paper": "HEX paper",
        "released": "HEX released",
        "neg": "negatives",
        "warm": "warm-up",
    }
    return TITLES.get(loss) or " ".join(words.get(word, word) for word in loss.split())


def filled(text: str, studies: dict[str, Study], rows: Rows) -> str:
    """The document with new blocks.

    Raises:
        ValueError: a block or a study is unknown.
    """

    def fill(match: re.Match[str]) -> str:
        head, name, block, end = match.groups()
        if name not in studies or block not in BLOCKS:
            raise ValueError(f"<!-- study {name} {block} -->: there is no such study or block")
        mine = {key: row for key, row in rows.items() if row["study"] == name}
        body = BLOCKS[block](name, studies[name], mine) if mine else f"No runs of `{name}` so far."
        return f"{head}\n{body}\n\n{end}"

    return BLOCK.sub(fill, text)


def empty(name: str) -> str:
    """A document with every block of a study, for `filled`."""
    blocks = (
        f"## {block}\n\n{make.__doc__}\n\n<!-- study {name} {block} -->\n<!-- end -->\n"
        for block, make in BLOCKS.items()
    )
    return "\n".join([f"# Study {name}\n", *blocks])


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def points(value: Summary | None, stars: str = "") -> str:
    """A mean in percent, with its standard error."""
    if value is None:
        return ""
    error = "" if value.error is None else f" ± {100 * value.error:.1f}"
    return f"{100 * value.mean:.1f}{error}{stars}"


def signed(value: Summary | None) -> str:
    """A difference in points of percent, in bold beyond two standard errors."""
    if value is None:
        return ""
    error = "" if value.error is None else f" ± {100 * value.error:.1f}"
    text = f"{100 * value.mean:+.1f}{error}"
    return f"**{text}**" if value.beyond_two_errors else text


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = "|---|" + "---:|" * (len(head) - 1)
    cells = [f"| {' | '.join(line)} |".replace(" ± ", "\u00a0±\u00a0") for line in lines]
    return "\n".join([f"| {' | '.join(head)} |", rule, *cells])  # a number and its error stay whole


def measures_of(rows: Rows) -> dict[str, str]:
    """The measures that the data has, with their titles."""
    row = next(iter(rows.values()))
    return {m: name for m, name in MEASURES.items() if score(row, m) is not None}


def cost(name: str, study: Study, rows: Rows) -> str:
    """The number of runs, their cost, the machine, the code and the number of images."""
    seconds = [row["cost"]["cpu_all"] for row in rows.values() if row["loss"] != "untrained"]
    main = [
        row["cost"]["cpu_all"] for row in rows.values()
        if row["regime"] == MAIN and row["loss"] != "untrained"
    ]  # fmt: skip
    machines = sorted({
        f"{m['device']}, {m['threads']} thread, torch {m['torch']}"
        for m in (row["machine"] for row in rows.values())
    })  # fmt: skip
    commits = sorted({row["commit"] for row in rows.values()})
    images = next(iter(rows.values()))["images"]
    by_size = study.regimes.keys() <= {*sizes(study).values()}
    which = f"with batch size {study.setup.batch}" if by_size else "of the main grid"
    return (
        f"{len(seconds)} runs took {sum(seconds) / 3600:.1f} hours of CPU time in all, not "
        f"counting the untrained network. A run {which} took {median(main):.0f} seconds (the "
        f"median; {min(main):.0f} to {max(main):.0f}). Machine: {'; '.join(machines)}. Commits: "
        f"{', '.join(f'`{c}`' for c in commits)}. Each run had "
        f"{images['train']} training images, {images['validation']} held-out images of the "
        f"training set, and {images['test']} test images."
    )


def chosen(name: str, study: Study, rows: Rows) -> str:
    """Validation scores at the first seed, for every temperature."""
    taus = sorted({tau for loss in study.losses for tau in temperatures(study, loss)})
    lines = []
    for loss in study.losses:
        if loss.like is not None:
            continue
        tried = {
            row["temperature"]: score(row, SCORE, "validation") for row in rows.values()
            if (row["loss"], row["regime"], row["seed"]) == (loss.name, MAIN, study.seeds[0])
        }  # fmt: skip
        if tried:
            best = max(tried.values())
            cells = [percent(tried.get(tau)) for tau in taus]
            whole = len(tried) == len(temperatures(study, loss))
            if whole:
                cells = [
                    f"**{c}**" if tried.get(t) == best else c
                    for t, c in zip(taus, cells, strict=True)
                ]
            lines.append([title(loss.name), *cells])
    return table(["loss", *(f"tau {tau:g}" for tau in taus)], lines)


def main(name: str, study: Study, rows: Rows) -> str:
    """Test accuracy of every loss, as mean and standard error over its seeds."""
    measures = measures_of(rows)
    del measures[SCORE]
    lines = []
    for row in rows.values():
        if row["loss"] == "untrained":
            lines.append(["untrained", "", "1", *(percent(score(row, m)) for m in measures)])
    for loss, runs in compared(name, study, rows).items():
        tau = next(iter(runs.values()))["temperature"]
        cells = [points(summary(score(r, m) for r in runs.values())) for m in measures]
        lines.append([title(loss), f"{tau:g}", str(len(runs)), *cells])
    return table(["loss", "tau", "seeds", *measures.values()], lines)


def against(baseline: str, all_runs: dict[str, Runs], measures: dict[str, str]) -> str:
    """Differences from a baseline at the same seed, and p of the score where there are enough."""
    lines, p = [], []
    for loss, runs in all_runs.items():
        if loss == baseline:
            continue
        found = {m: difference(runs, all_runs[baseline], m) for m in measures}
        if (first := found[SCORE]) is None:
            continue
        lines.append([title(loss), str(first.n), *(signed(d) for d in found.values())])
        p.append(first.p if first.enough else None)
    adjusted = iter(holm([x for x in p if x is not None]))
    for line, raw in zip(lines, p, strict=True):
        line += ["", ""] if raw is None else [f"{raw:.3f}", f"{next(adjusted):.3f}"]
    return table(["loss", "seeds", *measures.values(), "p of score", "p, Holm"], lines)


def paired(name: str, study: Study, rows: Rows) -> str:
    """Every loss minus InfoNCE."""
    runs = compared(name, study, rows)
    return against("infonce", runs, measures_of(rows)) if "infonce" in runs else "No InfoNCE yet."


def decoupled(name: str, study: Study, rows: Rows) -> str:
    """HEX minus decoupled InfoNCE, from which the released form differs in leaving H out."""
    runs = compared(name, study, rows)
    kept = {x: r for x, r in runs.items() if x not in ("infonce", "hcl")}
    return against("decoupled", kept, measures_of(rows)) if "decoupled" in kept else "None yet."


def regimes(name: str, study: Study, rows: Rows) -> str:
    """Differences from InfoNCE in each regime that has runs."""
    parts = []
    for regime in study.regimes:
        runs = compared(name, study, rows, regime)
        if "infonce" in runs:
            base = next(iter(runs["infonce"].values()))
            setup, here = base["setup"], summary(score(r, SCORE) for r in runs["infonce"].values())
            classes = f", classes {', '.join(setup['classes'])}" if setup["classes"] else ""
            parts.append(
                f"*{regime}*: {setup['epochs']} epochs, batch size {setup['batch']}, "
                f"{base['images']['train']} images{classes}. InfoNCE's score: {points(here)}.\n\n"
                + against("infonce", runs, measures_of(rows))
            )
    return "\n\n".join(parts) or "No runs of other regimes so far."


def batches(name: str, study: Study, rows: Rows) -> str:
    """Each loss minus InfoNCE, and the released form minus decoupled InfoNCE, by batch size."""
    measures = {m: x for m, x in measures_of(rows).items() if m in (SCORE, "knn", "linear")}
    made, lines, p = 0, [], []
    for batch, regime in sizes(study).items():
        runs = compared(name, study, rows, regime)
        made += sum(len(mine.keys() & {*study.seeds}) for mine in runs.values())
        for loss, baseline in planned(study):
            found = {m: difference(runs.get(loss, {}), runs.get(baseline, {}), m) for m in measures}
            first = found[SCORE]
            p.append(first.p if first is not None and first.enough else 1.0)
            cells = [str(first.n if first else 0), *(signed(d) for d in found.values())]
            tested = first is not None and first.enough
            lines.append([str(batch), title(loss), title(baseline), *cells, tested])
    for line, raw, adjusted in zip(lines, p, holm(p), strict=True):
        line[-1:] = [f"{raw:.3f}", f"{adjusted:.3f}"] if line[-1] else ["", ""]
    head = ["batch size", "loss", "minus", "seeds", *measures.values(), "p of score", "p, Holm"]
    count = len(study.losses) * len(study.seeds) * len(sizes(study))
    return (
        f"{made} of {count} runs have been made: {len(study.losses)} losses, {len(study.seeds)} "
        f"seeds and {len(sizes(study))} batch sizes.\n\n{table(head, lines)}"
    )


def planned(study: Study) -> list[tuple[str, str]]:
    """The comparisons at a batch size: a loss, and the baseline that is taken from it."""
    names = {loss.name: loss.family for loss in study.losses}
    pairs = [(x, "infonce") for x in names if x != "infonce"]
    if "decoupled" in names:
        pairs += [(x, "decoupled") for x, family in names.items() if family == "released"]
    return pairs


def groups(name: str, study: Study, rows: Rows) -> str:
    """The threshold and the members of H, in the first epoch and in the last."""
    lines = []
    for loss, runs in compared(name, study, rows).items():
        ends = [(r["curves"][0]["eps"], r["curves"][-1]["eps"]) for r in runs.values()]
        if loss in BASELINES:
            continue
        start = [r["looks"][1] for r in runs.values()]  # the first after some training
        last = [r["looks"][-1] for r in runs.values()]
        eps = [mean_of(x[i] for x in ends) for i in (0, 1)]
        cells = [
            f"{number(eps[0], 2)} → {number(eps[1], 2)}",
            number(mean_of(x["own"]["size"] for x in last), 1),
        ]
        for part in ("class", "superclass"):
            a, b = (mean_of(x["own"][part] for x in looks) for looks in (start, last))
            cells.append(f"{percent(a) or '–'} → {percent(b) or '–'}")
        lines.append([title(loss), *cells])
    chance = next(iter(rows.values()))["looks"][-1]["chance"]
    head = ["loss", "eps, first → last epoch", "size of H", "same class %", "same superclass %"]
    return (
        table(head, lines) + f"\n\nChance: {percent(chance['class'])} % of all negatives are of "
        f"the anchor's class, {percent(chance['superclass']) or '–'} % of its superclass."
    )


def geometry(name: str, study: Study, rows: Rows) -> str:
    """Properties of the embedding at the end: nearest 1 %, ranks, uniformity and alignment."""
    shown: dict[str, tuple[Callable[[dict], float | None], int]] = {
        "near, class %": (lambda x: scaled(x["near"]["class"]), 1),
        "near, superclass %": (lambda x: scaled(x["near"]["superclass"]), 1),
        "near, cosine": (lambda x: x.get("near_cosine"), 2),
        "rank": (lambda x: x["rank"], 1),
        "rank in a class": (lambda x: x["rank_within"], 1),
        "features' rank": (lambda x: x["rank_features"], 1),
        "features' rank in a class": (lambda x: x["rank_features_within"], 1),
        "uniformity": (lambda x: x["uniformity"], 2),
        "alignment": (lambda x: x["alignment"], 3),
    }
    runs = compared(name, study, rows)
    if all(x.get("near_cosine") is None for r in runs.get("infonce", {}).values()
           for x in r["looks"]):  # fmt: skip
        del shown["near, cosine"]  # older rows do not have it
    lines = []
    for loss, mine in runs.items():
        last = [r["looks"][-1] for r in mine.values()]
        tau = next(iter(mine.values()))["temperature"]
        cells = [number(mean_of(map(f, last)), digits) for f, digits in shown.values()]
        lines.append([title(loss), f"{tau:g}", *cells])
    return table(["loss", "tau", *shown], lines)


def scaled(value: float | None) -> float | None:
    return None if value is None else 100 * value


def mean_of(values) -> float | None:
    """The mean of the values that are not None, or None if there are none."""
    there = [x for x in values if x is not None]
    return fmean(there) if there else None


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def verdict(name: str, study: Study, rows: Rows) -> str:
    """Which differences of the score from InfoNCE are larger than the noise."""
    runs = compared(name, study, rows)
    base = runs.get("infonce", {})
    every = {x: difference(mine, base, SCORE) for x, mine in runs.items() if x != "infonce"}
    found = {x: d for x, d in every.items() if d is not None and d.enough}
    if not found:
        return "Too few runs so far."
    adjusted = dict(zip(found, holm([d.p for d in found.values()]), strict=True))

    def listed(losses: list[str]) -> str:
        texts = [f"{title(x)} ({signed(found[x]).strip('*')})" for x in losses]
        return ", ".join(texts) or "none"

    up = [x for x, d in found.items() if d.beyond_two_errors and d.mean > 0]
    down = [x for x, d in found.items() if d.beyond_two_errors and d.mean < 0]
    sure = [x for x in found if adjusted[x] < 0.05]
    noise = 100 * pooled_deviation(found.values())
    seeds = sorted({ENOUGH, max(d.n for d in found.values())})
    errors = ", ".join(f"{2 * noise / math.sqrt(n):.1f} with {n} seeds" for n in seeds)
    return (
        f"{len(found)} losses have {ENOUGH} seeds or more. Each is compared with InfoNCE by its "
        "score, the mean of k-NN and the linear probe on the test images, in points:\n\n"
        f"* Above InfoNCE by more than two standard errors: {listed(up)}.\n"
        f"* Below InfoNCE by more than two standard errors: {listed(down)}.\n"
        "* Significantly different at the 5 % level after Holm's correction: "
        f"{listed(sure)}.\n\n"
        "For one seed, the difference between two losses has a standard deviation of "
        f"{noise:.2f} points, pooled over the losses. Two standard errors are therefore {errors}."
    )


def left(name: str, study: Study, rows: Rows) -> str:
    """The runs of the table, as far as results decide it so far, that have no row."""
    runs = plan(name, study, without_test(rows))
    missing: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        if run.key not in rows:
            losses = missing.setdefault(run.regime, {})
            losses.setdefault(title(run.loss.name), []).append(str(run.seed))
    lines = []
    for regime, losses in missing.items():
        by_seeds: dict[str, list[str]] = {}
        for loss, seeds in losses.items():
            by_seeds.setdefault(", ".join(seeds), []).append(loss)
        texts = [
            f"{', '.join(x)} (seed{'s' * (',' in seeds)} {seeds})" for seeds, x in by_seeds.items()
        ]
        lines.append(f"* *{regime}*: {'; '.join(texts)}")
    done = sum(run.key in rows for run in runs)
    listed = "\n\nThese have not been made yet:\n\n" + "\n".join(lines) if lines else ""
    return f"{done} of the {len(runs)} runs of the table have been made.{listed}"


BLOCKS: dict[str, Callable[[str, Study, Rows], str]] = {
    f.__name__: f
    for f in (
        cost, chosen, main, paired, decoupled, regimes, batches, groups, geometry, verdict, left
    )
}  # fmt: skip
