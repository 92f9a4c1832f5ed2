# SPDX-License-Identifier: MIT
"""What versions.py tries and what it leaves out, and what it says of it: without pip and without a
network. That it works is seen by running it, `make versions`."""

import argparse
import json
import shlex
import subprocess
import sys

import pytest
import torch_exports
import versions
from versions import MB, Fetch, Python, Row

HERE = "3.{1}".format(*sys.version_info)
LISTED = """torch (2.15.0)
Available versions: 2.15.0, 2.13.1, 2.13.0+cpu, 2.13.0, 2.10.0, 2.9.1, 1.13.1
  INSTALLED: 2.13.0+cpu
"""


def test_of_each_minor_release_from_2_10_on_the_last_is_taken_and_a_cpu_build_first():
    found = versions.releases(LISTED.replace("2.13.1, ", ""))
    assert list(found.items()) == [("2.10", "2.10.0"), ("2.13", "2.13.0+cpu"), ("2.15", "2.15.0")]
    assert versions.releases(LISTED)["2.13"] == "2.13.1"
    assert versions.releases("") == {}


def test_pythons_are_looked_for_on_path_and_where_pyenv_and_uv_keep_them(tmp_path):
    names = (
        "one/python3.12",
        "pyenv/versions/3.10.1/bin/python3.10",
        ".local/share/uv/python/cpython-3.14/bin/python3.14",
        "one/python3.12-config",
        "one/python3",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    environment = {"PATH": f"{tmp_path}/one::/nowhere", "PYENV_ROOT": f"{tmp_path}/pyenv"}
    found = versions.candidates(environment, tmp_path)
    assert found == [str(tmp_path / name) for name in names[:3]]


def test_what_does_not_start_and_another_abi_are_no_interpreters(tmp_path):
    for name, said in (
        ("broken", "exit 1"),
        ("pypy", "echo 3 11 7 pypy 0"),
        ("free", "echo 3 14 0 cpython 1"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{said}\n")
        (tmp_path / name).chmod(0o755)
        assert versions.probe(str(tmp_path / name)) is None
    assert versions.probe(str(tmp_path / "absent")) is None
    assert versions.probe(sys.executable) == Python(sys.executable, sys.version_info[:3])


def test_of_each_python_the_newest_is_taken_but_the_running_one_for_its_own():
    found = [
        Python("a", (3, 9, 30)),
        Python("b", (3, 30, 2)),
        Python("c", (3, 30, 4)),
        Python("d", (3, sys.version_info[1], 999)),
    ]
    taken = versions.interpreters(found)
    assert {minor: p.path for minor, p in taken.items()} == {"3.30": "c", HERE: sys.executable}


def test_each_python_takes_its_newest_torch_and_one_takes_all():
    known = {
        "3.10": {"2.10": "2.10.0", "2.14": "2.14.1"},
        "3.11": {"2.10": "2.10.0", "2.14": "2.14.1", "2.15": "2.15.0"},
        "3.15": {"2.15": "2.15.0"},
    }
    one = [("3.10", "2.14"), ("3.11", "2.10"), ("3.11", "2.14"), ("3.11", "2.15"), ("3.15", "2.15")]
    assert versions.pairs(known, "3.11", every=False) == one
    assert versions.pairs(known, "3.11", every=True) == [("3.10", "2.10"), *one]


def test_what_fetches_too_much_is_skipped_with_the_command_that_has_it_tried():
    fetch = Fetch([], 300 * MB + 1, 7 * MB)
    row = versions.decide("3.11", "2.10", "2.10.0", fetch, 300, 10**12, "versions")
    assert row.outcome == "skipped"
    said, _, command = row.said.partition(": ")
    assert said == "it would fetch 301 MB, more than 300"
    make, target, options = shlex.split(command)
    assert (make, target) == ("make", "versions")
    name, _, words = options.partition("=")
    assert (name, words) == ("VERSIONS", "--python 3.11 --torch 2.10 --most-mb 301")
    assert versions.decide("3.11", "2.10", "2.10.0", fetch, 301, 10**12, "versions").outcome == ""


def test_what_the_disk_cannot_hold_is_skipped():
    fetch = Fetch([], 100 * MB, 200 * MB)
    assert versions.decide("3.11", "2.10", "2.10.0", fetch, 300, 900 * MB, "versions").outcome == ""
    row = versions.decide("3.11", "2.10", "2.10.0", fetch, 300, 900 * MB - 1, "versions")
    assert row.outcome == "skipped" and "it takes about 900 MB of" in row.said


def answers(monkeypatch, index=LISTED, report='{"install": []}', code=0, error=""):
    """Let pip say this."""

    def pip(python, command, *arguments):
        if command == "index":
            return subprocess.CompletedProcess((), 0, index, "ERROR: no index\nERROR: at all")
        return subprocess.CompletedProcess((), code, report, error)

    monkeypatch.setattr(versions, "pip", pip)


def options(**given):
    return argparse.Namespace(
        **{"python": [HERE], "torch": None, "every": False, "most_mb": 300, "wheel": None, **given}
    )


def test_pythons_and_torches_that_are_not_there_are_in_the_plan_with_the_reason(monkeypatch):
    answers(monkeypatch)
    pythons = versions.interpreters([])
    rows = versions.plan(pythons, options(python=["3.10000", HERE], torch=["2.13", "2.12"]))
    assert [row[:3] for row in rows] == [
        ("3.10000", "every", "skipped"), (HERE, "2.12", "skipped"), (HERE, "2.13.1", ""),
    ]  # fmt: skip
    assert rows[0].said.endswith("pip install uv && uv python install 3.10000")
    assert rows[1].said == "pip finds none for this Python, but 2.10, 2.13, 2.15"


def test_the_newest_torch_and_this_python_can_be_asked_for_without_their_numbers(monkeypatch):
    answers(monkeypatch)
    pythons = versions.interpreters([Python("other", (3, 10000, 1))])
    asked = options(python=["this"], torch=["2.10", "newest"])
    rows = versions.plan(pythons, asked)
    assert [row[:3] for row in rows] == [(HERE, "2.10.0", ""), (HERE, "2.15.0", "")]
    answers(monkeypatch, index="")
    (row,) = versions.plan(pythons, asked)
    assert row.outcome == "skipped" and row.said.startswith("pip finds no torch >= 2.10 for it")


def test_of_a_wheel_that_is_given_the_command_is_the_one_that_tries_it(monkeypatch, tmp_path):
    answers(monkeypatch)
    monkeypatch.setattr(versions, "to_fetch", lambda report: Fetch([], 301 * MB, 0))
    for wheel, target in ((None, "versions"), (tmp_path, "check-wheel")):
        (row,) = versions.plan(versions.interpreters([]), options(torch=["2.10"], wheel=wheel))
        assert f": make {target} VERSIONS='--python {HERE} --torch 2.10 --most-mb 301'" in row.said


def test_what_pip_refuses_is_skipped_with_its_first_error(monkeypatch):
    answers(
        monkeypatch, code=1, error="note\nERROR: Cannot install torch==2.15.0\nERROR: Impossible"
    )
    (row,) = versions.plan(versions.interpreters([]), options(torch=["2.15"]))
    assert row.outcome == "skipped"
    assert row.said.startswith("pip does not give it: Cannot install torch==2.15.0; ")
    assert "pip install --dry-run torch==2.15.0" in row.said
    answers(monkeypatch, index="")
    (row,) = versions.plan(versions.interpreters([]), options())
    assert row.said == "pip finds no torch >= 2.10 for it: no index"


def test_the_size_of_a_file_on_this_disk_is_not_fetched(tmp_path):
    wheel = tmp_path / "a b+cpu.whl"
    wheel.write_bytes(b"12345")
    archive = {"hashes": {"sha256": "abc"}}
    item = {"download_info": {"url": wheel.as_uri(), "archive_info": archive}}
    fetch = versions.to_fetch(json.dumps({"install": [item]}))
    assert fetch == Fetch([f"{wheel.as_uri()}#sha256=abc"], 0, 5)


def test_nothing_is_fetched_unasked(monkeypatch, capsys):
    rows = [Row(HERE, "2.13.0", "", "", Fetch([], 2 * MB, 0))]
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    assert not versions.agreed(rows, yes=False)
    assert "They fetch 2 MB at most" in capsys.readouterr().out
    assert versions.agreed(rows, yes=True)
    assert versions.agreed([Row(HERE, "2.13.0", "", "", Fetch([], 0, 9))], yes=False)


@pytest.mark.parametrize(
    ("outcomes", "status"), [(("passed", "passed"), 0), (("passed", "failed"), 1)]
)
def test_the_exit_status_tells_of_a_failure(monkeypatch, tmp_path, capsys, outcomes, status):
    rows = [Row(HERE, f"2.{10 + n}.0", "", "", Fetch([], 0, 0)) for n in range(2)]
    said = iter(outcomes)
    (wheel := tmp_path / "a.whl").touch()
    monkeypatch.setattr(sys, "argv", ["versions.py", "--wheel", str(wheel)])
    monkeypatch.setattr(versions, "candidates", list)
    monkeypatch.setattr(versions, "plan", lambda *_: rows)
    monkeypatch.setattr(
        versions, "attempt", lambda row, *_: row._replace(outcome=next(said), said="so")
    )
    assert versions.main() == status
    assert capsys.readouterr().out.endswith(
        f"{outcomes.count('passed')} passed, {outcomes.count('failed')} failed, 0 skipped\n"
    )


def test_where_nothing_is_tried_the_exit_status_is_no_success(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["versions.py"])
    monkeypatch.setattr(versions, "candidates", list)
    monkeypatch.setattr(versions, "plan", lambda *_: [Row(HERE, "2.13.0", "skipped", "why")])
    assert versions.main() == 2
    assert "skipped: why" in capsys.readouterr().out


def test_the_last_line_of_pytest_is_what_is_told_and_why_something_was_skipped():
    output = """...s
SKIPPED [1] tests/test_abi.py:44: torch is older than 2.11
=== 830 passed, 1 skipped in 9s ==="""
    assert versions.summary(output) == (
        "830 passed, 1 skipped in 9s; skipped tests/test_abi.py:44: torch is older than 2.11"
    )
    assert versions.summary("") == "pytest said nothing"


def test_a_torch_that_lacks_a_function_or_differs_from_the_table_is_found(monkeypatch, tmp_path):
    (tmp_path / "torch/lib").mkdir(parents=True)
    assert versions.abi(tmp_path, "2.10.0") == "torch has no libtorch_cpu.so"
    (tmp_path / "torch/lib/libtorch_cpu.so").touch()
    (tmp_path / "torch/lib/libtorch_cuda_linalg.so").touch()  # of which nothing is asked
    table = torch_exports.read()
    names = [
        n
        for (library, n), having in table.items()
        if library == "libtorch_cpu.so" and "2.10.0" in having
    ]
    monkeypatch.setattr(torch_exports, "exported", lambda library: [*names, "other"])
    assert versions.abi(tmp_path, "2.10.0+cpu") == ""
    assert "torch 2.99.0 does not export [('libtorch_cpu.so', 'torch_from_blob')]" in versions.abi(
        tmp_path, "2.99.0"
    )
    names.append("torch_from_blob")
    assert versions.abi(tmp_path, "2.99.0") == ""  # which the table does not have
    assert "torch_exports.txt is wrong about torch 2.10.0" in versions.abi(tmp_path, "2.10.0")
    names.remove("aoti_torch_get_dim")
    assert "does not export [('libtorch_cpu.so', 'aoti_torch_get_dim')]" in versions.abi(
        tmp_path, "2.99.0"
    )


def test_the_tests_that_are_run_exist():
    for name in versions.BATTERY:
        assert (versions.ROOT / f"tests/test_{name}.py").exists(), name
