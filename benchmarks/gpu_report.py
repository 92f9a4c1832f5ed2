# SPDX-License-Identifier: MIT
"""What gpu.py measured, as tables in Markdown and pictures: report.md, time.png, memory.png.

A part for each machine. Nothing is imported that needs torch: gpu.py calls this where the device is
not.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import table

Record = dict[str, Any]
HEX = "hex HEXLoss"
# What was aimed at before anything ran: ms of HEXLoss in half precision at D = 128, by (rows,
# queue, in a graph).
GOALS = {
    (1024, 0, True): 0.035,
    (4096, 0, True): 0.060,
    (8192, 0, True): 0.210,
    (32768, 0, False): 3.2,
    (65536, 0, False): 13.0,
    (4096, 65536, False): 0.8,
}
RECORD = Path(__file__).parent / "gpu_results.jsonl"  # of the tables in docs/cuda.md
GOAL_MB = {(65536, 0, False): 64 * 1.048576}
BEGIN, END = "<!-- measured: begin, by benchmarks/gpu.py -->", "<!-- measured: end -->"


def read(text: str) -> dict[tuple[str, str], Record]:
    """The records by machine and case; of a case that is there twice the last one."""
    records = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError):  # cut off, or of an older form
            record = json.loads(line)
            records[record["on"], record["case"]] = record
    return records


def write(records: Sequence[Record], folder: Path) -> list[Path]:
    """The files made."""
    machines = [r["on"] for r in records if r["case"] == "machine"] or [""]
    text = folder / "report.md"
    made = [parts([r for r in records if r["on"] == on]) for on in machines]
    text.write_text("\n\n".join(part for of_one in made for part in of_one if part) + "\n")
    most = max(machines, key=lambda on: sum(r["on"] == on for r in records))
    return [text, *pictures([r for r in records if r["on"] == most], most, folder)]


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


def parts(records: Sequence[Record]) -> Iterator[str]:
    """Of one machine."""
    by_case = {r["case"]: r for r in records}
    rate = by_case.get("roofline: roofline", {})
    if "machine" in by_case:
        checked = any("ms" in r and "loss_error" in r for r in records)
        yield machine(by_case["machine"], rate, checked)
    cases = [r for r in records if "ms" in r or "skipped" in r]
    yield goals(cases, rate.get("tflops"))
    sizes = of_steps(cases, "sizes", "compiled")
    yield by_method("Time and memory by rows", "ms (MB)", sizes, ms_and_mb)
    yield by_method("What the host takes for a call", "ms", sizes, host_ms)
    yield kernels([r for r in records if "kernels_us" in r])
    of_rate = functools.partial(share, tflops=rate.get("tflops"))
    yield by_method(
        "The products' share, at that rate", "", of_steps(cases, "sizes", "queue"), of_rate
    )
    for title, step in (
        ("A queue", "queue"),
        ("Other numbers of features", "features"),
        ("Other dtypes", "dtypes"),
    ):
        yield by_method(title, "ms (MB)", of_steps(cases, step), ms_and_mb)
    yield errors([r for r in records if "loss_error" in r and r["rows"] <= 1024])
    yield of_float32([r for r in records if r["case"].startswith("float32: ")])
    yield training([r for r in records if "step_ms" in r])
    yield checks(records)
    yield not_reached(by_case.get("not reached", {}).get("cases", []))


def of_steps(cases: Iterable[Record], *steps: str) -> list[Record]:
    return [r for r in cases if r["case"].partition(":")[0] in steps]


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
        "\n\nTimes are of forward and backward together, in ms, the median of samples by CUDA "
        "events. Memory is what a call takes at most beside its inputs. Plain is eager PyTorch, "
        "which widens half precision to float32 before it multiplies."
    )
    first = " Each method was first checked against hex.reference in float64 where N x N fits."
    return text + first * checked


def goals(cases: list[Record], tflops: float | None) -> str:
    """The goal beside what was measured, and the time of the products alone beside that."""
    found = {
        (r["rows"], r["queue"], r["graph"]): r
        for r in cases
        if "ms" in r and (r["method"], r["dtype"], r["features"]) == (HEX, "bfloat16", 128)
    }
    rows = []
    for key, goal in GOALS.items():
        n, queue, graph = key
        got = found.get(key, {})
        rows.append([
            f"{n} x {queue or n}" + (", in a graph" if graph else ""),
            f"{goal:g}",
            f"{got['ms']:.3g}" if got else "not measured",
            f"{GOAL_MB[key]:.0f}" if key in GOAL_MB else "",
            f"{got['extra_mb']:.0f}" if got else "",
            share(got, tflops),
        ])  # fmt: skip
    columns = ["HEXLoss, bfloat16, D = 128", "goal, ms", "ms", "goal, MB", "MB"]
    return table.markdown(table.Table("Goals", [*columns, "of the products' rate"], rows, []))


def by_method(title: str, unit: str, cases: list[Record], cell: Callable[[Record], str]) -> str:
    """A line for each method, a column for each batch, the smaller first."""

    def batch_of(r: Record) -> tuple[Any, ...]:
        return r["dtype"], r["features"], r["queue"], r["rows"]

    batches = sorted({batch_of(r) for r in cases})
    lines = []
    for method, graph in dict.fromkeys((r["method"], r["graph"]) for r in cases):
        found = {
            batch_of(r): cell(r) for r in cases if (r["method"], r["graph"]) == (method, graph)
        }
        if any(found.values()):
            name = method + (", in a graph" if graph else "")
            lines.append([name, *(found.get(batch, "") for batch in batches)])
    if not lines:
        return ""
    kinds = {batch[:2] for batch in batches}
    if len(kinds) == 1:  # once is enough
        title += f": {batches[0][0]}, D = {batches[0][1]}"
    columns = [
        f"{n} x {queue or n}" + (f", D {d}, {dtype}" if len(kinds) > 1 else "")
        for dtype, d, queue, n in batches
    ]
    skipped = sorted({f"{r['method']}: {r['skipped']}" for r in cases if "skipped" in r})
    notes = [f"Left out: {line}" for line in skipped if cell is ms_and_mb]
    return table.markdown(table.Table(title, [unit, *columns], lines, notes))


def ms_and_mb(r: Record) -> str:
    if "ms" not in r:
        return ""
    return f"{r['ms']:.3g}" + ("" if r["graph"] else f" ({table.number(r['extra_mb'])})")


def host_ms(r: Record) -> str:
    return f"{r['host_ms']:.2g}" if "ms" in r and not r["graph"] else ""


def share(r: Record, tflops: float | None) -> str:
    """Of the time, that the products would take at the rate of a large one."""
    return f"{r['flop'] / tflops / 1e9 / r['ms']:.0%}" if "flop" in r and tflops else ""


def kernels(cases: list[Record]) -> str:
    """Where the time of a step goes."""
    cases = sorted(cases, key=lambda r: (r["queue"], r["rows"]))
    names = dict.fromkeys(name for r in cases for name in r["kernels_us"])
    lines = [
        [name, *(table.number(r["kernels_us"].get(name, [0, None])[1]) for r in cases)]
        for name in names
    ]
    if not lines:
        return ""
    lines.append(["all", *(table.number(r["all_us"]) for r in cases)])
    columns = ["us of a step", *(f"{r['rows']} x {r['queue'] or r['rows']}" for r in cases)]
    kinds = sorted({f"{r['method']}, {r['dtype']}, D = {r['features']}" for r in cases})
    return table.markdown(table.Table(f"Kernels: {'; '.join(kinds)}", columns, lines, []))


def errors(cases: list[Record]) -> str:
    """A line for each batch, a column for each method."""
    found: dict[str, dict[str, str]] = {}
    for r in cases:
        batch = f"{r['rows']} x {r['queue'] or r['rows']}, D {r['features']}, {r['dtype']}"
        both = f"{r['loss_error']:.1e}, {r['gradient_error']:.1e}"
        found.setdefault(batch, {}).setdefault(r["method"], both)
    methods = list(dict.fromkeys(r["method"] for r in cases))
    lines = [[batch, *(of.get(method, "") for method in methods)] for batch, of in found.items()]
    title = "Relative errors of the loss and of the gradient, against float64"
    return table.markdown(table.Table(title, ["", *methods], lines, [])) if lines else ""


def of_float32(cases: list[Record]) -> str:
    """How exact float32 is, row by row, for many features."""
    lines = [
        [f"{r['features']}, {r['loss']}"]
        + [f"{r[who][what]:.1e}" for what in ("max", "mean", "grad") for who in ("ours", "plain")]
        for r in cases
    ]
    columns = ["D", "largest of a row's loss, ours", "plain", "mean with its sign, ours", "plain"]
    columns += ["gradient, ours", "plain"]
    title = "Errors in float32 by D, beside plain PyTorch in float32"
    return table.markdown(table.Table(title, columns, lines, [])) if lines else ""


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


def checks(records: Iterable[Record]) -> str:
    """What has no time: tests, sanitizers, repeats, training runs; and what failed."""
    rows = []
    for r in records:
        if r.get("ok") is not None or "knn" in r:
            said = r.get("note", "")
            if "knn" in r:
                said = f"k-NN {r['knn']:.2%}, linear {r['linear']:.2%}"
            state = "passed" if r.get("ok", True) else "FAILED"
            rows.append([r["case"], state, said.replace("|", "/")])
    return table.markdown(table.Table("Tests and runs", ["", "", ""], rows, [])) if rows else ""


def not_reached(cases: Sequence[str]) -> str:
    """By step and batch."""
    batches = dict.fromkeys(", ".join(case.split(", ")[:2]) for case in cases)
    return f"Not reached: {'; '.join(batches)}." if cases else ""


def pictures(records: Sequence[Record], on: str, folder: Path) -> list[Path]:
    """Time and memory against N, by method; dotted in a graph."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [r for r in of_steps(records, "sizes", "compiled") if "ms" in r]
    ticks = sorted({r["rows"] for r in cases})
    colours = {
        name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(r["method"] for r in cases))
    }
    made = []
    for name, key, unit in (("time", "ms", "ms"), ("memory", "extra_mb", "MB beside the inputs")):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        for method, graph in dict.fromkeys((r["method"], r["graph"]) for r in cases):
            if graph and name == "memory":
                continue  # the same
            of = [r for r in cases if (r["method"], r["graph"]) == (method, graph)]
            points = sorted((r["rows"], r[key]) for r in of)
            style = ":" if graph else "-o" if method.startswith("hex ") else "--s"
            # those on top of each other are all seen: the later the thinner
            width = max(1, 4 - list(colours).index(method)) if name == "memory" else 1.5
            label = None if graph else method
            axes.plot(
                *zip(*points, strict=True), style, color=colours[method], label=label,
                linewidth=width, markersize=2.5 * width,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="N = 2B", ylabel=unit)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(on + ("; dotted: in a CUDA graph" if name == "time" else ""), fontsize=9)
        axes.grid(True, alpha=0.3)
        if cases:
            axes.legend(fontsize=9, loc="upper left")
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=150)
        pyplot.close(figure)
    return made
