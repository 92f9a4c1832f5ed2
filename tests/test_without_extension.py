# SPDX-License-Identifier: MIT
"""The wheel that HEX_EXTENSION=0 makes, for systems where the extension cannot be built: in a
process of its own every loss has there the values and gradients of the kernels here.

What a device without kernels runs is tested with each loss; here, that it is all there without the
extension, under transforms and with several ranks too. What `import hex` says is in test_import.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from data import batch, views
from torch import Tensor

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"

# What the process of the wheel runs.
THERE = """
import sys, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import hex
import torch, test_without_extension
from pathlib import Path
from hex import ops
torch.save(test_without_extension.results(Path(sys.argv[1])), sys.argv[2])
print(hex.__file__, hex._C, ops.isa(), *(f"{w.category.__name__}:{w.filename}" for w in said))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pure")
    tree = folder / "tree"
    shutil.copytree(
        ROOT / "hex", tree / "hex", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    environment = os.environ | {"HEX_EXTENSION": "0"}
    subprocess.run(
        [sys.executable, "-c", BUILD, folder], cwd=tree, env=environment, check=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return wheel


def run(wheel: Path, *command: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """In the folder of the wheel, which also has its package first."""
    path = f"{wheel.parent / 'site'}{os.pathsep}{Path(__file__).parent}"
    done = subprocess.run(
        [sys.executable, *command], cwd=wheel.parent, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def results(folder: Path) -> dict[str, tuple[Tensor, ...]]:
    """Values, gradients and statistics of every loss; whoever calls has the kernels or has not."""
    from hex import (
        HEXCrossEntropyLoss,
        HEXLoss,
        HEXSupConLoss,
        InfoNCELoss,
        ThresholdTracker,
        batch_threshold,
        hex_loss,
    )

    z0, z1, queue = batch("cluster", 24, 9, "unpaired", K=31)
    own = batch("cluster", 24, 9, "paired", K=5)[2]
    labels = torch.arange(24) % 7
    logits = 10 * torch.nn.functional.normalize(views("cluster", 24, 24)[0])  # cosines / 0.1
    cosine = HEXLoss(
        mode="query", threshold=ThresholdTracker.cosine(0.9, 0.3, 10, normalize_rows=True)
    )
    cosine.set_epoch(2)
    found: dict[str, tuple[Tensor, ...]] = {}

    def add(name: str, loss: Any, *inputs: Tensor, **options: Any) -> None:
        leaves = [z.clone().requires_grad_() for z in inputs]
        value = loss(*leaves, **options)
        gradients = torch.autograd.grad(value, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
        told = torch.tensor(list(loss.statistics().values()), dtype=torch.float64)
        found[name] = (value, *gradients, *second, told)

    add("HEXLoss", HEXLoss(), z0, z1)
    add("released", HEXLoss(variant="released"), z0, z1)
    add("cross", HEXLoss(mode="cross", threshold=0.3), z0, z1)
    add("a schedule, of the rows", cosine, z0, z1)
    add("a queue", HEXLoss(temperature=torch.tensor(0.2)), z0, z1, queue)
    add("negatives of each", HEXLoss(), z0, z1, own)
    add("groups", HEXLoss(), z0, z1, groups=labels)
    add("a guide", HEXLoss(), z0, z1, guide=(z1.flip(1), z0.flip(1)))
    add("InfoNCELoss", InfoNCELoss(), z0, z1)
    add("SupCon", HEXSupConLoss(), torch.cat([z0, z1]), labels=labels.repeat(2))
    add("SupCon inside", HEXSupConLoss(positives="inside"), z0, labels=labels)
    add("logits", HEXCrossEntropyLoss(0.1), logits, target=labels)
    add("no rows", HEXSupConLoss(), z0[:0], labels=labels[:0])
    add("compiled", _Compiled(HEXLoss()), z0, z1)
    found["batch_threshold"] = (batch_threshold(z0, z1),)
    both = torch.stack([z0, z1])
    found["vmap"] = (torch.vmap(lambda z: hex_loss(z, z1, eps=0.3))(both),)
    found["func"] = (torch.func.grad(lambda z: hex_loss(z, z1, eps=0.3))(z0),)
    found["two ranks"] = tuple(torch.cat(x) for x in zip(*ranks.run(_share, folder), strict=True))
    return {name: tuple(x.detach() for x in tensors) for name, tensors in found.items()}


class _Compiled:
    """A loss whose first call is compiled; its derivatives are taken outside the graph."""

    def __init__(self, loss: Any) -> None:
        self.statistics = loss.statistics
        self.loss = torch.compile(loss, fullgraph=True, backend="eager")

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.loss(*inputs)


def _share(rank: int) -> tuple[Tensor, ...]:
    """Value and gradient of the loss of both ranks."""
    from hex import HEXLoss

    leaves = [z[12 * rank :][:12].clone().requires_grad_() for z in views("cluster", 24, 9)]
    value = HEXLoss(gather_distributed=True)(*leaves)
    return value.detach()[None], *torch.autograd.grad(value, leaves)


def test_the_wheel_is_for_every_system_and_has_no_library(wheel):
    assert re.fullmatch(r"hex_ssl-[\d.]+-py3-none-any\.whl", wheel.name)
    files = {p.name for p in (wheel.parent / "site/hex").iterdir()}
    assert files == {p.name for p in (ROOT / "hex").glob("*.py*")} - {"__pycache__"} | {"py.typed"}


def test_every_loss_computes_there_what_the_kernels_compute(wheel, tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    said = run(wheel, "-c", THERE, tmp_path / "there", tmp_path / "found.pt", OMP_NUM_THREADS="1")
    site = wheel.parent / "site/hex/__init__.py"
    assert said.stdout.split() == [str(site), "None", "none", "RuntimeWarning:<string>"]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    wanted = results(tmp_path / "here")
    assert found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        close = dict(rtol=1e-9, atol=1e-10, equal_nan=True)  # groups have no eps
        torch.testing.assert_close(
            found[name], tensors, **close, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_python_m_hex_says_what_is_missing_and_why(wheel):
    done = run(wheel, "-m", "hex")
    assert re.search(r"CPU kernels +none", done.stdout)
    assert "There are no kernels to check" in done.stdout
    assert "hex._C is not built in" in done.stderr


def test_hex_extension_is_neither_0_nor_1():
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"HEX_EXTENSION": "no"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "HEX_EXTENSION: got 'no', wanted 0 or 1\n"
