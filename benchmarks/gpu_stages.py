# SPDX-License-Identifier: MIT
"""What the stages of gpu.py do, each in a process of its own: python gpu_stages.py STAGE.

gpu.py gives the device, the record and the rest in the environment. On a CPU, in a rehearsal, what
needs a GPU or its tools is left out or made small.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[1:1] = [str(Path(__file__).parents[1] / "tests")]  # emulator.py, and what it imports

import gpu
import measure
import torch
from worker import Record, append, read

DEVICE = os.environ.get("HEX_GPU_DEVICE", "cuda")
RECORD = Path(os.environ.get("HEX_GPU_RECORD", os.devnull))
ON, THIS_RUN = os.environ.get("HEX_GPU_ON", ""), os.environ.get("HEX_GPU_RUN", "")
CARRIED = Path(os.environ.get("HEX_GPU_CARRIED", gpu.CARRIED))
ON_A_GPU = DEVICE != "cpu"

STEPS = 10  # that are profiled
# Of the tests, so that one that takes the process or the device's context down costs few others.
GROUPS = ("opcheck", "every_mode or primitives or offsets", "battery or bits or compiled")
GROUPS += (f"not ({' or '.join(GROUPS)})",)
TEST_LIMIT = 40  # seconds
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
METRICS = "time_duration.sum|issue_active|pipe_tensor|warps_active|registers|issue_stalled.*ratio"


def note(name: str, **record: Any) -> None:
    append(RECORD, {"on": ON, "name": name, **record})
    print(name, json.dumps(record), flush=True)


def itself(*arguments: str) -> list[str]:
    return [sys.executable, __file__, *arguments]


# ---- is it what it should be, and right ----------------------------------------------------------


def manifest() -> None:
    """The files are those that were built, the driver is there, each library can be loaded."""
    if problems := [*gpu.changed(CARRIED)]:
        raise SystemExit(f"{CARRIED}: {'; '.join(problems)}: gpu.py --prepare builds them anew")
    from hex._load import _C

    about = {"torch": torch.__version__, "python": sys.version.split()[0]}
    for build in gpu.read_manifest(CARRIED)["builds"]:
        problem = _C.load_cuda(str(CARRIED / f"cuda_{build}.so")) or _C.probe_cuda(0)
        print(build, problem or "is loaded", flush=True)
        if ON_A_GPU and problem:
            raise SystemExit(f"cuda_{build}.so cannot be used: {problem}")
    if ON_A_GPU:
        subprocess.run(["nvidia-smi"], check=True)
        card = torch.cuda.get_device_properties(0)
        about |= {
            "CUDA": torch.version.cuda, "memory": f"{card.total_memory / 1e9:.0f} GB",
            "processors": card.multi_processor_count, "capability": f"{card.major}.{card.minor}",
            "driver": gpu.said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }  # fmt: skip
    note("machine", **about, manifest=gpu.read_manifest(CARRIED))


def conformance(build: str) -> None:
    import emulator

    if ON_A_GPU:
        emulator.assert_conforms(CARRIED / f"conformance_{build}.so", DEVICE)


def first_step() -> None:
    """HEXLoss and its gradient against float64; then float32 by the number of features."""
    import parts
    import peers
    from conftest import check, problem

    for dtype in ("bfloat16", "float32"):
        for rows in (256, 1024):
            case = parts.shaped(rows, dtype=dtype)
            note(f"first step: {case.case}", **peers.checked(peers.HEX, case, DEVICE)[1])
    for features in (256, 500, 2048):
        p = problem("cluster", 512, features, dtype=torch.float32, device=DEVICE)
        truth, errors = p.plain(torch.float64), {}
        for name, got in (("ours", p.ours()), ("plain", p.plain(torch.float32))):
            of_loss = got.loss.double() - truth.loss
            z, of_z = (torch.cat([r.grads[k].double() for k in ("z0", "z1")]) for r in (got, truth))
            errors[name] = {
                "loss": of_loss.abs().max().item(), "mean with its sign": of_loss.mean().item(),
                "gradient": ((z - of_z).norm() / of_z.norm()).item(),
            }  # fmt: skip
        note(f"first step: float32, D {features}", errors=errors)
        check(p)


def battery() -> None:
    import emulator

    emulator.battery(DEVICE)
    emulator.battery_of_blocks(DEVICE)


# ---- times ---------------------------------------------------------------------------------------


def kernels() -> None:
    """What each kernel takes in a step, and what the card can do at all."""
    import batches
    import parts
    import peers
    from torch.autograd import DeviceType

    n = 8192 if ON_A_GPU else 128
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    large, other = (torch.empty(16 * n * n, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    flops = 2 * n**3 / measured(lambda: torch.mm(a, b))
    moved = 2 * len(large) / measured(lambda: other.copy_(large))
    note("kernels: the card", tflops=round(flops / 1e12, 1), copy_gb_s=round(moved / 1e9))
    del a, b, large, other

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


def measured(step: measure.Step) -> float:
    return measure.timer(step, device=DEVICE).blocked_autorange(min_run_time=0.2).median


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
        note(f"tests: {nodeid}", ok=False, run=THIS_RUN, note="its process ended")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self.outcome, self.note = report.outcome, str(report.longrepr)[-600:]

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        ok, seconds = self.outcome != "failed", round(time.monotonic() - self.begin, 2)
        about = {"outcome": self.outcome, "seconds": seconds, "note": self.note}
        note(f"tests: {nodeid}", ok=ok, run=THIS_RUN, **about)
        if "CUDA error" in self.note:
            os._exit(1)  # nothing that this process asks of the device would succeed


def of_tests() -> dict[str, Record]:
    """The last record of each test, of this card and code."""
    records = read(RECORD.read_text())
    return {name: r for (on, name), r in records.items() if on == ON and name.startswith("tests:")}


def tests() -> None:
    with ThreadPoolExecutor(len(GROUPS)) as pool:
        whole = [*pool.map(all_of, GROUPS)]
    wrong = [name for name, record in of_tests().items() if not record["ok"]]
    if wrong or not all(whole):
        raise SystemExit("\n".join(["some tests failed, or did not run:", *wrong]))


def all_of(group: str) -> bool:
    """A group of the tests, again without what has begun where its process was lost."""
    before = -1
    while (now := RECORD.read_text().count('"tests: ')) > before:
        before = now
        if subprocess.run(itself("group", group)).returncode == 0:
            return True
    return False


def group(expression: str) -> None:
    import pytest

    options = ["-m", "gpu", "-k", expression, "-q", "-p", "no:cacheprovider"]
    options += ["--timeout", str(TEST_LIMIT), "--timeout-method", "thread"]
    status = pytest.main(["tests/test_gpu.py", *options], plugins=[Lines()])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(0 if status == pytest.ExitCode.NO_TESTS_COLLECTED else 2)


# ---- NVIDIA's tools ------------------------------------------------------------------------------


def sanitizers() -> None:
    """Each tool is a record as soon as it ends."""
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        if not all(pool.map(sanitized, TOOLS if ON_A_GPU else TOOLS[:1])):
            raise SystemExit("a tool found something, or could not run")


def sanitized(tool: str) -> bool:
    # Each tensor an allocation of its own, so that what is past its end is nobody's.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    before = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"] if ON_A_GPU else []
    begin = time.monotonic()
    done = subprocess.run(
        [*before, *itself("few")], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines, seconds = done.stdout.splitlines(), round(time.monotonic() - begin, 1)
    print(done.stdout, flush=True)
    note(f"sanitizers: {tool}", ok=done.returncode == 0, seconds=seconds, output=lines[-30:])
    return done.returncode == 0


def few() -> None:
    """Problems that between them go through most kernels, and are small enough for racecheck."""
    import emulator
    from conftest import check, problem

    half, single = torch.bfloat16, torch.float32
    for p in (
        problem("cluster", 70, 130, dtype=single, device=DEVICE),
        problem("cluster", 40, 66, "unpaired", K=150, dtype=single, device=DEVICE),
        problem("cluster", 4, 37, "paired", K=150, dtype=single, device=DEVICE),
    ):
        check(p)
        emulator.assert_threshold_is_right(p)
        print("right:", p, flush=True)
    for p in (
        problem("cluster", 136, 30, dtype=half, device=DEVICE),
        problem("cluster", 100, 20, "unpaired", K=1400, dtype=half, device=DEVICE),
    ):
        emulator.assert_half_is_right(p)
        emulator.assert_threshold_is_right(p)
        emulator.assert_one_call_is_two(p)
        print("right:", p, flush=True)


def ncu() -> None:
    """One step, each kernel by itself. All that was counted is beside the record."""
    command = itself("one_step")
    file = RECORD.with_name(f"{RECORD.stem}-ncu.csv")
    if not ON_A_GPU:
        subprocess.run(command, check=True)
        return
    # Without --clock-control none it would set the card's clocks.
    tool = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--set", "full"]
    tool += ["--page", "raw", "--csv", "--log-file", str(file)]
    subprocess.run([*tool, *command], check=True)
    for row in counted(file.read_text().splitlines()):
        note(f"ncu: {row.pop('kernel')}", **row)


def counted(lines: Sequence[str]) -> list[dict[str, str]]:
    """Of each kernel what METRICS names, of a CSV between other lines whose second has the units."""
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
