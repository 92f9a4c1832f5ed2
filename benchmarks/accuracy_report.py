# SPDX-License-Identifier: MIT
"""The errors that accuracy.py measured, as tables and as a picture; report.py puts them in place.

Of a result each error is a line: of which case, by which way ("ours", "plain", "formula"), of what
("loss", the mean; "row", the worst one; "gradient", the worst element).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import accuracy
import pandas as pd
from accuracy import DTYPES, ERRORS, PLACES, WAYS, WRONG

NAMES = {"ours": "hex", "plain": "PyTorch, with care", "formula": "PyTorch, as the formula reads"}
CASE = ["part", "loss", "dtype", "tau", "rows", "features", "kind"]
AXES = {
    "temperature": ("tau", "temperature"),
    "features": ("features", "features D (N = 26)"),
    "rows": ("rows", "rows N (D = 33), or columns of logits"),
}
AT = 0.1  # the temperature of the picture, where another thing varies
OF = {"row": "loss of the worst row", "gradient": "gradient"}  # in the picture
STYLES = {  # told apart by line and marker too
    "formula": {"color": "#666666", "linestyle": ":", "marker": "^", "markersize": 5},
    "plain": {"color": "#E69F00", "linestyle": "--", "marker": "s", "markersize": 5},
    "ours": {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 4},
}
LEAST = {"float64": 1e-17}  # of the picture: less, also 0, stands there
LEAST_NARROW, MOST, LOST = 1e-9, 10.0, 60.0  # what is not finite stands at LOST

Record = Mapping[str, Any]


def lines(records: Sequence[Record]) -> pd.DataFrame:
    """A line an error, of all parts but the places."""
    found = [
        {"part": record["name"], **{name: row[name] for name in CASE[1:]}, "way": way, "of": of,
         "error": row[way][of], "rounding": row["rounding"][of]}
        for record in records if record["name"] in AXES for row in record["results"]
        for way in WAYS for of in ERRORS
    ]  # fmt: skip
    return pd.DataFrame(found)


def number(error: float) -> str:
    return "0" if error == 0 else f"{error:.1e}" if math.isfinite(error) else "inf or nan"


def tables(records: Sequence[Record]) -> dict[str, pd.DataFrame]:
    """By name; cells are texts."""
    found = lines(records)
    return {
        "worst": worst(found),
        "where": where(found),
        "ratios": ratios(found),
        "wrong": wrong(found),
        "places": places(records),
    }


def worst(found: pd.DataFrame) -> pd.DataFrame:
    """The greatest error, by dtype and by what it is of, of InfoNCE and of HEX."""
    of_hex = found["loss"].str.startswith("HEX").map({True: "HEX", False: "InfoNCE"})
    most = found.assign(family=of_hex).pivot_table(
        "error", ["dtype", "of"], ["family", "way"], aggfunc="max", sort=False
    )
    columns = [(family, way) for family in ("InfoNCE", "HEX") for way in WAYS]
    cells = most.loc[[(dtype, of) for dtype in DTYPES for of in ERRORS], columns].map(number)
    cells.index = [f"{dtype}, {of}" for dtype, of in cells.index]
    cells.columns = [f"{family}: {NAMES[way]}" for family, way in columns]
    return cells


def where(found: pd.DataFrame) -> pd.DataFrame:
    """The case of the worst of ours and of plain PyTorch; the first of several as bad ones."""
    cells = {}
    for dtype in DTYPES:
        for of in ERRORS:
            mine = found[(found["dtype"] == dtype) & (found["of"] == of)]
            cells[f"{dtype}, {of}"] = {
                NAMES[way]: named(mine.loc[mine["error"][mine["way"] == way].idxmax()])
                for way in WAYS[:2]
            }
    return pd.DataFrame(cells).T


def named(line: pd.Series) -> str:
    rows = "columns" if line["loss"] in accuracy.LOGITS else "N"
    features = "" if line["loss"] in accuracy.LOGITS else f", D = {line['features']}"
    return (
        f"{line['loss']}, tau = {line['tau']:g}, {rows} = {line['rows']}{features}, {line['kind']}"
    )


def ratios(found: pd.DataFrame) -> pd.DataFrame:
    """How ours compare with plain PyTorch's, case by case; a row for each dtype."""
    both = found.pivot_table("error", [*CASE, "of", "rounding"], "way", aggfunc="max", sort=False)
    both = both.reset_index("rounding")
    more = both["ours"] > 2 * both["plain"]
    both["level"] = (both["ours"] / both["rounding"]).where(more)
    both["factor"] = (both["ours"] / both["plain"]).where(more & (both["plain"] > 0))
    twice = 2 * both["plain"].where(both["plain"] < math.inf, 0)
    both["share"] = both["ours"] / (twice + both["rounding"]).where(both["ours"] > 0, 1)
    cells = {}
    for dtype in DTYPES:
        mine = both.xs(dtype, level="dtype")
        most = mine.groupby(level="of")["factor"].max()
        cells[dtype] = {
            "comparisons": str(len(mine)),
            "hex's error <= PyTorch's": f"{(mine['ours'] <= mine['plain']).mean():.0%}",
            "hex's error > 2 x PyTorch's": str(mine["level"].count()),
            "these: over rounding": f"{mine['level'].max():.2f}",
            **{f"these: over PyTorch's, {of}": _factor(most[of]) for of in ERRORS},
            "all: over the tolerance": f"{mine['share'].max():.2f}",
        }
    return pd.DataFrame(cells).T


def _factor(most: float) -> str:
    return "" if math.isnan(most) else f"{most:.3g}"


def wrong(found: pd.DataFrame) -> pd.DataFrame:
    """How many cases have a loss or a gradient that is not finite or off by more than a per cent,
    and the temperatures of those."""
    bad = found.assign(bad=~(found["error"] <= WRONG))
    cases = bad.groupby([*CASE, "way"], sort=False)["bad"].any().reset_index()
    cells: dict[str, dict[str, str]] = {}
    for (dtype, loss), mine in cases.groupby(["dtype", "loss"], sort=False):
        line = cells.setdefault(f"{loss}, {dtype}", {})
        for way in WAYS:
            of_way = mine[mine["way"] == way]
            taus = of_way["tau"][of_way["bad"]]
            line[NAMES[way]] = f"{len(taus)} of {len(of_way)}"
            if len(taus):
                line[NAMES[way]] += f", tau {taus.min():g} to {taus.max():g}"
    order = [f"{loss}, {dtype}" for loss in accuracy.LOSSES for dtype in DTYPES]
    return pd.DataFrame(cells).T.reindex(order)


def places(records: Sequence[Record]) -> pd.DataFrame:
    """The value that each way has, and the error of its gradient."""
    cells: dict[str, dict[str, str]] = {}
    for row in (row for r in records if r["name"] == "places" for row in r["results"]):
        place = PLACES[row["kind"]]
        line = cells[str(len(cells) + 1)] = {
            "inputs": f"{place.what}: `{place.code}`",
            "loss": f"{place.loss}, {place.dtype}, tau = {place.tau:g}",
            "truth": f"{row['truth']:.4g}",
        }
        for way in WAYS:
            line[NAMES[way]] = f"{row[way]['value']:.4g} ({number(row[way]['gradient'])})"
    return pd.DataFrame(cells).T


def points(records: Sequence[Record]) -> pd.DataFrame:
    """The greatest error of all losses and batches, by what the picture has on its axes."""
    found = lines(records)
    shown = (found["part"] == "temperature") | (found["tau"] == AT)
    found = found[found["of"].isin(OF) & shown]
    x = found.apply(lambda line: line[AXES[line["part"]][0]], axis=1)
    keys = ["dtype", "of", "part", "x", "way"]
    return found.assign(x=x).groupby(keys, sort=True)["error"].max().reset_index()


def draw(points: pd.DataFrame, about: str) -> Any:
    """A panel for each dtype, for loss and gradient, over temperature, features and rows."""
    from matplotlib.figure import Figure

    pairs = [(dtype, of) for dtype in DTYPES for of in OF]
    figure = Figure(figsize=(10, 16), layout="constrained")
    grid = figure.subplots(len(pairs), len(AXES), sharex="col", sharey="row")
    for (dtype, of), panels in zip(pairs, grid, strict=True):
        least = LEAST.get(dtype, LEAST_NARROW)
        low, middle = (round(math.log10(x)) for x in (least, math.sqrt(least * WRONG)))
        ticks = {
            least: rf"$\leq 10^{{{low}}}$", 10.0**middle: f"$10^{{{middle}}}$",
            WRONG: "1 %", LOST: "inf, nan",
        }  # fmt: skip
        for part, panel in zip(AXES, panels, strict=True):
            here = (points["dtype"] == dtype) & (points["of"] == of) & (points["part"] == part)
            mine = points[here]
            for way, style in STYLES.items():
                line = mine[mine["way"] == way]
                finite = line["error"].where(line["error"] < math.inf, math.nan)
                panel.plot(
                    line["x"], finite.clip(least, MOST), label=NAMES[way], linewidth=1.6,
                    markerfacecolor="white" if way != "ours" else None, **style,
                )  # fmt: skip
                lost = line["x"][line["error"] == math.inf]
                height = LOST * (6 if way == "plain" else 1)
                panel.plot(lost, [height] * len(lost), "x", color=style["color"], markersize=6)
            panel.axhline(WRONG, color="#999999", linewidth=1)
            panel.set(xscale="log", yscale="log", ylim=(least / 4, 40 * LOST))
            panel.set_yticks([*ticks], ticks.values())
            panel.minorticks_off()
            panel.grid(which="major", color="#ececec", linewidth=0.7)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=10.5)
        panels[0].set_title(f"{dtype}: {OF[of]}", loc="left", fontsize=11.5, fontweight="bold")
    for panel, (_, label) in zip(grid[-1], AXES.values(), strict=True):
        panel.set_xlabel(label, fontsize=11)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], names[::-1], loc="outside upper center", ncols=3, frameon=False, fontsize=12
    )
    figure.supylabel("relative error", fontsize=12)
    figure.supxlabel(
        f"Over D and N the temperature is {AT:g}.\n{about}",
        fontsize=10, color="#444444", x=0.01, ha="left",
    )  # fmt: skip
    return figure
