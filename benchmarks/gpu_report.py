# SPDX-License-Identifier: MIT
"""What bench.py --gpu measured, as tables in Markdown and a picture.

Those of docs/cuda.md are of benchmarks/gpu_results.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peers
import report
from report import form, markdown, number
from worker import read

Record = dict[str, Any]
RECORD = Path(__file__).with_name("gpu_results.jsonl")
DOCUMENT = report.ROOT / "docs" / "cuda.md"
PICTURE = report.ROOT / "docs" / "images" / "gpu.png"
# What was aimed at before anything ran: ms of HEXLoss in half precision at D = 128, and MB, by
# (rows, queue, in a graph).
GOALS = {
    (1024, 0, True): (0.035, None),
    (4096, 0, True): (0.060, None),
    (8192, 0, True): (0.210, None),
    (32768, 0, False): (3.2, None),
    (65536, 0, False): (13.0, 64 * 1.048576),
    (4096, 65536, False): (0.8, None),
}
BATCH = ["dtype", "features", "queue", "rows"]  # the smaller first


def text(records: Sequence[Record]) -> str:
    """A part for each machine."""
    machines = [r["on"] for r in records if r["case"] == "machine"] or [""]
    made = [part for on in machines for part in parts([r for r in records if r["on"] == on])]
    return "\n\n".join(filter(None, made))


def parts(records: Sequence[Record]) -> Iterator[str]:
    """Of one machine: which it is, and a table of each step that has results."""
    by_case = {r["case"]: r for r in records}
    rate = by_case.get("roofline: roofline", {})
    if "machine" in by_case:
        yield machine(by_case["machine"], rate)
    cases = frame(records, rate.get("tflops"))
    yield goals(cases)
    for title, unit, steps, cell in (
        ("Time and memory by rows", "ms (MB)", ("sizes", "compiled"), ms_and_mb),
        ("What the host takes for a call", "ms", ("sizes", "compiled"), host_ms),
        ("The products' share, at that rate", "", ("sizes", "queue"), lambda r: r.share),
        ("A queue", "ms (MB)", ("queue",), ms_and_mb),
        ("Other numbers of features", "ms (MB)", ("features",), ms_and_mb),
        ("Other dtypes", "ms (MB)", ("dtypes",), ms_and_mb),
    ):
        yield by_method(title, unit, cases[cases["step"].isin(steps)], cell)
    yield "\n\n".join(sorted({f"{note}." for r in records for note in r.get("notes", ())}))
    yield errors([r for r in rows(records) if "loss_error" in r and r["rows"] <= 1024])
    yield lined("A training step", "SimCLR's step, bfloat16", {
        r["case"].partition(": ")[2]: {
            "ms": f"{r['step_ms']:.3g}", "MB": f"{r['step_peak_mb']:.0f}"
        }
        for r in records if "step_ms" in r
    })  # fmt: skip
    yield lined("Tests and runs", "", {
        r["case"]: {
            "result": "passed" if r["ok"] else "FAILED",
            "it said": r.get("note", "").replace("|", "/"),
        }
        for r in records if "ok" in r
    })  # fmt: skip
    yield not_reached(by_case.get("not reached", {}).get("cases", []))


def rows(records: Sequence[Record]) -> list[Record]:
    """The results in the records; older ones are one themselves."""
    return [
        {"on": r["on"], "step": r["case"].partition(":")[0], **row}
        for r in records for row in r.get("results", [r])
    ]  # fmt: skip


def frame(records: Sequence[Record], tflops: float | None) -> pd.DataFrame:
    """A line a result, and the share of its time that its products would take at the rate of a
    large one."""
    columns = ["on", "step", "method", "graph", *BATCH, "ms", "host_ms", "peak_mb"]
    found = pd.DataFrame([r for r in rows(records) if "ms" in r], columns=columns)
    found["ms"] = found["ms"].map(np.median)
    # Products of N x M x D, times 2 operations: the threshold two, the forward one, the backward
    # two; float32 three times as many (docs/cuda.md).
    products = found["method"].map({report.HEX: 5, report.GIVEN: 3, report.INFO_NCE: 3})
    products *= found["dtype"].map({"float32": 3}).fillna(1)
    columns_of = found["queue"].where(found["queue"] > 0, found["rows"])
    flop = 2.0 * products * found["rows"] * columns_of * found["features"]
    found["share"] = (flop / (tflops or np.nan) / 1e9 / found["ms"]).map(form("{:.0%}"))
    found["name"] = found["method"] + found["graph"].map({True: ", in a graph"}).fillna("")
    return found


def machine(m: Record, rate: Record) -> str:
    where = f"{m['card']}, {m['card_gb']:.0f} GB, driver {m['driver']}" if "card" in m else m["cpu"]
    text = f"{where}; torch {m['torch']} (CUDA {m['cuda']}), hex-ssl {m['hex']}"
    text += "".join(f", {key} {m[key]}" for key in ("nvcc", "commit") if key in m)
    text += f" with changes ({m['changes']})" if "changes" in m else ""
    reached = (
        "It reaches {tflops:.0f} TFLOP/s in a large bfloat16 product and {copy_gb_s:.0f} GB/s in a "
        "copy, read and written. "
    )
    text += f"; {m['date']}. " + (reached.format(**rate) if "tflops" in rate else "")
    return (text + rate.get("note", "")).rstrip()


def goals(cases: pd.DataFrame) -> str:
    """The goal beside what was measured, and the time of the products alone beside that."""
    ours = cases.query("method == @report.HEX and dtype == 'bfloat16' and features == 128")
    found = {(r.rows, r.queue, r.graph): r for r in ours.itertuples()}
    lines = {}
    for key, (goal, goal_mb) in GOALS.items():
        n, queue, graph = key
        got = found.get(key)
        lines[f"{n} x {queue or n}" + ", in a graph" * graph] = {
            "goal, ms": f"{goal:g}",
            "ms": f"{got.ms:.3g}" if got else "not measured",
            "goal, MB": form("{:.0f}")(goal_mb),
            "MB": f"{got.peak_mb:.0f}" if got else "",
            "of the products' rate": got.share if got else "",
        }
    return lined("Goals", "HEXLoss, bfloat16, D = 128", lines)


def by_method(title: str, unit: str, cases: pd.DataFrame, cell: Callable[[Any], str]) -> str:
    """A line for each method, a column for each batch."""
    cases = cases.assign(cell=[cell(r) for r in cases.itertuples()]).query("cell != ''")
    if not len(cases):
        return ""
    cells = cases.pivot_table(
        index="name", columns=BATCH, values="cell", aggfunc="last", sort=False, fill_value=""
    ).sort_index(axis=1)
    kinds = {(dtype, features) for dtype, features, _, _ in cells.columns}
    if len(kinds) == 1:  # once is enough
        title += ": {}, D = {}".format(*kinds.pop())
    cells.columns = [
        f"{n} x {queue or n}" + (f", D {features}, {dtype}" if kinds else "")
        for dtype, features, queue, n in cells.columns
    ]
    return markdown(title, cells, unit)


def ms_and_mb(r: Any) -> str:
    return f"{r.ms:.3g}" + ("" if r.graph else f" ({number(r.peak_mb)})")


def host_ms(r: Any) -> str:
    return "" if r.graph else f"{r.host_ms:.2g}"


def lined(title: str, corner: str, lines: dict[str, dict[str, str]]) -> str:
    """A table of a dictionary a line."""
    cells = pd.DataFrame.from_dict(lines, orient="index").fillna("")
    return markdown(title, cells, corner) if lines else ""


def errors(cases: Sequence[Record]) -> str:
    """A line for each batch, a column for each method."""
    lines: dict[str, dict[str, str]] = {}
    for r in cases:
        batch = f"{r['rows']} x {r['queue'] or r['rows']}, D {r['features']}, {r['dtype']}"
        both = f"{r['loss_error']:.1e}, {r['gradient_error']:.1e}"
        lines.setdefault(batch, {}).setdefault(r["method"], both)
    title = "Relative errors of the loss and of the gradient, against float64"
    return lined(title, "", lines)


def not_reached(cases: Sequence[str]) -> str:
    """By step and batch."""
    batches = dict.fromkeys(", ".join(case.split(", ")[:2]) for case in cases)
    return f"Not reached: {'; '.join(batches)}." if cases else ""


STYLES = {
    peers.INF_CL.name: ("InfoNCE, Inf-CL", "#7a8fa6", "-."),
    peers.AUTOCAST.name: ("InfoNCE, autocast", "#7a8fa6", "--"),
    peers.AUTHORS.name: ("HEX, authors' form", "#2b4c7e", "-."),
    peers.GIVEN.name: ("hex_loss, eps given", "#8c564b", "-"),
    **report.STYLES,
}
STYLES |= {f"{name}, in a graph": (None, colour, ":") for name, (_, colour, _) in STYLES.items()}


def picture(records: Sequence[Record], file: Path) -> None:
    """Of the machine with the most results."""
    found = frame(records, None)
    found = found[found["step"].isin(["sizes", "compiled"])]
    on = next(iter(found["on"].mode()), "")
    points = found.loc[found["on"] == on, ["name", "rows", "ms", "peak_mb"]]
    caption = f"{on}; bfloat16, D = 128; dotted: in a CUDA graph. In memory hex has one line"
    report.draw(points.set_axis(["method", "rows", "ms", "mb"], axis=1), STYLES, caption, file)


def write() -> None:
    """The document and its picture."""
    records = list(read(RECORD.read_text()).values())
    picture(records, PICTURE)
    DOCUMENT.write_text(report.filled(DOCUMENT.read_text(), {"gpu": text(records)}))
