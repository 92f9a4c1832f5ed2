# SPDX-License-Identifier: MIT
"""The benchmarks at tiny sizes: they run, and a method that is wrong cannot be timed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import batches  # noqa: E402
import bench  # noqa: E402
import goals  # noqa: E402
import hazards  # noqa: E402
import measure  # noqa: E402
import parts  # noqa: E402
import peers  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import table  # noqa: E402

from hex import HEXLoss, hex_cross_entropy, hex_loss, hex_sup_con  # noqa: E402

own_memory = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="under AddressSanitizer memory and time are mostly the sanitizer's",
)


@own_memory
def test_the_benchmark_prints_tables_and_records_its_samples(tmp_path):
    file = tmp_path / "results.jsonl"
    words = ["hex", "plain HEX", "plain InfoNCE", "info-nce"]
    command = [sys.executable, str(BENCHMARKS / "bench.py"), "sizes", "--quick", "--repeats", "2"]
    command += ["--sizes", "160", "192x24", "--methods", *words, "--record", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, file.read_text().splitlines())
    methods = [
        "hex HEXLoss",
        "hex hex_loss, eps given",
        "plain HEX",
        "hex InfoNCELoss",
        "plain InfoNCE",
        "info-nce-pytorch InfoNCE",
    ]
    figures = goals.Figures(record)
    assert figures.cases == ["160", "192x24"]
    for case, shape in zip(figures.cases, ((160, 128), (192, 24)), strict=True):
        for heap in ("stock", "retained"):
            found = [r for r in record["results"] if r["case"] == case and r["heap"] == heap]
            assert [r["method"] for r in found] == [*methods, parts.MM, parts.PRODUCT]
            for result in found:
                assert (result["rows"], result["features"]) == shape
                assert len(result["ms"]) == 2 and min(result["ms"]) > 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("hex HEXLoss  ")]
    shown = [table.number(figures.ms(c, "hex HEXLoss", heap="retained")) for c in figures.cases]
    assert shown in [line.split()[2:] for line in lines]
    for about in (record["machine"]["cpu"], "plain HEX / hex HEXLoss", "flatters hex"):
        assert about in done.stdout


@own_memory
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # a library's
@pytest.mark.parametrize("part", sorted(set(parts.PARTS) - {"sizes"}))
def test_a_part_gives_results_and_a_table(part, monkeypatch):
    monkeypatch.setattr(measure, "retain_heap", lambda: None)  # for good: not in this process
    monkeypatch.setattr(measure, "SAMPLE_MS", 1)
    before = torch.get_num_threads()
    record = bench.run(part, parts.Settings(quick=True, repeats=1))
    torch.set_num_threads(before)
    assert record["results"] or record["notes"]
    for shown in report.tables(part, json.loads(json.dumps(record))):
        assert table.text(*shown) and table.markdown(shown)
        assert all(
            len(line) == len(shown.columns) for line in shown.lines if isinstance(line, list)
        )


def record_of(rows, ms, **more):
    """A record of sizes with these times of HEXLoss and plain HEX."""
    result = {"case": str(rows), "rows": rows, "features": 128, "heap": "retained", "peak_mb": 1.0}
    product = {**result, "method": parts.PRODUCT, "flop": 1e9, "ms": [9.0, 10.0, 30.0]}
    methods = (peers.HEX, peers.PLAIN_HEX)
    timed = [{**result, "method": m.name, "ms": t} for m, t in zip(methods, ms, strict=True)]
    return {"part": "sizes", "results": [*timed, product], **more}


def test_goals_are_held_against_medians_of_one_run():
    record = record_of(1024, ([1.0, 2.0, 9.0], [14.2, 13.0, 99.0]))
    by_name = {goal.about: goal for goal in goals.all_of({"sizes": record})}
    speed = by_name["plain HEX / hex HEXLoss at 1024"]
    assert speed.got == pytest.approx(7.1) and speed.wanted == 7 and speed.met
    share = by_name["share of the ideal at 1024"]  # 4 1024^2 128 operations in 2 ms, of 111 GF/s
    assert share.got == pytest.approx(4 * 1024**2 * 128 / 2e-3 / (1e9 / 9e-3))
    slower = record_of(1024, ([2.1], [14.2]))
    assert [goal.met for goal in goals.all_of({"sizes": slower})][0] is False


def test_the_documents_have_the_tables_of_the_recorded_results():
    records = report.latest()
    for path in report.DOCUMENTS:
        text = path.read_text()
        assert report.filled(text, records) == text, f"{path.name}: run bench.py --report"
    named = set(re.findall(r"<!-- (\w+) -->", report.DOCUMENTS[0].read_text()))
    assert named == {*parts.PARTS, "goals", "end"}
    assert "<!-- summary -->" in report.DOCUMENTS[1].read_text()
    with PIL.Image.open(report.PICTURE) as picture:
        assert picture.info["Figures"] == plot.checksum(records), "run bench.py --report"


def test_a_table_that_was_typed_is_seen():
    records = report.latest()
    typed = "<!-- small -->\n| 1.00 |\n<!-- end -->"
    assert report.filled(typed, records) != typed


def test_a_table_in_a_document_is_markdown():
    shown = table.Table("title", ["", "a"], ["part", ["name", "1"], ["  goal", "2"]], ["note"])
    assert table.markdown(shown).splitlines() == [
        "**title**", "", "|  | a |", "| --- | ---: |", "| **part** |  |", "| name | 1 |",
        "| *goal* | 2 |", "", "note",
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
    batch = batches.make(80, 24, kind=kind, dtype=dtype, mode=mode, queue=queue)
    for method in peers.METHODS:
        if method.takes(batch) and not method.compiled:
            right = peers.truth(batch, method.loss)
            peers.check(method, batch, method.step(batch)(), right)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": 0.101},
        {"beta": 0.9},
        {"tau_plus": 0.0},
        {"variant": "released"},
        {"threshold": None},
        {"threshold": hazards.ThresholdTracker.adaptive(quantile=0.98)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_another_formula_is_refused(option):
    batch = batches.make(100, 24)
    options = {"temperature": 0.1} | option
    method = peers.Method("other", "HEX", lambda _: HEXLoss(**options))
    with pytest.raises(peers.Mismatch, match="other: got"):
        peers.check(method, batch, method.step(batch)(), peers.truth(batch, "HEX"))


def test_a_wrong_gradient_is_refused():
    batch = batches.make(100, 24)
    right = peers.truth(batch, "HEX")
    wrong = right[0], right[1], 1.02 * right[2]
    with pytest.raises(peers.Mismatch, match="gradient in z1"):
        peers.check(peers.HEX, batch, wrong, right)


def test_a_wrong_method_ends_the_run(monkeypatch, capsys):
    def other(batch):
        return lambda *inputs: hex_loss(*inputs, eps=0.0)

    wrong = peers.HEX._replace(build=other)
    monkeypatch.setattr(peers, "METHODS", (wrong,))
    assert bench.main(["sizes", "--child", "--quick", "--sizes", "160"]) == 1
    assert re.search(
        r"error: hex HEXLoss: got loss .*, wanted .*, at 160 rows", capsys.readouterr().err
    )


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
def test_times_are_those_of_a_call():
    def step():
        start = measure.clock(1)()
        while measure.clock(1)() - start < 0.003:
            pass

    samples = measure.times({"step": step}, 3, measure.clock(1))["step"]
    assert len(samples) == 3
    assert all(3 <= ms < 6 for ms in samples)


def test_hex_answers_every_question():
    for text, question in hazards.QUESTIONS.items():
        for name, make in hazards.OURS.items():
            assert hazards.ask(question, make) == "ok", (text, name)


def test_the_questions_can_be_failed():
    plain = hazards.PlainInfoNCE
    for text in ("row of zeros: gradient < 1e6", "small loss: within 1e-4", "B = 0: finite"):
        assert hazards.ask(hazards.QUESTIONS[text], plain) == "wrong"
    assert hazards.ask(lambda make: [][0], plain) == "IndexError"


def test_a_table_is_aligned():
    shown = table.text("title", ["", "a"], ["part", ["name", "1.0"], ["n", ""]], ["note"])
    assert shown == "title\n\n        a\n---------\n\npart\nname  1.0\nn\n---------\nnote"
    assert [table.number(x) for x in (None, 0.123, 9.999, 99.96, 1234.5)] == [
        "", "0.12", "10.0", "100", "1234",
    ]  # fmt: skip


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
