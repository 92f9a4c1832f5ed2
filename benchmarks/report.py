# SPDX-License-Identifier: MIT
"""Results of bench.py as they are shown: tables on the terminal and in the documents, a picture.

results.jsonl has a line a run of a part, the newest last; of each part the last one counts. Nothing
that stands in a document between <!-- NAME --> and <!-- end --> is typed by hand.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import peers
from tables import Table, draw, fill, form, number, pivot

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results.jsonl")
DOCUMENTS = (ROOT / "docs" / "performance.md", ROOT / "README.md")
PICTURE = ROOT / "docs" / "images" / "performance.png"

HEX, GIVEN, INFO_NCE, PLAIN_HEX, COMPILED_HEX, PLAIN_INFO_NCE = (
    method.name
    for method in (peers.HEX, peers.GIVEN, peers.INFO_NCE, peers.PLAIN_HEX, peers.COMPILED_HEX,
                   peers.PLAIN_INFO_NCE)
)  # fmt: skip
PRODUCT, MM, EMPTY, BF16 = "tile product", "torch.mm", "empty autograd.Function", "4096 bfloat16"
RATIOS = ((PLAIN_HEX, HEX), (COMPILED_HEX, HEX), (PLAIN_INFO_NCE, HEX), (PLAIN_INFO_NCE, INFO_NCE))

CLOCK = (
    "Milliseconds of the process's CPU time for one call, forward and backward, on one thread; the "
    "median of turns that the methods take with each other."
)
RETAINED = (
    "Retained heap: the process keeps the memory that it frees, as other allocators do, and as "
    "glibc does with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776 "
    "MALLOC_TOP_PAD_=67108864 in the environment. The methods with N x N matrices are at their "
    "best here, so these are the ratios to quote."
)
STOCK = (
    "Stock heap: as in any run of Python. glibc takes fresh pages for every request of 32 MiB or "
    "more, which an N x N matrix in float32 is from N = 2897 on. This costs the methods that have "
    "such matrices much and hex nothing, so it flatters hex."
)

Record = Mapping[str, Any]
ratio, percent, hundredths = form("{:.1f}x"), form("{:.0%}"), form("{:.2f}x")


def results_of(record: Record) -> pd.DataFrame:
    """A line a result, with the median and the least of its samples."""
    results = pd.DataFrame(record["results"])
    if "ms" in results:
        results["median"] = results["ms"].map(statistics.median)
        results["best"] = results["ms"].map(min)
    return results


def timed(results: pd.DataFrame) -> pd.DataFrame:
    """Those of methods, not of the products beside them."""
    return results[~results["method"].isin([PRODUCT, MM])]


def with_ratios(times: pd.DataFrame, pairs: Sequence[tuple[str, str]] = RATIOS) -> pd.DataFrame:
    """The times as texts; below, how many times as long the first takes as the second."""
    cells = times.map(number)
    for slow, fast in pairs:
        if {slow, fast} <= {*times.index}:
            cells.loc[f"{slow} / {fast}"] = (times.loc[slow] / times.loc[fast]).map(ratio)
    return cells


# ---- the tables of each part ---------------------------------------------------------------------


def sizes(results: pd.DataFrame) -> list[Table]:
    results = timed(results)
    stock = results[results.heap == "stock"]
    title = "float32, rows N = 2B, D = 128 where the column does not say otherwise"
    peaks = pivot(stock, "peak_mb")
    if HEX in peaks.index:
        first = stock.drop_duplicates("case").set_index("case")
        beyond = peaks.loc[HEX] - 4 * first.rows * first.features / 1e6
        peaks.loc[f"{HEX} beyond its results"] = beyond
    tables = []
    for heap, notes in (("retained", [CLOCK, RETAINED]), ("stock", [STOCK])):
        times = pivot(results[results.heap == heap], "median")
        tables.append(Table(f"Milliseconds, {heap} heap: {title}", with_ratios(times), notes))
    note = (
        "The most that the process holds during a call above what it held before, on the stock "
        "heap. The results of HEXLoss are the gradients of both views."
    )
    tables.append(Table(f"Memory at the peak, MB: {title}", peaks.map(number), [note]))
    for table in tables:
        table.cells.columns = [case.replace("x", " x ") for case in table.cells.columns]
    return tables


def data(results: pd.DataFrame) -> list[Table]:
    times = pivot(results, "median")
    cells = with_ratios(times)
    slower = times.loc[HEX] / times.loc[HEX].iloc[0]
    cells.loc[f"{HEX} / that of clusters"] = slower.map(hundredths)
    note = (
        "clusters is the ordinary batch, of 64 classes. tight has 4 classes with cosines of about "
        "0.99 inside. In half collapsed every second image lies in one direction, in collapsed all "
        "of them do. In tenth one image in ten is of one class with cosines of about 0.99. "
        "Retained heap."
    )
    return [Table(f"Batches that are hard, {results.rows[0]} rows, milliseconds", cells, [note])]


def with_peaks(results: pd.DataFrame) -> pd.DataFrame:
    cells = with_ratios(pivot(results, "median"))
    peaks = pivot(results, "peak_mb")
    for method in (HEX, PLAIN_HEX):
        cells.loc[f"peak MB, {method}"] = peaks.loc[method].map(number)
    return cells


def types(results: pd.DataFrame) -> list[Table]:
    cells, times = with_peaks(results), pivot(results, "median").loc[HEX]
    cells.loc[f"{HEX} / that of float32"] = (times / times["float32"]).map(hundredths)
    note = "Plain PyTorch widens half precision to float32, as hex does inside. Retained heap."
    return [Table(f"Dtypes, {results.rows[0]} rows, milliseconds", cells, [note])]


def shapes(results: pd.DataFrame) -> list[Table]:
    cells, first = with_peaks(results), results.drop_duplicates("case")
    cells.columns = [f"{r.case}, {r.rows} x {r.candidates}" for r in first.itertuples()]
    note = (
        'query is mode="query", cross is mode="cross", and queue has shared negatives as MoCo has. '
        "Retained heap."
    )
    return [Table("Not square: anchors x candidates, milliseconds", cells, [note])]


def threads(results: pd.DataFrame) -> list[Table]:
    cells = pd.DataFrame(columns=results["case"].unique())
    for method, mine in results.groupby("method", sort=False):
        times = pivot(mine.assign(method=mine.threads), "best")  # a line a number of threads
        times = times.reindex(columns=cells.columns)
        for count in times.index:
            cells.loc[f"{method}, threads: {count}"] = times.loc[count].map(number)
        for count in times.index[1:]:
            gain = times.loc[times.index[0]] / times.loc[count]
            cells.loc[f"{method}, times as fast with {count}"] = gain.map(hundredths)
    note = (
        "Milliseconds of the wall clock for one call, the best of the samples, because the others "
        "have other processes of the machine in them. The results are the same bits for any number "
        "of threads."
    )
    return [Table("Threads, by rows", cells, [note])]


def small(results: pd.DataFrame) -> list[Table]:
    times = 1e3 * results.set_index("method")["median"]
    cells = {"a call": times, "beyond the empty function": times - times[EMPTY]}
    note = (
        "CPU time of a call, forward and backward, with 2B = 64 and D = 128. The empty function "
        "keeps its inputs and returns empty tensors, which is what autograd and Python cost."
    )
    return [Table("64 rows, microseconds", pd.DataFrame(cells).map(number), [note])]


def large(results: pd.DataFrame) -> list[Table]:
    cells = pd.DataFrame({
        "s of CPU time": results["median"] / 1e3,
        "ns a pair of rows": 1e6 * results["median"] / results["rows"] ** 2,
        "peak MB": results["peak_mb"],
    })  # fmt: skip
    cells.index = [f"{rows} rows" for rows in results["rows"]]
    note = (
        "HEXLoss: one call of the large batch, the median of several calls of the other one. "
        f"{results.compared[0]} rows of its loss were compared with float64."
    )
    return [Table("Many rows, D = 128, stock heap", cells.map(number), [note])]


def isa(results: pd.DataFrame) -> list[Table]:
    tables = []
    for level, mine in results.groupby("isa", sort=False):
        cells = with_ratios(pivot(timed(mine), "median"))
        cells.loc["share of the ideal"] = share(mine).loc[HEX].map(percent)
        rates = [number(rate(mine, product)) for product in (PRODUCT, MM)]
        note = (
            "Retained heap, a process of its own. At its best hex's own product in cache reached "
            f"{rates[0]} GF/s and torch.mm {rates[1]} GF/s."
        )
        tables.append(Table(f"HEX_ISA={level}, by rows, milliseconds", cells, [note]))
    return tables


def labels(results: pd.DataFrame) -> list[Table]:
    tables = [
        Table(case, mine.set_index("method")[["median", "peak_mb"]].map(number).rename(
            columns={"median": "ms", "peak_mb": "peak MB"}))
        for case, mine in results.groupby("case", sort=False)
    ]  # fmt: skip
    return [*tables[:-1], tables[-1]._replace(notes=["Stock heap."])]


def profile(results: pd.DataFrame) -> list[Table]:
    shares = pd.DataFrame(dict(zip(results["case"], results["percent"], strict=True)))
    note = (
        "Per cent of the samples that perf took on one thread. The compiler mixes what lies "
        "together in the source, so a share is right to a few per cent."
    )
    return [Table("Where the time of HEXLoss goes, by rows", shares.map(number), [note])]


def tables(record: Record) -> list[Table]:
    """Those of a part; the last one says where the figures come from."""
    shown = globals()[record["part"]](results_of(record)) if record["results"] else []
    last = shown.pop() if shown else Table(record["part"], pd.DataFrame())
    notes = [*last.notes, *(f"{note}." for note in record["notes"]), source(record)]
    return [*shown, last._replace(notes=notes)]


def source(record: Record) -> str:
    m, load = record["machine"], record["load"]
    level = "" if record["part"] == "isa" else f", HEX_ISA {m['hex_isa']}"
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB; torch {m['torch']} "
        f"({m['torch_simd']}), hex {m['hex']} at {m['commit']}{level}; {record['utc']} UTC, "
        f"{record['seconds']} s, load {load[0]} to {load[1]}."
    )


# ---- the ideal and the goals ---------------------------------------------------------------------


def rate(results: pd.DataFrame, product: str) -> float:
    """Of a product, GF/s: the most of all samples of the run, for it is a peak that is asked for,
    and a neighbour on the same core takes a fifth of it for seconds."""
    found = results[results["method"] == product]
    return (found["flop"] / found["best"] / 1e6).max() if len(found) else float("nan")


def own_rate(results: pd.DataFrame, value: str = "median") -> pd.DataFrame:
    """Of a symmetric loss at 4 N^2 D operations, in GF/s: N^2 D for half the cosines of all pairs
    of rows, the same again in the backward, and 2 N^2 D for their pull on both rows."""
    mine = timed(results)
    flop = 4.0 * mine["rows"] ** 2 * mine["features"]
    return pivot(mine.assign(rate=flop / mine[value] / 1e6), "rate")


def share(results: pd.DataFrame, value: str = "median") -> pd.DataFrame:
    """Of the ideal, which is the rate of the core's own product in cache, in the same run."""
    return own_rate(results, value) / rate(results, PRODUCT)


def ideal(record: Record) -> Table:
    results = results_of(record)
    results = results[results.heap == "retained"]
    shares = share(results)
    cells = shares.loc[[HEX, GIVEN, INFO_NCE]].map(percent)
    cells.loc[f"{HEX}, best sample"] = share(results, "best").loc[HEX].map(percent)
    cells.loc[f"{HEX}, GF/s"] = own_rate(results).loc[HEX].map(number)
    times = pivot(timed(results), "median")
    for slow in SPEED:
        at_the_ideal = times.loc[slow] / times.loc[HEX] / shares.loc[HEX]
        cells.loc[f"{slow} / {HEX} at the ideal"] = at_the_ideal.map(ratio)
    cells.columns = [case.replace("x", " x ") for case in cells.columns]
    rates = [number(rate(results, product)) for product in (PRODUCT, MM)]
    note = (
        f"In cache, hex's own product reached {rates[0]} GF/s at its best and torch.mm {rates[1]} "
        "GF/s. A line at the ideal says how many times as fast HEXLoss would be if it did nothing "
        "but its products at that rate."
    )
    return Table("Share of the ideal, retained heap", cells, [note])


SPEED = {  # how many times as fast as these HEXLoss is to be, retained heap, by size
    PLAIN_HEX: (7, 7, 9, 10, 10, 8),
    COMPILED_HEX: (5, 6, 7, 8, 8, 5),
    PLAIN_INFO_NCE: (3, 3.3, 3.8, 4.2, 4.2, 4),
}
SHARE = (0.55, 0.68, 0.75, 0.82, 0.84, 0.80)  # of the ideal, by size
GOAL_SIZES = ("512", "1024", "2048", "4096", "8192", "4096x512")
THREADS = {"512": 1.5, "4096": 1.85, "8192": 1.85}  # times as fast in two threads


class Goal(NamedTuple):
    """A ratio of figures of one run, never a time, set on a CPU with AVX-512."""

    about: str
    got: float
    least: float | None = None
    most: float | None = None
    form: str = "{:.3g}x"

    @property
    def met(self) -> bool:
        return self.got >= self.least if self.most is None else self.got <= self.most

    def row(self) -> list[str]:
        bound = "at least" if self.most is None else "at most"
        wanted = self.least if self.most is None else self.most
        return [self.form.format(self.got), f"{bound} {self.form.format(wanted)}"]


def all_goals(records: Mapping[str, Record]) -> list[Goal]:
    """In the order of the document."""
    results = {part: results_of(record) for part, record in records.items()}
    sizes, large = results["sizes"], results["large"]
    retained, stock = sizes[sizes.heap == "retained"], sizes[sizes.heap == "stock"]
    times, shares = pivot(timed(retained), "median"), share(retained).loc[HEX]
    found = [
        Goal(f"{slow} / {HEX} at {size}", times[size][slow] / times[size][HEX], least)
        for slow, wanted in SPEED.items()
        for size, least in zip(GOAL_SIZES, wanted, strict=True)
    ]
    for size, least in zip(GOAL_SIZES, SHARE, strict=True):
        found.append(Goal(f"share of the ideal at {size}", shares[size], least, form="{:.0%}"))
    for r in stock[stock.method == HEX].itertuples():
        if r.rows >= 4096:  # beyond that 8 % of an N x N matrix and what is O(N D)
            most = (0.08 * 4 * r.rows**2 + 24 * r.rows * r.features) / 1e6
            got = r.peak_mb - 4 * r.rows * r.features / 1e6
            found.append(
                Goal(f"memory beyond the results at {r.case}", got, None, most, "{:.1f} MB")
            )
    data, types, shapes = (pivot(results[part], "median") for part in ("data", "types", "shapes"))
    for kind in data.columns[1:]:
        slower = data[kind][HEX] / data.loc[HEX].iloc[0]
        found.append(Goal(f"{kind} batch / ordinary one", slower, most=1.25))
    for name in ("bfloat16", "float16"):  # no slower, but for what the clock is good for
        found.append(Goal(f"{name} / float32", types[name][HEX] / types["float32"][HEX], most=1.03))
    wide = types["float64"]
    found.append(Goal(f"{PLAIN_HEX} / {HEX} in float64", wide[PLAIN_HEX] / wide[HEX], 5))
    for case, found_times in shapes.items():
        gain = found_times[PLAIN_INFO_NCE] / found_times[HEX]
        found.append(Goal(f"{PLAIN_INFO_NCE} / {HEX}, {case}", gain, 3))
    of_threads = results["threads"][results["threads"].method == HEX]
    best = of_threads.pivot(index="case", columns="threads", values="best")
    for size, least in THREADS.items():
        found.append(Goal(f"two threads at {size}", best[1][size] / best[2][size], least))
    dots = results["isa"].query("isa == 'avx512_bf16' and method == @HEX").set_index("case")
    dots = dots["median"]
    if len(dots):
        about = "float32 / bfloat16 at HEX_ISA=avx512_bf16"
        found.append(Goal(about, dots["4096"] / dots[BF16], 1.4))
    few, many = large.rows
    found.append(Goal(f"memory of {many} rows", large.peak_mb[1], None, 200, "{:.0f} MB"))
    pair = large["median"] / large.rows**2
    found.append(Goal(f"time a pair at {many} rows / at {few}", pair[1] / pair[0], most=1.2))
    return found


def goals(records: Mapping[str, Record]) -> Table:
    found = all_goals(records)
    missed = {goal.about: goal.row() for goal in found if not goal.met}
    cells = pd.DataFrame.from_dict(missed, orient="index", columns=["measured", "goal"])
    return Table(f"{len(found) - len(missed)} of {len(found)} goals are met; these are not", cells)


# ---- documents -----------------------------------------------------------------------------------


def summary(record: Record) -> Table:
    """The README's."""
    results = timed(results_of(record))
    times = {heap: pivot(results[results.heap == heap], "median") for heap in ("stock", "retained")}
    peaks = pivot(results[results.heap == "stock"], "peak_mb")["4096"]
    cells = pd.DataFrame({
        title: {
            **{size: " / ".join(number(t[size][method]) for t in times.values())
               for size in ("512", "1024", "4096", "8192")},
            "peak MB at 4096": number(peaks[method]),
        }
        for method, title in (
            (HEX, "`HEXLoss`, adaptive"), (PLAIN_HEX, "HEX in plain PyTorch"),
            (INFO_NCE, "`InfoNCELoss`"), (PLAIN_INFO_NCE, "InfoNCE in plain PyTorch"),
        )
    })  # fmt: skip
    return Table("", cells.T, corner="rows 2B")


def latest(file: Path = RESULTS) -> dict[str, Record]:
    """The last record of each part."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {record["part"]: record for record in records if not record["quick"]}


def blocks(records: Mapping[str, Record]) -> dict[str, Callable[[], str]]:
    """What stands in the documents, by name."""

    def of_part(record: Record) -> str:
        return "\n\n".join(table.markdown() for table in tables(record))

    return {part: functools.partial(of_part, record) for part, record in records.items()} | {
        "ideal": lambda: ideal(records["sizes"]).markdown(),
        "goals": lambda: goals(records).markdown(),
        "summary": lambda: summary(records["sizes"]).markdown(),
    }


def write() -> int:
    records = latest()
    for path in DOCUMENTS:
        fill(path, blocks(records))
    picture(records)
    for goal in all_goals(records):
        print("     " if goal.met else "MISS ", goal.about, *goal.row())
    return 0


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
    results = results_of(records["sizes"])
    results = results[(results["features"] == 128) & results["method"].isin(STYLES)]
    keys = ["method", "rows"]
    stock, retained = (results[results.heap == heap] for heap in ("stock", "retained"))
    found = stock[[*keys, "peak_mb"]].merge(retained[[*keys, "median"]], on=keys)
    large = results_of(records["large"]).iloc[1:][[*keys, "median", "peak_mb"]]
    found = pd.concat([found, large], ignore_index=True)
    return found.rename(columns={"median": "ms", "peak_mb": "mb"})


def picture(records: Mapping[str, Record]) -> None:
    m = records["sizes"]["machine"]
    caption = (
        f"{m['cpu']}, HEX_ISA {m['hex_isa']}, torch {m['torch']}; float32, D = 128, one thread; "
        "time with a retained heap, memory with the stock one"
    )
    draw(points(records), STYLES, caption, PICTURE)
