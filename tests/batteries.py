# SPDX-License-Identifier: MIT
"""What right CUDA kernels give, on a GPU and in the emulation (emulator.py) alike: problems of two
views against plain PyTorch, by bounds that are derived, and batteries of a few problems that go
through every line of the kernels between them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import operators
import torch
from conftest import Problem, check, eps_of_each_row
from data import f64
from emulator import HEX, Emulator
from torch import Tensor

from hex import ThresholdTracker, info_nce, ops, reference

BIN = 1 / 65535 + 1e-6  # of the threshold: half a bin, and the rounding of float32


def half_errors(p: Problem) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(ours, truth, allowed) of the loss and each gradient, for 16-bit inputs.

    An element of a unit row is rounded by 2^-12 of itself and the row's length by no more, so a
    cosine is off by delta = 2 * 2^-12 at most, plus 2^-24 sqrt(D) where elements are subnormal.
    dL/dc <= 1 / tau in all (times the debiasing's condition, and 1 + beta for the weights), which
    bounds the loss. A gradient entry is a sum of such dL/dc, each off by the relative error of an
    exponential, (1 + beta) delta / tau, and by 2^-11 for w and u in fp16; it is compared with the
    largest of its rows.
    """
    ours, truth = p.ours(), p.plain(torch.float64)
    delta = 2 * 2**-12 + 2**-24 * p.inputs[0].shape[-1] ** 0.5
    steep = p.condition * (1 + p.beta) * delta / p.tau
    out = {"loss": (ours.loss, truth.loss, 2 * steep)}
    for name in p.names:
        a, b = ours.grads[name], truth.grads[name]
        rounding = 2**-8 if a.dtype == torch.bfloat16 else 2**-11
        out[name] = (a, b, (4 * steep + 2**-10 + rounding) * b.abs().max().item())
    return out


def assert_half_is_right(p: Problem) -> None:
    for name, (ours, truth, allowed) in half_errors(p).items():
        error = (ours.double() - truth.double()).abs().max().item()
        assert error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}, {p}"


def assert_threshold_is_right(
    p: Problem, quantiles: tuple[tuple[str, float], ...] = (("all", 0.99), ("negatives", 0.6))
) -> None:
    """The adaptive threshold over both kinds of row, and the rows' bounds."""
    code = ops.MODES[p.mode]
    padded = (*p.inputs, p.inputs[0].new_empty((0, p.inputs[0].shape[1])))[:3]
    wide = tuple(z.double() for z in padded)
    narrow = all(z.element_size() == 2 for z in p.inputs) and p.mode != "paired"
    cosine = 2 * 2**-11 if narrow else 1e-6
    for over, quantile in quantiles:
        got = operators.threshold(*padded, code, quantile, over)
        want = reference.threshold(*wide, code, quantile, over)
        assert abs(got - want) <= BIN + cosine, (over, quantile, got, want, p)
    for got, want in zip(
        operators.row_range(*padded, code), reference.row_range(*wide, code), strict=True
    ):
        assert (got.double() - want).abs().max() <= cosine, p


def assert_one_pass_is_two(
    library: Emulator, p: Problem, left: bool | None, quantile: float = 0.99, over: str = "all"
) -> int:
    """The threshold by brackets is the one by two passes to the bit; `left`: whether any row was
    left to those (None: either). Returns how many."""
    padded = (*p.inputs, p.inputs[0].new_empty((0, p.inputs[0].shape[1])))[:3]

    def threshold() -> tuple[Tensor, int]:
        before = library.launches
        value = operators.threshold(*padded, ops.MODES[p.mode], quantile, over)
        return value, library.launches - before

    two, launches = threshold()
    with library.brackets():
        one, more_launches = threshold()
        rows = library.limits(0, 1)
    what = f"{one}, wanted {two}, {rows} rows left, quantile {quantile} over {over}, {p}"
    assert (launches, more_launches) == (3, 5), what
    assert torch.equal(one.nan_to_num(7), two.nan_to_num(7)), what
    assert left is None or left == (rows > 0), what
    return rows


def near_some(B: int, D: int, near: Tensor, seed: int = 0) -> Problem:
    """Anchors all alike, and a queue of which those rows (bool) are near them."""
    r, K = torch.Generator().manual_seed(seed), len(near)
    direction = torch.randn(D, generator=r, dtype=torch.float64)
    direction /= direction.norm()
    noise = [torch.randn(n, D, generator=r, dtype=torch.float64) / D**0.5 for n in (B, B, K)]
    queue = noise[2] + 1.5 * near[:, None] * direction
    z = (direction + 0.3 * noise[0], direction + 0.3 * noise[1], queue)
    return Problem(tuple(x.bfloat16() for x in z), "unpaired", f"{int(near.sum())} of {K} near")


def periodic(B: int, K: int, D: int) -> Problem:
    """Near is every eighth tile of 64, from the first on: a sample of these tiles sees that alone,
    one of others sees none of it."""
    return near_some(B, D, torch.arange(K) // 64 % 8 == 0)


def lopsided(B: int, K: int, D: int) -> Problem:
    """Near are 80, all in the columns of the first thread of a row and within one slice."""
    k = torch.arange(K)
    return near_some(B, D, (k % 8 < 2) & (k // 64 >= 6) & (k // 64 < 11))


def cone(B: int, D: int, width: float, mode: str, seed: int = 0) -> Problem:
    """A batch around one direction, as of a network that has not learnt yet."""
    r = torch.Generator().manual_seed(seed)
    direction, *noise = (torch.randn(n, D, generator=r, dtype=torch.float64) for n in (1, B, B))
    z = (direction + width * x for x in noise)
    return Problem(tuple(x.bfloat16() for x in z), mode, f"cone of {width}, {B} x {D}")


def sorted_classes(B: int, D: int, classes: int, mode: str, seed: int = 0) -> Problem:
    """A batch in the order of its classes."""
    r = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, D, generator=r, dtype=torch.float64)
    of_each = centres[torch.arange(B) * classes // B]
    z = [of_each + 0.7 * torch.randn(B, D, generator=r, dtype=torch.float64) for _ in range(2)]
    return Problem(tuple(x.bfloat16() for x in z), mode, f"{classes} sorted classes, {B} x {D}")


def battery_of_brackets(library: Emulator) -> None:
    """Problems that between them go through every line of the one-pass threshold."""
    half = torch.float16
    with library.brackets():
        assert_one_call_is_two(conftest.problem("cluster", 70, 30, dtype=half))
    for p, left, rule in (
        (conftest.problem("gauss", 150, 70, dtype=half), False, (0.99, "all")),
        (
            conftest.problem("cluster", 100, 9, "unpaired", K=1500, dtype=half),
            None,
            (0.96, "negatives"),
        ),
        (conftest.problem("gauss", 220, 9, "cross", dtype=half), None, (0.97, "all")),
        (conftest.problem("gauss", 120, 9, "unpaired", K=3300, dtype=half), False, (0.951, "all")),
        (cone(400, 30, 0.2, "query"), False, (0.98, "all")),
        (periodic(200, 3000, 9), True, (0.951, "negatives")),
        (
            conftest.problem("collapsed", 120, 9, "unpaired", K=1300, dtype=half),
            True,
            (0.99, "all"),
        ),
    ):
        assert_one_pass_is_two(library, p, left, *rule)
    b = in_blocks(conftest.problem("gauss", 160, 9, "cross", dtype=half), 0, 30, 160)
    two = b.quantiles(0.98, "all")
    for device in ((132, 227 * 1024), (8, 64 * 1024)):  # the latter has short lists, and slices
        library.device(*device)
        before = library.launches
        with library.brackets():
            assert torch.equal(b.quantiles(0.98, "all"), two)
        assert library.launches == before + 2 * 5
    assert_one_pass_is_two(library, lopsided(120, 1300, 9), True, 0.9692, "negatives")


def assert_one_call_is_two(p: Problem) -> None:
    """The loss with its adaptive threshold in one call: threshold, tracker and loss, to the bit."""
    z0, z1, negatives, _, tau, mode, *options, keep = p.raw()
    tracker = ThresholdTracker.adaptive(momentum=0.5, over="negatives").to(z0.device)
    tracker.update(f64(0.3).to(z0.device), store=True, anchors=p.rows + 1)
    tracker.state[:2] *= 0.5  # the average with a new one
    rule = (*tracker.kernel_rule(), keep)
    one = operators.adaptive(z0, z1, negatives, tracker.state, tau, mode, *options, *rule)
    quantile = operators.threshold(z0, z1, negatives, mode, tracker.quantile, tracker.over)
    eps = tracker.update(quantile, store=True, anchors=p.rows)
    two = operators.forward(z0, z1, negatives, eps, tau, mode, *options, keep)
    pairs = ((one[0], two[0]), (one[1], two[1]), (one[3], eps), (one[4], tracker.state))
    assert all(torch.equal(a, b) for a, b in pairs), p
    mean, *_ = operators.forward(
        z0, z1, negatives, eps, tau, mode, ops.REDUCTIONS["mean"], *options[1:], keep
    )
    torch.testing.assert_close(mean, two[0].mean(), rtol=1e-6, atol=0)


def assert_not_finite_reaches_who_sees_it(p: Problem) -> None:
    """A row with a NaN: the same losses and gradients are NaN, the threshold is, and the bounds."""
    p.inputs[0][2, 3] = math.nan
    ours, truth = p.ours(), p.plain(torch.float64)
    assert torch.equal(ours.loss.isnan(), truth.loss.isnan()), p
    for name in p.names[:-1]:
        assert torch.equal(ours.grads[name].isnan(), truth.grads[name].isnan()), (name, p)
    padded = (*p.inputs, p.inputs[0].new_empty((0, p.inputs[0].shape[1])))[:3]
    assert operators.threshold(*padded, ops.MODES[p.mode], 0.9, "all").isnan(), p
    wide = tuple(z.double() for z in padded)
    bounds = operators.row_range(*padded, ops.MODES[p.mode])
    for got, want in zip(bounds, reference.row_range(*wide, ops.MODES[p.mode]), strict=True):
        assert torch.equal(got.isnan(), want.isnan()), p


def laid_out(x: Tensor) -> Tensor:
    """Rows of 64 halves as the kernels want them: chunk c of row r of 64 stands at c ^ (r & 7)."""
    chunks = x.view(-1, 64, 8, 8)
    rows = torch.arange(64)[:, None]
    return chunks[:, rows, torch.arange(8) ^ (rows & 7)].contiguous()


def assert_conforms(path: Path, device: str = "cpu") -> None:
    """The primitives of emulation/conformance.cu, against plain arithmetic."""
    run = ctypes.CDLL(str(path)).hex_conformance
    run.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 3
    run.restype = ctypes.c_char_p
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 64, generator=generator).half() for n in (64, 11 * 64))
    a, b = (laid_out(z).to(device) for z in (x, y))
    x, y = x.double(), y.double()

    def call(which: int, *shape: int) -> Tensor:
        c = torch.full(shape, torch.nan, device=device)
        problem = run(which, a.data_ptr(), b.data_ptr(), c.data_ptr())
        assert problem is None, problem
        return c.double().cpu()

    # products of halves are exact in float32; their sum rounds, or truncates, at each step
    close = {"rtol": 0, "atol": 64 * 2**-22 * 16}
    torch.testing.assert_close(call(0, 16, 8), x[:16, :16] @ y[:8, :16].T, **close)
    torch.testing.assert_close(call(1, 64, 64), x @ y[:64].T, **close)
    assert torch.equal(call(2, 16, 64), x[:16])
    torch.testing.assert_close(call(3, 64, 64), x @ y[:64].T, **close)
    torch.testing.assert_close(call(4, 64, 64), x @ y[:64], **close)
    tiles = sum((k + 1) * (x @ z.T) for k, z in enumerate(y.split(64)))
    torch.testing.assert_close(call(5, 64, 64), tiles, rtol=0, atol=66 * close["atol"])
    lanes, v = call(6, 6, 32), x[0, :32]
    torch.testing.assert_close(lanes[0], torch.exp2(v), rtol=2**-22, atol=0)
    torch.testing.assert_close(lanes[1], v.sum().expand(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(lanes[2], v.cumsum(0), rtol=0, atol=1e-5)
    assert torch.equal(lanes[3], v.bfloat16().double())
    for got, want in ((lanes[4], v * 2**-20), (lanes[5], v * -(2**-2))):
        assert torch.equal(got, want.half().double())  # below 2^-14 too


# ---- blocks of anchors --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class InBlocks(Problem):
    """A problem that is solved a block of anchors after another; they begin and end at `cut`."""

    cut: tuple[int, ...] = ()

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(first, count) of each."""
        return [(a, b - a) for a, b in zip(self.cut, self.cut[1:], strict=False)]

    def anchors(self, first: int, count: int) -> Tensor:
        """Their places among all anchors."""
        B = self.inputs[0].shape[0]
        rows = torch.arange(first, first + count, device=self.inputs[0].device)
        return torch.cat([rows, B + rows]) if self.rows > B else rows

    def _gather(self, of_block: Callable[[int, int], Tensor]) -> Tensor:
        """What `of_block` gives for the anchors of each block (..., n), of all (..., N)."""
        columns = torch.cat([self.anchors(*block) for block in self.blocks])
        return torch.cat([of_block(*block) for block in self.blocks], -1)[..., columns.argsort()]

    def quantiles(self, quantile: float, over: str) -> Tensor:
        rule = (ops.MODES[self.mode], quantile, over == "negatives")
        arguments = operators.arguments("threshold", *self.raw()[:3], *rule)
        return self._gather(lambda *block: HEX.block_quantiles(*arguments, 0, *block)[0])

    def bounds(self) -> Tensor:
        """Least and greatest cosine of each row, (2, N)."""
        arguments = operators.arguments("row_range", *self.raw()[:3], ops.MODES[self.mode])
        return self._gather(
            lambda *block: torch.stack(HEX.block_quantiles(*arguments, 0, *block)[:2])
        )

    def statistics(self, allow_tf32: bool = False) -> tuple[Tensor, Tensor]:
        """Loss (N,) and statistics (9, N) of all rows."""
        *inputs, eps, tau, mode, _, positives, beta, variant, tau_plus, decoupled, _, tf32 = (
            operators.arguments("forward", *self.raw(), allow_tf32=allow_tf32)
        )

        def of_block(first: int, count: int) -> Tensor:
            at = self.anchors(first, count)
            its = eps[at] if eps.dim() else eps
            loss, stats, _ = HEX.block_forward(
                *inputs, its, tau, eps.new_empty(0, dtype=self.dtype), mode, 0, positives, beta,
                variant, tau_plus, decoupled, False, tf32, first, count,
            )  # fmt: skip
            assert loss.shape == (len(at),)
            return torch.cat([loss[None], stats])

        rows = self._gather(of_block)
        return rows[0], rows[1:].contiguous()

    def ours(self, grad: Tensor | None = None) -> conftest.Result:
        loss, stats = self.statistics()
        return conftest.Result(loss, self.gradients(stats, grad))

    def backward(
        self, stats: Tensor, grad: Tensor | None = None, reduction: str = "none"
    ) -> list[tuple[Tensor, ...]]:
        """Of each block the gradients, from the statistics of all rows."""
        z0, z1, negatives, _, tau, mode, *_ = self.raw()
        grad = (self.grad_output() if grad is None else grad).to(self.dtype)
        arguments = operators.arguments(
            "backward", grad, z0, z1, negatives, tau, stats, grad.new_empty(0), mode,
            ops.REDUCTIONS[reduction], self.beta, 15,
        )  # fmt: skip
        return [HEX.backward(*arguments, *block) for block in self.blocks]

    def gradients(self, *of: Any) -> dict[str, Tensor]:
        """The same of the whole inputs."""
        found = {}
        for name, parts in zip(conftest.NAMES, zip(*self.backward(*of), strict=True), strict=True):
            if name in ("z0", "z1") or (name == "negatives" and self.mode == "paired"):
                found[name] = torch.cat(parts)
            else:  # of all anchors, in every block
                found[name] = parts[0]
                assert all(torch.equal(x.nan_to_num(7), parts[0].nan_to_num(7)) for x in parts)
        return {name: found[name] for name in self.names}


def in_blocks(p: Problem, *cut: int) -> InBlocks:
    return InBlocks(*(getattr(p, field.name) for field in dataclasses.fields(p)), cut=cut)


def row_quantiles(p: Problem, quantile: float, over: str) -> Tensor:
    """By plain PyTorch in float64."""
    padded = (*(z.double() for z in p.inputs), None)[:3]
    return reference.row_quantiles(reference._table_of_views(*padded, p.mode), quantile, over)


def assert_blocks_are_right(p: Problem, *cut: int) -> None:
    """Loss, gradients, quantiles and bounds of all rows, a block after another."""
    b = in_blocks(p, *cut)
    narrow = all(z.element_size() == 2 for z in p.inputs) and p.mode != "paired"
    if narrow:
        assert_half_is_right(b)
    else:
        check(b)  # whose loss is of the whole batch
        loss, stats = b.statistics()
        whole, of_whole, _ = operators.forward(*p.raw())
        assert torch.equal(stats[ops.COUNT], of_whole[ops.COUNT]), b
        # Of rows' sums in other slices: some roundings of the terms.
        close = 1e-13 if p.dtype == torch.float64 else 4e-6
        torch.testing.assert_close(loss, whole, rtol=close, atol=close)
    cosine = 2 * 2**-11 if narrow else 1e-6
    for over, quantile in (("all", 0.9), ("negatives", 0.6)):
        got, want = b.quantiles(quantile, over), row_quantiles(p, quantile, over)
        assert (got.double() - want).abs().max() <= BIN + cosine, (over, quantile, b)
    whole = operators.row_range(*p.raw()[:3], ops.MODES[p.mode])
    assert torch.equal(b.bounds(), torch.stack(whole)), b


def assert_a_loss_near_0_is_right(device: str) -> None:
    """Where all rows share a shift, from which it is far; beside rows whose loss is large."""
    positive, tau = torch.tensor([0.03, 0.03, -0.9]), 0.032
    z0 = torch.eye(1, 8).repeat(3, 1)
    z1 = positive[:, None] * z0 + (1 - positive[:, None] ** 2).sqrt() * torch.eye(2, 8)[1]
    rest = -0.9 * z0 + (1 - 0.9**2) ** 0.5 * torch.eye(3, 8)[2]
    c, p, _ = reference.cosines(z0.double(), z1.double(), rest.double(), "unpaired")
    want = (((c[:, 1:] - p[:, None]) / tau).exp().sum(1)).log1p()
    got = info_nce(
        *(z.to(device) for z in (z0, z1)), negatives=rest.to(device), temperature=tau,
        reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(got.double().cpu(), want, rtol=2e-5, atol=0)


def battery(device: str = "cpu") -> None:
    """A few problems that between them go through every line of the kernels."""
    single = torch.float32
    problem = functools.partial(conftest.problem, device=device)
    low, cold = f64(-2.0).to(device), {"tau": 0.0005, "variant": "paper decoupled"}
    for p in (
        problem("cluster", 70, 130, dtype=single),  # tiles with and without an edge, two chunks
        problem("cluster", 20, 9, dtype=single, tau=0.004, eps=f64(math.inf).to(device)),
        eps_of_each_row(problem("gauss", 40, 64, dtype=single)),
        problem("cluster", 40, 20, dtype=single, beta=2.0),
        problem("cluster", 40, 66, "unpaired", K=150, dtype=single, beta=0.5),
        problem("cluster", 33, 7, "cross", dtype=single, tau=0.02, variant="released"),
        problem("cluster", 20, 9, dtype=single, variant="excluded"),
        problem("cluster", 33, 7, "query", dtype=single, variant="paper decoupled"),
        # exp(-m) overflows; Q is its sum, and at its floor
        problem("clamped", 13, 40, dtype=single, eps=low, tau_plus=0.0, **cold),
        problem("clamped", 13, 40, dtype=single, eps=low, **cold),
        problem("clamped", 13, 40, dtype=single, near=0.2, **cold),
        problem("clamped", 24, 40, dtype=single, tau_plus=0.9, tau=0.005),
        problem("cluster", 20, 9, dtype=single, tau=0.05, beta=6.0),  # no common scale
        problem("gauss", 20, 40, dtype=single, tau=0.001),  # at a shift of 1 all would be 0
    ):
        check(p)
        assert_threshold_is_right(p)
    assert_a_loss_near_0_is_right(device)
    assert_one_call_is_two(problem("cluster", 70, 30, dtype=single))
    half = {"dtype": torch.bfloat16}
    assert_half_is_right(problem("cluster", 40, 70, "query", dtype=torch.float16))
    # Rows whose partners, 8 apart, are of different tiles; in H most negatives of every fourth 8.
    many = problem("cluster", 136, 30, **half)
    row = torch.arange(many.rows)
    some = ((row // 8 + row // 64) % 2 == 0) & (row % 64 >= 32)
    eps = torch.where(some, -0.9, math.inf).double()
    assert_half_is_right(many.with_(eps=eps.to(device)))
    assert_threshold_is_right(many)
    none = many.with_(eps=f64(math.inf).to(device))  # in H
    quiet = torch.where(row < 64, 0.0, many.grad_output().cpu()).to(device)  # a tile of no weight
    ours, truth = none.ours(quiet).grads["z0"], none.plain(torch.float64, quiet).grads["z0"]
    assert (ours[:64].double() - truth[:64]).abs().max() <= 0.1 * truth[:64].abs().max()
    # Some rounds of the ring; so many cosines leave no gap for a threshold.
    assert_half_is_right(problem("cluster", 100, 20, "unpaired", K=1400, eps=none.eps, **half))
    assert_half_is_right(problem("cluster", 100, 100, "cross", **half))
    for D, options in ((30, half), (100, half), (132, half), (260, half), (30, {"dtype": single})):
        p = problem("gauss", 20, D, "unpaired", K=70, **options)
        assert_not_finite_reaches_who_sees_it(p)
    assert_not_finite_reaches_who_sees_it(problem("gauss", 40, 10, "cross", **half))
    # rows that are read four features at a time
    assert_half_is_right(problem("cluster", 20, 132, "unpaired", K=70, **half))
    for D in (250, 260):  # a tile is held for both products; the weights go through memory
        assert_half_is_right(problem("cluster", 40, D, "unpaired", K=150, **half))
    check(problem("cluster", 9, 264, dtype=single))
    for p in (
        problem("cluster", 4, 37, "paired", K=150, dtype=single),
        problem("cluster", 9, 37, dtype=torch.float64),
    ):
        check(p)
        assert_threshold_is_right(p)


def battery_of_weights(library: Emulator) -> None:
    """Problems of more than 128 features whose weights are in memory a few columns at a time."""
    single, half = torch.float32, torch.bfloat16
    problem = functools.partial(conftest.problem, device="cpu")
    with library.weights(16):
        check(problem("cluster", 20, 200, "unpaired", K=700, dtype=single))
        check(problem("cluster", 9, 66, "unpaired", K=700, dtype=single))  # held, if there is room
        assert_half_is_right(problem("cluster", 100, 260, "cross", dtype=half))
        assert_half_is_right(problem("cluster", 9, 330, "unpaired", K=700, dtype=half, beta=2.0))
        b = problem("cluster", 70, 260, "unpaired", K=300, dtype=half)
        assert_half_is_right(in_blocks(b, 0, 5, 69, 70))
    library.device(1, 227 * 1024)  # its rows in bands
    with library.weights(2):
        check(problem("cluster", 100, 130, dtype=single, tau=0.02))
        assert_half_is_right(problem("cluster", 100, 260, dtype=half))


def battery_of_blocks(device: str = "cpu") -> None:
    """A few problems in blocks of anchors, and the sums over the rows of all ranks."""
    single, half = torch.float32, torch.bfloat16
    problem = functools.partial(conftest.problem, device=device)
    for p, cut in (
        (problem("cluster", 70, 20, dtype=half), (0, 5, 69, 70)),
        (eps_of_each_row(problem("cluster", 40, 9, "cross", dtype=single)), (0, 7, 7, 40)),
        (problem("cluster", 13, 140, "unpaired", K=150, dtype=single), (0, 6, 13)),
        (problem("cluster", 9, 37, "paired", K=20, dtype=single), (0, 4, 9)),
        (problem("cluster", 9, 7, dtype=torch.float64), (0, 2, 9)),
    ):
        assert_blocks_are_right(p, *cut)
    for k, row in ((0, 39), (0, 2), (1, 3)):  # in the first tile of the other's columns; not there
        p = problem("gauss", 40, 9, "query", dtype=half)
        p.inputs[k][row, 3] = math.nan
        got, want = in_blocks(p, 0, 17, 40).quantiles(0.9, "all"), row_quantiles(p, 0.9, "all")
        assert torch.equal(got.isnan(), want.isnan()), (k, row)
    x = torch.randn(3, 2500, generator=torch.Generator().manual_seed(0)).to(device)
    for rows in (x, x.T[:10], x[:, ::2].double()):
        torch.testing.assert_close(HEX.total(rows), rows.double().sum(1), rtol=1e-13, atol=1e-11)
    tracker = ThresholdTracker.adaptive().to(device)
    x[0, 3] = math.inf  # of a row that has no element
    for rows, mean in ((x[0], x[0, x[0] < math.inf].double().mean()), (x[0, 3:4], math.nan)):
        eps, state = HEX.settle(rows, tracker.state, *tracker.kernel_rule()[2:])
        assert abs(eps - mean) < 1e-14 or (eps.isposinf() and math.isnan(mean))
        assert state[4] == math.isnan(mean)  # HEX_STATE_SKIPPED
