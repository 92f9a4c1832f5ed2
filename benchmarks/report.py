# SPDX-License-Identifier: MIT
"""Results as they are shown: tables and pictures, of a CPU here, of a GPU in gpu_report.py.

results.jsonl has a line a run of a part, the newest last; of each part the last one counts. Nothing
that stands in a document between <!-- NAME --> and <!-- end --> is typed by hand.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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
PRODUCT, MM, EMPTY = "tile product", "torch.mm", "empty autograd.Function"

Record = Mapping[str, Any]
Tables = dict[str, pd.DataFrame]  # of texts, by title


def form(pattern: str) -> Callable[[Any], str]:
    """Writes a number as the pattern says, and nothing for what is not there."""
    return lambda value: "" if pd.isna(value) else pattern.format(value)


def number(value: Any) -> str:
    """Three digits or so; nothing for what is not there."""
    if pd.isna(value):
        return ""
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


ratio, percent, hundredths = form("{:.1f}x"), form("{:.0%}"), form("{:.2f}x")


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


def timed(results: pd.DataFrame, heap: str = "retained") -> pd.DataFrame:
    """Those of methods with a heap, not of the products beside them."""
    return results[~results["method"].isin([PRODUCT, MM]) & (results["heap"] == heap)]


# ---- the tables of each part ---------------------------------------------------------------------


def by_case(
    results: pd.DataFrame, peaks: Sequence[str] = (HEX, PLAIN_HEX), first: bool = False
) -> pd.DataFrame:
    """Milliseconds; below, how many times as long one takes as another, peaks of memory, and if
    wanted HEXLoss beside that of the first case."""
    times = pivot(results, "median")
    cells = times.map(number)
    for slow, fast in RATIOS:
        if {slow, fast} <= {*times.index}:
            cells.loc[f"{slow} / {fast}"] = (times.loc[slow] / times.loc[fast]).map(ratio)
    for method in times.index.intersection(peaks):
        cells.loc[f"peak MB, {method}"] = pivot(results, "peak_mb").loc[method].map(number)
    if first and HEX in times.index:
        beside = times.loc[HEX] / times.loc[HEX].iloc[0]
        cells.loc[f"{HEX} / that of {times.columns[0]}"] = beside.map(hundredths)
    return cells


def sizes(results: pd.DataFrame) -> Tables:
    title = "float32, rows N = 2B, D = 128 where the column does not say otherwise"
    stock = timed(results, "stock")
    peaks, one = pivot(stock, "peak_mb"), stock.drop_duplicates("case").set_index("case")
    if HEX in peaks.index:
        beyond = peaks.loc[HEX] - 4 * one.rows * one.features / 1e6
        peaks.loc[f"{HEX} beyond its results"] = beyond
    return {
        f"Milliseconds, retained heap: {title}": by_case(timed(results), ()),
        f"Milliseconds, stock heap: {title}": by_case(stock, ()),
        f"Memory at the peak, MB: {title}": peaks.map(number),
    }


def data(results: pd.DataFrame) -> Tables:
    cells = by_case(results, (), first=True)
    return {f"Batches that are hard, {results.rows[0]} rows, milliseconds": cells}


def types(results: pd.DataFrame) -> Tables:
    return {f"Dtypes, {results.rows[0]} rows, milliseconds": by_case(results, first=True)}


def shapes(results: pd.DataFrame) -> Tables:
    one = results.drop_duplicates("case").itertuples()
    names = [f"{r.case}, {r.rows} x {r.candidates}" for r in one]
    title = "Not square: anchors x candidates, milliseconds"
    return {title: by_case(results).set_axis(names, axis=1)}


def threads(results: pd.DataFrame) -> Tables:
    lines = {}
    for method, mine in results.groupby("method", sort=False):
        times = mine.pivot(index="threads", columns="case", values="best")
        one, *more = times.index
        lines |= {f"{method}, threads: {n}": times.loc[n].map(number) for n in times.index}
        for n in more:
            gain = times.loc[one] / times.loc[n]
            lines[f"{method}, times as fast with {n}"] = gain.map(hundredths)
    return {"Threads, by rows": pd.DataFrame(lines).T[results.case.unique()].fillna("")}


def small(results: pd.DataFrame) -> Tables:
    times = 1e3 * results.set_index("method")["median"]
    cells = pd.DataFrame(
        {"a call": times, "beyond the empty function": times - times.get(EMPTY, np.nan)}
    )
    return {"64 rows, microseconds": cells.map(number)}


def large(results: pd.DataFrame) -> Tables:
    results = results.set_index(results["rows"].map("{} rows".format))
    cells = pd.DataFrame({
        "s of CPU time": results["median"] / 1e3,
        "ns a pair of rows": 1e6 * results["median"] / results["rows"] ** 2,
        "peak MB": results["peak_mb"],
    })  # fmt: skip
    return {"Many rows, D = 128, stock heap": cells.map(number)}


def isa(results: pd.DataFrame) -> Tables:
    tables = {}
    for level, mine in results.groupby("isa", sort=False):
        cells = by_case(timed(mine), ())
        cells.loc["share of the ideal"] = share(mine).reindex([HEX]).loc[HEX].map(percent)
        tables[f"HEX_ISA={level}, by rows, milliseconds; {rates(mine)}"] = cells
    return tables


def labels(results: pd.DataFrame) -> Tables:
    cells = results.set_index("method")[["median", "peak_mb"]].map(number)
    cells.columns = ["ms", "peak MB"]
    return {case: cells[(results.case == case).values] for case in results.case.unique()}


PARTS = {
    part.__name__: part
    for part in (sizes, data, types, shapes, threads, small, large, isa, labels)
}  # fmt: skip

# ---- the ideal and the goals ---------------------------------------------------------------------


def rate(results: pd.DataFrame, product: str) -> float:
    """Of a product, GF/s: the most of all samples of the run, for it is a peak that is asked for,
    and a neighbour on the same core takes a fifth of it for seconds."""
    found = results[results["method"] == product]
    return (found["flop"] / found["best"] / 1e6).max()  # NaN of none


def rates(results: pd.DataFrame) -> str:
    own, mm = (number(rate(results, product)) for product in (PRODUCT, MM))
    return f"in cache hex's own product reached {own} GF/s and torch.mm {mm} GF/s"


def own_rate(results: pd.DataFrame, value: str = "median") -> pd.DataFrame:
    """Of a symmetric loss at 4 N^2 D operations, in GF/s: N^2 D for half the cosines of all pairs
    of rows, the same again in the backward, and 2 N^2 D for their pull on both rows."""
    mine = timed(results)
    flop = 4.0 * mine["rows"] ** 2 * mine["features"]
    return pivot(mine.assign(rate=flop / mine[value] / 1e6), "rate")


def share(results: pd.DataFrame, value: str = "median") -> pd.DataFrame:
    """Of the ideal, which is the rate of the core's own product in cache, in the same run."""
    return own_rate(results, value) / rate(results[results.heap == "retained"], PRODUCT)


def ideal(results: pd.DataFrame) -> str:
    times, shares = pivot(timed(results), "median"), share(results)
    cells = shares.loc[[HEX, GIVEN, INFO_NCE]].map(percent)
    cells.loc[f"{HEX}, best sample"] = share(results, "best").loc[HEX].map(percent)
    cells.loc[f"{HEX}, GF/s"] = own_rate(results).loc[HEX].map(number)
    for slow in SPEED:
        faster = times.loc[slow] / times.loc[HEX] / shares.loc[HEX]
        cells.loc[f"{slow} / {HEX} at the ideal"] = faster.map(ratio)
    title = f"Share of the ideal, retained heap; {rates(results[results.heap == 'retained'])}"
    return markdown(title, cells)


GOAL_SIZES = ("512", "1024", "2048", "4096", "8192", "4096x512")
SPEED = {  # how many times as fast as these HEXLoss is to be, retained heap, by size
    PLAIN_HEX: (7, 7, 9, 10, 10, 8),
    COMPILED_HEX: (5, 6, 7, 8, 8, 5),
    PLAIN_INFO_NCE: (3, 3.3, 3.8, 4.2, 4.2, 4),
}
SHARE = (0.55, 0.68, 0.75, 0.82, 0.84, 0.80)  # of the ideal, by size
THREADS = {"512": 1.5, "4096": 1.85, "8192": 1.85}  # times as fast in two threads
Goal = tuple[bool, str, str, str]  # whether it is met, about what, what was measured, and wanted


def least(about: str, got: float, wanted: float, text: str = "{:.3g}x") -> Goal:
    return got >= wanted, about, text.format(got), f"at least {text.format(wanted)}"


def most(about: str, got: float, wanted: float, text: str = "{:.3g}x") -> Goal:
    return got <= wanted, about, text.format(got), f"at most {text.format(wanted)}"


def goals(parts: Mapping[str, pd.DataFrame]) -> Iterator[Goal]:
    """Ratios of figures of one run, never times, set on a CPU with AVX-512."""
    times, shares = pivot(timed(parts["sizes"]), "median"), share(parts["sizes"]).loc[HEX]
    for slow, wanted in SPEED.items():
        for size, goal in zip(GOAL_SIZES, wanted, strict=True):
            yield least(f"{slow} / {HEX} at {size}", times[size][slow] / times[size][HEX], goal)
    for size, goal in zip(GOAL_SIZES, SHARE, strict=True):
        yield least(f"share of the ideal at {size}", shares[size], goal, "{:.0%}")
    for r in timed(parts["sizes"], "stock").query("method == @HEX and rows >= 4096").itertuples():
        # 8 % of an N x N matrix and what is O(N D)
        goal = (0.08 * 4 * r.rows**2 + 24 * r.rows * r.features) / 1e6
        got = r.peak_mb - 4 * r.rows * r.features / 1e6
        yield most(f"memory beyond the results at {r.case}", got, goal, "{:.1f} MB")
    data, types, shapes = (pivot(parts[part], "median") for part in ("data", "types", "shapes"))
    ours, wide = types.loc[HEX], types["float64"]
    for kind in data.columns[1:]:
        yield most(f"{kind} batch / ordinary one", data[kind][HEX] / data.loc[HEX].iloc[0], 1.25)
    for name in ("bfloat16", "float16"):  # no slower, but for what the clock is good for
        yield most(f"{name} / float32", ours[name] / ours["float32"], 1.03)
    yield least(f"{PLAIN_HEX} / {HEX} in float64", wide[PLAIN_HEX] / wide[HEX], 5)
    for case, of in shapes.items():
        yield least(f"{PLAIN_INFO_NCE} / {HEX}, {case}", of[PLAIN_INFO_NCE] / of[HEX], 3)
    best = parts["threads"].query("method == @HEX").set_index(["threads", "case"])["best"]
    for size, goal in THREADS.items():
        yield least(f"two threads at {size}", best[1, size] / best[2, size], goal)
    dots = parts["isa"].query("isa == 'avx512_bf16' and method == @HEX").set_index("case")["median"]
    if len(dots):
        about = "float32 / bfloat16 at HEX_ISA=avx512_bf16"
        yield least(about, dots["4096"] / dots["4096 bfloat16"], 1.4)
    few, many = parts["large"].itertuples()
    yield most(f"memory of {many.rows} rows", many.peak_mb, 200, "{:.0f} MB")
    slower = (many.median / many.rows**2) / (few.median / few.rows**2)
    yield most(f"time a pair at {many.rows} rows / at {few.rows}", slower, 1.2)


def missed(parts: Mapping[str, pd.DataFrame]) -> str:
    found = pd.DataFrame(goals(parts), columns=["met", "about", "measured", "goal"])
    title = f"{found.met.sum()} of {len(found)} goals are met; these are not"
    return markdown(title, found[~found.met].set_index("about")[["measured", "goal"]])


# ---- documents -----------------------------------------------------------------------------------


def of_part(record: Record) -> str:
    """The tables of a part, and what they are of."""
    found = PARTS[record["part"]](results_of(record)) if record["results"] else {}
    m, load = record["machine"], record["load"]
    level = "" if record["part"] == "isa" else f", HEX_ISA {m['hex_isa']}"
    source = (
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB; torch {m['torch']} "
        f"({m['torch_simd']}), hex {m['hex']} at {m['commit']}{level}; {record['utc']} UTC, "
        f"{record['seconds']:.0f} s, load {load[0]} to {load[1]}."
    )
    notes = [f"{note}." for note in record["notes"]]
    return "\n\n".join([*(markdown(*table) for table in found.items()), *notes, source])


def summary(sizes: pd.DataFrame) -> str:
    """The README's."""
    stock, retained = (pivot(timed(sizes, heap), "median") for heap in ("stock", "retained"))
    shown = {
        HEX: "`HEXLoss`, adaptive", PLAIN_HEX: "HEX in plain PyTorch",
        INFO_NCE: "`InfoNCELoss`", PLAIN_INFO_NCE: "InfoNCE in plain PyTorch",
    }  # fmt: skip
    cells = stock.map(number) + " / " + retained.map(number)
    cells = cells.loc[[*shown], ["512", "1024", "4096", "8192"]]
    peaks = pivot(timed(sizes, "stock"), "peak_mb")["4096"]
    cells["peak MB at 4096"] = peaks.map(number)
    return markdown("", cells.rename(index=shown), "rows 2B")


def latest(file: Path = RESULTS) -> dict[str, Record]:
    """The last record of each part that is no rehearsal."""
    records = map(json.loads, file.read_text().splitlines())
    found = [r for r in records if not r.get("on", "").endswith("a rehearsal")]
    return {r["part"]: r for r in found if r.get("part") in PARTS}


def blocks(records: Mapping[str, Record]) -> dict[str, str]:
    """What stands in the documents, by name."""
    parts = {name: results_of(record) for name, record in records.items()}
    return {name: of_part(record) for name, record in records.items()} | {
        "ideal": ideal(parts["sizes"]), "goals": missed(parts), "summary": summary(parts["sizes"]),
    }  # fmt: skip


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
    found = timed(results, "stock")[[*keys, "peak_mb"]].merge(timed(results)[[*keys, "median"]])
    large = results_of(records["large"]).iloc[1:]
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
