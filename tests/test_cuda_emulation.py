# SPDX-License-Identifier: MIT
"""The source of the CUDA kernels, run on the CPU (emulator.py), against plain PyTorch: every mode,
dtype and kind of hard batch, with mma.sync and with wgmma, on a large and on a small device.

float32 and float64 meet the tolerances of the CPU's kernels; 16-bit inputs those of fp16 products.
"""

import math

import batteries
import emulator
import operators
import pytest
import torch
from batteries import assert_half_is_right, assert_one_pass_is_two, assert_threshold_is_right
from conftest import EMULATED, NAMES, Problem, check, cuda_tensor, eps_of_each_row, problem
from data import FORMS, KINDS, f64, nans
from emulator import ALONE, HOPPER, ROUNDED, SMALL, TRUNCATED

from hex import HEXLoss, ThresholdTracker, _load, ops, reference

MODES = ("ntxent", "query", "cross", "unpaired", "paired")


@pytest.mark.parametrize("flags", EMULATED.values(), ids=EMULATED)
def test_the_primitives_do_what_plain_arithmetic_does(flags, tmp_path):
    source = emulator.ROOT / "tests/emulation/conformance.cu"
    batteries.assert_conforms(emulator.compile(tmp_path / "conform.so", *flags, sources=[source]))


def test_primitives_that_were_built_elsewhere_need_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("HEX_CONFORMANCE", str(tmp_path / "built.so"))
    monkeypatch.setattr(emulator.subprocess, "run", None)
    assert emulator.conformance_on_a_gpu(tmp_path) == tmp_path / "built.so"


@pytest.mark.parametrize(
    "seed, device, extra_bits",
    tuple(zip(emulator.SEEDS, emulator.DEVICES, (ROUNDED, TRUNCATED, TRUNCATED), strict=True)),
)
def test_a_battery_of_problems_is_right_in_any_order_of_the_warps(
    kernels, seed, device, extra_bits
):
    kernels.seed(seed)
    kernels.device(*device)
    kernels.truncate(extra_bits)
    before = kernels.conflicts
    batteries.battery()
    assert kernels.conflicts == before


@pytest.mark.parametrize("device", (HOPPER, ALONE), ids=str)
def test_a_hopper_with_the_code_of_other_gpus_is_right(mma, device):
    """Of a library without sm_90a: built for 90, or from PTX."""
    mma.major(9)
    try:
        for battery in (batteries.battery, batteries.battery_of_blocks):
            mma.device(*device)
            battery()
        batteries.battery_of_brackets(mma)
    finally:
        mma.major(8)


@pytest.mark.parametrize("D", (256, 500, 2048))
def test_float32_is_as_good_as_torch_though_additions_are_cut_off(kernels, D):
    kernels.truncate(TRUNCATED)
    check(problem("cluster", 20, D, dtype=torch.float32))


@pytest.mark.parametrize("seed, device", tuple(zip(emulator.SEEDS, emulator.DEVICES, strict=True)))
def test_a_battery_of_weights_is_right_in_any_order_of_the_warps(kernels, seed, device):
    kernels.seed(seed)
    kernels.device(*device)
    before = kernels.conflicts
    batteries.battery_of_weights(kernels)
    assert kernels.conflicts == before


@pytest.mark.parametrize("mode", MODES[:4])
@pytest.mark.parametrize("D", (129, 200, 256, 500, 2048))
def test_more_than_128_features_are_right_in_every_mode_and_dtype(kernels, mode, D):
    """The weights go through memory: of all columns, and of a few at a time. (In 16 bits, up to 256
    features, they do so on the small device alone.)"""
    case = D + MODES.index(mode)
    p = problem("cluster", 70 if D < 500 else 20, D, mode, K=150, dtype=torch.float32)
    kernels.device(*emulator.DEVICES[case % 3])
    check(p)
    with kernels.weights(2):
        check(eps_of_each_row(p.with_(variant="released")))
        for k, dtype in enumerate((torch.bfloat16, torch.float16)):
            kernels.device(*emulator.DEVICES[(case + k) % 3])
            assert_half_is_right(p.with_(inputs=tuple(z.to(dtype) for z in p.inputs)))


@pytest.mark.parametrize("tau", (1.0, 0.03125, 0.01, 0.001))
def test_weights_in_memory_are_right_at_every_temperature(mma, tau):
    with mma.weights(2):
        for k, kind in enumerate(KINDS):
            beta = (0.0, 2.5)[k % 2]
            check(problem(kind, 40, 140, dtype=torch.float32, tau=tau, beta=beta, tau_plus=0.3))


def test_a_tile_of_much_smaller_weights_takes_nothing_from_the_row(kernels):
    """Tiles have powers of two of their own: a queue whose rows come nearer, and go away again."""
    r = torch.Generator().manual_seed(0)
    direction, *noise, queue = (
        torch.randn(n, 260, generator=r, dtype=torch.float64) for n in (1, 10, 10, 400)
    )
    near = torch.arange(400).sub(200).abs().div(-40).exp()[:, None]
    z = (*(direction + 0.1 * x for x in noise), 3 * near * direction + queue)
    p = Problem(tuple(x.float() for x in z), "unpaired", "a wave", tau=0.02)
    for tiles in (1, 2048):
        with kernels.weights(tiles):
            check(p)
            assert_half_is_right(p.with_(inputs=tuple(x.half() for x in p.inputs)))


def test_a_long_sum_of_many_features_is_as_good_as_torch_though_additions_are_cut_off(kernels):
    kernels.truncate(TRUNCATED)
    kernels.device(1, HOPPER[1])
    with kernels.weights(40):
        check(problem("cluster", 4, 140, "unpaired", K=3000, dtype=torch.float32))


def test_float32_of_128_features_takes_the_weights_through_memory_where_a_tile_cannot_be_held(mma):
    p = problem("cluster", 70, 66, "unpaired", K=150, dtype=torch.float32)
    for shared, files in ((HOPPER[1], ["backward"]), (SMALL[1], ["weights", "product"])):
        mma.device(132, shared)
        batch = {"D": 66, "mode": "unpaired", "K": 150, "dtype": torch.float32}
        launched = launches_of_a_backward(mma, 70, **batch)
        assert [kernel for kernel, _ in launched if kernel in KERNELS] == files
        check(p)


def test_a_long_sum_of_the_gradient_is_as_good_as_torch_though_additions_are_cut_off(kernels):
    kernels.truncate(TRUNCATED)
    kernels.device(1, HOPPER[1])  # the 3000 columns in two slices
    check(problem("cluster", 4, 16, "unpaired", K=3000, dtype=torch.float32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", FORMS)
def test_every_mode_and_variant_is_as_good_as_torch(mma, mode, variant):
    for seed, (B, D, K) in enumerate(((3, 3, 2), (13, 7, 11), (37, 65, 65), (65, 64, 130))):
        p = problem("cluster", B, D, mode, K=K, seed=seed, dtype=torch.float32, variant=variant)
        check(p)
        check(eps_of_each_row(p))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", (1.0, 0.05, 0.03125, 0.01, 0.001))
def test_hard_batches_are_right_at_every_temperature(mma, kind, tau):
    for beta in (0.0, 1.0, 2.5):
        for variant in ("paper", "paper decoupled"):
            options = {"beta": beta, "tau_plus": 0.3, "variant": variant}
            check(problem(kind, 20, 9, dtype=torch.float32, tau=tau, **options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_16_bit_inputs_err_no_more_than_fp16_products_do(kernels, mode, dtype):
    for B, D, K in ((13, 7, 11), (37, 130, 70)):
        p = problem("cluster", B, D, mode, K=K, dtype=dtype)
        assert_half_is_right(p)
        for variant in ("released", "excluded", "paper decoupled"):
            assert_half_is_right(p.with_(variant=variant))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_the_threshold_is_within_half_a_bin(mma, mode, dtype):
    quantiles = [(o, q) for o in ("all", "negatives") for q in (0.0, 0.9, 1.0)]
    for kind, B, D in (("cluster", 40, 64), ("zero_rows", 20, 9)):
        assert_threshold_is_right(problem(kind, B, D, mode, K=40, dtype=dtype), quantiles)


def test_the_threshold_of_a_small_batch_is_exactly_the_self_cosine(mma):
    z = problem("cluster", 20, 16, dtype=torch.float32).inputs  # N = 40 < 52
    none = z[0].new_empty((0, 16))
    assert operators.threshold(*z, none, ops.MODES["ntxent"], 0.99, "all") == 1


def test_a_row_of_more_negatives_than_16_bits_count_has_its_threshold(mma):
    z0, z1, few = problem("cluster", 2, 8, "unpaired", K=90, dtype=torch.bfloat16).inputs
    queue = torch.cat([few[:1].expand(65560, 8), few])  # a bin with more than 65535
    got = operators.threshold(z0, z1, queue, ops.MODES["unpaired"], 0.9992, "negatives")
    wide = (z.double() for z in (z0, z1, queue))
    want = reference.threshold(*wide, "unpaired", 0.9992, "negatives")
    assert abs(got - want) <= batteries.BIN + 2 * 2**-11


# ---- the threshold in one pass ----


@pytest.mark.parametrize("seed, device", tuple(zip(emulator.SEEDS, emulator.DEVICES, strict=True)))
def test_a_battery_of_brackets_is_right_in_any_order_of_the_warps(kernels, seed, device):
    kernels.seed(seed)
    kernels.device(*device)
    batteries.battery_of_brackets(kernels)


ONE_PASS = ("ntxent", "query", "cross", "unpaired")


@pytest.mark.parametrize("mode", ONE_PASS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_in_one_pass_is_that_of_two_to_the_bit(mma, kind, mode):
    devices = (HOPPER, 300), (SMALL, 141), ((1, HOPPER[1]), 200)
    device, B = devices[(KINDS.index(kind) + ONE_PASS.index(mode)) % 3]
    mma.device(*device)
    p = problem(kind, B, 20, mode, K=700, dtype=torch.bfloat16)
    for rule in ((0.99, "all"), (0.96, "negatives"), (1.0, "all")):
        assert_one_pass_is_two(mma, p, None, *rule)


@pytest.mark.parametrize("mode", ("ntxent", "query", "cross"))
def test_one_pass_is_enough_where_the_classes_are_in_order(mma, mode):
    p = batteries.sorted_classes(400, 30, 3, mode)
    assert assert_one_pass_is_two(mma, p, None, 0.98, "negatives") <= p.rows / 50
    p = batteries.sorted_classes(400, 30, 30, mode)  # of less than a tile: then it is not
    assert_one_pass_is_two(mma, p, None, 0.98, "negatives")


@pytest.mark.parametrize("width", (0.1, 0.3, 1.0))
def test_one_pass_is_enough_for_cosines_that_lie_close_together(mma, width):
    p = batteries.cone(300, 20, width, "ntxent")
    assert_one_pass_is_two(mma, p, False)


@pytest.mark.parametrize("processors", (1, 132))
def test_rows_that_the_sample_deceives_are_counted_in_two_passes(mma, processors):
    mma.device(processors, HOPPER[1])
    assert_one_pass_is_two(mma, batteries.periodic(150, 3300, 16), True, 0.951, "negatives")


def test_lists_that_are_too_short_are_noticed(mma):
    for processors in (1, 132):
        mma.device(processors, HOPPER[1])
        p = problem("collapsed", 120, 9, "unpaired", K=1500, dtype=torch.float16)
        assert_one_pass_is_two(mma, p, True)


def test_a_batch_that_is_not_finite_has_no_threshold_in_one_pass(mma):
    p = problem("gauss", 90, 9, dtype=torch.bfloat16)
    p.inputs[0][2, 3] = math.nan
    with mma.brackets():
        none = p.inputs[0].new_empty((0, 9))
        assert operators.threshold(*p.inputs, none, ops.MODES["ntxent"], 0.99, "all").isnan()


def test_one_pass_is_for_large_batches_in_16_bits_and_high_quantiles(mma):
    p = problem("gauss", 90, 9, dtype=torch.bfloat16)

    def launches(p, quantile):
        before = mma.launches
        none = p.inputs[0].new_empty((0, 9))
        operators.threshold(*p.inputs, none, ops.MODES["ntxent"], quantile, "all")
        return mma.launches - before

    assert launches(p, 0.99) == 3
    with mma.brackets():
        assert launches(p, 0.99) == 5
        assert launches(p, 0.5) == 3
        assert launches(problem("gauss", 90, 9, dtype=torch.float32), 0.99) == 3


def test_what_has_nothing_to_sum_is_defined(mma):
    for mode in MODES:
        for variant in FORMS:
            options = {"dtype": torch.float32, "variant": variant}
            check(problem("gauss", 1, 5, mode, K=0, eps=f64(0.5), **options))
            check(problem("gauss", 4, 5, mode, K=3, eps=f64(-math.inf), **options))
            check(problem("gauss", 4, 5, mode, K=3, eps=f64(math.inf), **options))
        p = problem("gauss", 0, 5, mode, K=3, dtype=torch.float32, eps=f64(0.5))
        padded = (*p.inputs, p.inputs[0].new_empty((0, 5)))[:3]
        assert operators.threshold(*padded, ops.MODES[mode], 0.9, "all").isnan()
        for reduction, shape in (("none", (0,)), ("sum", ()), ("mean", ())):
            inputs = [z.clone().requires_grad_() for z in p.inputs]
            value = p.loss(*inputs, reduction=reduction)
            assert value.shape == shape and not value.any()
            value.sum().backward()
            assert all(z.grad.shape == z.shape and not z.grad.any() for z in inputs)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16))
def test_a_row_that_is_not_finite_reaches_exactly_the_rows_that_see_it(mma, dtype):
    for mode in MODES:
        p = problem("gauss", 5, 6, mode, K=4, dtype=dtype)
        p.inputs[0][2, 3] = math.nan
        ours, truth = p.ours(), p.plain(torch.float64)
        assert torch.equal(ours.loss.isnan(), truth.loss.isnan()), mode
        for name in p.names[:-1]:
            assert torch.equal(ours.grads[name].isnan(), truth.grads[name].isnan()), (mode, name)
        padded = (*p.inputs, p.inputs[0].new_empty((0, 6)))[:3]
        assert operators.threshold(*padded, ops.MODES[mode], 0.9, "all").isnan()
        low, high = operators.row_range(*padded, ops.MODES[mode])
        assert torch.equal(low.isnan(), truth.loss.isnan()) and low.isnan().equal(high.isnan())


@pytest.mark.parametrize("D", (40, 66, 132, 260))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_rows_of_any_length_keep_their_direction(mma, dtype, D):
    """A power of two changes no bit but the exponents', where none of them is out of range."""
    p = problem("cluster", 20, D, "unpaired", K=30, dtype=dtype)
    length = torch.ones(20, 1, dtype=torch.float64)
    length[3], length[4] = 2.0**66, 2.0**-76  # 1e20 and 1e-23
    z0, z1, queue = p.inputs
    q = p.with_(inputs=((z0 * length).to(dtype), (z1 * length.flip(0)).to(dtype), queue))
    a, b = p.ours(), q.ours()
    assert torch.equal(a.loss, b.loss) and torch.equal(a.grads["negatives"], b.grads["negatives"])
    assert torch.equal(a.grads["z0"].double(), b.grads["z0"] * length)
    assert torch.equal(a.grads["z1"].double(), b.grads["z1"] * length.flip(0))


def test_the_bits_are_the_same_in_any_order_of_warps_and_blocks(mma):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        p = problem("cluster", 70, 70, dtype=dtype)
        runs = []
        for seed in (1, 2, 3, 4):
            mma.seed(seed)
            result = p.ours()
            eps = operators.threshold(*p.raw()[:3], 0, 0.99, "all")
            runs.append((result.loss, *result.grads.values(), eps))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_many_rows_take_blocks_of_128(mma):
    mma.device(1, 227 * 1024)
    check(problem("cluster", 100, 66, dtype=torch.float32))
    assert_half_is_right(problem("cluster", 100, 66, dtype=torch.bfloat16))


def test_rows_in_several_bands_are_right_whole_and_sliced(mma):
    mma.device(1, HOPPER[1])  # bands of 256 rows
    p = problem("cluster", 150, 30, dtype=torch.float32)
    check(p)
    assert_half_is_right(p.with_(inputs=tuple(z.bfloat16() for z in p.inputs)))
    check(problem("cluster", 150, 30, "cross", dtype=torch.float32))
    check(problem("cluster", 30, 30, "unpaired", K=300, dtype=torch.float32))


KERNELS = ("backward", "weights", "product")  # of a gather


def call_of(operator, B, D=8, mode="ntxent", K=0, dtype=torch.bfloat16, wanted="z0 z1 tau"):
    """A call of an operator on zeros."""
    z0, z1, negatives = (torch.zeros(n, D, dtype=dtype) for n in (B, B, K))
    rows = 2 * B if mode in ("ntxent", "cross") else B
    views, code, none = (z0, z1, negatives), ops.MODES[mode], ops.REDUCTIONS["none"]
    needs = sum(1 << k for k, name in enumerate(NAMES) if name in wanted.split())
    return {
        "forward": lambda: operators.forward(
            *views, f64(0.4), f64(0.1), code, none, ops.VARIANTS["paper"], 1.0, 0.0, False, False
        ),
        "threshold": lambda: operators.threshold(*views, code, 0.99, "all"),
        "row_range": lambda: operators.row_range(*views, code),
        "backward": lambda: operators.backward(
            torch.zeros(rows), *views, f64(0.1), torch.zeros(9, rows), torch.zeros(0), code, none,
            1.0, needs,
        ),
    }[operator]  # fmt: skip


def launches_of(library, operator, B, **batch):
    """(kernel's file, blocks) of each launch of an operator, which is not run."""
    return library.launches_of(call_of(operator, B, **batch))


def launches_of_a_backward(library, B, **batch):
    return launches_of(library, "backward", B, **batch)


def busy(blocks):
    """The share of the processors that have a block, over the rounds that the blocks take."""
    return blocks / HOPPER[0] / math.ceil(blocks / HOPPER[0])


QUEUE = {"mode": "unpaired", "K": 65536}


@pytest.mark.parametrize(
    "batch",
    (
        {"B": 256, **QUEUE},
        {"B": 4096, **QUEUE},
        {"B": 256, **QUEUE, "wanted": "z0 z1 negatives tau"},
        {"B": 17000},  # the last of the bands has 208 rows
        {"B": 20000},
        {"B": 32768},
        {"B": 20000, "mode": "query"},
        {"B": 20000, "mode": "cross"},
        {"B": 32768, "D": 256},
        {"B": 2048, "D": 256},
        {"B": 256, "D": 256, **QUEUE},
    ),
    ids=str,
)
def test_every_launch_of_the_gather_fills_the_device(mma, batch):
    grids = [n for kernel, n in launches_of_a_backward(mma, **batch) if kernel == "backward"]
    assert min(busy(n) for n in grids) >= 0.85, grids
    assert max(grids) <= 4 * HOPPER[0], grids  # whose sums are 35 MB


@pytest.mark.parametrize(
    "batch",
    (
        {"B": 256, "D": 257, **QUEUE},
        {"B": 256, "D": 512, **QUEUE, "wanted": "z0 z1 negatives tau"},
        {"B": 2048, "D": 500},
        {"B": 4500, "D": 500},
        {"B": 2048, "D": 2048},
        {"B": 20000, "D": 384, "mode": "cross"},
        {"B": 32768, "D": 512},
        {"B": 32768, "D": 2048},
        {"B": 32768, "D": 256, "dtype": torch.float32},
        {"B": 2048, "D": 512, "dtype": torch.float32},
        {"B": 32768, "D": 512, "dtype": torch.float32},
    ),
    ids=str,
)
def test_the_launches_of_many_features_fill_the_device(mma, batch):
    grids = [(k, n) for k, n in launches_of_a_backward(mma, **batch) if k in KERNELS]
    assert {kernel for kernel, _ in grids} == {"weights", "product"}
    assert [kernel for kernel, _ in grids[:2]] == ["weights", "product"]
    shares = [busy(n) for _, n in grids]  # the last band, and the last columns, may be few
    assert sum(shares) >= 0.95 * len(shares), grids
    assert max(n for kernel, n in grids if kernel == "product") <= 2 * HOPPER[0], grids


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("D", (256, 512, 2048))
def test_the_memory_of_weights_and_sums_does_not_grow_with_the_batch(mma, D, dtype):
    """What a backward takes beside unit rows and coefficients: weights, scales, sums."""
    for B, K in ((2048, 0), (32768, 0), (256, 65536)):
        call = call_of("backward", B, D, "unpaired" if K else "ntxent", K, dtype)
        with torch.profiler.profile(profile_memory=True) as seen:
            mma.launches_of(call)
        largest = max(event.cpu_memory_usage for event in seen.events())
        of_rows = (2 * B + K) * (D * (4 if dtype == torch.float32 else 2) + 48 + 8 + 8)
        assert largest - of_rows <= 2**25 * 33 / 32 + 2 * 132 * 128 * 256 * 4 + 1e6, (B, K, largest)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize(
    "batch",
    ({"B": 256, **QUEUE}, {"B": 4096, **QUEUE}, {"B": 17000}, {"B": 20000}),
    ids=("256 x 65536", "4096 x 65536", "N 34000", "N 40000"),
)
def test_no_launch_on_the_tensor_cores_leaves_more_than_a_third_of_a_hopper_idle(
    kernels, batch, dtype
):
    """What is not there yet or no more is not counted: the blocks of a processor at a time."""
    for operator in ("forward", "threshold", "row_range", "backward"):
        launched = launches_of(kernels, operator, D=128, dtype=dtype, **batch)
        grids = [(kernel, n) for kernel, n in launched if kernel not in ("unit", "project")]
        assert grids
        assert min(busy(n) for _, n in grids) > 2 / 3, (operator, grids)


@pytest.mark.parametrize(
    "batch, passes",
    (
        ({"B": 4001}, 1),  # 8002 anchors, each with 8000 negatives
        ({"B": 8001, "mode": "query"}, 1),
        ({"B": 8001, "mode": "cross"}, 1),
        ({"B": 4096, **QUEUE}, 1),
        ({"B": 3900}, 2),
        ({"B": 256, **QUEUE}, 2),
        ({"B": 4001, "dtype": torch.float32}, 2),
    ),
    ids=str,
)
def test_a_large_batch_has_its_threshold_in_one_pass_though_nobody_asks_for_it(
    kernels, batch, passes
):
    launched = [kernel for kernel, _ in launches_of(kernels, "threshold", **batch)]
    one = ["sample", "bracket"] if passes == 1 else []
    assert launched == ["unit", *one, "threshold", "threshold"]


def test_the_anchors_before_a_queue_are_cut_finely_though_the_queue_learns_too(mma):
    def first(wanted):
        launched = launches_of_a_backward(mma, B=256, **QUEUE, wanted=wanted)
        return next(n for kernel, n in launched if kernel == "backward")

    assert first("z0 z1 negatives") == first("z0 z1")
    assert busy(first("z0 z1")) >= 0.85


def test_the_projection_is_launched_for_the_rows_whose_gradient_is_wanted(mma):
    def rows(wanted, **batch):
        launched = launches_of_a_backward(mma, wanted=wanted, **batch)
        return [8 * n for kernel, n in launched if kernel == "project"]  # two for each warp

    assert rows("z0", B=256, **QUEUE) == [256]
    assert rows("z0 z1", B=256, **QUEUE) == [512]
    assert rows("z1", B=20000) == [20000 - 6208, 6208]  # 33792 rows a band
    assert sum(rows("negatives", B=256, **QUEUE)) == 65536
    assert rows("tau", B=20000) == [8]  # the block that adds up dL/dtau
    assert rows("", B=20000) == []


def test_wide_features_do_not_stay_in_shared_memory(mma):
    p = problem("cluster", 20, 1100, dtype=torch.float32)
    check(p)
    mma.device(*SMALL)
    check(p)
    assert_half_is_right(problem("cluster", 20, 500, dtype=torch.bfloat16))


def test_one_product_for_float32_is_as_exact_as_16_bit_inputs(mma):
    p = problem("cluster", 40, 30, dtype=torch.float32)
    arguments = p.raw()
    exact, *_ = operators.forward(*arguments)
    rounded, *_ = operators.forward(*arguments, allow_tf32=True)
    steep = p.condition * (1 + p.beta) * 2**-11 / p.tau
    assert 1e-6 < (exact - rounded).abs().max() < 2 * steep


def test_strides_and_mixed_dtypes_are_read_as_they_are(mma):
    p = problem(
        "cluster", 20, 12, "unpaired", K=30, dtype=(torch.float32, torch.bfloat16, torch.float16)
    )
    check(p)
    z0, z1, queue = (z.float() for z in p.inputs)
    check(
        p.with_(
            inputs=(
                z0.repeat(1, 2)[:, :12],
                z1[:, None].expand(20, 3, 12)[:, 1],
                queue.T.contiguous().T,
            )
        )
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_of_any_bits_reaches_every_row_that_sees_it(mma, mode):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        p = problem("gauss", 6, 8, mode, dtype=dtype)
        for n, nan in enumerate(nans(dtype, 17 if dtype == torch.float64 else 7)):
            inputs = [z.clone() for z in p.inputs]
            inputs[n % len(inputs)][2, ..., -1] = nan
            c, positive, negative = reference.cosines(*(*inputs, None)[:3], mode)
            wanted = (c.isnan() & negative).any(1) | positive.isnan()
            inputs = [z.requires_grad_() for z in inputs]
            rows = p.loss(*inputs)
            rows.sum().backward()
            assert torch.equal(rows.isnan(), wanted), (dtype, nan)
            for i in range(6):
                assert inputs[0].grad[i].isnan().all() or not wanted[i], (dtype, nan)


def test_gradients_that_are_not_wanted_are_not_computed(mma):
    p = problem("cluster", 20, 12, "unpaired", K=30, dtype=torch.float32)
    want = p.plain(torch.float64)
    for k, name in enumerate(p.names[:3]):
        inputs = [z.clone().requires_grad_(k == i) for i, z in enumerate(p.inputs)]
        p.loss(*inputs).backward(p.grad_output())
        torch.testing.assert_close(inputs[k].grad.double(), want.grads[name], rtol=1e-4, atol=1e-6)


RULES = (
    {},
    {"momentum": 0.7, "over": "negatives"},
    {"monotonic": True, "quantile": 0.6},
    {"lagged": True, "warmup_epochs": 1, "warmup_threshold": 0.25},
)


def run_of_steps(mode, dtype, rule, in_one_call):
    """Loss, statistics and state of some steps, the third of a batch that is not finite."""
    kernel_mode = mode if mode in ("ntxent", "query", "cross") else "ntxent"
    loss = HEXLoss(0.1, mode=kernel_mode, threshold=ThresholdTracker.adaptive(**rule))
    out = []
    for step in range(5):
        loss.set_epoch(step // 2)
        K = 5 if mode == "paired" else 40
        p = problem("cluster", 30, 9, mode, K=K, dtype=dtype, seed=step)
        if step == 2:
            p.inputs[0][3, 2] = math.nan
        inputs = [z.requires_grad_() for z in p.inputs]  # or the threshold would not learn
        with pytest.MonkeyPatch.context() as patch:
            if not in_one_call:
                patch.setattr(ops, "has_adaptive", lambda z: False)
            value = loss(*inputs)
        out += [value, *loss.last, loss.threshold.state.clone()]
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*quantile of a row of|.*H was empty")  # of small batches
def test_the_loss_with_its_threshold_in_one_call_is_the_two_calls_to_the_bit(mma, mode):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for rule in RULES[:: 1 if dtype == torch.float32 else 3]:
            one, two = (
                run_of_steps(mode, dtype, rule, in_one_call) for in_one_call in (True, False)
            )
            assert all(
                torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(one, two, strict=True)
            )


def test_an_empty_batch_is_a_step_that_the_threshold_skips(mma):
    loss = HEXLoss(0.1, threshold=ThresholdTracker.adaptive(over="negatives"))
    z0, z1 = (torch.zeros(0, 5, requires_grad=True) for _ in range(2))
    assert loss(z0, z1) == 0
    assert int(loss.threshold.updates) == 0 and int(loss.threshold.skipped) == 1


def test_a_training_step_takes_seven_launches(mma, monkeypatch):
    z0, z1 = (z.requires_grad_() for z in problem("cluster", 64, 32, dtype=torch.float32).inputs)
    loss = HEXLoss(0.1, threshold=ThresholdTracker.adaptive(over="negatives"))

    def launches():
        counts = [mma.launches]
        value = loss(z0, z1)
        counts.append(mma.launches)
        value.backward()
        return counts[1] - counts[0], mma.launches - counts[1]

    assert launches() == (4, 3)
    monkeypatch.setattr(ops, "has_adaptive", lambda z: False)  # as of a tracker elsewhere
    assert launches() == (3 + 2, 3)


def test_a_smaller_problem_never_lowers_the_shared_memory_of_a_kernel(kernels):
    """Another thread may be about to launch that kernel: each call allows what the device has."""
    kernels.least_allowed()
    for dtype in (torch.float32, torch.bfloat16):
        for D in (9, 70, 300):
            p = problem("cluster", 20, D, "unpaired", K=90, dtype=dtype)
            p.ours()
            with kernels.brackets():
                operators.threshold(*p.inputs, ops.MODES["unpaired"], 0.99, "all")
            operators.row_range(*p.inputs, ops.MODES["unpaired"])
            assert kernels.least_allowed() == HOPPER[1]


def test_a_launch_that_fails_is_an_exception_that_names_the_kernel(mma):
    p = problem("cluster", 20, 12, dtype=torch.float32)
    mma.device(1, 20 * 1024)
    with pytest.raises(RuntimeError, match="kernel 'forward statistics': CUDA error 1, invalid"):
        p.loss(*p.inputs)
    mma.device(*HOPPER)
    check(p)  # and nothing stays behind


def test_a_gpu_that_the_library_has_no_code_for_is_composed_with_a_warning(libraries, fresh_cuda):
    library = libraries["mma"]
    fresh_cuda((9, 0), library.path)
    library.no_code(0)
    try:
        with pytest.warns(
            RuntimeWarning, match=r"\(hex/_cuda.so has no code for this GPU, of comp"
        ):
            assert not ops._has_kernel(cuda_tensor(0))
        assert not ops._has_kernel(cuda_tensor(0))  # and is silent from now on
        assert "HEX_CUDA=1 HEX_CUDA_ARCH=90a pip install" in _load.cuda_problem(0)
        assert ops._has_kernel(cuda_tensor(1))  # another GPU, for which there is
        with library.in_use(), pytest.raises(RuntimeError, match="CUDA error 209, no kernel"):
            check(problem(dtype=torch.float32))  # what it would have come to
    finally:
        library.no_code()
        _load._C.load_cuda(None)


def test_asking_a_gpu_for_code_leaves_the_current_device_and_no_error(libraries):
    library = libraries["mma"]
    with library.in_use():
        library.no_code(1)
        assert _load._C.probe_cuda(1) == 209 and _load._C.probe_cuda(0) == 0
        check(problem(dtype=torch.float32))
        library.no_code()


def test_the_cpus_kernels_are_back_when_the_emulation_is_over(libraries):
    p = problem("cluster", 20, 12, dtype=torch.float32)
    before = libraries["mma"].launches
    check(p)
    assert libraries["mma"].launches == before  # the CPU's kernels again
