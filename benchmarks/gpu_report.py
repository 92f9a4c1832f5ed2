# SPDX-License-Identifier: MIT
"""What gpu.py measured, as tables in Markdown and a picture.

Those of docs/cuda.md are of benchmarks/gpu_results.jsonl.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import peers
import report
from tables import Table, draw, form, number

Record = dict[str, Any]
HEX = "hex HEXLoss"
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


def read(text: str) -> dict[tuple[str, str], Record]:
    """The records by machine and case; of a case that is there twice the last one."""
    records = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError):  # cut off, or of an older form
            record = json.loads(line)
            records[record["on"], record["case"]] = record
    return records


def text(records: Sequence[Record]) -> str:
    """A part for each machine."""
    machines = [r["on"] for r in records if r["case"] == "machine"] or [""]
    made = [part for on in machines for part in parts([r for r in records if r["on"] == on])]
    return "\n\n".join(made)


def parts(records: Sequence[Record]) -> Iterator[str]:
    """Of one machine: what there is to say, and a table of each step that has results."""
    by_case = {r["case"]: r for r in records}
    rate = by_case.get("roofline: roofline", {})
    if "machine" in by_case:
        yield machine(
            by_case["machine"], rate, any("ms" in r and "loss_error" in r for r in records)
        )
    for table in tables(records, rate.get("tflops")):
        if len(table.cells):
            yield table.markdown()
    if cases := by_case.get("not reached", {}).get("cases"):
        yield not_reached(cases)


def tables(records: Sequence[Record], tflops: float | None) -> Iterator[Table]:
    cases = frame([r for r in records if "ms" in r or "skipped" in r], tflops)
    yield goals(cases)

    def of(*steps: str) -> pd.DataFrame:
        return cases[cases["step"].isin(steps)]

    yield by_method("Time and memory by rows", "ms (MB)", of("sizes", "compiled"), ms_and_mb)
    yield by_method("What the host takes for a call", "ms", of("sizes", "compiled"), host_ms)
    yield kernels([r for r in records if "kernels_us" in r])
    title = "The products' share, at that rate"
    yield by_method(title, "", of("sizes", "queue"), lambda r: r.share)
    yield by_method("A queue", "ms (MB)", of("queue"), ms_and_mb)
    yield by_method("Other numbers of features", "ms (MB)", of("features"), ms_and_mb)
    yield by_method("Other dtypes", "ms (MB)", of("dtypes"), ms_and_mb)
    yield errors([r for r in records if "loss_error" in r and r["rows"] <= 1024])
    yield of_float32([r for r in records if r["case"].startswith("float32: ")])
    yield training([r for r in records if "step_ms" in r])
    yield checks(records)


def frame(cases: Sequence[Record], tflops: float | None) -> pd.DataFrame:
    """A line a case, with its step, and the share of its time that its products would take at the
    rate of a large one."""
    columns = ["on", "case", "method", "graph", *BATCH, "ms", "host_ms", "extra_mb", "flop"]
    found = pd.DataFrame(cases, columns=[*columns, "skipped"])
    found["step"] = [case.partition(":")[0] for case in found["case"]]
    found["share"] = (found["flop"] / (tflops or float("nan")) / 1e9 / found["ms"]).map(
        form("{:.0%}")
    )
    found["name"] = found["method"] + found["graph"].map({True: ", in a graph"}).fillna("")
    return found


def machine(m: Record, rate: Record, checked: bool) -> str:
    where = f"{m['card']}, {m['card_gb']:.0f} GB, driver {m['driver']}" if "card" in m else m["cpu"]
    text = f"{where}; torch {m['torch']} (CUDA {m['cuda']}), hex-ssl {m['hex']}"
    text += "".join(f", {key} {m[key]}" for key in ("nvcc", "commit") if key in m)
    text += f" with changes ({m['changes']})" if "changes" in m else ""
    text += f"; {m['date']}." if "date" in m else "."
    if rate:
        text += (
            f" It reaches {rate['tflops']:.0f} TFLOP/s in a large bfloat16 product and "
            f"{rate['copy_gb_s']:.0f} GB/s in a copy, read and written."
        )
        text += f" {rate['note']}" if "note" in rate else ""
    text += (
        "\n\nTimes are of forward and backward together, in ms, the median of samples. Memory is "
        "what a call takes at most beside its inputs. Plain is eager PyTorch, which widens half "
        "precision to float32 before it multiplies."
    )
    first = " Each method was first checked against float64 where N x N fits."
    return text + first * checked


def goals(cases: pd.DataFrame) -> Table:
    """The goal beside what was measured, and the time of the products alone beside that."""
    ours = cases[(cases.method == HEX) & (cases.dtype == "bfloat16") & (cases.features == 128)]
    ours = ours[ours.ms.notna()].drop_duplicates(["rows", "queue", "graph"], keep="last")
    found = ours.set_index(["rows", "queue", "graph"])
    lines = {}
    for key, (goal, goal_mb) in GOALS.items():
        n, queue, graph = key
        got = found.loc[key] if key in found.index else None
        lines[f"{n} x {queue or n}" + (", in a graph" if graph else "")] = [
            f"{goal:g}",
            "not measured" if got is None else f"{got.ms:.3g}",
            "" if goal_mb is None else f"{goal_mb:.0f}",
            "" if got is None else f"{got.extra_mb:.0f}",
            "" if got is None else got.share,
        ]
    columns = ["goal, ms", "ms", "goal, MB", "MB", "of the products' rate"]
    cells = pd.DataFrame.from_dict(lines, orient="index", columns=columns)
    return Table("Goals", cells, corner="HEXLoss, bfloat16, D = 128")


def by_method(title: str, unit: str, cases: pd.DataFrame, cell: Callable[[Any], str]) -> Table:
    """A line for each method, a column for each batch."""
    found = cases.assign(cell=[cell(r) for r in cases.itertuples()])
    cells = found.pivot_table(
        index="name", columns=BATCH, values="cell", aggfunc="last", sort=False
    )
    cells = cells.sort_index(axis=1).fillna("").astype(str)
    cells = cells[(cells != "").any(axis=1)]
    kinds = set(cells.columns.droplevel(["queue", "rows"])) if len(cells) else set()
    if len(kinds) == 1:  # once is enough
        title += ": {}, D = {}".format(*kinds.pop())
    several = bool(kinds)
    cells.columns = [
        f"{n} x {queue or n}" + (f", D {d}, {dtype}" if several else "")
        for dtype, d, queue, n in cells.columns
    ]
    skipped = found[found.skipped.notna()]
    notes = sorted({f"Left out: {r.method}: {r.skipped}" for r in skipped.itertuples()})
    return Table(title, cells, notes if cell is ms_and_mb else (), unit)


def ms_and_mb(r: Any) -> str:
    return "" if pd.isna(r.ms) else f"{r.ms:.3g}" + ("" if r.graph else f" ({number(r.extra_mb)})")


def host_ms(r: Any) -> str:
    return "" if pd.isna(r.ms) or r.graph else f"{r.host_ms:.2g}"


def lined(title: str, corner: str, lines: dict[str, dict[str, str]]) -> Table:
    """Of a dictionary a line."""
    return Table(title, pd.DataFrame.from_dict(lines, orient="index").fillna(""), corner=corner)


def kernels(cases: list[Record]) -> Table:
    """Where the time of a step goes."""
    lines: dict[str, dict[str, str]] = {}
    for r in sorted(cases, key=lambda r: (r["queue"], r["rows"])):
        for name, (_, us) in [*r["kernels_us"].items(), ("all", (0, r["all_us"]))]:
            lines.setdefault(name, {})[f"{r['rows']} x {r['queue'] or r['rows']}"] = number(us)
    if lines:
        lines["all"] = lines.pop("all")  # below the others
    kinds = sorted({f"{r['method']}, {r['dtype']}, D = {r['features']}" for r in cases})
    return lined(f"Kernels: {'; '.join(kinds)}", "us of a step", lines)


def errors(cases: list[Record]) -> Table:
    """A line for each batch, a column for each method."""
    lines: dict[str, dict[str, str]] = {}
    for r in cases:
        batch = f"{r['rows']} x {r['queue'] or r['rows']}, D {r['features']}, {r['dtype']}"
        both = f"{r['loss_error']:.1e}, {r['gradient_error']:.1e}"
        lines.setdefault(batch, {}).setdefault(r["method"], both)
    title = "Relative errors of the loss and of the gradient, against float64"
    return lined(title, "", lines)


def of_float32(cases: list[Record]) -> Table:
    """How exact float32 is, row by row, for many features."""
    kinds = {"max": "largest of a row's loss", "mean": "mean with its sign", "grad": "gradient"}
    title = "Errors in float32 by D, beside plain PyTorch in float32"
    return lined(title, "D", {
        f"{r['features']}, {r['loss']}": {
            f"{name}, {who}": f"{r[who][kind]:.1e}"
            for kind, name in kinds.items()
            for who in ("ours", "plain")
        }
        for r in cases
    })  # fmt: skip


def training(cases: list[Record]) -> Table:
    return lined("Within a training step", "SimCLR's step, bfloat16", {
        r["case"].partition(": ")[2]: {
            "step, ms": f"{r['step_ms']:.3g}", "loss, ms": f"{r['loss_ms']:.3g}",
            "share": f"{r['share_of_step']:.1%}", "step, MB": f"{r['step_extra_mb']:.0f}",
            "loss, MB": f"{r['loss_extra_mb']:.0f}",
        }
        for r in cases
    })  # fmt: skip


def checks(records: Sequence[Record]) -> Table:
    """What has no time: tests, sanitizers, repeats; and what failed."""
    lines = {}
    for r in records:
        if r.get("ok") is not None:
            state = "passed" if r.get("ok", True) else "FAILED"
            lines[r["case"]] = {"result": state, "it said": r.get("note", "").replace("|", "/")}
    return lined("Tests and runs", "", lines)


def not_reached(cases: Sequence[str]) -> str:
    """By step and batch."""
    batches = dict.fromkeys(", ".join(case.split(", ")[:2]) for case in cases)
    return f"Not reached: {'; '.join(batches)}."


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
    found = frame([r for r in records if "ms" in r], None)
    found = found[found["step"].isin(["sizes", "compiled"])]
    on = next(iter(found["on"].mode()), "")
    points = found.loc[found["on"] == on, ["name", "rows", "ms", "extra_mb"]]
    points.columns = ["method", "rows", "ms", "mb"]
    caption = f"{on}; bfloat16, D = 128; dotted: in a CUDA graph. In memory hex has one line"
    draw(points, STYLES, caption, file)
