# SPDX-License-Identifier: MIT
"""gpu.py without a GPU: what hangs, crashes or is deaf is ended and noted, the run goes on or ends
as it has to, and a record is gone on with.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import carried  # noqa: E402
import gpu  # noqa: E402
import gpu_stages  # noqa: E402
from gpu import Stage  # noqa: E402

PLANTED = ["hangs", "crashes", "deaf to SIGTERM", "leaves a child"]
CONFORMANCE = ["conformance 90a", "conformance 90"]


@pytest.fixture
def rehearsal(tmp_path):
    """Arguments of gpu.py, with libraries that stand in for those of nvcc."""
    folder = tmp_path / "carried"
    folder.mkdir()
    for name in ("cuda_90a.so", "cuda_90.so", "_C.abi3.so"):
        (folder / name).write_text(name)
    carried.write_manifest(folder, ["90a", "90"], "none")
    return ["--rehearse", "--record", str(tmp_path / "run.jsonl"), "--carried", str(folder)]


def records(folder):
    """Those of this card, by name, and all lines."""
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return {r["name"]: r for r in lines if r["on"].startswith("a CPU, ")}, lines


def left(folder):
    """Processes that a run with this record has started."""
    mark = f"HEX_GPU_RECORD={folder / 'run.jsonl'}".encode()
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes())
        except OSError:
            continue
    return found


def test_what_hangs_crashes_or_is_deaf_costs_its_limit_and_no_more(rehearsal, tmp_path):
    other = json.dumps({"on": "another card", "name": "manifest", "asked": "", "ok": True})
    (tmp_path / "run.jsonl").write_text(f"{other}\n")
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "manifest", *PLANTED, *rehearsal]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stdout  # nothing has failed but what was planted
    assert left(tmp_path) == []
    found, lines = records(tmp_path)
    assert lines[0] == json.loads(other)
    probes = [f"probe: {name}" for name in PLANTED[:3]]
    about = ["card", "manifest", "leaves a child", *CONFORMANCE, *probes]
    assert {*found} == {*about, *PLANTED}
    assert all(found[name]["ok"] for name in about[1:])
    notes = ("not done within 1 s", "ended with -6", "not done within 1 s", None)
    assert tuple(found[name].get("note") for name in PLANTED) == notes
    assert "Fatal Python error: Aborted" in found["hangs"]["output"]  # and where it was
    assert "hangs                   FAILED" in done.stdout
    assert all(r["on"].endswith(", a rehearsal") for r in found.values())

    again = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120)
    assert again.returncode == 0
    new = [r["name"] for r in records(tmp_path)[1][len(lines) :]]
    assert new == [x for pair in zip(PLANTED[:3], probes, strict=True) for x in pair]


def test_a_changed_library_ends_the_run(rehearsal, tmp_path, capsys):
    (tmp_path / "carried" / "cuda_90.so").write_text("another")
    assert gpu.main(rehearsal) == 1
    found, _ = records(tmp_path)
    assert [*found] == ["manifest"]
    assert "cuda_90.so is another file than was built" in "".join(found["manifest"]["output"])
    assert "not reached: battery" in capsys.readouterr().err


def test_libraries_are_looked_at_again_where_they_have_changed(rehearsal, tmp_path, plan):
    plan(Stage("manifest", 20, GOOD))
    for text, lines in (("cuda_90.so", 1), ("cuda_90.so", 1), ("another", 2)):
        (tmp_path / "carried" / "cuda_90.so").write_text(text)
        assert gpu.main(rehearsal) == 0
        assert len(records(tmp_path)[1]) == lines


def test_other_sources_are_found(rehearsal, tmp_path, monkeypatch):
    folder = tmp_path / "carried"
    assert [*carried.changed(folder)] == []
    monkeypatch.setattr(carried, "SOURCES", ("setup.py",))
    (folder / "_C.abi3.so").unlink()
    missing, others = carried.changed(folder)
    assert missing == "_C.abi3.so is missing" and "the sources in csrc/ are others" in others


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def plan(monkeypatch):
    """Sets the stages."""

    def set_up(*stages):
        monkeypatch.setattr(gpu, "stages", lambda *_: [*stages])
        monkeypatch.setattr(gpu, "planted", lambda: [])

    return set_up


GOOD, BAD = python(""), python("raise SystemExit('it is wrong')")
PRIMITIVES = [Stage(name, 20, GOOD) for name in CONFORMANCE]


def test_a_gate_that_fails_ends_the_run(rehearsal, tmp_path, plan, capsys):
    plan(*PRIMITIVES, Stage("battery", 20, BAD, gate=True), Stage("tests", 20, GOOD))
    assert gpu.main(rehearsal) == 1
    found, _ = records(tmp_path)
    assert [*found] == [*CONFORMANCE, "battery"]
    assert found["battery"]["output"] == ["it is wrong"]
    said = capsys.readouterr()
    assert (
        "stopped: the other stages rely on this one" in said.out
        and "not reached: tests" in said.err
    )

    plan(*PRIMITIVES, Stage("battery", 20, GOOD, gate=True), Stage("tests", 20, GOOD))
    assert gpu.main(rehearsal) == 0  # mended
    assert [*records(tmp_path)[0]] == [*CONFORMANCE, "battery", "tests"]


def test_a_device_that_does_not_answer_ends_the_run(rehearsal, tmp_path, plan, monkeypatch):
    monkeypatch.setitem(gpu.PROBES, "cpu", "raise SystemExit(1)")
    plan(*PRIMITIVES, Stage("goals", 20, BAD), Stage("tests", 20, GOOD))
    assert gpu.main(rehearsal) == 1
    assert [*records(tmp_path)[0]][2:] == ["goals", "probe: goals"]


@pytest.mark.parametrize("wrong, build", (((), "90a"), ((0,), "90"), ((0, 1), None)))
def test_the_first_library_with_right_primitives_serves_the_rest(
    rehearsal, tmp_path, plan, wrong, build
):
    primitives = [s._replace(command=BAD) if i in wrong else s for i, s in enumerate(PRIMITIVES)]
    plan(*primitives, Stage("tests", 20, GOOD))
    assert gpu.main(rehearsal) == bool(wrong)
    found, _ = records(tmp_path)
    assert found.get("tests", {}).get("build") == build


def test_on_a_card_the_library_goes_into_the_package(rehearsal, tmp_path, plan, monkeypatch):
    (tmp_path / "hex").mkdir()
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(carried, "asked_of_card", lambda field: "NVIDIA H200")
    monkeypatch.setitem(gpu.PROBES, "cuda", "")
    found = "import os; print(os.environ['HEX_CONFORMANCE']); raise SystemExit(1)"
    plan(PRIMITIVES[0]._replace(command=BAD), PRIMITIVES[1], Stage("tests", 20, python(found)))
    assert gpu.main(rehearsal[1:]) == 1  # no rehearsal
    *_, tests, probe = records(tmp_path)[1]
    assert tests["on"].startswith("NVIDIA H200, hex-ssl at ") and "rehearsal" not in tests["on"]
    assert tests["output"] == [str(tmp_path / "carried" / "conformance_90.so")]
    assert probe["name"] == "probe: tests" and probe["ok"]
    for name, text in (("_cuda.so", "cuda_90.so"), ("_C.abi3.so", "_C.abi3.so")):
        assert (tmp_path / "hex" / name).read_text() == text

    monkeypatch.setattr(carried, "asked_of_card", lambda field: "")
    assert gpu.main(rehearsal[1:]) == 1


def test_it_ends_in_time_whatever_runs(rehearsal, tmp_path, plan, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    plan(Stage("manifest", 600, python("import time; time.sleep(600)")), Stage("tests", 20, GOOD))
    assert gpu.main([*rehearsal, "--seconds", "2"]) == 1
    assert records(tmp_path)[0]["manifest"]["seconds"] < 20
    assert "not reached: tests" in capsys.readouterr().err


def test_a_run_that_is_ended_ends_its_stage(rehearsal, tmp_path, plan):
    ends = "import os, signal, time; os.kill(os.getppid(), signal.SIGUSR1); time.sleep(600)"
    plan(Stage("manifest", 600, python(ends)))
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
    try:
        with pytest.raises(SystemExit):
            gpu.main(rehearsal)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert left(tmp_path) == []


def test_stages_can_be_named(rehearsal, tmp_path, plan, capsys):
    plan(*PRIMITIVES, Stage("goals", 20, GOOD), Stage("ncu", 20, GOOD))
    assert gpu.main(["ncu", *rehearsal]) == 0
    assert [*records(tmp_path)[0]] == [*CONFORMANCE, "ncu"]
    assert gpu.main(["--build", "90", *rehearsal]) == 0
    *_, last = records(tmp_path)[1]
    assert last["build"] == "90" and last["on"].endswith(", 90 alone, a rehearsal")
    assert gpu.main(["nvc", *rehearsal]) == 2
    assert "no stage 'nvc': " in capsys.readouterr().err


def test_a_test_that_takes_its_process_down_costs_no_other(tmp_path):
    file = tmp_path / "test_planted.py"
    file.write_text(
        "import os, pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_opcheck(): pass\n"
        "def test_of_the_rest(): pass\n"
        "def test_that_crashes(): os.abort()\n"
        "def test_after_it(): assert 1 == 2\n"
        "def test_lost(): raise RuntimeError('CUDA error: an illegal memory access')\n"
        "def test_after_that(): pytest.skip('for lack of a second device')\n"
    )
    environment = {
        "HEX_GPU_RECORD": str(tmp_path / "run.jsonl"), "HEX_GPU_ON": "a CPU, ",
        "HEX_GPU_RUN": "1", "PYTHONPATH": str(ROOT / "tests"),
    }  # fmt: skip
    (tmp_path / "run.jsonl").touch()
    command = [sys.executable, gpu_stages.__file__, "tests", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    found, lines = records(tmp_path)
    found = {name.partition("::")[2]: r for name, r in found.items()}
    assert {name for name, r in found.items() if not r["ok"]} == {
        "test_that_crashes", "test_after_it", "test_lost"
    }  # fmt: skip
    assert len(found) == 6, done.stdout + done.stderr
    assert found["test_that_crashes"]["note"] == "its process ended"
    assert "assert 1 == 2" in found["test_after_it"]["note"]
    assert found["test_after_that"]["outcome"] == "skipped"
    assert done.returncode == 1 and "test_lost" in done.stderr


def test_what_ncu_counted_is_read():
    lines = [
        "==PROF== Connected",
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","other"',
        '"","","us","register/thread",""',
        '"0","void (anonymous namespace)::forward_tiles<8, 1>(hex_run, int)","107.5","128","1"',
    ]
    assert gpu_stages.counted(lines) == [
        {
            "kernel": "0 forward_tiles<8, 1>",
            "gpu__time_duration.sum": "107.5",
            "launch__registers_per_thread": "128",
        }
    ]
