# SPDX-License-Identifier: MIT
"""benchmarks/gpu.py without a GPU, at tiny sizes: it runs, goes on where it was, and tells."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu  # noqa: E402
import gpu_methods  # noqa: E402
import gpu_report  # noqa: E402
import gpu_steps  # noqa: E402
import peers  # noqa: E402
from gpu_steps import Case  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        "libasan" in os.environ.get("LD_PRELOAD", ""),
        reason="under AddressSanitizer memory and time are mostly the sanitizer's",
    ),
    # gpu.py forks before torch is there; here it is, and NumPy has threads
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
REHEARSAL = ["--device", "cpu", "--smoke"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(gpu_methods, "SAMPLES", 2)
    monkeypatch.setattr(gpu_methods, "SAMPLE_MS", 1)
    monkeypatch.setattr(gpu_methods, "WARM_UP", 1)


def records(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return {r["case"]: r for r in map(json.loads, lines)}


def test_every_step_but_the_programs_runs_and_the_report_has_it(tmp_path, capsys):
    steps = ["roofline", "sizes", "dtypes", "features", "queue", "repeats", "report"]
    assert gpu.main([*steps, *REHEARSAL, "--out", str(tmp_path)]) == 0
    found = records(tmp_path)
    ours = found["sizes: 192 x 192 x 24, bfloat16, hex HEXLoss"]
    assert ours["ms"] > 0 and ours["host_ms"] > 0 and ours["extra_mb"] >= 0
    assert ours["loss_error"] < 1e-5 and len(ours["samples_ms"]) == 2
    assert ours["flop"] == 2 * 192 * 192 * 24 * 5
    assert found["not reached"]["cases"] == []
    text = (tmp_path / "report.md").read_text()
    for line in ("| 65536 x 65536 | 13 | not measured | 67 |", "authors' form, eager", "0 differ"):
        assert line in text
    assert (tmp_path / "time.png").stat().st_size > 1000

    capsys.readouterr()  # again: all is there
    assert gpu.main([*steps, *REHEARSAL, "--out", str(tmp_path)]) == 0
    again = capsys.readouterr().out
    assert "sizes" not in again and "report: " in again


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_case_that_hangs_crashes_or_is_deaf_costs_its_limit_and_no_more(
    tmp_path, monkeypatch, capsys
):
    child = tmp_path / "child"

    def hangs():
        child.write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
        time.sleep(1000)

    def deaf():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    work = {"hangs": hangs, "crashes": os.abort, "deaf": deaf, "lost": lost, "right": dict}

    def planted(options):
        for name, what in work.items():
            yield Case(f"sizes: {name}", 1, what)
            yield Case(f"sizes: after {name}", 60, lambda: {"process": os.getpid()})

    monkeypatch.setitem(gpu_steps.STEPS, "sizes", planted)
    arguments = ["sizes", "report", *REHEARSAL, "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1  # a case that is waited for ends this test by its timeout
    found = records(tmp_path)
    for name in ("hangs", "deaf"):
        assert found[f"sizes: {name}"]["note"] == "not done within 1 s"
        assert f" in {name}" in "".join(found[f"sizes: {name}"]["output"])  # where it was
    assert not alive(int(child.read_text()))
    assert "SIGABRT" in found["sizes: crashes"]["note"]
    assert "illegal memory access" in found["sizes: lost"]["note"]
    assert len({found[f"sizes: after {name}"]["process"] for name in work}) == 5 - 1
    assert "failed: sizes: hangs" in capsys.readouterr().err
    assert "| sizes: deaf | FAILED |" in (tmp_path / "report.md").read_text()

    monkeypatch.setitem(work, "hangs", lambda: {"ok": True})  # what failed is tried again
    assert gpu.main(arguments) == 1
    again = capsys.readouterr()
    assert "failed: sizes: hangs" not in again.err and "failed: sizes: deaf" in again.err
    assert "after" not in again.out


def test_it_ends_in_time_whatever_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    hang = [True]

    def planted(options):
        yield Case("queue: first", 600, dict)
        yield Case(
            "queue: 256 x 512, bfloat16, slow", 600, lambda: time.sleep(1000 * hang[0]) or {}
        )

    monkeypatch.setitem(gpu_steps.STEPS, "queue", planted)
    arguments = ["queue", "report", *REHEARSAL, "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--seconds", "10"]) == 3  # not after the 600 s of its limit
    assert "Not reached: queue: 256 x 512, bfloat16." in capsys.readouterr().err
    assert "Not reached: queue: 256 x 512" in (tmp_path / "report.md").read_text()
    assert "queue: first" in records(tmp_path)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"on": "the machine went away')
    hang[0] = False
    assert gpu.main(arguments) == 0
    assert "Not reached" not in (tmp_path / "report.md").read_text()
    again = gpu.Results(tmp_path).records
    assert {case for _, case in again} >= {"queue: first", "queue: 256 x 512, bfloat16, slow"}


def test_another_loss_than_the_reference_s_is_a_failure(tmp_path, monkeypatch, capsys):
    wrong = gpu_methods.METHODS[0]._replace(build=gpu_methods.METHODS[2].build)  # InfoNCE
    monkeypatch.setattr(gpu_methods, "METHODS", (wrong,))
    arguments = ["sizes", *REHEARSAL, "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert "failed: sizes: 160 x 160 x 24, bfloat16, hex HEXLoss" in capsys.readouterr().err


def test_without_a_device_it_says_so(tmp_path, monkeypatch, capsys):
    def start(options):
        raise SystemExit("no CUDA kernels: there is no GPU")

    monkeypatch.setattr(gpu_steps, "start", start)
    assert gpu.main(["sizes", "--out", str(tmp_path)]) == 1
    assert "no CUDA kernels: there is no GPU" in capsys.readouterr().err


def test_the_results_of_each_machine_have_their_part(tmp_path, monkeypatch):
    monkeypatch.setitem(
        gpu_steps.STEPS, "sizes", lambda options: iter([Case("sizes: a", 60, dict)])
    )
    other = gpu.Results(tmp_path)
    other.on = "another card"
    about = {"card": "X1", "card_gb": 2, "driver": "1", "torch": "2", "cuda": "13", "hex": "0"}
    other.add("machine", about)
    other.add("sizes: a", {"ok": False, "note": "of the other"})
    assert gpu.main(["sizes", "report", *REHEARSAL, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("X1, 2 GB") and text.count("**Goals**") == 2
    assert "| sizes: a | FAILED | of the other |" in text


def test_the_sanitizers_calls_reach_every_operator():
    gpu_methods.calls("cpu")


def test_the_loss_has_its_share_of_a_training_step():
    name = gpu_methods.INFO_NCE.name
    found = gpu_methods.training_step(name, "small", 4, "cpu")
    assert 0 < found["loss_ms"] and 0 < found["share_of_step"] < 1


def test_the_authors_form_is_the_released_one():
    for queue in (0, 300):
        shape = gpu_methods.Shape(160, queue, 24, "float32")
        batch, method = gpu_methods.batch_of(shape, "cpu"), gpu_methods.AUTHORS
        found = gpu_methods.check(
            method, batch, method.step(batch)(), peers.truth(batch, method.loss)
        )
        assert found["loss_error"] < 1e-5


def test_the_report_replaces_what_stands_between_its_marks(tmp_path):
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    (docs / "cuda.md").write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n")
    gpu_report.write([], tmp_path)
    for _ in range(2):
        gpu_report.into_docs(tmp_path, docs)
        text = (docs / "cuda.md").read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("13 | not measured") == 1


def test_without_results_the_report_is_of_the_record_which_the_documents_show(tmp_path):
    assert gpu.main(["report", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for title in ("Goals", "Time and memory by rows", "Kernels", "Relative errors", "by D"):
        assert re.search(rf"\*\*.*{title}.*\*\*\n\n\|", text), title
    shown = (gpu_steps.ROOT / "docs/cuda.md").read_text()
    assert f"{gpu_report.BEGIN}\n{text}" in shown


def test_the_record_names_no_place_of_the_machine():
    text = gpu_report.RECORD.read_text()
    assert not re.search(r'[" ]/\w|uuid|pci', text)
    records = gpu_report.read(text)
    assert len(records) == len(text.splitlines())
    for on in {on for on, _ in records}:
        assert records[on, "machine"].keys() >= {"date", "card", "driver", "torch", "commit"}
