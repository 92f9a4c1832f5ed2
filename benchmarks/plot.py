# SPDX-License-Identifier: MIT
"""Draws time and memory by rows from the records. What was drawn is told by a sum in the picture,
so that a test can see whether it is what the records have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from goals import Figures, Record
from peers import COMPILED_HEX, HEX, INFO_NCE, PLAIN_HEX, PLAIN_INFO_NCE

Points = list[tuple[int, float, float]]  # rows, ms, peak MB

# Label, colour, line; ours strong.
STYLES = {
    HEX.name: ("HEXLoss", "#c4342d", "-"),
    INFO_NCE.name: ("InfoNCELoss", "#e08a3c", "-"),
    PLAIN_HEX.name: ("HEX, PyTorch", "#2b4c7e", "-"),
    COMPILED_HEX.name: ("HEX, torch.compile", "#2b4c7e", "--"),
    PLAIN_INFO_NCE.name: ("InfoNCE, PyTorch", "#7a8fa6", "-"),
    "lightly NTXentLoss": ("InfoNCE, lightly", "#7a8fa6", "--"),
}


def points(records: Mapping[str, Record]) -> dict[str, Points]:
    """Of each method, D = 128: time with a retained heap, memory with the stock one."""
    sizes = Figures(records["sizes"])
    found: dict[str, Points] = {}
    for name in STYLES:
        found[name] = []
        for case in sizes.cases:
            stock = sizes.find(case, name, heap="stock")
            ms = sizes.ms(case, name, heap="retained")
            if stock and ms and stock["features"] == 128:
                found[name].append((stock["rows"], ms, stock["peak_mb"]))
    for result in records["large"]["results"][1:]:
        found[result["method"]].append((result["rows"], result["ms"][0], result["peak_mb"]))
    return {name: sorted(row) for name, row in found.items() if row}


def checksum(records: Mapping[str, Record]) -> str:
    return hashlib.sha256(json.dumps([points(records), STYLES]).encode()).hexdigest()


def draw(records: Mapping[str, Record], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    drawn = points(records)
    machine = records["sizes"]["machine"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    ticks = sorted({n for row in drawn.values() for n, *_ in row})
    for axis, column, title in zip(
        axes, (1, 2), ("CPU time a call, forward and backward", "Memory at the peak"), strict=True
    ):
        ends = []
        for name, row in drawn.items():
            label, colour, line = STYLES[name]
            x, y = [point[0] for point in row], [point[column] for point in row]
            axis.plot(x, y, line, color=colour, marker="o", markersize=3.5, linewidth=1.8)
            ends.append((y[-1], x[-1], label, colour))
        axis.set(xscale="log", yscale="log", xlim=(ticks[0] / 1.15, ticks[-1] * 1.3))
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axis.set_xlabel("rows N = 2B")
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="x", labelrotation=35, labelsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.grid(which="major", color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        write = text_of_time if column == 1 else text_of_memory
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _, write=write: write(y)))
    handles = [
        plt.Line2D([], [], color=colour, linestyle=line, marker="o", markersize=3.5, label=label)
        for label, colour, line in (STYLES[name] for name in drawn)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
                  fontsize=9)  # fmt: skip
    figure.suptitle(
        f"float32, D = 128, one thread; {machine['cpu']}, HEX_ISA {machine['hex_isa']}, torch "
        f"{machine['torch']}; time with a retained heap, memory with the stock one",
        fontsize=8.5, color="#555555", x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(file, dpi=150, metadata={"Figures": checksum(records), "Software": "hex-ssl"})
    plt.close(figure)


def text_of_time(ms: float) -> str:
    return f"{ms / 1e3:g} s" if ms >= 1e3 else f"{ms:g} ms"


def text_of_memory(mb: float) -> str:
    return f"{mb / 1e3:g} GB" if mb >= 1e3 else f"{mb:g} MB"
