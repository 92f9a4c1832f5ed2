# SPDX-License-Identifier: MIT
"""A block of anchors on the CUDA core, run on the CPU (emulator.py): the operators of many ranks,
against plain PyTorch and the CPU's core, whatever the cut, on a large and on a small device.
"""

import math

import batteries
import emulator
import operators
import pytest
import torch
from batteries import assert_blocks_are_right, in_blocks
from conftest import Problem, check, eps_of_each_row, problem
from data import f64
from emulator import ALONE, HEX, HOPPER, SMALL

from hex import ThresholdTracker, ops

MODES = ("ntxent", "query", "cross", "unpaired", "paired")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# An empty block, one of a row, and blocks that begin and end anywhere.
CUTS = {13: ((0, 13), (0, 1, 1, 7, 13)), 70: ((0, 70), (0, 5, 69, 70))}


@pytest.mark.parametrize("seed, device", tuple(zip(emulator.SEEDS, emulator.DEVICES, strict=True)))
def test_a_battery_of_blocks_is_right_in_any_order_of_the_warps(kernels, seed, device):
    kernels.seed(seed)
    kernels.device(*device)
    batteries.battery_of_blocks()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (F64, F32, BF16, F16), ids=str)
def test_blocks_are_right_in_every_mode(kernels, mode, dtype):
    for cut in CUTS[13]:
        assert_blocks_are_right(problem("cluster", 13, 9, mode, K=11, dtype=dtype), *cut)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype, D", ((F32, 130), (BF16, 66), (BF16, 200)), ids=str)
def test_blocks_of_many_rows_and_features_are_right(kernels, mode, dtype, D):
    kernels.seed(2)
    p = problem("cluster", 70, D, mode, K=9 if mode == "paired" else 150, dtype=dtype)
    for device, cut in zip((ALONE, SMALL), CUTS[70], strict=True):
        kernels.device(*device)
        assert_blocks_are_right(p, *cut)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (F64, F32, BF16), ids=str)
def test_the_bits_of_a_row_depend_neither_on_the_cut_nor_on_the_device(kernels, mode, dtype):
    B, K = (150, 230) if dtype != F64 else (40, 50)
    p = problem("cluster", B, 20, mode, K=9 if mode == "paired" else K, dtype=dtype)
    _, stats = in_blocks(p, 0, B).statistics()
    seen = []
    some = (0, 1, 7, B // 2 + 2, B)
    for device, cut in ((HOPPER, (0, B)), (ALONE, some), (SMALL, (0, B // 3, B)), (HOPPER, some)):
        kernels.device(*device)
        b = in_blocks(p, *cut)
        seen.append((*b.statistics(), b.quantiles(0.9, "negatives"), b.bounds(),
                     *b.gradients(stats).values()))  # fmt: skip
    for other in seen[1:]:
        assert all(torch.equal(x, y) for x, y in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("mode", MODES[:4])
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_nor_do_they_where_the_weights_go_through_memory(kernels, mode, dtype):
    p = problem("cluster", 150, 140 if dtype == F32 else 260, mode, K=430, dtype=dtype)
    _, stats = in_blocks(p, 0, 150).statistics()
    some, bits = (0, 1, 7, 77, 150), []
    with kernels.weights(16):  # of four tiles of columns at a time, or of two
        for device, cut in ((HOPPER, (0, 150)), (ALONE, some), (SMALL, (0, 50, 150))):
            kernels.device(*device)
            bits.append(in_blocks(p, *cut).gradients(stats))
    for other in bits[1:]:
        assert all(torch.equal(other[name], bits[0][name]) for name in p.names)


@pytest.mark.parametrize("mode", MODES)
def test_the_numbers_of_the_cpus_core_are_the_same(libraries, mode):
    """Those that have one definition; the others are on a scale that the core chooses."""
    kinds = [0, 5, 6, 7, 8]  # HEX_STAT_EPS, POSITIVE, DTAU, COUNT, SHARE
    for dtype in (F64, F32):
        p = eps_of_each_row(problem("cluster", 13, 9, mode, dtype=dtype))
        b = in_blocks(p, 0, 5, 13)
        loss, stats = b.statistics()
        rows = [b.quantiles(q, over) for q in (0.0, 0.9) for over in ("all", "negatives")]
        with libraries["mma"].in_use():
            ours, its = b.statistics()
            assert torch.equal(its[[0, 7]], stats[[0, 7]])
            close = 1e-12 if dtype == F64 else 1e-5
            torch.testing.assert_close(ours, loss, rtol=close, atol=close)
            torch.testing.assert_close(its[kinds], stats[kinds], rtol=10 * close, atol=close)
            for want, (q, over) in zip(
                rows, [(q, o) for q in (0.0, 0.9) for o in ("all", "negatives")], strict=True
            ):
                assert (b.quantiles(q, over) - want).abs().max() <= batteries.BIN


def test_the_gradient_goes_in_bands_where_a_block_has_many_rows(kernels):
    kernels.device(*ALONE)
    p = problem("cluster", 260, 20, dtype=BF16)
    b = in_blocks(p, 0, 250, 260)
    launched = kernels.launches_of(lambda: b.backward(torch.zeros(9, 520)))
    assert sum(kernel == "backward" for kernel, _ in launched) > 2
    batteries.assert_half_is_right(b)
    for D in (20, 260):
        many = problem("cluster", 5, D, "unpaired", K=700, dtype=BF16)  # and their own gradient
        batteries.assert_half_is_right(in_blocks(many, 0, 2, 5))


def test_what_goes_beside_the_inputs_may_be_of_any_kind(mma):
    p = problem("cluster", 13, 9, dtype=F32, tau=0.02, beta=2.0, variant="released")
    assert_blocks_are_right(eps_of_each_row(p), 0, 6, 13)
    for reduction, factor in (("mean", 26), ("sum", 1)):
        b = in_blocks(p, 0, 6, 13)
        _, stats = b.statistics()
        got = b.gradients(stats, torch.tensor(0.7), reduction)
        want = b.gradients(stats, torch.full((26,), 0.7 / factor))
        for name in p.names:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-7)
    exact, _ = b.statistics()
    rounded, _ = b.statistics(allow_tf32=True)
    assert 1e-6 < (exact - rounded).abs().max() < 0.1
    z0, z1 = (z[:, None].expand(13, 2, 9)[:, 1] for z in p.inputs)  # of any strides
    check(in_blocks(p.with_(inputs=(z0.repeat(1, 2)[:, :9], z1)), 0, 4, 13))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (F64, F32, F16), ids=str)
def test_a_row_that_is_not_finite_reaches_exactly_the_rows_that_see_it(mma, mode, dtype):
    for k in range(2 if mode in ("ntxent", "query", "cross") else 3):
        p = problem("gauss", 40, 6, mode, K=4, dtype=dtype)
        p.inputs[k][2, ..., 3] = math.nan
        b, truth = in_blocks(p, 0, 2, 17, 40), p.plain(F64)
        for brackets in (False, True):
            with mma.brackets(0 if brackets else 10**9):
                for over in ("all", "negatives"):
                    want = batteries.row_quantiles(p, 0.98, over)
                    assert torch.equal(b.quantiles(0.98, over).isnan(), want.isnan())
        ours = b.ours()
        assert torch.equal(ours.loss.isnan(), truth.loss.isnan())
        for name in p.names[:-1]:
            assert torch.equal(ours.grads[name].isnan(), truth.grads[name].isnan()), name


@pytest.mark.parametrize("mode", ("ntxent", "query", "cross", "unpaired"))
def test_the_quantiles_in_one_pass_are_those_of_two_to_the_bit(kernels, mode):
    for device in (HOPPER, (8, 64 * 1024)):
        kernels.device(*device)
        b = in_blocks(problem("gauss", 200, 20, mode, K=700, dtype=BF16), 0, 30, 31, 200)
        before = kernels.launches
        two = b.quantiles(0.98, "all")
        assert kernels.launches - before == 3 * 3
        with kernels.brackets():
            assert torch.equal(b.quantiles(0.98, "all"), two)
            assert kernels.launches - before == 3 * 3 + 5 * 3


@pytest.mark.parametrize("mode", MODES)
def test_what_has_nothing_to_choose_from_is_as_on_the_cpu(libraries, mode):
    for B, K in ((1, 0), (4, 0), (1, 3)):
        for dtype in (F64, F32):
            p = problem("gauss", B, 5, mode, K=K, dtype=dtype, eps=f64(0.5))
            b = in_blocks(p, 0, 0, B, B)
            ours, rows, bounds = b.ours(), b.quantiles(0.5, "negatives"), b.bounds()
            with libraries["mma"].in_use():
                its, its_rows, its_bounds = b.ours(), b.quantiles(0.5, "negatives"), b.bounds()
            close = {"rtol": 1e-5, "atol": 2e-5, "equal_nan": True}
            torch.testing.assert_close(its.loss, ours.loss, **close)
            torch.testing.assert_close(its_rows, rows, **close)
            torch.testing.assert_close(its_bounds, bounds, **close)
            for name in p.names:
                torch.testing.assert_close(its.grads[name], ours.grads[name], **close)


# ---- the sums over the rows of all ranks ----

RULES = (
    {},
    {"momentum": 0.7},
    {"momentum": 0.9, "monotonic": True},
    {"lagged": True, "momentum": 0.5},
    {"warmup_epochs": 1, "warmup_threshold": 0.25},
)


def steps(rule, quantiles):
    """(eps, state) after each step."""
    tracker = ThresholdTracker.adaptive(over="negatives", **rule)
    _, _, *rest = tracker.kernel_rule()
    state, seen = tracker.state, []
    for rows in quantiles:
        eps, state = HEX.settle(rows, state, *rest)
        seen.append((eps, state))
    return seen


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_settling_is_the_step_of_the_cpu(libraries, rule):
    values = torch.linspace(-0.3, 0.9, 3000, dtype=F64).sin()
    quantiles = [values, values[:40].float(), values.repeat(3)[::3], values[1::2] - 0.2]
    quantiles += [values[:0], torch.cat([values, f64(math.inf)[None]]), values[:9] * math.nan]
    quantiles += [torch.full((5,), math.inf), values[:2500]]
    want = steps(rule, quantiles)
    with libraries["mma"].in_use() as library:
        got = steps(rule, quantiles)
        library.seed(3)  # other warps first
        again = steps(rule, quantiles)
        before = library.launches
        steps(rule, quantiles[:1])
        assert library.launches == before + 1
    for (eps, state), (its, its_state), pair in zip(want, got, again, strict=True):
        torch.testing.assert_close(its, eps, rtol=0, atol=1e-14, equal_nan=True)
        torch.testing.assert_close(its_state, state, rtol=0, atol=1e-14, equal_nan=True)
        assert torch.equal(its.nan_to_num(7), pair[0].nan_to_num(7))
        assert torch.equal(its_state, pair[1])


def test_a_total_is_the_sum_of_each_row(libraries):
    x = torch.randn(3000, 10, generator=torch.Generator().manual_seed(0), dtype=F64)
    for rows in (x.T, x.T.contiguous(), x[:, ::2].T.float(), x[:7], x[:0].T, x[:, :0].T, x[:3, :1]):
        want = HEX.total(rows)
        with libraries["mma"].in_use() as library:
            before = library.launches
            got = HEX.total(rows)
            assert library.launches == before + (len(rows) > 0)
            assert torch.equal(HEX.total(rows.contiguous()), got)  # whatever its strides
        assert got.dtype == F64 and got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-12)


def test_quantiles_that_are_settled_are_the_threshold_of_the_batch(mma):
    p = problem("cluster", 40, 9, dtype=F32)
    tracker = ThresholdTracker.adaptive(over="negatives")
    quantile, over_negatives, *rest = tracker.kernel_rule()
    assert over_negatives
    rows = in_blocks(p, 0, 9, 40).quantiles(quantile, "negatives")
    eps, _ = HEX.settle(rows, tracker.state, *rest)
    whole = operators.threshold(*p.raw()[:3], ops.MODES["ntxent"], quantile, "negatives")
    assert abs(eps - whole) < 2**-24  # the rows' were rounded to float32


# ---- work ----


def test_a_step_of_a_rank_takes_three_launches_more_than_one_of_a_batch(mma):
    b = in_blocks(problem("cluster", 64, 32, dtype=F32), 10, 26)
    stats, tracker = torch.zeros(9, 128), ThresholdTracker.adaptive()

    def launches(call):
        before = mma.launches
        call()
        return mma.launches - before

    rule = tracker.kernel_rule()[2:]
    assert launches(lambda: b.quantiles(0.9, "all")) == 3
    assert launches(lambda: HEX.settle(stats[0], tracker.state, *rule)) == 1
    assert launches(b.statistics) == 2
    assert launches(lambda: HEX.total(stats)) == 1
    assert launches(lambda: b.backward(stats)) == 3


@pytest.mark.parametrize("dtype", (F64, BF16), ids=str)
@pytest.mark.parametrize("first, count", ((0, 512), (100, 512), (0, 8192)), ids=str)
def test_the_work_is_that_of_the_block(mma, dtype, first, count):
    """A sixteenth of the rows takes a sixteenth of the blocks, or some more where they begin
    anywhere."""
    z = torch.zeros(8192, 8, dtype=dtype)
    b = in_blocks(Problem((z, z)), first, first + count)
    stats, rows = torch.zeros(9, 2 * 8192, dtype=b.dtype), 2 * count
    grid = {}
    for call in (lambda: b.quantiles(0.5, "all"), b.statistics, lambda: b.backward(stats)):
        for kernel, blocks in mma.launches_of(call):
            grid[kernel] = grid.get(kernel, 0) + blocks
    if dtype == F64:
        assert grid["plain"] == 3 * rows
    else:
        slices = 32
        assert grid["threshold"] <= 2 * (rows / 64 + 2) * slices
        assert grid["forward"] <= (rows / 64 + 2) * slices
        assert grid["backward"] <= (rows / 128 + 6) * slices
    assert rows / 8 <= grid["project"] <= rows / 4 + 2


def test_a_block_outside_the_batch_is_refused(mma):
    with pytest.raises(RuntimeError, match="first, count: expected a block of 13 rows, got 9, 5"):
        p = problem("cluster", 13, 7)
        in_blocks(p, 9, 14).quantiles(0.5, "all")
