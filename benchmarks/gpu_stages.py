# SPDX-License-Identifier: MIT
"""What the stages of gpu.py do, each in a process of its own: python gpu_stages.py STAGE.

gpu.py gives the device, the record and the rest in the environment, and has tests/ on Python's path
for batteries.py and what that imports. On a CPU, in a rehearsal, what needs a GPU or its tools is
left out or made small. torch takes seconds to import: it is by those that use it.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import carried
from worker import Record, append, read

DEVICE = os.environ.get("HEX_GPU_DEVICE", "cuda")
RECORD = Path(os.environ.get("HEX_GPU_RECORD", os.devnull))
ON, THIS_RUN = os.environ.get("HEX_GPU_ON", ""), os.environ.get("HEX_GPU_RUN", "")
FOLDER = Path(os.environ.get("HEX_GPU_CARRIED", carried.FOLDER))
ON_A_GPU = DEVICE != "cpu"

STEPS = 10  # that are profiled
# Of the tests, so that one that takes the process or the device's context down costs few others.
GROUPS = ("opcheck", "every_mode or primitives or offsets", "battery or bits or compiled")
GROUPS += (f"not ({' or '.join(GROUPS)})",)
TEST_LIMIT = 60  # seconds
TESTS = Path(__file__).parents[1] / "tests" / "test_gpu.py"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TOOL_LIMIT, NCU_LIMIT = 80, 50  # seconds, below those of the stages, for what is there then
METRICS = "time_duration.sum|issue_active|pipe_tensor|warps_active|registers|issue_stalled.*ratio"


def keep(name: str, **record: Any) -> None:
    append(RECORD, {"on": ON, "name": name, **record})


def note(name: str, **record: Any) -> None:
    """The same, in the log too."""
    keep(name, **record)
    print(name, json.dumps(record), flush=True)


def itself(*arguments: str) -> list[str]:
    return [sys.executable, __file__, *arguments]


# ---- is it what it should be, and right ----------------------------------------------------------


def manifest() -> None:
    """The files are those that were built, the driver is there, each library can be loaded."""
    if problems := [*carried.changed(FOLDER)]:
        raise SystemExit(f"{FOLDER}: {'; '.join(problems)}: gpu.py --prepare builds them anew")
    import torch

    from hex._load import _C

    about = {"torch": torch.__version__, "python": sys.version.split()[0]}
    for build in carried.manifest(FOLDER)["builds"]:
        problem = _C.load_cuda(str(FOLDER / f"cuda_{build}.so")) or _C.probe_cuda(0)
        print(build, problem or "is loaded", flush=True)
        if ON_A_GPU and problem:
            raise SystemExit(f"cuda_{build}.so cannot be used: {problem}")
    if ON_A_GPU:
        subprocess.run(["nvidia-smi"], check=True)
        card = torch.cuda.get_device_properties(0)
        about |= {
            "CUDA": torch.version.cuda, "memory": f"{card.total_memory / 1e9:.0f} GB",
            "processors": card.multi_processor_count, "capability": f"{card.major}.{card.minor}",
            "driver": carried.asked_of_card("driver_version"),
        }  # fmt: skip
    note("card", **about, manifest=carried.manifest(FOLDER))


def conformance(build: str) -> None:
    if ON_A_GPU:
        import batteries

        batteries.assert_conforms(FOLDER / f"conformance_{build}.so", DEVICE)


def first_step() -> None:
    """HEXLoss and its gradient against float64; then float32 by the number of features."""
    import parts
    import peers
    import torch
    from conftest import check, problem

    for dtype in ("bfloat16", "float32"):
        for rows in (256, 1024):
            case = parts.shaped(rows, dtype=dtype)
            note(f"first step: {case.case}", **peers.checked(peers.HEX, case, DEVICE)[1])
    of_features = [
        problem("cluster", 512, features, dtype=torch.float32, device=DEVICE)
        for features in (256, 500, 2048)
    ]
    for p in of_features:
        truth, errors = p.plain(torch.float64), {}
        for name, got in (("ours", p.ours()), ("plain", p.plain(torch.float32))):
            of_loss = got.loss.double() - truth.loss
            z, of_z = (torch.cat([r.grads[k].double() for k in ("z0", "z1")]) for r in (got, truth))
            errors[name] = {
                "loss": of_loss.abs().max().item(), "mean with its sign": of_loss.mean().item(),
                "gradient": ((z - of_z).norm() / of_z.norm()).item(),
            }  # fmt: skip
        note(f"first step: float32, D {p.inputs[0].shape[1]}", errors=errors)
    for p in of_features:  # when all are noted
        check(p)


def battery() -> None:
    import batteries

    batteries.battery(DEVICE)
    batteries.battery_of_blocks(DEVICE)


def battery_of_sets() -> None:
    import set_batteries

    set_batteries.battery_of_sets(DEVICE)


# ---- times ---------------------------------------------------------------------------------------


def kernels() -> None:
    """What each kernel takes in a step, and what the card can do at all."""
    import batches
    import parts
    import peers
    import torch
    from torch.autograd import DeviceType

    the_card()
    mine, activity = DeviceType.CUDA, torch.profiler.ProfilerActivity.CUDA
    if not ON_A_GPU:
        mine, activity = DeviceType.CPU, torch.profiler.ProfilerActivity.CPU
    for rows, queue in ((1024, 0), (8192, 0), (256, 65536), (65536, 0), (34000, 0)):
        case = parts.shaped(rows, queue)
        batch = batches.make(case if ON_A_GPU else case.tiny(160), DEVICE)
        step = peers.HEX.step(batch)
        step()
        with torch.profiler.profile(activities=[activity]) as profile:
            for _ in range(STEPS):
                step()
            if ON_A_GPU:
                torch.cuda.synchronize()
        took = {
            short(e.key): round((e.self_device_time_total or e.self_cpu_time_total) / STEPS, 2)
            for e in profile.key_averages() if e.device_type == mine
        }  # fmt: skip
        note(f"kernels: {case.case}", us=dict(sorted(took.items(), key=lambda x: -x[1])[:20]))


def the_card() -> None:
    import measure
    import torch

    def seconds(step: measure.Step) -> float:
        timer = measure.timer(step, device=DEVICE)
        return timer.blocked_autorange(min_run_time=0.2).median

    n = 8192 if ON_A_GPU else 128
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    x, y = (torch.zeros(16 * n * n, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    flops, moved = 2 * n**3 / seconds(lambda: a @ b), 2 * len(x) / seconds(lambda: y.copy_(x))
    note("kernels: the card", tflops=round(flops / 1e12, 1), copy_gb_s=round(moved / 1e9))


def short(name: str) -> str:
    """A kernel's, without its arguments."""
    name = re.sub(r"^void |\(anonymous namespace\)::|<unnamed>::", "", name)
    return re.sub(r"\(.*", "", name)[:80]


# ---- tests ---------------------------------------------------------------------------------------


class Lines:
    """Of pytest, a plugin: a record of each test that has begun, and again when it has ended. What
    has a record of this run, or passed in an earlier one, is left out."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        before = of_tests()
        left_out = {name for name, r in before.items() if r["ok"] or r["run"] == THIS_RUN}
        items[:] = [item for item in items if f"tests: {item.nodeid}" not in left_out]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.begin, self.outcome, self.note = time.monotonic(), "passed", ""
        keep(f"tests: {nodeid}", ok=False, run=THIS_RUN, note="its process ended")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self.outcome, self.note = report.outcome, str(report.longrepr)[-600:]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        ok, seconds = self.outcome != "failed", round(time.monotonic() - self.begin, 2)
        about = {"outcome": self.outcome, "seconds": seconds, "note": self.note}
        keep(f"tests: {nodeid}", ok=ok, run=THIS_RUN, **about)
        if "CUDA error" in self.note:
            os._exit(1)  # nothing that this process asks of the device would succeed


def of_tests() -> dict[str, Record]:
    """The last record of each test, of this card and code."""
    records = read(RECORD.read_text())
    return {name: r for (on, name), r in records.items() if on == ON and name.startswith("tests:")}


def tests(file: str = str(TESTS)) -> None:
    with ThreadPoolExecutor(len(GROUPS)) as pool:
        whole = [*pool.map(functools.partial(all_of, file), GROUPS)]
    wrong = [name for name, record in of_tests().items() if not record["ok"]]
    if wrong or not all(whole):
        raise SystemExit("\n".join(["some tests failed, or did not run:", *wrong]))


def all_of(file: str, group: str) -> bool:
    """A group of the tests, and where its process was lost the rest of them in another."""
    before, now = -1, 0
    while now > before:  # else none had begun
        if subprocess.run(itself("group", file, group)).returncode == 0:
            return True
        before, now = now, RECORD.read_text().count('"tests: ')
    return False


def group(file: str, expression: str) -> None:
    import pytest

    # Of the plugins that are installed the one that is needed; the groups would share a cache.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-m", "gpu", "-k", expression, "-q", "-p", "no:cacheprovider"]
    options += ["-p", "pytest_timeout", "--timeout", str(TEST_LIMIT), "--timeout-method", "thread"]
    status = pytest.main([file, *options], plugins=[Lines()])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else 2)


# ---- NVIDIA's tools ------------------------------------------------------------------------------


def sanitizers() -> None:
    """Each tool is a record as soon as it ends."""
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        if not all(pool.map(sanitized, TOOLS if ON_A_GPU else TOOLS[:1])):
            raise SystemExit("a tool reported an error, or could not run")


def sanitized(tool: str) -> bool:
    # Each tensor an allocation of its own, so that what is past its end is nobody's.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    before = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] if ON_A_GPU else []
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        what = within(TOOL_LIMIT, [*before, *itself("few")], output)
        output.seek(0)
        lines = output.read().splitlines()
    print(*lines, sep="\n", flush=True)
    seconds = round(time.monotonic() - begin, 1)
    keep(f"sanitizers: {tool}", ok=not what, seconds=seconds, note=what, output=lines[-30:])
    return not what


def within(limit: float, command: Sequence[str], output: TextIO) -> str:
    """Nothing, or what became of the command."""
    process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"not done within {limit} s"
    return f"ended with {process.returncode}" * bool(process.returncode)


def few() -> None:
    """Some problems of the battery, small enough for racecheck. They go through most kernels, not
    through those that large batches alone have."""
    import batteries
    import set_batteries
    import torch
    from conftest import check, problem
    from data import f64
    from labelled_problems import labelled, logits, viewed

    half, single = torch.bfloat16, torch.float32
    for p in (
        problem("cluster", 70, 130, dtype=single, device=DEVICE),
        problem("cluster", 40, 66, "unpaired", K=150, dtype=single, beta=0.5, device=DEVICE),
        problem("cluster", 4, 37, "paired", K=150, dtype=single, device=DEVICE),
    ):
        check(p)
        batteries.assert_threshold_is_right(p)
        print("right:", p, flush=True)
    batteries.assert_one_call_is_two(problem("cluster", 70, 30, dtype=single, device=DEVICE))
    none = f64(math.inf).to(DEVICE)  # in H, for so many cosines leave no gap for a threshold
    for p in (
        problem("cluster", 100, 100, "cross", dtype=half, device=DEVICE),
        problem("cluster", 100, 20, "unpaired", K=1400, dtype=half, eps=none, device=DEVICE),
    ):
        batteries.assert_half_is_right(p)
        print("right:", p, flush=True)
    for call in (
        labelled(70, 66, dtype=single),
        labelled(24, 9, masked=True, dtype=single),
        labelled(33, 9, "pair", "guide", M=90, dtype=single),
        viewed(9, 20, "paired", "groups", K=9, dtype=single),
        logits(5, 300, dtype=single),
    ):
        set_batteries.check_call(call.to(DEVICE))
        if call.pairing != "paired":
            set_batteries.assert_measures_are_right(call.to(DEVICE))
        print("right:", call, flush=True)


def ncu() -> None:
    """One step, each kernel by itself. All that was counted is beside the record."""
    file = RECORD.with_name(f"{RECORD.stem}-ncu.csv")
    # Without --clock-control none it would set the card's clocks.
    tool = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--set", "full"]
    tool += ["--page", "raw", "--csv", "--log-file", str(file)]
    what = within(NCU_LIMIT, [*(tool if ON_A_GPU else ()), *itself("one_step")], sys.stdout)
    for row in counted(file.read_text().splitlines() if file.exists() else ()):
        note(f"ncu: {row.pop('kernel')}", **row)
    if what:
        raise SystemExit(what)


def counted(lines: Sequence[str]) -> list[dict[str, str]]:
    """Of each kernel what METRICS names. The CSV is between other lines; its second has the units,
    and no ID."""
    rows = list(csv.DictReader(io.StringIO("\n".join(x for x in lines if x.startswith('"')))))
    return [
        {"kernel": f"{row['ID']} {short(row['Kernel Name'])}"}
        | {name: value for name, value in row.items() if re.search(METRICS, name)}
        for row in rows if row["ID"]
    ]  # fmt: skip


def one_step() -> None:
    import batches
    import parts
    import peers
    import torch

    case = parts.shaped(8192)
    step = peers.HEX.step(batches.make(case if ON_A_GPU else case.tiny(160), DEVICE))
    step()
    if ON_A_GPU:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    step()
    if ON_A_GPU:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
