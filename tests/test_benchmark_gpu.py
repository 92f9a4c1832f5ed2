# SPDX-License-Identifier: MIT
"""benchmarks/gpu.py without a GPU, at tiny sizes: it runs, goes on where it was, and tells."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("pandas")  # with matplotlib, of the extra `benchmarks`
pictures = pytest.importorskip("PIL.Image")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_report  # noqa: E402
import peers  # noqa: E402
from gpu_cases import Case  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        "libasan" in os.environ.get("LD_PRELOAD", ""),
        reason="under AddressSanitizer memory and time are mostly the sanitizer's",
    ),
    # the process that measures is forked, and NumPy has threads
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
REHEARSAL = ["--device", "cpu", "--smoke"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(gpu_cases, "SAMPLE_S", 1e-3)


def records(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    return {r["case"]: r for r in map(json.loads, lines)}


def test_every_step_but_the_programs_runs_and_the_report_has_it(tmp_path, capsys):
    steps = ["roofline", "sizes", "dtypes", "features", "queue", "report"]
    assert gpu.main([*steps, *REHEARSAL, "--out", str(tmp_path)]) == 0
    found = records(tmp_path)
    ours = found["sizes: 192 x 192 x 24, bfloat16, hex HEXLoss"]
    assert ours["low_ms"] <= ours["ms"] <= ours["high_ms"] and ours["low_ms"] > 0
    assert ours["host_ms"] > 0 and ours["extra_mb"] >= 0 and ours["loss_error"] < 1e-5
    assert ours["flop"] == 2 * 192 * 192 * 24 * 5
    assert found["not reached"]["cases"] == []
    text = (tmp_path / "report.md").read_text()
    for line in ("| 65536 x 65536 | 13 | not measured | 67 |", "authors' form, eager"):
        assert line in text
    assert (tmp_path / "report.png").stat().st_size > 1000

    capsys.readouterr()  # again: all is there
    assert gpu.main([*steps, *REHEARSAL, "--out", str(tmp_path)]) == 0
    again = capsys.readouterr().out
    assert "sizes" not in again and "report: " in again


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def hangs(folder):
    (folder / "child").write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
    if not (folder / "mended").exists():
        time.sleep(1000)
    return {"ok": True}


def deaf(folder):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def crashes(folder):
    for file in Path("/proc/self/fd").iterdir():
        if int(file.name) > 2 and file.exists() and file.resolve().name == "log.txt":
            os.close(int(file.name))  # as an inherited pipe of the same number does when it goes
    os.abort()


def lost(folder):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def process(folder):
    return {"process": os.getpid()}


def test_a_case_that_hangs_crashes_or_is_deaf_costs_its_limit_and_no_more(
    tmp_path, monkeypatch, capsys
):
    planted = (hangs, crashes, deaf, lost, process)

    def cases(options):
        for work in planted:
            name = work.__name__
            yield Case(f"sizes: {name}", 1, functools.partial(work, tmp_path))
            yield Case(f"sizes: after {name}", 60, functools.partial(process, tmp_path))

    monkeypatch.setitem(gpu_cases.STEPS, "sizes", cases)
    arguments = ["sizes", "report", *REHEARSAL, "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1  # a case that is waited for ends this test by its timeout
    found = records(tmp_path)
    for name in ("hangs", "deaf"):
        assert found[f"sizes: {name}"]["note"] == "not done within 1 s"
        assert f" in {name}" in "".join(found[f"sizes: {name}"]["output"])  # where it was
    assert not alive(int((tmp_path / "child").read_text()))
    assert "Aborted" in "".join(found["sizes: crashes"]["output"])
    assert "illegal memory access" in found["sizes: lost"]["note"]
    after = {found[f"sizes: after {work.__name__}"]["process"] for work in planted}
    assert len(after) == len(planted) - 1  # none after the last
    assert "failed: sizes: hangs" in capsys.readouterr().err
    assert "| sizes: deaf | FAILED |" in (tmp_path / "report.md").read_text()

    (tmp_path / "mended").touch()  # what failed is tried again
    assert gpu.main(arguments) == 1
    again = capsys.readouterr()
    assert "failed: sizes: hangs" not in again.err and "failed: sizes: deaf" in again.err
    assert "after" not in again.out


def test_it_ends_in_time_whatever_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    def cases(options):
        yield Case("queue: first", 600, dict)
        slow = functools.partial(hangs, tmp_path)
        yield Case("queue: 256 x 512, bfloat16, slow", 600, slow)

    monkeypatch.setitem(gpu_cases.STEPS, "queue", cases)
    arguments = ["queue", "report", *REHEARSAL, "--out", str(tmp_path)]
    assert gpu.main([*arguments, "--seconds", "5"]) == 3  # not after the 600 s of its limit
    assert "Not reached: queue: 256 x 512, bfloat16." in capsys.readouterr().err
    assert "Not reached: queue: 256 x 512" in (tmp_path / "report.md").read_text()
    assert "queue: first" in records(tmp_path)
    assert not alive(int((tmp_path / "child").read_text()))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"on": "the machine went away')
    (tmp_path / "mended").touch()
    assert gpu.main(arguments) == 0
    assert "Not reached" not in (tmp_path / "report.md").read_text()
    again = gpu.Results(tmp_path).records
    assert {case for _, case in again} >= {"queue: first", "queue: 256 x 512, bfloat16, slow"}


def test_another_loss_than_the_reference_s_is_a_failure(tmp_path, monkeypatch, capsys):
    wrong = peers.HEX._replace(build=peers.INFO_NCE.build)
    monkeypatch.setattr(peers, "GPU_METHODS", (wrong,))
    sizes = [(160, 0, 24)], [(160, 0, 24)], (wrong,), ["bfloat16"]
    monkeypatch.setitem(gpu_cases.MEASURED, "sizes", sizes)
    arguments = ["sizes", *REHEARSAL, "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert "failed: sizes: 160 x 160 x 24, bfloat16, hex HEXLoss" in capsys.readouterr().err


def test_without_a_device_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["sizes", "--out", str(tmp_path)]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_the_results_of_each_machine_have_their_part(tmp_path, monkeypatch):
    cases = [Case("sizes: a", 60, dict)]
    monkeypatch.setitem(gpu_cases.STEPS, "sizes", lambda options: iter(cases))
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
    gpu_cases.calls("cpu")


def test_the_loss_has_its_share_of_a_training_step():
    found = gpu_cases.training_step(peers.PLAIN_HEX.name, "small", 4, "cpu")
    assert 0 < found["loss_ms"] and 0 < found["share_of_step"] < 1


def test_without_results_the_report_is_of_the_record_which_the_documents_show(tmp_path):
    assert gpu.main(["report", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    for title in ("Goals", "Time and memory by rows", "Kernels", "Relative errors", "by D"):
        assert re.search(rf"\*\*.*{title}.*\*\*\n\n\|", text), title
    shown = gpu_report.DOCUMENT.read_text()
    assert f"<!-- gpu -->\n{text}<!-- end -->" in shown, "run gpu.py report --docs"
    with (
        pictures.open(gpu_report.PICTURE) as picture,
        pictures.open(tmp_path / "report.png") as ours,
    ):
        assert picture.info["Figures"] == ours.info["Figures"], "run gpu.py report --docs"


def test_the_report_replaces_what_stands_in_the_document(tmp_path, monkeypatch):
    document = tmp_path / "cuda.md"
    document.write_text("before\n<!-- gpu -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(gpu_report, "DOCUMENT", document)
    monkeypatch.setattr(gpu_report, "PICTURE", tmp_path / "images" / "gpu.png")
    assert gpu.main(["report", "--docs", "--out", str(tmp_path)]) == 0
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("**Goals**") == 1
    assert (tmp_path / "images" / "gpu.png").exists()


def test_the_record_names_no_place_of_the_machine():
    text = gpu_report.RECORD.read_text()
    assert not re.search(r'[" ]/\w|uuid|pci', text)
    records = gpu_report.read(text)
    assert len(records) == len(text.splitlines())
    for on in {on for on, _ in records}:
        assert records[on, "machine"].keys() >= {"date", "card", "driver", "torch", "commit"}
