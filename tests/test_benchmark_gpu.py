# SPDX-License-Identifier: MIT
"""bench.py --gpu without a GPU, at tiny sizes: it runs, goes on where it was, and tells."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("pandas")  # with matplotlib, of the extra `benchmarks`

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import bench  # noqa: E402
import measure  # noqa: E402
import parts  # noqa: E402
import peers  # noqa: E402
import worker  # noqa: E402
from worker import Results, Work  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        "libasan" in os.environ.get("LD_PRELOAD", ""),
        reason="under AddressSanitizer memory and time are mostly the sanitizer's",
    ),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),  # NumPy has threads
]


def rehearsal(folder):
    return ["--gpu", "--device", "cpu", "--smoke", "--record", str(folder / "gpu.jsonl")]


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """The process has what is planted here."""
    monkeypatch.setattr(worker, "START_METHOD", "fork")
    monkeypatch.setattr(measure, "TURN_S", 1e-4)


def records(folder):
    lines = (folder / "gpu.jsonl").read_text().splitlines()
    return {r["name"]: r for r in map(json.loads, lines)}


def test_every_part_runs_and_the_tables_have_it(tmp_path, capsys):
    steps = ["sizes", "dtypes", "features", "queue", "compiled"]
    assert bench.main([*steps, *rehearsal(tmp_path)]) == 0
    found = records(tmp_path)
    (ours,) = found["sizes: 1024 x 1024, hex HEXLoss"]["results"]
    assert len(ours["ms"]) == 10 and min(ours["ms"]) > 0
    assert ours["peak_mb"] >= 0 and ours["loss_error"] < 1e-5
    text = (tmp_path / "gpu.md").read_text()
    for line in ("|  | 512 x 512 | 1024 x 1024 |", "| authors' form, eager |", "### features"):
        assert line in text

    capsys.readouterr()  # again: all is there
    assert bench.main([*steps, *rehearsal(tmp_path)]) == 0
    assert "sizes: " not in capsys.readouterr().out


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
        if int(file.name) > 2 and file.exists() and file.resolve().name == "gpu.log":
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
            yield Work(f"sizes: {name}", 1, functools.partial(work, tmp_path))
            yield Work(f"sizes: after {name}", 60, functools.partial(process, tmp_path))

    monkeypatch.setattr(parts, "works", cases)
    signal.signal(signal.SIGABRT, signal.SIG_DFL)  # as a library may, after faulthandler's handler
    arguments = ["sizes", *rehearsal(tmp_path)]
    assert bench.main(arguments) == 1  # a case that is waited for ends this test by its timeout
    found = records(tmp_path)
    for name in ("hangs", "deaf"):
        assert found[f"sizes: {name}"]["note"] == "not done within 1 s"
        assert f" in {name}" in "".join(found[f"sizes: {name}"]["output"])  # where it was
    assert not alive(int((tmp_path / "child").read_text()))
    assert "Aborted" in "".join(found["sizes: crashes"]["output"])
    assert "illegal memory access" in found["sizes: lost"]["note"]
    after = {found[f"sizes: after {work.__name__}"]["process"] for work in planted}
    assert len(after) == len(planted) - 1  # none after the last
    assert "sizes: hangs  FAILED: not done within 1 s\n" in capsys.readouterr().out
    assert "sizes: deaf failed: not done within 1 s." in (tmp_path / "gpu.md").read_text()

    (tmp_path / "mended").touch()  # what failed is tried again
    assert bench.main(arguments) == 1
    again = capsys.readouterr().out
    assert "sizes: hangs\n" in again and "sizes: deaf  FAILED" in again
    assert "after" not in again


def test_it_ends_in_time_whatever_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    def cases(options):
        yield Work("queue: first", 600, dict)
        slow = functools.partial(hangs, tmp_path)
        yield Work("queue: 256 x 512, bfloat16, slow", 600, slow)

    monkeypatch.setattr(parts, "works", cases)
    arguments = ["queue", *rehearsal(tmp_path)]
    assert bench.main([*arguments, "--seconds", "5"]) == 3  # not after the 600 s of its limit
    assert "not reached: queue: 256 x 512, bfloat16, slow" in capsys.readouterr().err
    assert "queue: first" in records(tmp_path)
    assert not alive(int((tmp_path / "child").read_text()))
    with (tmp_path / "gpu.jsonl").open("a") as file:
        file.write('{"on": "the machine went away')
    (tmp_path / "mended").touch()
    assert bench.main(arguments) == 0
    assert "not reached" not in capsys.readouterr().err
    again = {case for _, case in Results(tmp_path / "gpu.jsonl").records}
    assert again >= {"queue: first", "queue: 256 x 512, bfloat16, slow"}


def test_another_loss_than_the_reference_s_is_a_failure(tmp_path, monkeypatch, capsys):
    wrong = peers.HEX._replace(build=peers.INFO_NCE.build)
    monkeypatch.setitem(parts.GPU, "sizes", parts.Part([parts.shaped(160, 0, 24)], (wrong,)))
    assert bench.main(["sizes", *rehearsal(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "160 x 160, D 24, bfloat16, hex HEXLoss  FAILED: Mismatch: hex HEXLoss: got a" in printed


def test_without_a_device_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--gpu", "sizes", "--record", str(tmp_path / "gpu.jsonl")]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_the_results_of_another_machine_are_not_this_one_s(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "works", lambda options: [Work("sizes: a", 60, dict)])
    other = Results(tmp_path / "gpu.jsonl")
    other.on = "another card"
    other.add("machine", {"memory": "2 GB", "date": "2000-01-01"})
    other.add("sizes: a", {"asked": "", "notes": ["of the other"]})
    before = other.file.read_text()
    assert bench.main(["sizes", *rehearsal(tmp_path)]) == 0
    assert "another card" not in (tmp_path / "gpu.md").read_text()
    text = other.file.read_text()
    assert text.startswith(before) and text.count('"sizes: a"') == 2
