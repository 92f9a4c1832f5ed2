# SPDX-License-Identifier: MIT
"""From rows to numbers: which runs are compared, means, standard errors, differences by seed."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from scipy import stats
from statsmodels.stats.multitest import multipletests

from effect.rows import Rows, RowsError, without_test
from effect.table import MAIN, Study, chosen_temperatures

SCORE = "score"  # settings are ranked by it: the mean of k-NN and linear probe
MEASURES = {
    SCORE: "score",
    "knn": "k-NN",
    "linear": "linear",
    "linear_1pct": "1 % of labels",
    "super_knn": "superclass k-NN",
    "super_linear": "superclass linear",
}
ENOUGH = 3  # seeds, because the spread of two says next to nothing
Runs = dict[int, dict[str, Any]]  # rows, keyed by seed


@dataclass(frozen=True)
class Summary:
    """A measure, or its differences from a baseline, at several seeds."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @cached_property
    def mean(self) -> float:
        return fmean(self.values)

    @cached_property
    def error(self) -> float | None:
        """The standard error of the mean, or None for one seed."""
        return float(stats.sem(self.values)) if self.n > 1 else None

    @property
    def enough(self) -> bool:
        """Whether there are enough seeds for a spread that means something."""
        return self.n >= ENOUGH

    @property
    def beyond_two_errors(self) -> bool:
        return self.enough and abs(self.mean) > 2 * self.error

    @property
    def p(self) -> float:
        """The p-value of the two-sided t-test of a mean of 0. It is 1 for one seed."""
        if self.n == 1:
            return 1.0
        if self.error == 0:  # all values are the same, and scipy would warn
            return float(self.mean == 0)
        return float(stats.ttest_1samp(self.values, 0).pvalue)


def summary(values: Iterable[float]) -> Summary:
    return Summary(tuple(values))


def score(row: dict[str, Any], measure: str, split: str = "test") -> float | None:
    """A measure of a row, in [0, 1], or None if it needs superclasses and the data has none."""
    scores = row[split]
    if measure == SCORE:
        return (scores["knn"] + scores["linear"]) / 2
    return scores.get(measure)


def difference(runs: Runs, baseline: Runs, measure: str) -> Summary | None:
    """The differences of a measure from the baseline's."""
    return paired(runs, baseline, lambda row: score(row, measure))


def paired(
    runs: Runs, baseline: Runs, value: Callable[[dict[str, Any]], float | None]
) -> Summary | None:
    """The differences of a value of the rows from the baseline's at the same seed, for all seeds
    that both have, or None if there are none.

    Raises:
        RowsError: two runs of a seed are no pair, as their first weights or their draws differ.
    """
    seeds = sorted(runs.keys() & baseline.keys())
    for seed in seeds:
        mine, other = runs[seed], baseline[seed]
        if mine["pairing"] != other["pairing"]:
            raise RowsError(f"{mine['key']!r} and {other['key']!r} are no pair: {mine['pairing']}")
    pairs = [(value(runs[s]), value(baseline[s])) for s in seeds]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    return summary(a - b for a, b in pairs) if pairs else None


def pooled_deviation(found: Iterable[Summary]) -> float:
    """The standard deviation of a difference at one seed, pooled over all losses."""
    spread = [(d.n - 1, d.error**2 * d.n) for d in found if d.error is not None]
    return math.sqrt(sum(k * v for k, v in spread) / sum(k for k, _ in spread))


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979). All that are below 0.05 hold together at that level."""
    return list(multipletests(p, method="holm")[1]) if p else []


def compared(name: str, study: Study, rows: Rows, regime: str = MAIN) -> dict[str, Runs]:
    """The runs of each loss at its chosen temperature, in the order of the table. A loss without
    runs is left out."""
    chosen = chosen_temperatures(name, study, without_test(rows))
    found: dict[str, Runs] = {}
    for loss in study.losses:
        runs = {
            row["seed"]: row
            for row in rows.values()
            if (row["study"], row["regime"], row["loss"]) == (name, regime, loss.name)
            and row["temperature"] == chosen.get(loss.name)
        }
        if runs:
            found[loss.name] = dict(sorted(runs.items()))
    return found
