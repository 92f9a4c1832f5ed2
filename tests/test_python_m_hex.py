# SPDX-License-Identifier: MIT
"""`python -m hex`: what it prints, and that its check can fail."""

import os
import re
import subprocess
import sys

import pytest
import torch

import hex.__main__ as main
from hex import __version__, hex_loss, ops, reference

MODES = ("ntxent", "query", "cross", "unpaired", "paired")
NUMBER = re.compile(r"\d\.\de-\d\d|inf")


def test_it_reports_the_installation_and_that_every_kernel_is_right():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "hex"],
        env={**os.environ, "HEX_ISA": "base"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"hex-ssl +{re.escape(__version__)}, ", done.stdout)
    assert torch.__version__ in done.stdout
    assert re.search(r"CPU kernels +base \(HEX_ISA = base\)", done.stdout)
    rows = [line for line in done.stdout.splitlines() if line.startswith(MODES)]
    assert len(rows) == 20 and all(len(NUMBER.findall(row)) == 6 for row in rows)
    assert done.stdout.endswith("All checks passed.\n")


def test_a_level_that_was_asked_for_and_is_not_there_is_named_with_the_reason():
    code = "from hex.__main__ import installation; print(dict(installation())['CPU kernels'])"
    level = "avx512_amx"  # the rarest: whether it is there, the machine decides
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HEX_ISA": level},
        capture_output=True,
        text=True,
    )
    used, asked = done.stdout.rstrip(")\n").split(" (")
    if used == level:
        assert asked == f"HEX_ISA = {level}" and not done.stderr
    else:
        assert re.fullmatch(f"HEX_ISA = {level}: this (CPU|build) does not have it", asked)
        assert f"{asked.replace(' = ', '=')}; using {used}" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)  # as of `python -m hex | head`, when head is done
    with os.fdopen(write, "w") as out:
        done = subprocess.run([sys.executable, "-m", "hex"], stdout=out, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_help_explains_the_exit_status(capsys):
    with pytest.raises(SystemExit, match="0"):
        main.main(["--help"])
    assert "Exit status" in capsys.readouterr().out


def test_an_unknown_argument_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main.main(["--fast"])
    assert "--fast" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
def test_a_wrong_loss_is_found_and_named(monkeypatch, capsys, factor):
    def wrong(*batch, mode, **options):
        return hex_loss(*batch, mode=mode, **options) * (factor if mode == "cross" else 1)

    monkeypatch.setattr(main, "hex_loss", wrong)
    assert main.main([]) == 1
    out = capsys.readouterr().out
    named = {line.split()[0] for line in out.splitlines() if line.endswith("WRONG")}
    assert named == {"cross"} and "Something is wrong" in out


def test_a_wrong_threshold_is_found(monkeypatch, capsys):
    right = ops.row_range
    monkeypatch.setattr(ops, "row_range", lambda *of: [x + 1e-5 for x in right(*of)])
    assert main.main([]) == 1
    assert capsys.readouterr().out.count("WRONG\n") == 20


def test_a_result_that_depends_on_the_threads_is_found(monkeypatch, capsys):
    def wrong(*batch, **options):
        return hex_loss(*batch, **options) + torch.get_num_threads() * 1e-6

    with main.threads(2):
        monkeypatch.setattr(main, "hex_loss", wrong)
        assert not main.same_bits(2)
        monkeypatch.undo()
        assert main.same_bits(2)


def test_the_number_of_threads_is_left_as_it_was():
    for n in (1, 3):
        with main.threads(n):
            main.check("query", torch.float32)
            with pytest.raises(RuntimeError), main.threads(2):
                raise RuntimeError
            assert torch.get_num_threads() == n


@pytest.mark.parametrize("mode", MODES)
def test_the_batch_has_rows_of_every_kind(mode):
    """Rows with the local term at its floor and above it, so that both gradients are checked."""
    batch = [z.double() for z in main.make_batch(mode, torch.float64)]
    inputs = main.three(batch)
    c, p, is_negative = reference.cosines(*inputs, mode)
    eps = main.between(c)
    near = (c[..., None] - eps).abs().min()
    assert near > 1e-4, "rounding could move a candidate across the threshold"
    hard = is_negative & (c > eps)
    n_h = hard.sum(1)
    b = torch.where(hard, torch.exp(c / main.TEMPERATURE), 0.0)
    q = n_h * (b * b).sum(1) / b.sum(1).clamp(min=1e-9) - 0.1 * n_h * torch.exp(p / 0.1)
    floor = 0.9 * n_h * torch.exp(torch.tensor(-1 / main.TEMPERATURE))
    assert ((n_h > 0) & (q < floor)).sum() >= 3
    assert ((n_h > 0) & (q > floor)).sum() >= 3


def test_the_devices_begin_with_the_cpu():
    assert main.devices()[0] == "cpu"
