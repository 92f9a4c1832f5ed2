# SPDX-License-Identifier: MIT
"""What the tests of the kernels share: a batch with its options as one object, the comparison with
plain PyTorch from which every tolerance follows, and the settings of the run.

The batches themselves are in data.py, the plain PyTorch is hex/reference.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import random
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import hypothesis
import operators
import pytest
import torch
from data import batch, eps_in_a_gap, f64, form
from torch import Tensor

from hex import _load, hex_loss, ops, reference

# lightly, open_clip and the examples import torchvision; common.vision has it imported where its
# build and torch's do not match.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
with contextlib.suppress(ModuleNotFoundError):
    import common.vision  # noqa: F401

hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# What tests draw at random they draw from this; a worker has that of the process that started it.
os.environ.setdefault("HEX_SEED", str(random.randrange(1_000_000)))

torch.set_num_threads(1)  # the tensors are small; test_threads.py takes more

DEVICES = ("cpu",)  # those with kernels
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("z0", "z1", "negatives", "tau")


def pytest_report_header() -> str:
    share = os.environ.get("HEX_SHARE", "1")
    return f"HEX_SEED={os.environ['HEX_SEED']} HEX_SHARE={share} draws the same again"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With HEX_SHARE=n one file of tests in n, others with another seed; those of alone/ always.
    Every file is imported: one that cannot be, where the tests run, fails with any seed."""
    share, seed = int(os.environ.get("HEX_SHARE", 1)), int(os.environ["HEX_SEED"])

    def drawn(item: pytest.Item) -> bool:
        name = item.path.name
        return name.startswith("test_alone") or (zlib.crc32(name.encode()) + seed) % share == 0

    config.hook.pytest_deselected(items=[item for item in items if not drawn(item)])
    items[:] = filter(drawn, items)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def without_kernels(monkeypatch):
    """What a device without kernels runs: the composed formulas, on the CPU."""
    monkeypatch.setattr(ops, "_KERNELS", {"meta"})
    monkeypatch.setattr(ops, "_warned", {"cpu"})


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def cuda_tensor(index: int = 0) -> Any:
    """What hex.ops asks a CUDA tensor about before it chooses its kernels; no GPU is needed."""
    device = types.SimpleNamespace(type="cuda", index=index)
    return types.SimpleNamespace(device=device, is_cpu=False, is_cuda=True)


@pytest.fixture
def fresh_cuda(monkeypatch):
    """Nothing asked of a GPU yet, nothing warned of yet. Call it with the compute capability that
    GPUs are to have and the library of the build; without: one that serves them is loaded."""

    monkeypatch.delenv("HEX_CUDA_KERNELS", raising=False)

    def forget():
        _load.cuda_problem.cache_clear()
        _load._cuda_core_problem.cache_clear()

    def set_up(capability, library=None):
        forget()
        monkeypatch.setattr(ops, "_warned", set())
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(_load, "_CUDA_LIBRARY", str(library or __file__))  # that exists
        if library is None:
            monkeypatch.setattr(_load._C, "load_cuda", lambda path: None)
            monkeypatch.setattr(_load._C, "probe_cuda", lambda index: 0)

    yield set_up
    forget()


# ---- the CUDA kernels on the CPU ----

EMULATED = {"mma": (), "wgmma": ("-DHEX_WGMMA",)}  # the flags of each library of emulator.py


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """Of mma.sync and of wgmma; not in use."""
    import emulator

    folder = tmp_path_factory.mktemp("emulation")
    return {
        name: emulator.Emulator(emulator.compile(folder / f"{name}.so", *flags))
        for name, flags in EMULATED.items()
    }


@pytest.fixture(params=EMULATED)
def kernels(libraries, request):
    """One of the libraries in use, as one large device; its barriers one way."""
    with libraries[request.param].in_use() as library:
        yield library


@pytest.fixture
def mma(libraries):
    import emulator

    if emulator.SANITIZED:
        pytest.skip("AddressSanitizer has seen the batteries, which go through every line")
    with libraries["mma"].in_use() as library:
        yield library


class Result(NamedTuple):
    loss: Tensor
    grads: dict[str, Tensor]  # by name, of those there are
    count: Tensor | None = None  # |H| and share of each row, where plain PyTorch gave them
    share: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of the loss; its repr names it without the tensors."""

    # z0, z1 and, in modes "unpaired" and "paired", negatives
    inputs: tuple[Tensor, ...] = dataclasses.field(repr=False)
    mode: str = "ntxent"  # one of data.MODES
    batch: str = ""  # which one it is, for messages
    eps: Tensor = dataclasses.field(default_factory=lambda: f64(math.inf))  # 0-d or (N,)
    tau: float = 0.1
    beta: float = 1.0
    tau_plus: float = 0.1
    variant: str = "paper"  # one of data.FORMS

    @property
    def names(self) -> tuple[str, ...]:
        return (*NAMES[: len(self.inputs)], "tau")

    @property
    def dtype(self) -> torch.dtype:
        """That the loss is computed in."""
        wide = any(z.dtype == torch.float64 for z in self.inputs)
        return torch.float64 if wide else torch.float32

    @property
    def rows(self) -> int:
        return self.inputs[0].shape[0] * (2 if self.mode in ("ntxent", "cross") else 1)

    @property
    def condition(self) -> float:
        """Of the debiasing: `condition_of` the problem."""
        wide = [z.double() for z in self.inputs]
        run = functools.partial(self.reference, *wide, tau=f64(self.tau))
        return condition_of(run, self.tau_plus, **form(self.variant))

    def grad_output(self) -> Tensor:
        """Of the rows: numbers of both signs."""
        values = torch.randn(self.rows, generator=torch.Generator().manual_seed(0))
        return values.to(self.inputs[0].device, self.dtype)

    def loss(self, *inputs: Tensor, tau: Tensor | None = None, reduction: str = "none") -> Tensor:
        """By the kernels, of these inputs instead of its own."""
        return hex_loss(
            *inputs,
            eps=self.eps,
            temperature=self.tau if tau is None else tau,
            beta=self.beta,
            tau_plus=self.tau_plus,
            **form(self.variant),
            mode=self.mode if self.mode in ("ntxent", "query", "cross") else "ntxent",
            reduction=reduction,
        )

    def reference(self, *inputs: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By plain PyTorch: loss, |H| and share of each row."""
        padded = (*inputs, None)[:3]
        return reference.loss_rows(
            *padded, self.eps, tau, self.mode, self.beta, self.tau_plus, **form(self.variant)
        )

    def _result(self, loss: Any, inputs: list[Tensor], grad: Tensor | None) -> Result:
        """Of `loss`, which gives the loss of each row, or also |H| and share."""
        inputs = [z.detach().clone().requires_grad_() for z in inputs]
        tau = f64(self.tau).to(inputs[0].device).requires_grad_()
        value, *rest = loss(*inputs, tau=tau)
        grad = self.grad_output() if grad is None else grad
        grads = torch.autograd.grad(value, (*inputs, tau), grad.to(value))
        return Result(value.detach(), dict(zip(self.names, grads, strict=True)), *rest)

    def ours(self, grad: Tensor | None = None) -> Result:
        """Loss of each row and gradients, by the kernels."""
        return self._result(lambda *z, tau: [self.loss(*z, tau=tau)], list(self.inputs), grad)

    def plain(self, dtype: torch.dtype, grad: Tensor | None = None) -> Result:
        """The same by plain PyTorch in `dtype`, on the same numbers."""
        return self._result(self.reference, [z.to(dtype) for z in self.inputs], grad)

    def raw(self) -> tuple[Any, ...]:
        """The arguments of torch.ops.hex.forward, reduction "none"."""
        z0 = self.inputs[0]
        return (
            *(*self.inputs, z0.new_empty((0, z0.shape[1])))[:3],
            self.eps,
            f64(self.tau).to(z0.device),
            ops.MODES[self.mode],
            ops.REDUCTIONS["none"],
            ops.VARIANTS[form(self.variant)["variant"]],
            self.beta,
            self.tau_plus,
            form(self.variant)["decoupled"],
            0,
        )

    def with_(self, **changes: Any) -> Problem:
        return dataclasses.replace(self, **changes)


def problem(
    kind: str = "gauss",
    B: int = 13,
    D: int = 7,
    mode: str = "ntxent",
    *,
    K: int = 11,
    seed: int = 0,
    dtype: torch.dtype | tuple[torch.dtype, ...] = torch.float64,
    device: str = "cpu",
    near: float = 0.3,
    **options: Any,
) -> Problem:
    """A batch of data.py, with eps where no cosine is, close to `near`; dtype: one, or of each.

    Where there is no gap, cosines that are all alike or, with one feature, all 1 or -1, eps is 0.5.
    """
    tensors = [z for z in batch(kind, B, D, mode, K, seed) if z is not None]
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * 3
    inputs = tuple(z.to(device, t) for z, t in zip(tensors, dtypes, strict=False))
    if "eps" not in options:
        c, _, negative = reference.cosines(*(*(z.double() for z in inputs), None)[:3], mode)
        spread = "collapsed" not in kind and D > 1 and negative.sum() > 1
        options["eps"] = eps_in_a_gap(c[negative], near) if spread else f64(0.5).to(device)
    name = f"{kind} {B} x {D}, seed {seed}, " + " ".join(str(z.dtype)[6:] for z in inputs)
    return Problem(inputs, mode, name, **options)


def eps_of_each_row(p: Problem) -> Problem:
    """The same with a threshold of its own for each row, where no cosine is."""
    inputs = (*(z.double() for z in p.inputs), None)[:3]
    c, _, negative = reference.cosines(*inputs, p.mode)
    near = torch.linspace(-0.4, 0.9, p.rows)
    eps = [eps_in_a_gap(c[i][negative[i]], near[i].item()) for i in range(p.rows)]
    return p.with_(eps=torch.stack(eps).to(p.inputs[0].device))


def at_the_floor(p: Problem) -> Tensor:
    """Rows (bool) with hard negatives whose debiased sum is below the floor, letter by letter."""
    inputs = (*(z.double() for z in p.inputs), None)[:3]
    c, positive, negative = reference.cosines(*inputs, p.mode)
    hard = negative & (c > p.eps.reshape(-1, 1))
    count = hard.sum(1)
    weights = torch.where(hard, torch.exp(p.beta * c / p.tau), 0.0)
    mean = (weights * torch.exp(c / p.tau)).sum(1) / weights.sum(1)
    debiased = (mean - p.tau_plus * torch.exp(positive / p.tau)) / (1 - p.tau_plus)
    return (count > 0) & (debiased < math.exp(-1 / p.tau))


# ---- tolerances ---------------------------------------------------------------------------------

# The levels for bfloat16 multiply rows by their factors after the dot product: four roundings by
# half an ulp where a row of one feature, 1 or -1, has none.
BY_DOTS = ops.isa() in ("avx512_bf16", "avx512_amx")
COSINE_ULPS = 2 if BY_DOTS else 1


def condition_of(
    run: Callable[[], object], tau_plus: float, variant: str, decoupled: bool
) -> float:
    """How many times its terms' relative error a denominator may err by, for the debiased sum in it
    is their difference, q = N_h (r - tau_plus E / n_P) / (1 - tau_plus).

    The denominator of the paper's form also has E, and no more than (1 + tau_plus) / (1 - tau_plus)
    comes of it. Decoupled it has not, and the terms may be any number of times what is left of
    them: the most of all rows is taken, which are those of `run`, by the reference in float64.
    """
    if variant != "paper":
        return 1.0
    least = (1 + tau_plus) / (1 - tau_plus)
    if not decoupled:
        return least
    with mock.patch.object(reference, "row_loss", wraps=reference.row_loss) as looked:
        run()
    (table, hard, tau, beta, *_), options = looked.call_args
    values, positive, negative, _ = (x.detach() for x in table)
    if not negative.any():
        return least
    hard, some = negative & hard, negative.any(1, keepdim=True)
    x = values if options.get("logits") else values / tau.detach()
    top = torch.where(some, torch.where(negative, x, -math.inf).amax(1, keepdim=True), 0.0)
    e = torch.exp((x - top).clamp(max=600))
    b = torch.where(hard, beta * (x - top), -math.inf).softmax(1).nan_to_num(0)  # 0 without H
    r, rest = (b * e).sum(1), torch.where(negative & ~hard, e, 0.0).sum(1)
    near, mean = hard.sum(1), torch.where(positive, e, 0.0).sum(1) / positive.sum(1).clamp(min=1)
    terms, q = (near * (r + sign * tau_plus * mean) / (1 - tau_plus) for sign in (1, -1))
    floor = near * torch.exp((-1 / tau.detach() - top.squeeze(1)).clamp(max=600))
    return max(least, (terms / (torch.maximum(q.abs(), floor) + rest)).nan_to_num(0).max().item())


def assert_as_good_as_torch(
    ours: Tensor,
    same_dtype: Tensor,
    truth: Tensor,
    *,
    tau: float,
    dtype: torch.dtype | None = None,
    condition: float = 1.0,
    scale: float = 0.0,
    about: object = None,
) -> None:
    """Ours may err twice what plain PyTorch errs on the same numbers, and a rounding error more.

    truth: plain PyTorch in float64. same_dtype: plain PyTorch in the dtype that ours computes in,
    which is `dtype` where the two tensors do not say so.

    The rounding error: 4 ulp of the largest value; or, where tau makes more of it, what cosines
    with an error of one ulp of 1 (COSINE_ULPS) give: that over tau, times the condition of the
    debiasing.
    `scale` is the size of the terms whose sum the value is: where they cancel (a collapsed batch,
    whose gradient is nearly 0), an ulp of them. float64 has no wider truth beside it: there the
    contract's 1e-12 from tau = 0.05 on stands for both. A gradient in a dtype narrower than that of
    the computation is, besides, rounded once.
    """
    assert ours.shape == truth.shape, about
    if ours.numel() == 0:
        return
    dtype = dtype or same_dtype.dtype
    if dtype == torch.float64:
        ulp, relative = 1e-12, 1e-12 * max(1, 0.05 / tau)
    else:
        ulp = torch.finfo(dtype).eps
        relative = ulp * max(4, COSINE_ULPS / tau)
    allowed = 2 * (same_dtype.double() - truth).abs().max()
    allowed = allowed + condition * relative * truth.abs().max()
    allowed = allowed + ulp * scale + torch.finfo(dtype).tiny / tau
    if ours.dtype not in (dtype, torch.float64):
        info = torch.finfo(ours.dtype)
        subnormal = info.tiny * info.eps  # the spacing of those
        allowed = allowed + (truth.abs() * info.eps + subnormal) / 2
    error = (ours.double() - truth).abs()
    assert error.isfinite().all(), about
    excess = (error / allowed).max().item()
    assert excess <= 1, f"{excess:.3g} times the error allowed, {about}"


def check_loss(p: Problem) -> None:
    """The loss of each row, |H| and share, against plain PyTorch."""
    _check_rows(p, *(
        Result(loss, {}, count, share)
        for dtype in (p.dtype, torch.float64)
        for loss, count, share in [p.reference(*(z.to(dtype) for z in p.inputs), tau=f64(p.tau))]
    ))  # fmt: skip


def check(p: Problem) -> None:
    """The same, and every gradient."""
    truth = p.plain(torch.float64)
    same = truth if p.dtype == torch.float64 else p.plain(p.dtype)
    _check_rows(p, same, truth)
    ours = p.ours()
    # What the weights of a row, the dL/dc, add up to: the negatives' to S / (tau (e_0 + S)) =
    # (1 - exp(-L)) / tau before debiasing, or to 1 / tau where the denominator has no e_0.
    condition, decoupled = p.condition, "decoupled" in p.variant
    mass = 1.0 if p.variant == "released" or decoupled else -torch.expm1(-truth.loss)
    mass = mass / p.tau * condition * p.grad_output().double().abs()
    for name, z in zip(p.names, (*p.inputs, None), strict=True):
        if z is None:
            scale = 2 * mass.sum().item() / p.tau  # cosines are up to 2 apart
        else:
            length = z.double().norm(dim=-1)
            scale = (mass.max() / length[length > 0].min()).item() if length.any() else 0.0
        assert ours.grads[name].dtype == (torch.float64 if z is None else z.dtype)
        rounded = same.grads[name]
        if BY_DOTS and ours.grads[name].dtype == torch.bfloat16:
            # The terms are rounded to bfloat16 there, not only their sum: as large an error of it
            # as of plain PyTorch's, but not element by element.
            rounded = rounded.to(torch.bfloat16)
        assert_as_good_as_torch(
            ours.grads[name],
            rounded,
            truth.grads[name],
            tau=p.tau,
            dtype=p.dtype,
            condition=condition,
            scale=scale,
            about=(name, p),
        )


def _check_rows(p: Problem, same: Result, truth: Result) -> None:
    loss, stats, _ = operators.forward(*p.raw())
    condition = p.condition
    assert loss.dtype == stats.dtype == p.dtype
    assert torch.equal(stats[ops.COUNT].double(), truth.count.double()), p
    # Without e_0 in the denominator the loss is a difference, of logarithms up to 1/tau.
    size = 2 / p.tau * condition if "decoupled" in p.variant else 0.0
    named = {
        "loss": (size, loss, same.loss, truth.loss),
        "share": (0.0, stats[ops.SHARE], same.share, truth.share),
    }
    for name, (scale, *tensors) in named.items():
        options = dict(tau=p.tau, dtype=p.dtype, condition=condition, scale=scale)
        assert_as_good_as_torch(*tensors, **options, about=(name, p))
