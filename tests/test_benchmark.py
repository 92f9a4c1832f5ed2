# SPDX-License-Identifier: MIT
"""The benchmarks at tiny sizes: they run, and a method that is wrong cannot be timed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import batches  # noqa: E402
import classes  # noqa: E402
import hazards  # noqa: E402
import loss  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import table  # noqa: E402

from hex import HEXLoss, hex_cross_entropy, hex_loss, hex_sup_con  # noqa: E402

own_memory = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="under AddressSanitizer memory and time are mostly the sanitizer's",
)


@own_memory
def test_the_benchmark_prints_a_table_and_writes_its_samples(tmp_path):
    file = tmp_path / "figures.json"
    words = ["hex", "plain HEX", "plain InfoNCE", "info-nce"]
    command = [sys.executable, str(BENCHMARKS / "loss.py"), "--quick", "--sizes", "160", "192x24"]
    done = subprocess.run(
        [*command, "--dim", "16", "--repeats", "2", "--methods", *words, "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert [(case["rows"], case["features"]) for case in content["sizes"]] == [(160, 16), (192, 24)]
    methods = [
        "hex HEXLoss",
        "hex hex_loss, eps given",
        "plain HEX",
        "hex InfoNCELoss",
        "plain InfoNCE",
        "info-nce-pytorch InfoNCE",
    ]
    for case in content["sizes"]:
        assert list(case["peak_mb"]) == methods
        for heap in ("stock", "retained"):
            assert list(case["samples_ms"][heap]) == methods
            for samples in case["samples_ms"][heap].values():
                assert len(samples) == 2 and min(samples) > 0
    medians = [sum(case["samples_ms"]["stock"]["hex HEXLoss"]) / 2 for case in content["sizes"]]
    line = next(line for line in done.stdout.splitlines() if line.startswith("hex HEXLoss"))
    assert line.split()[2:] == [table.number(ms) for ms in medians]
    for about in (content["machine"]["cpu"], "plain HEX / hex HEXLoss", "flatters hex"):
        assert about in done.stdout


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
    monkeypatch.setattr(loss, "METHODS", (wrong,))
    assert loss.main(["--quick", "--sizes", "160", "--dim", "16", "--heap", "stock"]) == 1
    assert re.search(
        r"error: hex HEXLoss: got loss .*, wanted .*, at 160 rows", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sizes", "many"], "--sizes: got 'many'"),
        (["--sizes", "255"], "--sizes: got '255', wanted an even number"),
        (["--methods", "nothing"], "--methods: no name"),
        (["--repeats", "0"], "--repeats: got 0, wanted at least 1"),
    ],
)
def test_a_bad_argument_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        loss.parse(arguments)
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
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # a library's
def test_labels_and_logits_are_checked_and_timed(capsys):
    assert classes.main(["--quick", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = ("hex_sup_con", "SupContrast in plain", "hex_cross_entropy", "torch's cross_entropy")
    assert all(any(line.startswith(name) for line in lines) for name in wanted)


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
