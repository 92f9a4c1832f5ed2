# SPDX-License-Identifier: MIT
"""Results as they are shown: tables in Markdown and pictures.

A record has a line for each work, with a result for each method and batch. Nothing that stands in a
document between <!-- NAME --> and <!-- end --> is typed by hand.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import accuracy_report
import cost
import curves
import ddp
import numpy as np
import pandas as pd
import peers
from worker import Record, read

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
HEX, GIVEN, INFO_NCE = (method.name for method in peers.OURS)
PLAIN_HEX, PLAIN_INFO_NCE = peers.PLAIN_HEX.name, peers.PLAIN_INFO_NCE.name
COMPILED_HEX = peers.COMPILED_HEX.name
RATIOS = (
    (PLAIN_HEX, HEX), (COMPILED_HEX, HEX), (PLAIN_INFO_NCE, HEX), (PLAIN_INFO_NCE, INFO_NCE),
    *((other.name, ours.name) for ours, other in (peers.LABELS[:2], peers.LABELS[2:4])),
    *((other.name, ours.name) for ours, other in (peers.LOGITS[:2], peers.LOGITS[2:4])),
    (peers.LABELS[3].name, peers.LABELS[5].name), (peers.LOGITS[3].name, peers.LOGITS[4].name),
)  # fmt: skip
COLUMNS = ("on", "part", "method", "case", "rows", "features", "queue", "dtype", "heap", "isa",
           "ms", "peak_mb", "loss_error", "gradient_error")  # fmt: skip

ABOUT = ("cores", "memory", "torch's SIMD", "driver", "CUDA", "nvcc")  # a machine
# Parts whose memory other parts show, or of which a call's memory says little.
TIMES_ALONE = ("threads", "isa", "ranks")
OF_RANKS = ("ranks", "ddp")  # parts that have a page of their own

Tables = dict[str, pd.DataFrame]  # of texts, by title


def number(value: Any) -> str:
    """Three digits or so; nothing for what is not there."""
    if pd.isna(value):
        return ""
    return f"{value:.0f}" if value >= 99.95 or value == 0 else f"{value:#.3g}"


def markdown(title: str, cells: pd.DataFrame, corner: str = "") -> str:
    lines = [[corner, *cells.columns], ["---", *["---:"] * cells.shape[1]]]
    lines += [[name, *row] for name, row in zip(cells.index, cells.values, strict=True)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{title}**\n\n{table}" if title else table


def pivot(results: pd.DataFrame, value: str) -> pd.DataFrame:
    """A line a method and a column a case, in the order in which they come."""
    found = results.pivot(index="method", columns="case", values=value)
    return found.reindex(index=results.method.unique(), columns=results.case.unique())


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """A line a result, of those measured again the last; the batches with few rows first."""
    rows = [
        {"on": record["on"], "part": record["name"].partition(":")[0], **row}
        for record in records for row in record.get("results", ())
    ]  # fmt: skip
    found = pd.DataFrame(rows, columns=COLUMNS)
    found = found.drop_duplicates(["part", "method", "case", "heap", "isa"], keep="last")
    found["ms"] = found["ms"].map(np.median)
    return found.sort_values(["features", "queue", "rows"], kind="stable")


# ---- tables --------------------------------------------------------------------------------------


def times(results: pd.DataFrame) -> Tables:
    """Milliseconds, and how many times as long one method takes as another; the peaks of memory."""
    tables, levels = {}, results["isa"].nunique() > 1
    for (heap, isa), mine in results.groupby(["heap", "isa"]):
        ms = pivot(mine, "ms")
        cells = ms.map(number)
        for slow, fast in RATIOS:
            if {slow, fast} <= {*ms.index}:
                ratios = ms.loc[slow] / ms.loc[fast]
                cells.loc[f"{slow} / {fast}"] = [f"{x:.1f}x" * (x == x) for x in ratios]
        for name, ranks in ((method.name, method.ranks) for method in peers.RANKS):
            if {name, HEX} <= {*ms.index}:
                ratios = ms.loc[name] / ms.loc[HEX]
                cells.loc[f"{name}, {ranks} times / {HEX}"] = [f"{x:.2f}x" for x in ratios * ranks]
                cells.loc[f"{HEX} / {name}"] = [f"{x:.1f}x" for x in 1 / ratios]
        title = "Milliseconds" + f", {heap} heap" * bool(heap) + f", HEX_ISA={isa}" * levels
        tables[title] = cells
    if results["part"].iloc[0] not in TIMES_ALONE:
        first = results[(results["heap"] == results["heap"].iloc[0]) & of_one_level(results)]
        first = first[~first["method"].str.endswith(peers.CAPTURED)]
        tables["Memory at the peak, MB"] = pivot(first, "peak_mb").map(number)
    return tables


def of_one_level(results: pd.DataFrame) -> pd.Series[bool]:
    """Which are of the instruction set that most have."""
    return results["isa"] == results["isa"].mode()[0]


def errors(results: pd.DataFrame) -> str:
    """The greatest of each method, by dtype."""
    tables, suffix = [], rf"(, threads: \d+|{peers.CAPTURED})$"
    results = results.assign(method=results["method"].str.replace(suffix, "", regex=True))
    for column, what in (("loss_error", "loss"), ("gradient_error", "gradient")):
        most = results.pivot_table(column, "method", "dtype", aggfunc="max", sort=False)
        cells = most.map(lambda x: f"{x:.1e}" if x > 0 else "0" if x == 0 else "")
        tables.append(markdown(f"Greatest relative error of the {what}, against float64", cells))
    return "\n\n".join(tables)


def under_ddp(results: Sequence[Mapping[str, Any]]) -> str:
    """What became of each method's value and gradient on ranks."""
    cells: dict[str, dict[str, str]] = {}
    checks = {r["ranks"]: r["seconds"] for r in results if r["method"] == ddp.CHECK}
    for r in results:  # of those measured again the last
        if r["method"] == ddp.CHECK:
            continue
        line, ranks = cells.setdefault(r["method"], {}), f", {r['ranks']} ranks"
        line["value" + ranks] = " / ".join(f"{x:.3f}" for x in r["value"])
        line["ratio" + ranks] = f"{r['ratio']:.3f}"
        line["residual" + ranks] = f"{r['residual']:.3f}"
        line["scale" + ranks] = "" if r["scale"] is None else f"{r['scale']:.3f}"
    packages = sorted({r["package"] for r in results if "package" in r})
    took = [f"{1e6 * seconds:.0f} µs with {ranks} ranks" for ranks, seconds in checks.items()]
    table = markdown("", pd.DataFrame(cells).T)
    return f"{table}\n\nOf {', '.join(packages)}. The comparison of sizes took {', '.join(took)}."


def summary(results: pd.DataFrame) -> str:
    """The README's."""
    sizes = results[of_one_level(results)]
    sizes = sizes.query("part == 'sizes' and case in ('512', '1024', '4096', '8192')")
    shown = {
        HEX: "`HEXLoss`, adaptive", PLAIN_HEX: "HEX in plain PyTorch",
        INFO_NCE: "`InfoNCELoss`", PLAIN_INFO_NCE: "InfoNCE in plain PyTorch",
    }  # fmt: skip
    stock, retained = (sizes[sizes["heap"] == heap] for heap in ("stock", "retained"))
    cells = pivot(stock, "ms").map(number) + " / " + pivot(retained, "ms").map(number)
    cells["peak MB at 4096"] = pivot(stock, "peak_mb")["4096"].map(number)
    return markdown("", cells.loc[[*shown]].rename(index=shown), "rows 2B")


def machine(record: Record) -> str:
    about = (f"{key} {record[key]}" for key in ABOUT if key in record)
    return f"{record['on']}; {', '.join(about)}; {record['date']}."


def blocks(records: Sequence[Record]) -> dict[str, str]:
    """What stands in the documents, by name: the machine, the tables of each part, the errors."""
    results, found = frame(records), {}
    machines = {r["on"]: r for r in records if r["name"] == "machine"}
    used = {*results["on"]} or {*machines}
    found["machine"] = "\n\n".join(machine(m) for on, m in machines.items() if on in used)
    for part in dict.fromkeys(r["name"].partition(":")[0] for r in records):
        mine, of = results[(results["part"] == part) & results["ms"].notna()], []
        if len(mine):
            of += [markdown(*table) for table in times(mine).items()]
        if gradients := [
            row for r in records for row in r.get("results", ()) if part == r["name"] == "ddp"
        ]:
            of.append(under_ddp(gradients))
        for r in (r for r in records if r["name"].partition(":")[0] == part):
            of += [f"{note}." for note in r.get("notes", ()) if f"{note}." not in of]
            of += [] if r.get("ok", True) else [f"{r['name']} failed: {r['note']}."]
        if of:
            found[part] = "\n\n".join(of)
    if results["loss_error"].notna().any():
        found["errors"] = errors(results)
    return found


def text(records: Sequence[Record]) -> str:
    """All of them, one after another."""
    return "\n\n".join(
        block if name in ("machine", "errors") else f"### {name}\n\n{block}"
        for name, block in blocks(records).items()
    )


# ---- the documents and their pictures ------------------------------------------------------------


class Page(NamedTuple):
    record: Path
    documents: Sequence[Path]
    picture: Path | None = None
    about: str = ""
    panels: Sequence[curves.Panel] = ()

    def records(self) -> list[Record]:
        """All but rehearsals, and of the parts that this page shows."""
        found = read(self.record.read_text()).values()
        parts = [
            r for r in found if not r["on"].endswith("a rehearsal")
            and r["name"] != "machine" and (r["name"] in OF_RANKS) == (self.picture is None)
        ]  # fmt: skip
        machines = {r["on"] for r in parts}
        return [r for r in found if r in parts or (r["name"] == "machine" and r["on"] in machines)]

    def blocks(self) -> dict[str, str]:
        records = self.records()
        found = blocks(records)
        if self.documents[1:]:
            found["summary"] = summary(frame(records))
        if not self.picture:
            del found["errors"]
            found["cost"] = cost.table()
        return found

    def points(self) -> pd.DataFrame:
        found = frame(self.records())
        found = found[of_one_level(found)].query(
            "part in ('sizes', 'compiled', 'large') and features == 128 and heap != 'stock' "
            "and method in @curves.METHODS"
        )
        return found[["method", "rows", "ms", "peak_mb"]]

    def draw(self) -> None:
        points, on = self.points(), self.records()[0]["on"]
        save(curves.draw(points, self.panels, f"{on}\n{self.about}"), points, self.picture)


class Errors(Page):
    """Of the record of accuracy.py."""

    def records(self) -> list[Record]:
        """Of each part the last, behind the machines."""
        found = read(self.record.read_text()).values()
        parts = {r["name"]: r for r in found if r["name"] != "machine"}.values()
        used = {r["on"] for r in parts}
        return [r for r in found if r["name"] == "machine" and r["on"] in used] + [*parts]

    def blocks(self) -> dict[str, str]:
        records = self.records()
        tables = accuracy_report.tables(records).items()
        about = "\n\n".join(machine(r) for r in records if r["name"] == "machine")
        return {"machine": about} | {name: markdown("", cells) for name, cells in tables}

    def points(self) -> pd.DataFrame:
        return accuracy_report.points(self.records())

    def draw(self) -> None:
        points = self.points()
        figure = accuracy_report.draw(points, self.records()[0]["on"])
        save(figure, points, self.picture)


PAGES = (
    Page(
        HERE / "results.jsonl", (DOCS / "performance.md", DOCS.parent / "README.md"),
        DOCS / "images" / "performance.png",
        "a call: forward and backward; float32, D = 128, one thread; "
        "time with a retained heap, memory with the stock one",
        curves.CPU,
    ),
    Page(
        HERE / "gpu_results.jsonl", (DOCS / "cuda.md",), DOCS / "images" / "gpu.png",
        "the code of an earlier commit; a call: forward and backward; bfloat16, D = 128; "
        "sizes without a mark were not measured",
        curves.GPU,
    ),
    Page(HERE / "results.jsonl", (DOCS / "distributed.md",)),
    Errors(HERE / "accuracy.jsonl", (DOCS / "numbers.md",), DOCS / "images" / "numbers.png"),
)  # fmt: skip


def filled(document: str, blocks: Mapping[str, str]) -> str:
    """What stands between <!-- NAME --> and <!-- end --> made anew."""

    def block(found: re.Match[str]) -> str:
        if found[1] not in blocks:
            raise ValueError(f"the record has no {found[1]!r}, which a document shows")
        return f"<!-- {found[1]} -->\n{blocks[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, document, flags=re.DOTALL)


def write() -> None:
    for page in PAGES:
        blocks = page.blocks()
        for file in page.documents:
            file.write_text(filled(file.read_text(), blocks))
        if page.picture:
            page.draw()


def save(figure: Any, points: pd.DataFrame, file: Path) -> None:
    """A sum in the file tells a test what was drawn."""
    figure.savefig(file, dpi=150, metadata={"Figures": checksum(points), "Software": "hex-ssl"})


def checksum(points: pd.DataFrame) -> str:
    return hashlib.sha256(points.to_json().encode()).hexdigest()
