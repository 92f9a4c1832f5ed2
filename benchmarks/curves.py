# SPDX-License-Identifier: MIT
"""The pictures of time and memory by rows in docs/performance.md and docs/cuda.md.

report.py chooses the results and saves the picture. A line joins a size and its double only: where
a size was not measured, the line has a gap. The name stands where the line's longest part begins.
Warm colours are for hex-ssl and cool ones for other code. HEX is dark and broad, InfoNCE light and
narrow, so that both are seen where they coincide. The colours are Okabe and Ito's, which
colour-blind people can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import peers

BROAD, NARROW = {"linewidth": 3.4, "markersize": 7}, {"linewidth": 1.6, "markersize": 4}
OUR_HEX = {"color": "#D55E00", "marker": "o", **BROAD}
OUR_INFO_NCE = {"color": "#E69F00", "marker": "o", **NARROW}
OTHER_HEX = {"color": "#0072B2", "marker": "s", **BROAD}
OTHER_INFO_NCE = {"color": "#56B4E9", "marker": "s", **NARROW}
STYLES = {  # name on the picture, look, kind of line; what stands later is drawn above
    peers.PLAIN_HEX.name: ("HEX, PyTorch", OTHER_HEX, "-"),
    peers.COMPILED_HEX.name: ("HEX, torch.compile", OTHER_HEX, "--"),
    peers.AUTHORS.name: ("HEX, authors' form", OTHER_HEX, ":"),
    peers.PLAIN_INFO_NCE.name: ("InfoNCE, PyTorch", OTHER_INFO_NCE, "-"),
    peers.LIGHTLY.name: ("InfoNCE, lightly", OTHER_INFO_NCE, "--"),
    peers.INF_CL.name: ("InfoNCE, Inf-CL", OTHER_INFO_NCE, ":"),
    peers.AUTOCAST.name: ("InfoNCE, autocast", OTHER_INFO_NCE, "-."),
    peers.HEX.name: ("HEXLoss", OUR_HEX, "-"),
    peers.INFO_NCE.name: ("InfoNCELoss", OUR_INFO_NCE, "-"),
}
METHODS = [name + suffix for name in STYLES for suffix in ("", peers.CAPTURED)]
LINE = 0.09  # height of a name, as a share of its panel's


class Panel(NamedTuple):
    title: str
    value: Callable[[pd.DataFrame], pd.Series]
    suffix: str = ""  # of the names of the methods that it shows
    note: str = ""  # beside the last point of HEXLoss


def _time(points: pd.DataFrame) -> pd.Series:
    return points["ms"]


def _time_of_a_pair(points: pd.DataFrame) -> pd.Series:
    return 1e6 * points["ms"] / points["rows"] ** 2


def _memory(points: pd.DataFrame) -> pd.Series:
    return points["peak_mb"]


CPU = (
    Panel(
        "CPU time for each pair of rows (time of a call / N²), ns", _time_of_a_pair,
        note="with 65536 rows the cosines are\ntoo many to keep and are made again",
    ),
    Panel(
        "Memory at the peak, MB", _memory,
        note="with 65536 rows the cosines are\ntoo many to keep",
    ),
)  # fmt: skip
GPU = (
    Panel("Time of a call, ms", _time),
    Panel("Time of a call in a CUDA graph, ms", _time, peers.CAPTURED),
    Panel("Memory at the peak, MB", _memory),
)


def draw(points: pd.DataFrame, panels: Sequence[Panel], about: str) -> Any:
    """One panel below the other, over the rows. `points` has a line for each method and size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3 * len(panels) + 0.9), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True)
    ticks = sorted(set(points["rows"]))
    for axes, panel in zip(grid, panels, strict=True):
        curves(axes, points, panel)
        axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold")
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_xticks([], minor=True)
    grid[-1].set_xlabel("rows N = 2B", fontsize=11)
    figure.suptitle(about, fontsize=10, color="#444444", x=0.01, ha="left")
    return figure


def curves(axes: Any, points: pd.DataFrame, panel: Panel) -> None:
    """A line and a name for each method."""
    from matplotlib.ticker import LogLocator, NullFormatter

    first, last = points["rows"].min(), points["rows"].max()
    doubles = (first << k for k in range(int(math.log2(last / first)) + 1))
    sizes = sorted({*points["rows"], *doubles})
    begins = {}
    for method, (name, look, line) in STYLES.items():
        mine = points[points["method"] == method + panel.suffix].set_index("rows", drop=False)
        values = panel.value(mine).reindex(sizes)
        there = values.dropna()
        if there.empty:
            continue
        axes.plot(sizes, values, line, label=name, **look)
        part = values.isna().cumsum()[there.index]  # the same number from gap to gap
        x = part.index[part == part.mode()[0]][0]
        begins[name] = x, there[x], look["color"]
        if panel.note and method == peers.HEX.name:
            axes.annotate(
                panel.note, (there.index[-1], there.iloc[-1]), xytext=(-10, 0), fontsize=10.5,
                textcoords="offset points", ha="right", va="center",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", ymargin=0.1)
    left = min(x for x, _, _ in begins.values()) / 3.6  # of the names
    axes.set_xlim(min(first / 1.15, left), last * 1.15)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    heights = spread([math.log(y / low, high / low) for _, y, _ in begins.values()], LINE)
    for height, (name, (x, y, colour)) in zip(heights, begins.items(), strict=True):
        axes.annotate(
            name, (x, y), xytext=(x / 1.28, height), textcoords=axes.get_xaxis_transform(),
            fontsize=11, ha="right", va="center", arrowprops={
                "arrowstyle": "-", "color": colour, "relpos": (1, 0.5), "shrinkA": 2, "shrinkB": 3,
            },
        )  # fmt: skip
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high < 50 * low else (1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=11)
    axes.grid(which="major", color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """The heights in their order, each that is too near to a lower one raised. Of equal ones the
    first comes to the top."""
    raised: dict[int, float] = {}
    least = -math.inf
    for k in sorted(reversed(range(len(heights))), key=heights.__getitem__):
        raised[k] = max(heights[k], least)
        least = raised[k] + apart
    return [raised[k] for k in range(len(heights))]
