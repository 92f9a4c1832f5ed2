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
from report import markdown, number, pivot
from worker import Record, read

RECORD = Path(__file__).with_name("gpu_results.jsonl")
DOCUMENT = report.ROOT / "docs" / "cuda.md"
PICTURE = report.ROOT / "docs" / "images" / "gpu.png"


def text(records: Sequence[Record]) -> str:
    """A part for each machine."""
    machines = [r["on"] for r in records if r["case"] == "machine"] or [""]
    made = [part for on in machines for part in parts([r for r in records if r["on"] == on])]
    return "\n\n".join(filter(None, made))


def parts(records: Sequence[Record]) -> Iterator[str]:
    """Of one machine: which it is, and the tables of what has results."""
    results = frame(records)
    yield from (machine(r) for r in records if r["case"] == "machine")
    for title, steps in (
        ("By rows", ("sizes", "compiled")),
        ("A queue", ("queue",)),
        ("Other numbers of features", ("features",)),
        ("Other dtypes", ("dtypes",)),
    ):
        mine = results[results["step"].isin(steps) & results["ms"].notna()]
        if len(mine):
            times, peaks = pivot(mine, "ms"), pivot(mine[~mine["graph"]], "peak_mb")
            cells = times.map("{:.3g}".format).where(times.notna(), "")
            yield markdown(f"{title}, ms", cells)
            yield markdown(f"{title}, MB at the peak", peaks.map(number))
    checked = results[results["loss_error"].notna() & (results["rows"] <= 1024) & ~results["graph"]]
    if len(checked):
        both = [f"{r.loss_error:.1e}, {r.gradient_error:.1e}" for r in checked.itertuples()]
        cells = pivot(checked.assign(both=both).drop_duplicates(["method", "case"]), "both").T
        title = "Relative errors of the loss and of the gradient, against float64"
        yield markdown(title, cells.fillna(""))
    notes = {note for r in records for note in r.get("notes", ())}
    notes |= {f"{r['case']} failed: {r['note']}" for r in records if not r.get("ok", True)}
    yield "\n\n".join(f"{note}." for note in sorted(notes))


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """A line a result, the smaller batches first. Records of before are a result themselves."""
    batch = ["dtype", "features", "queue", "rows"]
    columns = ["method", "graph", *batch, "ms", "peak_mb", "loss_error", "gradient_error"]
    rows = [
        {"on": r["on"], "step": r["case"].partition(":")[0], **row}
        for r in records for row in r.get("results", [r]) if "method" in row
    ]  # fmt: skip
    found = pd.DataFrame(rows, columns=["on", "step", *columns]).sort_values(batch, kind="stable")
    found["ms"] = found["ms"].map(np.median)
    found["graph"] = found["graph"].astype(bool)
    found["method"] += found["graph"].map({True: ", in a graph", False: ""})
    found["case"] = [
        f"{r.rows} x {r.queue or r.rows}"
        + f", D {r.features}, {r.dtype}" * ((r.features, r.dtype) != (128, "bfloat16"))
        for r in found.itertuples()
    ]
    return found


def machine(m: Record) -> str:
    where = f"{m['card']}, {m['card_gb']:.0f} GB, driver {m['driver']}" if "card" in m else m["cpu"]
    text = f"{where}; torch {m['torch']} (CUDA {m['cuda']}), hex-ssl {m['hex']}"
    text += "".join(f", {key} {m[key]}" for key in ("nvcc", "commit") if key in m)
    text += f" with changes ({m['changes']})" if "changes" in m else ""
    return f"{text}; {m['date']}."


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
    points = found.loc[found["on"] == on, ["method", "rows", "ms", "peak_mb"]]
    caption = f"{on}; bfloat16, D = 128; dotted: in a CUDA graph. In memory hex has one line"
    points = points.set_axis(["method", "rows", "ms", "mb"], axis=1)
    report.draw(points, STYLES, caption, PICTURE)
