# SPDX-License-Identifier: MIT
"""What gpu.py measured, as tables in Markdown and pictures: report.md, time.png, memory.png."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import table
from gpu_methods import COMPILED, HEX, IN_A_GRAPH, INFO_NCE, METHODS, OURS

Record = dict[str, Any]
# What was aimed at before anything ran: ms of HEXLoss in half precision at D = 128, in a graph up
# to 8192 rows, by (rows, queue).
GOALS = {
    (1024, 0): 0.035,
    (4096, 0): 0.060,
    (8192, 0): 0.210,
    (32768, 0): 3.2,
    (65536, 0): 13.0,
    (4096, 65536): 0.8,
}
GOAL_MB = {(65536, 0): 64 * 1.048576}
BEGIN, END = "<!-- measured: begin, by benchmarks/gpu.py -->", "<!-- measured: end -->"


def write(records: dict[str, Record], folder: Path) -> list[Path]:
    """The files made."""
    text = folder / "report.md"
    text.write_text("\n\n".join(part for part in parts(records) if part) + "\n")
    return [text, *pictures(records, folder)]


def into_docs(folder: Path, docs: Path) -> list[Path]:
    """Puts the report between the marks in docs/cuda.md, and the pictures into docs/images."""
    file = docs / "cuda.md"
    head, begin, rest = file.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{file}: {BEGIN} and {END} are not there")
    text = (folder / "report.md").read_text()
    made = [file]
    for name in ("time", "memory"):
        if (folder / f"{name}.png").exists():
            made.append(Path(shutil.copy(folder / f"{name}.png", docs / f"images/gpu_{name}.png")))
            text += f"\n![{name} against N](images/gpu_{name}.png)\n"
    file.write_text(f"{head}{BEGIN}\n{text}{END}{tail}")
    return made


def parts(records: dict[str, Record]) -> Iterable[str]:
    yield machine(records)
    cases = [r for r in records.values() if "method" in r]
    yield goals(cases)
    for title, *steps in (
        ("Time and memory by rows", "sizes", "compiled"),
        ("Other dtypes", "dtypes"),
        ("Other numbers of features", "features"),
        ("A queue", "queue"),
    ):
        yield by_method(title, of_steps(cases, *steps))
    yield training([r for r in records.values() if "step_ms" in r])
    yield checks(records)


def of_steps(cases: Iterable[Record], *steps: str) -> list[Record]:
    return [r for r in cases if r["case"].partition(":")[0] in steps]


def machine(records: dict[str, Record]) -> str:
    m = records.get("build: machine")
    if m is None:
        return ""
    r = records.get("roofline: roofline", {})
    where = f"{m['card']}, {m['card_gb']:.0f} GB, driver {m['driver']}" if "card" in m else m["cpu"]
    text = f"{where}; torch {m['torch']} (CUDA {m['cuda']}), hex-ssl {m['hex']}."
    if r:
        text += (
            f" It reaches {r['tflops']:.0f} TFLOP/s in a large bfloat16 product and "
            f"{r['copy_gb_s']:.0f} GB/s in a copy, read and written."
        )
    return text + (
        " Times are of forward and backward together, in ms, the median of samples by CUDA events; "
        "each method was first checked against hex.reference in float64 where N x N fits. Memory "
        "is what a call takes at most beside its inputs."
    )


def goals(cases: list[Record]) -> str:
    """The goal beside what was measured."""
    rows = []
    for (n, queue), goal in GOALS.items():
        graph = n <= IN_A_GRAPH and not queue
        found = [
            r
            for r in cases
            if r["method"] == HEX.name and (r["rows"], r["queue"]) == (n, queue)
            and r["dtype"] == "bfloat16" and r["features"] == 128 and r["graph"] == graph
        ]  # fmt: skip
        got = found[0] if found and "ms" in found[0] else {}
        most = GOAL_MB.get((n, queue))
        share = got.get("share_of_roofline")
        rows.append([
            f"{n} x {queue or n}" + (", in a graph" if graph else ""),
            f"{goal:g}",
            f"{got['ms']:.3g}" if got else "not measured",
            "" if most is None else f"{most:.0f}",
            f"{got['extra_mb']:.0f}" if got else "",
            "" if share is None else f"{share:.0%}",
        ])  # fmt: skip
    columns = [
        "HEXLoss, bfloat16, D = 128",
        "goal, ms",
        "ms",
        "goal, MB",
        "MB",
        "of the products' rate",
    ]
    return table.markdown(table.Table("Goals", columns, rows, []))


def by_method(title: str, cases: list[Record]) -> str:
    """A line for each method, a column for each batch: ms, MB where there is no graph."""
    if not cases:
        return ""

    def batch_of(r: Record) -> str:
        return f"{r['rows']} x {r['queue'] or r['rows']}, D {r['features']}, {r['dtype']}"

    batches = list(dict.fromkeys(map(batch_of, cases)))
    lines = []
    for method in (m.name for m in (*METHODS, *COMPILED)):
        for graph in (False, True):
            found = {batch_of(r): r for r in cases if (r["method"], r["graph"]) == (method, graph)}
            if not any("ms" in r for r in found.values()):
                continue
            lines.append([method + (", in a graph" if graph else ""), *(
                cell(found.get(batch), graph) for batch in batches
            )])  # fmt: skip
    skipped = sorted({f"{r['method']}: {r['skipped']}" for r in cases if "skipped" in r})
    notes = [f"Left out: {line}" for line in skipped]
    return table.markdown(table.Table(title, ["ms (MB)", *batches], lines, notes))


def cell(r: Record | None, graph: bool) -> str:
    if r is None or "ms" not in r:
        return (r or {}).get("skipped", "")[:40]
    return f"{r['ms']:.3g}" + ("" if graph else f" ({table.number(r['extra_mb'])})")


def training(cases: list[Record]) -> str:
    if not cases:
        return ""
    rows = [
        [r["case"].partition(": ")[2], f"{r['step_ms']:.3g}", f"{r['loss_ms']:.3g}",
         f"{r['share_of_step']:.1%}", f"{r['step_extra_mb']:.0f}", f"{r['loss_extra_mb']:.0f}"]
        for r in cases
    ]  # fmt: skip
    columns = ["SimCLR's step, bfloat16", "step, ms", "loss, ms", "share", "step, MB", "loss, MB"]
    return table.markdown(table.Table("Within a training step", columns, rows, []))


def checks(records: dict[str, Record]) -> str:
    """What has no time: tests, sanitizers, repeats, training runs."""
    rows = []
    for case, r in records.items():
        if r.get("ok") is not None or "knn" in r:
            said = r.get("note", "")
            if "knn" in r:
                said = f"k-NN {r['knn']:.2%}, linear {r['linear']:.2%}"
            rows.append([case, "passed" if r.get("ok", True) else "FAILED", said.replace("|", "/")])
    return table.markdown(table.Table("Tests and runs", ["", "", ""], rows, [])) if rows else ""


def pictures(records: dict[str, Record], folder: Path) -> list[Path]:
    """Time and memory against N, by method."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [r for r in of_steps(records.values(), "sizes", "compiled") if "ms" in r]
    made = []
    for name, key, unit in (("time", "ms", "ms"), ("memory", "extra_mb", "MB beside the inputs")):
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for method in (m.name for m in (*METHODS, *COMPILED)):
            points = sorted(
                (r["rows"], r[key]) for r in cases if r["method"] == method and not r["graph"]
            )
            if points:
                ours = any(method == m.name for m in OURS)
                style = "-o" if ours else "--s"
                width = 2 if method in (HEX.name, INFO_NCE.name) else 1
                axes.plot(
                    *zip(*points, strict=True), style, label=method, linewidth=width, markersize=3
                )
        axes.set(xscale="log", yscale="log", xlabel="N = 2B", ylabel=unit)
        axes.grid(True, alpha=0.3)
        if cases:
            axes.legend(fontsize=8)
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=150)
        pyplot.close(figure)
    return made
