# SPDX-License-Identifier: MIT
"""Results as they are shown: tables and pictures, of a CPU here, of a GPU in gpu_report.py.

results.jsonl has a line a run of a part, the newest last; of each part the last one counts. Nothing
that stands in a document between <!-- NAME --> and <!-- end --> is typed by hand.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results.jsonl")
DOCUMENTS = (ROOT / "docs" / "performance.md", ROOT / "README.md")
PICTURE = ROOT / "docs" / "images" / "performance.png"

HEX, GIVEN, INFO_NCE = (method.name for method in peers.OURS)
PLAIN_HEX, PLAIN_INFO_NCE = peers.PLAIN_HEX.name, peers.PLAIN_INFO_NCE.name
COMPILED_HEX = peers.COMPILED_HEX.name
RATIOS = ((PLAIN_HEX, HEX), (COMPILED_HEX, HEX), (PLAIN_INFO_NCE, HEX), (PLAIN_INFO_NCE, INFO_NCE))
SHOWN = [method.name for method in peers.METHODS]  # older records have others too
PARTS = ("sizes", "data", "types", "shapes", "threads", "small", "large", "isa", "labels")
WITH_MEMORY = ("sizes", "types", "shapes", "large")  # a table of it

Record = Mapping[str, Any]
Tables = dict[str, pd.DataFrame]  # of texts, by title


def number(value: Any) -> str:
    """Three digits or so; nothing for what is not there."""
    if pd.isna(value):
        return ""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def markdown(title: str, cells: pd.DataFrame, corner: str = "") -> str:
    columns = [re.sub(r"(\d)x(\d)", r"\1 x \2", column) for column in cells.columns]
    lines = [[corner, *columns], ["---", *["---:"] * cells.shape[1]]]
    lines += [[name, *row] for name, row in zip(cells.index, cells.values, strict=True)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{title}**\n\n{table}" if title else table


def pivot(results: pd.DataFrame, value: str) -> pd.DataFrame:
    """A line a method and a column a case, in the order in which they come."""
    found = results.pivot(index="method", columns="case", values=value)
    return found.reindex(index=results.method.unique(), columns=results.case.unique())


def results_of(record: Record) -> pd.DataFrame:
    """A line a result, with the median and the least of its samples."""
    found = pd.DataFrame(record["results"])
    found["median"], found["best"] = found["ms"].map(np.median), found["ms"].map(min)
    return found


def of_heap(results: pd.DataFrame, heap: str) -> pd.DataFrame:
    return results[results["method"].isin(SHOWN) & (results["heap"] == heap)]


# ---- the tables of each part ---------------------------------------------------------------------


def by_case(part: str, results: pd.DataFrame) -> Tables:
    """Milliseconds by heap or instruction set, and how many times as long one method takes as
    another; and the peaks of memory."""
    results = results[results["method"].isin(SHOWN)]
    tables = {}
    kind, title = ("isa", "HEX_ISA={}") if part == "isa" else ("heap", "{} heap")
    for name, mine in results.groupby(kind):
        times = pivot(mine, "median")
        cells = times.map(number)
        for slow, fast in RATIOS:
            if {slow, fast} <= {*times.index}:
                cells.loc[f"{slow} / {fast}"] = [
                    "" if np.isnan(x) else f"{x:.1f}x" for x in times.loc[slow] / times.loc[fast]
                ]
        tables[f"Milliseconds, {title.format(name)}"] = cells
    if part in WITH_MEMORY:
        memory = pivot(of_heap(results, results.heap.iloc[0]), "peak_mb")
        tables["Memory at the peak, MB"] = memory.map(number)
    return tables


def threads(results: pd.DataFrame) -> Tables:
    times = results.pivot_table("best", ["method", "threads"], "case", sort=False)
    cells = times.map(number)
    cells.index = [f"{method}, threads: {n}" for method, n in times.index]
    return {"Milliseconds, retained heap": cells}


def labels(results: pd.DataFrame) -> Tables:
    cells = results.set_index("method")[["median", "peak_mb"]].map(number)
    cells.columns = ["ms", "peak MB"]
    return {case: cells[(results.case == case).values] for case in results.case.unique()}


def of_part(record: Record) -> str:
    """The tables of a part, and what they are of."""
    part, m, load = record["part"], record["machine"], record["load"]
    found: Tables = {}
    if record["results"]:
        results, special = results_of(record), {"threads": threads, "labels": labels}
        found = special[part](results) if part in special else by_case(part, results)
    level = "" if part == "isa" else f", HEX_ISA {m['hex_isa']}"
    source = (
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB; torch {m['torch']} "
        f"({m['torch_simd']}), hex {m['hex']} at {m['commit']}{level}; {record['utc']} UTC, "
        f"{record['seconds']:.0f} s, load {load[0]} to {load[1]}."
    )
    notes = [f"{note}." for note in record["notes"]]
    return "\n\n".join([*(markdown(*table) for table in found.items()), *notes, source])


def summary(sizes: pd.DataFrame) -> str:
    """The README's."""
    stock, retained = (pivot(of_heap(sizes, heap), "median") for heap in ("stock", "retained"))
    shown = {
        HEX: "`HEXLoss`, adaptive", PLAIN_HEX: "HEX in plain PyTorch",
        INFO_NCE: "`InfoNCELoss`", PLAIN_INFO_NCE: "InfoNCE in plain PyTorch",
    }  # fmt: skip
    cells = stock.map(number) + " / " + retained.map(number)
    cells = cells.loc[[*shown], ["512", "1024", "4096", "8192"]]
    peaks = pivot(of_heap(sizes, "stock"), "peak_mb")["4096"]
    cells["peak MB at 4096"] = peaks.map(number)
    return markdown("", cells.rename(index=shown), "rows 2B")


# ---- documents -----------------------------------------------------------------------------------


def latest(file: Path = RESULTS) -> dict[str, Record]:
    """The last record of each part that is no rehearsal."""
    records = map(json.loads, file.read_text().splitlines())
    found = [r for r in records if not r.get("on", "").endswith("a rehearsal")]
    return {r["part"]: r for r in found if r.get("part") in PARTS}


def blocks(records: Mapping[str, Record]) -> dict[str, str]:
    """What stands in the documents, by name."""
    of_parts = {name: of_part(record) for name, record in records.items()}
    return of_parts | {"summary": summary(results_of(records["sizes"]))}


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """A document with what stands between <!-- NAME --> and <!-- end --> made anew."""
    return re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end -->",
        lambda found: f"<!-- {found[1]} -->\n{blocks[found[1]]}\n<!-- end -->",
        text,
        flags=re.DOTALL,
    )


def write() -> None:
    records = latest()
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(), blocks(records)))
    m = records["sizes"]["machine"]
    about = (
        f"{m['cpu']}, HEX_ISA {m['hex_isa']}, torch {m['torch']}; float32, D = 128, one thread; "
        "time with a retained heap, memory with the stock one"
    )
    draw(points(records), STYLES, about, PICTURE)


# ---- the picture ---------------------------------------------------------------------------------

STYLES = {  # label, colour, line; ours strong, and above the others
    peers.LIGHTLY.name: ("InfoNCE, lightly", "#7a8fa6", "--"),
    PLAIN_INFO_NCE: ("InfoNCE, PyTorch", "#7a8fa6", "-"),
    COMPILED_HEX: ("HEX, torch.compile", "#2b4c7e", "--"),
    PLAIN_HEX: ("HEX, PyTorch", "#2b4c7e", "-"),
    INFO_NCE: ("InfoNCELoss", "#e08a3c", "-"),
    HEX: ("HEXLoss", "#c4342d", "-"),
}


def points(records: Mapping[str, Record]) -> pd.DataFrame:
    """ms with a retained heap, MB with the stock one; D = 128."""
    results = results_of(records["sizes"]).query("features == 128 and method in @STYLES")
    keys = ["method", "rows"]
    stock, retained = of_heap(results, "stock"), of_heap(results, "retained")
    found = stock[[*keys, "peak_mb"]].merge(retained[[*keys, "median"]])
    large = results_of(records["large"]).query("rows > 8192")
    found = pd.concat([found, large], join="inner", ignore_index=True)
    return found.rename(columns={"median": "ms", "peak_mb": "mb"})


def draw(points: pd.DataFrame, styles: Mapping[str, Sequence[Any]], about: str, file: Path) -> None:
    """Time and memory by rows, on a panel each.

    points: method, rows, ms, mb. styles: by method its label, colour and line, those to be seen
    best last. A sum in the picture tells a test what was drawn (`checksum`).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    ticks = sorted(set(points["rows"]))
    titles = {"ms": "A call, forward and backward, ms", "mb": "Memory at the peak, MB"}
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        for method, (label, colour, line) in styles.items():
            mine = points[points["method"] == method].sort_values("rows")
            if len(mine):
                panel.plot(mine["rows"], mine[column], line, color=colour, label=label, marker=".")
        panel.set(xscale="log", yscale="log", xlabel="rows N = 2B")
        panel.set_xticks(ticks, [str(n) for n in ticks], rotation=35, fontsize=8)
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
        panel.grid(which="major", color="#e4e4e4", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(about, fontsize=8.5, color="#555555", x=0.01, ha="left")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Figures": checksum(points), "Software": "hex-ssl"})
    pyplot.close(figure)


def checksum(points: pd.DataFrame) -> str:
    return hashlib.sha256(points.to_json().encode()).hexdigest()
