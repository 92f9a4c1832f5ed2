# SPDX-License-Identifier: MIT
"""Results as they are shown: the tables of each part, on the terminal and in the documents.

results.jsonl has a line a run of a part, the newest last; of each part the last one counts. In the
documents a table stands between <!-- NAME --> and <!-- end -->, and nothing there is typed by hand.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import goals
import plot
import table
from goals import Figures, Record, quotient
from parts import MM, PRODUCT
from peers import COMPILED_HEX, GIVEN, HEX, INFO_NCE, METHODS, PLAIN_HEX, PLAIN_INFO_NCE, Method
from table import Line, Table, number, ratio

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results.jsonl")
DOCUMENTS = (ROOT / "docs" / "performance.md", ROOT / "README.md")
PICTURE = ROOT / "docs" / "images" / "performance.png"

HEAPS = {
    "retained": "Retained heap: glibc keeps what is freed, as with MALLOC_MMAP_MAX_=0 "
    "MALLOC_TRIM_THRESHOLD_=1099511627776 MALLOC_TOP_PAD_=67108864 in the environment, or as other "
    "allocators do: the dense methods at their best. These ratios are the ones to quote.",
    "stock": "Stock heap: as in any run of Python. glibc serves a request of 32 MiB or more (N x N "
    "in float32 from N = 2897 on) from fresh pages: that costs the methods with N x N temporaries "
    "much and hex nothing, so it flatters hex.",
}
CLOCK = "ms of CPU time of the process a call, one thread, forward and backward; median, by turns."
IDEAL = (
    "Share of the ideal: 4 N^2 D operations a call, at the best rate of hex's own product in "
    "cache, measured by turns with the loss. At the ideal: how many times as fast HEXLoss would be "
    "if it did nothing but these products at that rate; a goal beyond it needs a faster product."
)


# ---- tables, a function a part ------------------------------------------------------------------


class Lines(list[Line]):
    """The lines of a table with a column a case; a line of nothing is left out."""

    def __init__(self, cases: Iterable[str]) -> None:
        super().__init__()
        self.cases = list(cases)

    def row(
        self, name: str, values: Iterable[float | None], form: Callable[..., str] = number
    ) -> None:
        cells = [form(value) for value in values]
        if any(cells):
            self.append([name, *cells])

    def goal(self, wanted: Mapping[str, float], form: Callable[..., str] = ratio) -> None:
        if any(isinstance(line, list) for line in self):
            self.row("  goal", (wanted.get(case) for case in self.cases), form)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def hundredths(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def sizes(record: Record) -> list[Table]:
    f = Figures(record)
    columns = ["", *(case.replace("x", " x ") for case in f.cases)]
    methods = [m for m in METHODS if m.name in f.methods]
    first = Lines(f.cases)
    first.append("times as fast as")
    for slow, wanted in goals.SPEED.items():
        first.row(slow.name, (f.ratio(case, slow, HEX, heap="retained") for case in f.cases), ratio)
        first.goal(dict(zip(goals.SIZES, wanted, strict=True)))
        first.row("  at the ideal", (f.at_the_ideal(case, slow) for case in f.cases), ratio)
    first.append("share of the ideal")
    for ours in (HEX, GIVEN, INFO_NCE):
        first.row(ours.name, (f.share(case, ours, heap="retained") for case in f.cases), percent)
        if ours is HEX:
            first.goal(dict(zip(goals.SIZES, goals.SHARE, strict=True)), percent)
            best = (f.best_share(case, heap="retained") for case in f.cases)
            first.row("  in the best sample", best, percent)
    first.row("GF/s", (f.own_rate(case, HEX, heap="retained") for case in f.cases))
    rates = " and ".join(
        f"{number(f.rate(product, heap='retained'))} GF/s of {name}"
        for product, name in ((PRODUCT, "hex's own product"), (MM, "torch.mm"))
        if product in f.methods
    )
    tables = [
        Table(
            "HEXLoss by rows N = 2B, D = 128 where a column names none, float32, retained heap",
            columns,
            first,
            [HEAPS["retained"], f"{IDEAL} The peaks, in cache: {rates}."],
        )
    ]
    for heap, note in HEAPS.items():
        lines = Lines(f.cases)
        for method in methods:
            lines.row(method.name, (f.ms(case, method, heap=heap) for case in f.cases))
        for slow, fast in (
            (PLAIN_HEX, HEX),
            (COMPILED_HEX, HEX),
            (PLAIN_INFO_NCE, HEX),
            (PLAIN_INFO_NCE, INFO_NCE),
        ):
            title = f"{slow.name} / {fast.name}"
            lines.row(title, (f.ratio(case, slow, fast, heap=heap) for case in f.cases), ratio)
        notes = [CLOCK] if heap == "retained" else [note]
        notes += [m.note for m in methods if m.note and heap == "retained"]
        tables.append(Table(f"ms, {heap} heap", columns, lines, notes))
    lines = Lines(f.cases)

    def peak(case: str, method: Method) -> float | None:
        found = f.find(case, method, heap="stock")
        return found and found["peak_mb"]

    for method in methods:
        lines.row(method.name, (peak(case, method) for case in f.cases))
    lines.row("hex HEXLoss beyond its results", (f.beyond_mb(case) for case in f.cases))
    most = {
        case: goals.most_mb(found["rows"], found["features"])
        for case in f.cases
        if (found := f.find(case, HEX)) and found["rows"] >= 4096
    }
    lines.goal(most, number)
    about = "What the process holds at most in a call above what it held before, stock heap."
    tables.append(Table("Peak MB", columns, lines, [about]))
    return tables


def data(record: Record) -> list[Table]:
    f = Figures(record)
    usual = f.cases[0]
    lines = Lines(f.cases)
    for method in (HEX, PLAIN_HEX):
        lines.row(method.name, (f.ms(case, method) for case in f.cases))
    lines.row("plain HEX / hex HEXLoss", (f.ratio(case, PLAIN_HEX, HEX) for case in f.cases), ratio)
    lines.row(
        "hex HEXLoss / that of clusters",
        (quotient(f.ms(case, HEX), f.ms(usual, HEX)) for case in f.cases),
        hundredths,
    )
    lines.goal({case: goals.HARD for case in f.cases[1:]}, hundredths)
    notes = [
        "clusters: 64 classes, the ordinary batch. tight: 4 classes of cosines about 0.99. half "
        "collapsed: every second image in one direction. collapsed: all of them. tenth: one image "
        f"in ten in one class of cosines about 0.99. Retained heap; {CLOCK}"
    ]
    rows = f.results[0]["rows"]
    return [Table(f"Hard batches, {rows} rows", ["", *f.cases], lines, notes)]


def against_plain(f: Figures, title: str, columns: list[str], notes: list[str]) -> Table:
    """Both losses beside plain PyTorch's."""
    lines = Lines(f.cases)
    for ours, plain in ((HEX, PLAIN_HEX), (INFO_NCE, PLAIN_INFO_NCE)):
        lines.row(ours.name, (f.ms(case, ours) for case in f.cases))
        lines.row(plain.name, (f.ms(case, plain) for case in f.cases))
    for slow, fast in ((PLAIN_HEX, HEX), (PLAIN_INFO_NCE, HEX), (PLAIN_INFO_NCE, INFO_NCE)):
        name = f"{slow.name} / {fast.name}"
        lines.row(name, (f.ratio(case, slow, fast) for case in f.cases), ratio)
    for method in (HEX, PLAIN_HEX):
        peaks = {case: f.find(case, method) for case in f.cases}
        lines.row(
            f"peak MB, {method.name}", (peaks[case] and peaks[case]["peak_mb"] for case in f.cases)
        )
    return Table(title, ["", *columns], lines, [*notes, f"Retained heap; {CLOCK}"])


def types(record: Record) -> list[Table]:
    f = Figures(record)
    table = against_plain(
        f,
        f"Dtypes, {f.results[0]['rows']} rows",
        f.cases,
        [
            "Plain PyTorch widens half precision to float32, as hex does inside.",
            f"Goals: half precision at most {goals.HALF}x the time of float32; float64 "
            f"{goals.WIDE}x as fast as plain HEX.",
        ],
    )
    lines = Lines(f.cases)
    lines.row(
        "hex HEXLoss / that of float32",
        (quotient(f.ms(case, HEX), f.ms("float32", HEX)) for case in f.cases),
        hundredths,
    )
    return [table._replace(lines=[*table.lines, *lines])]


def shapes(record: Record) -> list[Table]:
    f = Figures(record)
    found = [f.find(case, HEX) for case in f.cases]
    columns = [f"{r['case']}, {r['rows']} x {r['candidates']}" for r in found if r]
    return [
        against_plain(
            f,
            "Not square: anchors x candidates",
            columns,
            [
                'query: mode="query". cross: mode="cross". queue: shared negatives, as of MoCo.',
                f"Goal: HEXLoss {goals.SHAPES}x as fast as plain InfoNCE.",
            ],
        )
    ]


def threads(record: Record) -> list[Table]:
    f = Figures(record)
    lines = Lines(f.cases)
    counts = sorted({r["threads"] for r in f.results})
    for method in (HEX, INFO_NCE, PLAIN_HEX):
        for count in counts:
            lines.row(
                f"{method.name}, threads: {count}",
                (f.best(case, method, threads=count) for case in f.cases),
            )
        for count in counts[1:]:
            lines.row(
                f"  times as fast with {count}",
                (
                    quotient(f.best(case, method, threads=1), f.best(case, method, threads=count))
                    for case in f.cases
                ),
                hundredths,
            )
            if method is HEX and count == 2:
                lines.goal(goals.THREADS, hundredths)
    notes = [
        "ms of the wall clock a call, the best of the samples: the others have other processes of "
        "the machine in them. The results are the same bits for any number of threads."
    ]
    return [Table("Threads, by rows", ["", *f.cases], lines, notes)] if f.results else []


def small(record: Record) -> list[Table]:
    f = Figures(record)
    bottom = f.ms("64", "empty autograd.Function")
    lines: list[Line] = []
    for method in f.methods:
        ms = f.ms("64", method)
        more = None if ms is None or bottom is None else 1e3 * (ms - bottom)
        lines.append([method, number(ms and 1e3 * ms), number(more)])
    about = (
        "loss(z0, z1).backward(), 2B = 64, D = 128: CPU time of the process a call. The empty "
        "function only keeps its inputs and returns empty tensors: what autograd and Python cost."
    )
    return [Table("64 rows, microseconds", ["", "a call", "above empty"], lines, [about])]


def large(record: Record) -> list[Table]:
    lines: list[Line] = [
        [
            f"{r['rows']} rows",
            number(statistics.median(r["ms"]) / 1e3),
            number(goals.nanoseconds_a_pair(r)),
            number(r["peak_mb"]),
        ]
        for r in record["results"]
    ]
    note = (
        "HEXLoss, one call, of 8192 rows the median of several; "
        f"{record['results'][0]['compared']} rows of its loss compared with hex.reference. Goals: "
        f"less than {goals.LARGE_MB} MB; a pair at most {goals.LARGE_PAIR}x the time of one of "
        "8192 rows."
    )
    columns = ["", "s of CPU time", "ns a pair of rows", "peak MB"]
    return [Table("Many rows, D = 128, stock heap", columns, lines, [note])]


def isa(record: Record) -> list[Table]:
    f = Figures(record)
    lines = Lines(f.cases)
    for level in dict.fromkeys(r["isa"] for r in f.results):
        lines.append(f"HEX_ISA={level}")
        for method in (HEX, INFO_NCE, PLAIN_HEX, PLAIN_INFO_NCE):
            lines.row(method.name, (f.ms(case, method, isa=level) for case in f.cases))
        for slow in (PLAIN_HEX, PLAIN_INFO_NCE):
            lines.row(
                f"{slow.name} / hex HEXLoss",
                (f.ratio(case, slow, HEX, isa=level) for case in f.cases),
                ratio,
            )
        lines.row("share of the ideal", (f.share(case, isa=level) for case in f.cases), percent)
        for product, name in ((PRODUCT, "hex's own product"), (MM, "torch.mm")):
            peak = f.rate(product, isa=level)
            lines.append([f"GF/s of {name} at its best", *[number(peak)] * len(f.cases)])
    notes = [
        "A process a level, plain PyTorch in each of them. Retained heap. The ideal is that of "
        f"float32; goal: bfloat16 at HEX_ISA=avx512_bf16 {goals.DOTS}x as fast as float32 there."
    ]
    return [Table("Instruction sets, by rows: ms", ["", *f.cases], lines, notes)]


def labels(record: Record) -> list[Table]:
    lines: list[Line] = []
    f = Figures(record)
    for case in f.cases:
        lines.append(case)
        for r in f.results:
            if r["case"] == case:
                ms = number(f.ms(case, r["method"]))
                lines.append([r["method"], ms, number(r["peak_mb"])])
    return [Table("Labels and logits", ["", "ms", "peak MB"], lines, [f"Stock heap; {CLOCK}"])]


def profile(record: Record) -> list[Table]:
    shares = {r["case"]: r["percent"] for r in record["results"]}
    lines = Lines(shares)
    for name in dict.fromkeys(name for percents in shares.values() for name in percents):
        lines.row(name, (shares[case].get(name) for case in shares))
    note = (
        "Per cent of the samples of perf on one thread; the compiler mixes what lies together in "
        "the source, so a share is right to a few per cent."
    )
    title = "Where the time of HEXLoss goes, by rows"
    return [Table(title, ["", *shares], lines, [note])] if lines else []


def tables(part: str, record: Record) -> list[Table]:
    """Those of a part; the last one says where the figures come from."""
    shown = globals()[part](record)
    m, load = record["machine"], record["load"]
    isa = "" if part == "isa" else f", HEX_ISA {m['hex_isa']}"
    source = (
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB; torch {m['torch']} "
        f"({m['torch_simd']}), hex {m['hex']} at {m['commit']}{isa}; {record['utc']} UTC, "
        f"{record['seconds']} s, load {load[0]} to {load[1]}."
    )
    if not shown:
        return [Table(part, [""], [], [*record["notes"], source])]
    last = shown[-1]
    return [*shown[:-1], last._replace(notes=[*last.notes, *record["notes"], source])]


# ---- documents ----------------------------------------------------------------------------------


def latest(file: Path = RESULTS) -> dict[str, Record]:
    """The last record of each part."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {record["part"]: record for record in records if not record["quick"]}


def block(name: str, records: Mapping[str, Record]) -> str:
    """What stands in a document under this name."""
    if name == "goals":
        found = goals.all_of(records)
        lines: list[Line] = [[goal.about, *goal.cells()] for goal in found if not goal.met]
        title = f"{sum(goal.met for goal in found)} of {len(found)} goals are met; these are not"
        return table.markdown(Table(title, ["", "measured", "goal"], lines, []))
    if name == "summary":
        return table.markdown(summary(records["sizes"]))
    return "\n\n".join(table.markdown(shown) for shown in tables(name, records[name]))


def summary(record: Record) -> Table:
    """The README's."""
    f = Figures(record)
    cases = [case for case in ("512", "1024", "4096", "8192") if case in f.cases]
    lines: list[Line] = []
    for method, title in (
        (HEX, "`HEXLoss`, adaptive"),
        (PLAIN_HEX, "HEX in plain PyTorch"),
        (INFO_NCE, "`InfoNCELoss`"),
        (PLAIN_INFO_NCE, "InfoNCE in plain PyTorch"),
    ):
        pairs = [
            " / ".join(number(f.ms(case, method, heap=heap)) for heap in ("stock", "retained"))
            for case in cases
        ]
        found = f.find("4096", method, heap="stock")
        lines.append([title, *pairs, number(found and found["peak_mb"])])
    return Table("", ["rows 2B", *cases, "peak MB at 4096"], lines, [])


def filled(text: str, records: Mapping[str, Record]) -> str:
    """A document with its tables as the records have them."""

    def fill(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{block(found[1], records)}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def write() -> int:
    records = latest()
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(), records))
    plot.draw(records, PICTURE)
    for goal in goals.all_of(records):
        print(f"{'     ' if goal.met else 'MISS '}{goal.about}: {' of '.join(goal.cells())}")
    return 0


if __name__ == "__main__":
    sys.exit(write())
