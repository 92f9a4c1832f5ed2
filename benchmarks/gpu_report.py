# SPDX-License-Identifier: MIT
"""What bench.py --gpu measured, as tables in Markdown and a picture.

Those of docs/cuda.md are of benchmarks/gpu_results.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import peers
import report
from report import markdown, number
from worker import Record, read

RECORD = Path(__file__).with_name("gpu_results.jsonl")
DOCUMENT = report.ROOT / "docs" / "cuda.md"
PICTURE = report.ROOT / "docs" / "images" / "gpu.png"
BATCH = ["dtype", "features", "queue", "rows"]  # the smaller first


def text(records: Sequence[Record]) -> str:
    """A part for each machine."""
    machines = [r["on"] for r in records if r["case"] == "machine"] or [""]
    made = [part for on in machines for part in parts([r for r in records if r["on"] == on])]
    return "\n\n".join(filter(None, made))


def parts(records: Sequence[Record]) -> Iterator[str]:
    """Of one machine: which it is, and the tables of what has results."""
    by_case = {r["case"]: r for r in records}
    if "machine" in by_case:
        yield machine(by_case["machine"])
    results = frame(records)
    for title, steps in (
        ("Time and memory by rows", ("sizes", "compiled")),
        ("A queue", ("queue",)),
        ("Other numbers of features", ("features",)),
        ("Other dtypes", ("dtypes",)),
    ):
        yield by_method(title, results[results["step"].isin(steps)])
    yield errors(results)
    notes = {note for r in records for note in r.get("notes", ())}
    notes |= {f"{r['case']} failed: {r['note']}" for r in records if not r.get("ok", True)}
    yield "\n\n".join(f"{note}." for note in sorted(notes))


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """A line a result. Records of before are a result themselves."""
    columns = ["method", "graph", *BATCH, "ms", "peak_mb", "loss_error", "gradient_error"]
    rows = [
        {"on": r["on"], "step": r["case"].partition(":")[0], **row}
        for r in records for row in r.get("results", [r]) if "method" in row
    ]  # fmt: skip
    found = pd.DataFrame(rows, columns=["on", "step", *columns])
    found["ms"] = found["ms"].map(np.median)
    found["name"] = found["method"] + found["graph"].map({True: ", in a graph"}).fillna("")
    columns_of = found["queue"].where(found["queue"] > 0, found["rows"])
    found["batch"] = [f"{n} x {m}" for n, m in zip(found["rows"], columns_of, strict=True)]
    return found


def machine(m: Record) -> str:
    where = f"{m['card']}, {m['card_gb']:.0f} GB, driver {m['driver']}" if "card" in m else m["cpu"]
    text = f"{where}; torch {m['torch']} (CUDA {m['cuda']}), hex-ssl {m['hex']}"
    text += "".join(f", {key} {m[key]}" for key in ("nvcc", "commit") if key in m)
    text += f" with changes ({m['changes']})" if "changes" in m else ""
    return f"{text}; {m['date']}."


def by_method(title: str, results: pd.DataFrame) -> str:
    """A line for each method, a column for each batch."""
    results = results[results["ms"].notna()]
    if not len(results):
        return ""
    cell = [f"{r.ms:.3g}" + f" ({number(r.peak_mb)})" * (not r.graph) for r in results.itertuples()]
    cells = results.assign(cell=cell).pivot_table(
        index="name", columns=[*BATCH, "batch"], values="cell", aggfunc="last", sort=False,
        fill_value="",
    ).sort_index(axis=1)  # fmt: skip
    kinds = {f"D {d}, {dtype}" for dtype, d, *_ in cells.columns}
    if len(kinds) == 1:  # once is enough
        title, kinds = f"{title}: {kinds.pop()}", set()
    cells.columns = [
        f"{batch}, D {d}, {dtype}" if kinds else batch for dtype, d, _, _, batch in cells.columns
    ]
    return markdown(title, cells, "ms (MB)")


def errors(results: pd.DataFrame) -> str:
    """A line for each batch, a column for each method."""
    found = results[results["loss_error"].notna() & (results["rows"] <= 1024)]
    if not len(found):
        return ""
    both = [f"{r.loss_error:.1e}, {r.gradient_error:.1e}" for r in found.itertuples()]
    cells = found.assign(both=both).pivot_table(
        index=["batch", "features", "dtype"], columns="method", values="both", aggfunc="first",
        sort=False, fill_value="",
    )  # fmt: skip
    cells.index = [f"{batch}, D {d}, {dtype}" for batch, d, dtype in cells.index]
    return markdown("Relative errors of the loss and of the gradient, against float64", cells)


STYLES = {
    peers.INF_CL.name: ("InfoNCE, Inf-CL", "#7a8fa6", "-."),
    peers.AUTOCAST.name: ("InfoNCE, autocast", "#7a8fa6", "--"),
    peers.AUTHORS.name: ("HEX, authors' form", "#2b4c7e", "-."),
    peers.GIVEN.name: ("hex_loss, eps given", "#8c564b", "-"),
    **report.STYLES,
}
STYLES |= {f"{name}, in a graph": (None, colour, ":") for name, (_, colour, _) in STYLES.items()}


def write() -> None:
    """The document and its picture, of the machine with the most results."""
    records = list(read(RECORD.read_text()).values())
    DOCUMENT.write_text(report.filled(DOCUMENT.read_text(), {"gpu": text(records)}))
    found = frame(records).query("step in ('sizes', 'compiled')")
    on = found["on"].mode()[0]
    points = found.loc[found["on"] == on, ["name", "rows", "ms", "peak_mb"]]
    caption = f"{on}; bfloat16, D = 128; dotted: in a CUDA graph. In memory hex has one line"
    points = points.set_axis(["method", "rows", "ms", "mb"], axis=1)
    report.draw(points, STYLES, caption, PICTURE)
