# SPDX-License-Identifier: MIT
"""The benchmarks at tiny sizes: they run, and a method that is wrong cannot be timed."""

import gc
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch

pandas = pytest.importorskip("pandas")  # with matplotlib, of the extra `benchmarks`
pictures = pytest.importorskip("PIL.Image")

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import batches  # noqa: E402
import bench  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402

from hex import (  # noqa: E402
    HEXLoss,
    ThresholdTracker,
    hex_cross_entropy,
    hex_loss,
    hex_sup_con,
)
from hex import reference as oracle  # noqa: E402


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
    file = tmp_path / "results.jsonl"
    words = ["hex", "plain HEX", "plain InfoNCE", "info-nce"]
    arguments = ["sizes", "--quick", "--repeats", "2", "--sizes", "160", "192x24", "--methods"]
    assert bench.main([*arguments, *words, "--record", str(file)]) == 0
    printed = capsys.readouterr().out
    (record,) = map(json.loads, file.read_text().splitlines())
    methods = [
        "hex HEXLoss",
        "hex hex_loss, eps given",
        "plain HEX",
        "hex InfoNCELoss",
        "plain InfoNCE",
        "info-nce-pytorch InfoNCE",
    ]
    for case, shape in {"160": (160, 128), "192x24": (192, 24)}.items():
        for heap in ("stock", "retained"):
            found = [r for r in record["results"] if (r["case"], r["heap"]) == (case, heap)]
            assert [r["method"] for r in found] == [*methods, report.MM, report.PRODUCT]
            for result in found:
                assert (result["rows"], result["features"]) == shape
                assert len(result["ms"]) == 2 and min(result["ms"]) > 0
    results = report.results_of(record)
    ours = results[(results.method == "hex HEXLoss") & (results.heap == "retained")]
    shown = [tables.number(statistics.median(ms)) for ms in ours.ms]
    lines = [line for line in printed.splitlines() if line.startswith("hex HEXLoss  ")]
    assert shown in [line.split()[2:] for line in lines]
    for about in (record["machine"]["cpu"], "plain HEX / hex HEXLoss", "flatters hex"):
        assert about in printed


@own_memory
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # a library's
@pytest.mark.parametrize("part", sorted(set(bench.PARTS) - {"sizes"}))
def test_a_part_gives_results_and_a_table(part, monkeypatch):
    monkeypatch.setattr(measure, "retain_heap", lambda: None)  # for good: not in this process
    monkeypatch.setattr(measure, "TURN_S", 1e-3)
    before = torch.get_num_threads()
    record = bench.run(part, bench.parse(["--quick", "--repeats", "1"]))
    torch.set_num_threads(before)
    assert record["results"] or record["notes"]
    for shown in report.tables(json.loads(json.dumps(record))):
        assert str(shown) and shown.markdown()
        assert shown.title == "profile" or (shown.cells != "").any(axis=None)


def test_a_level_is_that_of_its_own_process_only(monkeypatch):
    monkeypatch.setenv("HEX_ISA", "avx2")
    before = os.environ.copy()
    with bench.environment(HEX_ISA="base", PYTHONWARNINGS="ignore"):
        assert os.environ["HEX_ISA"] == "base"
    assert os.environ.copy() == before


def test_levels_of_an_instruction_set_are_one_record():
    first = {"part": "isa", "seconds": 2, "load": [1, 2], "machine": "a", "notes": []}
    first["results"] = [{"isa": "base"}]
    absent = first | {"load": [2, 3], "machine": "b", "notes": ["left out"], "results": []}
    joined = bench.joined([first, absent, absent])
    assert (joined["seconds"], joined["load"], joined["machine"]) == (6, [1, 3], "a")
    assert joined["results"] == [{"isa": "base"}] and joined["notes"] == ["left out"]


def test_goals_are_held_against_medians_of_one_run():
    records = json.loads(json.dumps(report.latest()))

    def goal(about):
        return {goal.about: goal for goal in report.all_goals(records)}[about]

    def results(method):
        return [r for r in records["sizes"]["results"] if (r["case"], r["method"], r["heap"]) ==
                ("1024", method, "retained")]  # fmt: skip

    results(report.HEX)[0]["ms"] = [1.0, 2.0, 9.0]
    results(report.PLAIN_HEX)[0]["ms"] = [14.2, 13.0, 99.0]
    speed = goal("plain HEX / hex HEXLoss at 1024")
    assert speed.got == pytest.approx(7.1) and speed.met
    assert speed.row() == ["7.1x", "at least 7x"]
    for result in records["sizes"]["results"]:
        if result["method"] == report.PRODUCT:
            result.update(flop=1e9, ms=[9.0, 10.0, 30.0])
    share = goal("share of the ideal at 1024")  # 4 1024^2 128 operations in 2 ms, of 111 GF/s
    assert share.got == pytest.approx(4 * 1024**2 * 128 / 2e-3 / (1e9 / 9e-3))
    results(report.HEX)[0]["ms"] = [2.1]
    assert not goal("plain HEX / hex HEXLoss at 1024").met
    assert "| plain HEX / hex HEXLoss at 1024 | 6.76x | at least 7x |" in (
        report.goals(records).markdown()
    )


def test_the_documents_have_the_tables_of_the_recorded_results():
    records = report.latest()
    blocks = report.blocks(records)
    for path in report.DOCUMENTS:
        text = path.read_text()
        assert tables.filled(text, blocks) == text, f"{path.name}: run bench.py --report"
    named = set(re.findall(r"<!-- (\w+) -->", report.DOCUMENTS[0].read_text()))
    assert named == {*bench.PARTS, "goals", "ideal", "end"}
    assert "<!-- summary -->" in report.DOCUMENTS[1].read_text()
    with pictures.open(report.PICTURE) as picture:
        assert picture.info["Figures"] == tables.checksum(report.points(records)), (
            "run bench.py --report"
        )


def test_a_table_that_was_typed_is_seen():
    typed = "<!-- small -->\n| 1.00 |\n<!-- end -->"
    assert tables.filled(typed, report.blocks(report.latest())) != typed


def test_a_table_is_shown_on_a_terminal_and_is_markdown_in_a_document():
    cells = pandas.DataFrame({"a": {"name": "1.0", "n": ""}})
    shown = tables.Table("title", cells, ["note"], "corner")
    assert str(shown).splitlines() == ["title", "", "        a", "name  1.0", "n        ", "note"]
    assert shown.markdown().splitlines() == [
        "**title**", "", "| corner | a |", "| --- | ---: |", "| name | 1.0 |", "| n |  |", "",
        "note",
    ]  # fmt: skip
    assert [tables.number(x) for x in (None, 0.123, 9.999, 99.96, 1234.5)] == [
        "", "0.12", "10.0", "100", "1234",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind, mode, dtype",
    [
        *((kind, "ntxent", torch.float32) for kind in batches.KINDS),
        ("clusters", "ntxent", torch.float64),
        ("clusters", "query", torch.bfloat16),
        ("clusters", "cross", torch.float32),
        ("clusters", "shared", torch.float16),
    ],
)
def test_every_method_is_right(kind, mode, dtype):
    queue = 190 if mode == "shared" else 0
    batch = batches.views(80, 24, kind=kind, dtype=dtype, mode=mode, queue=queue)
    methods = (*peers.METHODS, peers.AUTHORS) if kind == "clusters" else peers.METHODS
    for method in methods:  # the released form of a collapsed batch is decided by rounding
        if method.takes(batch) and not method.compiled:
            right = peers.truth(batch, method.loss)
            peers.check(method, batch, method.step(batch)(), right)


@pytest.mark.parametrize("mode", ["ntxent", "query", "cross", "shared"])
def test_the_truth_is_the_reference(mode):
    batch = batches.views(80, 24, dtype=torch.float64, mode=mode, queue=190 * (mode == "shared"))
    z0, z1, negatives = (*batch.leaves, *batch.others, None)[:3]
    adaptive = oracle.threshold(z0, z1, negatives, mode, peers.QUANTILE)
    tau, none = torch.tensor(peers.TAU, dtype=torch.float64), torch.tensor(torch.inf)
    for name, eps, variant in (
        ("HEX", adaptive, "paper"),
        ("released", adaptive, "released"),
        ("InfoNCE", none, "paper"),
    ):
        wanted = oracle.loss_rows(
            z0, z1, negatives, eps, tau, mode, peers.BETA, peers.TAU_PLUS, variant
        )[0].mean()
        got = peers.plain(name, mode)(*batch.leaves, *batch.others)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_method_of_labels_and_logits_is_right(dtype):
    for batch, methods in (
        (batches.labels(192, 24), peers.LABELS),
        (batches.logits(30, 500, peers.TAU), peers.LOGITS),
    ):
        batch = batch.to(dtype)
        for method in methods:
            right = peers.truth(batch, method.loss)
            peers.check(method, batch, method.step(batch)(), right)
            other = peers.truth(batch, {"HEX": "InfoNCE"}.get(method.loss, "HEX"))
            with pytest.raises(peers.Mismatch, match=re.escape(method.name)):
                peers.check(method, batch, other, right)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.101},
        {"beta": 0.9},
        {"tau_plus": 0.0},
        {"variant": "released"},
        {"threshold": None},
        {"threshold": ThresholdTracker.adaptive(quantile=0.98)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_another_formula_is_refused(option):
    batch = batches.views(100, 24)
    options = {"temperature": 0.1} | option
    method = peers.Method("other", "HEX", lambda _: HEXLoss(**options))
    with pytest.raises(peers.Mismatch, match="other: got a (loss|gradient)_error"):
        peers.check(method, batch, method.step(batch)(), peers.truth(batch, "HEX"))


def test_a_wrong_gradient_is_refused():
    batch = batches.views(100, 24)
    right = peers.truth(batch, "HEX")
    wrong = right[0], right[1], 1.02 * right[2]
    with pytest.raises(peers.Mismatch, match="gradient_error"):
        peers.check(peers.HEX, batch, wrong, right)


def test_a_wrong_method_ends_the_run(monkeypatch, capsys):
    def other(batch):
        return lambda *inputs: hex_loss(*inputs, eps=0.0)

    wrong = peers.HEX._replace(build=other)
    monkeypatch.setattr(peers, "METHODS", (wrong,))
    monkeypatch.setattr(bench, "apart", lambda part, options, level: bench.run(part, options))
    before = torch.get_num_threads()
    assert bench.main(["sizes", "--quick", "--sizes", "160"]) == 1
    torch.set_num_threads(before)
    error = capsys.readouterr().err
    assert re.search(r"error: hex HEXLoss: got a loss_error .*, at 160 rows", error)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["everything"], "no part 'everything'"),
        (["--sizes", "many"], "--sizes: got 'many'"),
        (["--sizes", "255"], "--sizes: got '255', wanted an even number"),
        (["--methods", "nothing"], "--methods: no name"),
        (["--repeats", "0"], "--repeats: got 0, wanted at least 1"),
    ],
)
def test_a_bad_argument_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert message in capsys.readouterr().err


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

    steps = {name: measure.timer(step, clock=measure.clock(1)) for name in ("a", "b")}
    samples = measure.times(steps, 3)
    assert [len(ms) for ms in samples.values()] == [3, 3]
    assert all(3 <= x < 6 for ms in samples.values() for x in ms)
    monkeypatch.setattr(measure, "ENOUGH_S", 1e-3)  # a call that takes long has one turn
    assert [len(ms) for ms in measure.times(steps, 3).values()] == [1, 1]


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
