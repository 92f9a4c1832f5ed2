# SPDX-License-Identifier: MIT
"""The benchmark of a CPU at tiny sizes: it runs, and a method that is wrong cannot be timed."""

import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pandas = pytest.importorskip("pandas")  # with matplotlib, of the extra `benchmarks`
pictures = pytest.importorskip("PIL.Image")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import accuracy  # noqa: E402
import accuracy_report  # noqa: E402
import batches  # noqa: E402
import bench  # noqa: E402
import cost  # noqa: E402
import curves  # noqa: E402
import measure  # noqa: E402
import parts  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import worker  # noqa: E402
from batches import Case  # noqa: E402
from test_benchmark_gpu import alive  # noqa: E402

import hex  # noqa: E402
from hex import HEXLoss, ThresholdTracker, hex_cross_entropy, hex_sup_con  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """The peak of memory begins with a collection, which is to spare what was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


own_memory = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="under AddressSanitizer memory and time are mostly the sanitizer's",
)


@own_memory
def test_the_benchmark_prints_tables_and_records_its_samples(tmp_path, capsys):
    file = tmp_path / "bench.jsonl"
    arguments = ["sizes", "--smoke", "--repeats", "2", "--record", str(file)]
    arguments += ["--only", "(hex|plain|info-nce)"]
    assert bench.main(arguments) == 0
    printed = capsys.readouterr().out
    machine, record = map(json.loads, file.read_text().splitlines())
    page = report.PAGES[0]._replace(record=file)
    assert page.records() == []  # it was a rehearsal
    methods = [
        "hex HEXLoss",
        "hex hex_loss, eps given",
        "plain HEX",
        "hex InfoNCELoss",
        "plain InfoNCE",
        "info-nce-pytorch InfoNCE",
    ]
    for heap in ("stock", "retained"):
        found = [r for r in record["results"] if r["heap"] == heap]
        assert [r["method"] for r in found] == [*methods, *methods]
        assert {r["rows"] for r in found} == {160, 192}
        assert all(min(r["ms"]) > 0 for r in found)
        assert all(len(r["ms"]) == 2 for r in found)
    ours = [r for r in found if r["method"] == "hex HEXLoss"]
    shown = [report.number(statistics.median(r["ms"])) for r in ours]
    assert f"| hex HEXLoss | {' | '.join(shown)} |" in printed
    for about in (f"{machine['on']}; cores ", "plain HEX / hex HEXLoss"):
        assert about in printed
    assert re.search(r"\| hex HEXLoss \| \d\.\de-0[678] \|", printed)
    assert file.with_suffix(".md").read_text() in printed

    assert bench.main(arguments) == 0  # again: all is there
    assert "sizes\n" + capsys.readouterr().out == printed
    assert bench.main(arguments[:-1] + ["hex"]) == 0  # it is another one
    assert "sizes\n" in capsys.readouterr().out
    assert len(file.read_text().splitlines()) == 5  # the machine each time


@own_memory
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # a library's
@pytest.mark.parametrize("part", sorted(set(parts.CPU) - {"sizes", "ddp"}))
def test_a_part_gives_results_and_a_table(part, monkeypatch):
    monkeypatch.setattr(measure, "retain_heap", lambda: None)  # for good: not in this process
    monkeypatch.setattr(measure, "TURN_S", 1e-3)
    before = torch.get_num_threads()
    (work,) = parts.works(bench.parse([part, "--smoke", "--repeats", "1"]))
    record = json.loads(json.dumps(work.do()))
    torch.set_num_threads(before)
    shown = report.times(report.frame([record | {"on": "", "name": part}]))
    assert shown and all(re.search(r"\d", cell) for t in shown.values() for cell in t.iloc[0])
    titles = {"Milliseconds, stock heap" if part == "small" else "Milliseconds, retained heap"}
    assert {*shown} - {"Memory at the peak, MB"} == titles


def test_under_ddp_hex_is_the_truth_and_a_wrong_gradient_is_seen():
    for library in ("open_clip", "pytorch_metric_learning"):
        pytest.importorskip(library)
    wanted = "(hex|False, gather_with_grad=False|local_loss=True|efficient=True)"
    (work,) = parts.works(bench.parse(["ddp", "--smoke", "--only", wanted]))
    record = json.loads(json.dumps(work.do()))
    found = {r["method"].split()[-1]: r for r in record["results"]}
    for name in ("HEXLoss", "InfoNCELoss"):
        assert [*found[name]["value"], found[name]["ratio"]] == pytest.approx([1, 1, 1], abs=1e-11)
        assert found[name]["scale"] == pytest.approx(1, abs=1e-11)
        assert found[name]["residual"] < 1e-11
    clip = [r for r in record["results"] if "ClipLoss" in r["method"]]
    assert [r["ratio"] for r in clip] == pytest.approx([0.5, 0.47, 1], abs=0.01)
    assert [r["residual"] > 0.1 for r in clip] == [False, True, False]
    assert clip[1]["value"] == clip[2]["value"] != [1, 1]
    assert found["efficient=True"]["residual"] > 0.1 and found["efficient=True"]["scale"] is None
    table = report.blocks([record | {"on": "", "name": "ddp"}])["ddp"]
    assert "| hex HEXLoss | 1.000 / 1.000 | 1.000 | 0.000 | 1.000 |" in table
    assert f"Of hex-ssl {hex.__version__}, open_clip_torch " in table
    assert re.search(r"The comparison of sizes took \d+ µs with 2 ranks\.", table)


def test_the_model_of_a_cluster_adds_up():
    head, _, *lines = [line[2:-2].split(" | ") for line in cost.table().splitlines()]
    assert len(lines) == len(cost.SIZES) * len(cost.RANKS)
    names = list(cost.step(256, 128, 8))
    for cells in (dict(zip(head, line, strict=True)) for line in lines):
        images, features, ranks = (int(cells[name]) for name in ("images a GPU", "D", "GPUs"))
        assert int(cells["N"]) == 2 * images * ranks
        whole = sum(float(cells[name]) for name in names)
        assert float(cells["sharded"]) == pytest.approx(whole, rel=0.1)
    small = cost.step(256, 128, 8)
    assert small["products"] == pytest.approx(10 * 4096 * 512 * 128 / cost.RATE)
    assert small["gather z"] == pytest.approx(4096 * 128 * 2 * 7 / 8 / cost.LINK + cost.LATENCY)
    assert cost.operations(512) == 16 * 512  # of four chunks: the statistics are read once for each


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.documents[0].stem)
def test_the_documents_have_the_tables_of_the_recorded_results(page):
    blocks, named = page.blocks(), set()
    for file in page.documents:
        text = file.read_text()
        assert report.filled(text, blocks) == text, f"{file.name}: run bench.py --report"
        named |= set(re.findall(r"<!-- (\w+) -->", text)) - {"end"}
    assert named == {*blocks}
    if page.picture:
        with pictures.open(page.picture) as picture:
            assert picture.info["Figures"] == report.checksum(page.points()), "run --report"
    records = page.records()
    machines = {r["on"]: r for r in records if r["name"] == "machine"}
    for on in {r["on"] for r in records if "results" in r}:
        assert machines[on].keys() >= {"date", "memory"}
        assert re.search(r", torch \d\S*, hex-ssl \d\S* at [0-9a-f]+", on)
    if "gpu" in page.record.stem:
        assert "driver" in machines[on] and on.startswith("NVIDIA")
        assert len(records) == len(page.record.read_text().splitlines())
    with pytest.raises(ValueError, match="the record has no 'other', which a document shows"):
        report.filled("<!-- other -->\n<!-- end -->", blocks)
    part = next(iter(named - {"machine"}))
    typed = f"<!-- {part} -->\n| 1.00 |\n<!-- end -->"
    assert report.filled(typed, blocks) == f"<!-- {part} -->\n{blocks[part]}\n<!-- end -->"
    assert len({re.split(", HEX_ISA|, torch", r["on"])[0] for r in page.records()}) == 1
    assert not re.search(r'[" ]/\w|uuid|pci', page.record.read_text())  # no place of the machine


def test_the_report_makes_documents_and_pictures(tmp_path, monkeypatch):
    pages = []
    for page in (page for page in report.PAGES if page.picture):
        file = tmp_path / f"{page.record.stem}.md"
        name = next(iter(page.blocks().keys() & {"sizes", "worst"}))
        file.write_text(f"before\n<!-- {name} -->\nold\n<!-- end -->\nafter\n")
        pages.append(page._replace(documents=[file], picture=file.with_suffix(".png")))
    monkeypatch.setattr(report, "PAGES", pages)
    assert bench.main(["--report"]) == 0
    for page in pages:
        text = page.documents[0].read_text()
        name, block = re.search(r"<!-- (\w+) -->\n(.*)\n<!-- end -->", text, re.DOTALL).groups()
        assert block == page.blocks()[name] and text.startswith("before\n")
        assert text.endswith("<!-- end -->\nafter\n")
        with pictures.open(page.picture) as file:
            assert file.info["Figures"] == report.checksum(page.points())


@pytest.mark.parametrize(
    "page", [page for page in report.PAGES if page.panels], ids=lambda page: page.picture.stem
)
def test_a_line_has_a_gap_where_a_size_was_not_measured_and_no_words_overlap(page):
    from matplotlib.text import Text

    points = page.points()
    figure = curves.draw(points, page.panels, "")
    figure.draw_without_rendering()
    for axes, panel in zip(figure.axes, page.panels, strict=True):
        methods = {name: method + panel.suffix for method, (name, *_) in curves.STYLES.items()}
        names = [line.get_label() for line in axes.lines]
        assert {methods[name] for name in names} == {*methods.values()} & {*points["method"]}
        for line, name in zip(axes.lines, names, strict=True):
            there = dict(zip(*line.get_data(), strict=True))
            measured = {*points["rows"][points["method"] == methods[name]]}
            assert {rows for rows, value in there.items() if value > 0} == measured
            assert {512 << k for k in range(8)} <= {*there}  # a gap where there is no value
        words = [Text.get_window_extent(name) for name in axes.texts]
        assert len(words) == len(names) + bool(panel.note)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(words, 2))
        assert all(axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 for box in words)


def test_errors_are_recorded_and_named_in_tables(tmp_path, monkeypatch, capsys):
    few = [accuracy.Case(loss, "float32", 0.1, 26) for loss in accuracy.LOSSES]
    for part in ("temperature", "features", "rows"):
        monkeypatch.setitem(accuracy.PARTS, part, lambda: few)
    monkeypatch.setattr(accuracy_report, "DTYPES", ("float32",))
    file = tmp_path / "accuracy.jsonl"
    accuracy.main(["--record", str(file)])
    page = report.Errors(file, (), file.with_suffix(".png"))
    machine, *parts = page.records()
    assert [r["name"] for r in parts] == [*accuracy.PARTS]
    assert re.search(r", torch \d\S*, hex-ssl \d\S* at [0-9a-f]+", machine["on"])
    blocks = page.blocks()
    assert re.search(r"\| float32, row \| \d\.\de-0\d \|", blocks["worst"])
    assert blocks["wrong"].count("| 0 of 3 | 0 of 3 |") == len(accuracy.LOSSES)
    assert re.search(r"\| 4 \| exp.* \| 127.6 .* \| nan \(inf or nan\) \|$", blocks["places"], re.M)
    page.draw()
    with pictures.open(page.picture) as picture:
        assert picture.info["Figures"] == report.checksum(page.points())
    with pytest.raises(SystemExit):
        accuracy.main(["sizes"])
    assert "no part 'sizes': the parts are temperature" in capsys.readouterr().err


def test_a_result_measured_again_and_another_instruction_set():
    row = {"method": "hex HEXLoss", "case": "512", "heap": "retained", "dtype": "float32"}
    row |= {"rows": 512, "features": 128, "queue": 0, "peak_mb": 1.0}
    runs = [("a", "avx2", 1.0), ("a", "base", 3.0), ("b", "avx2", 2.0)]
    results = [(on, [row | {"isa": isa, "ms": [ms]}]) for on, isa, ms in runs]
    times = {
        "Milliseconds, retained heap, HEX_ISA=avx2": ["2.00"],
        "Milliseconds, retained heap, HEX_ISA=base": ["3.00"],
    }
    memory = {"Memory at the peak, MB": ["1.00"]}
    for part, tables in (("isa", times), ("types", times | memory)):
        records = [{"on": on, "name": part, "results": found} for on, found in results]
        shown = report.times(report.frame(records))
        assert {title: [*cells["512"]] for title, cells in shown.items()} == tables


def test_a_table_is_markdown():
    cells = pandas.DataFrame({"4096": {"name": "1.0", "n": ""}})
    assert report.markdown("title", cells, "corner").splitlines() == [
        "**title**", "", "| corner | 4096 |", "| --- | ---: |", "| name | 1.0 |", "| n |  |",
    ]  # fmt: skip
    assert [report.number(x) for x in (None, 0, 0.01234, 9.999, 99.96, 1234.5)] == [
        "", "0", "0.0123", "10.0", "100", "1234",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        *(Case("", 160, 24, kind=kind) for kind in batches.KINDS),
        Case("", 160, 24, dtype="float64"),
        Case("", 80, 24, dtype="bfloat16", mode="query"),
        Case("", 160, 24, mode="cross"),
        Case("", 80, 24, 190, dtype="float16", mode="unpaired"),
        *(Case("", 192, 24, dtype=dtype, mode="labels") for dtype in ("float32", "float64")),
        *(Case("", 30, 24, 500, dtype, mode="logits") for dtype in ("float32", "float64")),
    ],
    ids=lambda case: f"{case.mode} {case.kind} {case.dtype}",
)
def test_every_method_is_right_and_the_other_loss_is_refused(case):
    symmetric = () if case.mode != "ntxent" else (*peers.LIBRARIES, *peers.RANKS)
    released = (peers.AUTHORS,) if case.kind == "clusters" else ()  # else decided by rounding
    methods = (*peers.OURS, peers.PLAIN_HEX, peers.PLAIN_INFO_NCE, *symmetric, *released)
    of_mode = {"labels": peers.LABELS, "logits": peers.LOGITS}
    for method in of_mode.get(case.mode, methods):
        if case.rows <= method.most:
            batch = batches.make(case)
            got = method.step(batch)()
            peers.check(method, case, batch, got, peers.truth(case, "cpu", method.loss))
            if case.kind == "clusters":
                other = peers.truth(case, "cpu", {"HEX": "InfoNCE"}.get(method.loss, "HEX"))
                with pytest.raises(peers.Mismatch, match=re.escape(method.name)):
                    peers.check(method, case, batch, got, other)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.101},
        {"beta": 0.9},
        {"tau_plus": 0.0},
        {"variant": "released"},
        {"threshold": None},
        {"threshold": ThresholdTracker.adaptive(quantile=0.98)},
        {"threshold": ThresholdTracker.adaptive(over="all")},
    ],
    ids=lambda option: next(iter(option)),
)
def test_another_formula_is_refused(option):
    options = {"temperature": 0.1} | option
    method = peers.Method("other", "HEX", lambda _: HEXLoss(**options))
    with pytest.raises(peers.Mismatch, match="other: got a (loss|gradient)_error"):
        peers.checked(method, Case("", 200, 24))


def test_a_batch_too_large_for_the_reference_is_compared_with_the_kernels(monkeypatch):
    case = Case("", 200, 24)
    right = peers.truth(case, "cpu", "HEX")
    peers.truth.cache_clear()
    monkeypatch.setattr(peers, "DENSE", 1)
    again = peers.truth(case, "cpu", "HEX")
    for got, wanted in zip(again, right, strict=True):
        assert not torch.equal(got, wanted)  # other sums
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
    peers.truth.cache_clear()


def test_a_wrong_gradient_is_refused():
    case = Case("", 200, 24)
    right = peers.truth(case, "cpu", "HEX")
    wrong = right[0], right[1], 1.02 * right[2]
    with pytest.raises(peers.Mismatch, match="gradient_error"):
        peers.check(peers.HEX, case, batches.make(case), wrong, right)


@own_memory
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # NumPy has threads
def test_a_wrong_method_fails_and_the_next_part_begins(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(worker, "START_METHOD", "fork")  # it has what is planted here
    wrong = peers.HEX._replace(build=peers.INFO_NCE.build)
    case = Case("160", 160, 24)
    monkeypatch.setitem(parts.CPU, "data", parts.Part([case], (wrong,)))
    monkeypatch.setitem(parts.CPU, "types", parts.Part([case], (peers.HEX, peers.PLAIN_HEX)))
    file = tmp_path / "bench.jsonl"
    assert bench.main(["data", "types", "--repeats", "1", "--record", str(file)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"data  FAILED: Mismatch: hex HEXLoss: got a loss_error .*", printed)
    assert "### data\n\ndata failed: Mismatch" in printed
    assert re.search(r"### types\n\n.*\n\n.*160 \|\n.*\n\| hex HEXLoss \|", printed)


def threads():
    """How many this process has before and after a loss on two."""
    torch.set_num_threads(2)
    z = torch.randn(2, 1024, 64)
    before = len(os.listdir("/proc/self/task"))
    HEXLoss()(*z)
    return {"before": before, "after": len(os.listdir("/proc/self/task"))}


def hangs():
    time.sleep(1000)


def works():
    return {"threads": threads, "hangs": hangs}


def gone(pid):
    end = time.monotonic() + 30
    while alive(pid):
        assert time.monotonic() < end, f"{pid} runs on"
        time.sleep(0.1)
    return True


def test_a_loss_that_is_timed_has_its_threads_and_what_hangs_is_killed(tmp_path):
    log = tmp_path / "log"
    log.touch()
    process = worker.Worker(log, works)
    record = process.do("threads", 60)
    assert record["after"] == record["before"] + 1
    record = process.do("hangs", 1)
    assert record["note"] == "not done within 1 s" and " in hangs" in "".join(record["output"])
    process.end()
    assert gone(process.pid)


def test_the_worker_ends_with_the_benchmark_that_is_killed(tmp_path):
    command = [sys.executable, "-c", PARENT.format(Path(__file__).parent, tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    assert gone(pid)


PARENT = """
import sys, time
sys.path[:0] = ["{0}/../benchmarks", "{0}"]
import pathlib, test_benchmark, worker
log = pathlib.Path("{1}")
log.touch()
print(worker.Worker(log, test_benchmark.works).pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["everything"], "no part 'everything'"),
        (["--gpu", "data"], "no part 'data': the parts are sizes, queue"),
        (["--repeats", "0"], "--repeats: got 0, wanted at least 1"),
        (["--only", "("], "--only: got '('"),
        (["--device", "cuda"], "--device: got cuda without --gpu"),
        (["--record", "a.md"], "--record: got 'a.md', wanted a name with .jsonl at the end"),
    ],
)
def test_a_bad_argument_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert message in capsys.readouterr().err


def test_what_cannot_be_gone_on_with_is_said(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text('{"part": "sizes"}\n')
    assert bench.main(["small", "--record", str(file)]) == 2
    assert "a.jsonl: line 1 is no record of this benchmark" in capsys.readouterr().err
    file.write_text("")
    assert bench.main(["small", "--only", "nothing", "--record", str(file)]) == 2
    assert capsys.readouterr().err == "--only: nothing matches 'nothing'\n"


@own_memory
def test_the_peak_is_what_a_call_holds_at_most():
    size = 64 << 20  # large enough to be given back when it is freed
    peak = measure.peak_mb(lambda: torch.ones(size // 4).sum())
    assert peak == pytest.approx(size / 1e6, abs=1)
    assert measure.peak_mb(lambda: None) < 1


@own_memory
def test_times_are_those_of_a_call_a_sample_a_turn(monkeypatch):
    def step():
        start = time.process_time()
        while time.process_time() - start < 0.003:
            pass

    timers = [measure.timer(step), measure.timer(step)]
    samples = measure.times(timers, 3)
    assert [len(ms) for ms in samples] == [3, 3]
    assert all(3 <= x < 6 for ms in samples for x in ms)
    monkeypatch.setattr(measure, "ENOUGH_S", 1e-3)  # a call that takes long has few turns
    assert [len(ms) for ms in measure.times(timers, 5)] == [3, 3]
    monkeypatch.setattr(measure, "TOO_LONG_S", 1e-3)
    assert [len(ms) for ms in measure.times(timers, 5)] == [1, 1]


@own_memory
def test_labels_and_logits_hold_no_more_than_blocks_of_rows():
    x = torch.randn(3000, 32, requires_grad=True)
    guide, ids = torch.randn(3000, 16), torch.arange(3000) % 50

    def labelled():
        return torch.autograd.grad(hex_sup_con(x, ids, eps=0.3, guide=guide), x)

    logits = torch.randn(300, 20000, requires_grad=True)  # 24 MB, as their gradient
    target = torch.zeros(300, dtype=torch.int64)

    def rows():
        return torch.autograd.grad(
            hex_cross_entropy(logits, target, eps=0.3, temperature=0.1), logits
        )

    labelled(), rows()
    assert measure.peak_mb(labelled) < 12  # 3000 x 3000 in float32 are 36
    assert measure.peak_mb(rows) < 24 + 4


def test_the_table_of_large_batches_has_a_line_for_each_batch_and_the_heads_of_the_page():
    code = "import chunks; print(chunks.table((6, 10), 4))"  # it changes the heap for good
    folder = Path(__file__).parents[1] / "benchmarks"
    command = sys.executable, "-c", code
    printed = subprocess.check_output(command, cwd=folder, text=True)
    page = (folder.parent / "docs/guides/large_batches.md").read_text()
    (shown,) = re.findall(r"<!-- chunks -->\n\n(.*)\n", page)
    head, _, *lines = printed.splitlines()
    assert head == shown.replace("chunks of 64", "chunks of 4")
    assert [line.split(" | ")[0] for line in lines] == ["| 6", "| 10"]
    assert all(float(cell) >= 0 for line in lines for cell in line.strip("|").split("|"))
