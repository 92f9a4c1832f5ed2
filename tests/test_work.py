# SPDX-License-Identifier: MIT
"""The gate against work done twice: what the CPU core did for a loss, counted by the core itself,
against what the algorithm needs (work.py).

A time would know the machine: its clock, its vectors, its neighbours. How many multiply-adds,
exponentials and comparisons a problem takes is a property of the code, equal on every machine, with
any number of threads; where the values of the batch decide, a range is derived. Times are the
benchmark's (../benchmarks/core.py). That work done twice is found is shown by
test_work_done_twice.py.
"""

import os
import platform
import shutil

import pytest
import torch
from data import MODES, batch
from test_isa import skip_unless_available
from work import (
    ADAPTIVE,
    BF16,
    BLOCK,
    F32,
    F64,
    GIVEN,
    ROOT,
    ROW_RANGE,
    THRESHOLD,
    Need,
    build,
    most_passes,
    parts,
)

from hex import ops

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "gcc").split()[0]) is None,
    reason="there is no compiler to build the core with",
)

DTYPES = {F32: torch.float32, F64: torch.float64, BF16: torch.bfloat16}


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return build(ops.isa(), tmp_path_factory.mktemp("work") / "core.so")


def tight_classes(B, D, classes, spread=0.08):
    """The hard case of the threshold: a row's largest cosines lie close together."""
    g = torch.Generator().manual_seed(0)
    image = torch.randn(classes, D, generator=g)[torch.arange(B) % classes]
    image = image + spread * torch.randn(B, D, generator=g)
    return tuple(image + 0.75 * spread * torch.randn(B, D, generator=g) for _ in range(2))


def problem(kind, mode, B, K, D, dtype=F32):
    z = batch(kind if kind != "tight" else "gauss", B, D, mode, K)
    if kind == "tight":
        z = (*tight_classes(B, D, 4), z[2])
    return [x.to(DTYPES[dtype]).contiguous() for x in z if x is not None]


# No tile, block or vector divides them. From 192 candidates on the core goes by tiles, in blocks of
# 96 rows up to 1024, of 192 beyond; `paired` and what is smaller goes row by row.
SIZES = {
    "tiles": (251, 331, 40),
    "larger blocks": (551, 1201, 33),
    "rows": (37, 53, 19),
}
CASES = [
    pytest.param(mode, sizes, id=f"{mode}, {name}")
    for mode in MODES
    for name, sizes in SIZES.items()
    if mode != "paired" or name == "rows"
]
SMALLER = [case for case in CASES if "larger" not in case.id]


@pytest.mark.parametrize("keep", [0, 1], ids=["", "kept"])
@pytest.mark.parametrize(("mode", "sizes"), CASES)
def test_a_loss_with_its_threshold_given(core, mode, sizes, keep):
    B, K, D = sizes
    need = Need(core, mode, B, K, D)
    forward, backward = core.count(problem("cluster", mode, *sizes), mode, keep=keep)
    check_given(need, forward)
    assert backward == need.backward(bool(keep), (1, 1, 1))


def check_given(need, forward):
    expected = dict(compared=0, selected=0, listed=0, again=0)
    if need.by_tiles:
        expected |= dict(
            products=need.cosines(), exponentials=need.summed(),
            dots=need.B * need.D, rows=need.unit_rows,
        )  # fmt: skip
    else:
        each = need.rows * need.negatives
        expected |= need.row_cosines() | dict(exponentials=each, compared=each)
    assert forward == expected


@pytest.mark.parametrize("keep", [0, 1], ids=["", "kept"])
@pytest.mark.parametrize(
    ("kind", "over_negatives"),
    [
        *[("gauss", 0), ("gauss", 1), ("cluster", 0), ("near_collapsed", 1), ("collapsed", 0)],
        *[("tight", 0), ("tight", 1)],
    ],
)
@pytest.mark.parametrize(("mode", "sizes"), CASES)
def test_a_loss_that_finds_its_threshold(core, mode, sizes, kind, over_negatives, keep):
    B, K, D = sizes
    need = Need(core, mode, B, K, D)
    forward, backward = core.count(
        problem(kind, mode, *sizes), mode, keep=keep, what=ADAPTIVE,
        over_negatives=over_negatives,
    )  # fmt: skip
    check_adaptive(need, forward, bool(over_negatives), bool(keep), easy=kind == "gauss")
    assert backward == need.backward(bool(keep), (1, 1, 1))


def check_adaptive(need, count, over_negatives, keep, easy):
    """One pass over the cosines for the threshold and the loss; where the batch is not `easy`,
    maybe a second, at the threshold."""
    _, share = need.share(0.99, over_negatives)
    if not need.by_tiles:
        check_row_threshold(need, count, over_negatives, passes=2, keep=keep)
        return
    assert count["listed"] <= need.rows * need.capacity(share)
    assert count["rows"] == need.unit_rows
    products, each = need.bound(share) + need.cosines(), need.summed()
    # Rows that their list does not serve are done again whole, and then their positive's cosine too
    # is made again. Of the split at most one in so many, else all of them get one more pass; of the
    # selection 3 in 100,000, for the limit is 4 sigmas below the quantile.
    again, rest = divmod(count["dots"] - need.B * need.D, need.D)
    assert rest == 0 and again <= need.rows // 16
    if count["exponentials"] == 2 * each:
        assert not easy
        products += 0 if keep else need.cosines()
    elif again == 0:
        assert count["exponentials"] == each + count["listed"]
    else:
        most = each + count["listed"] + again * need.negatives
        assert each < count["exponentials"] <= most
    assert again <= count["again"] <= again + 2 * (need.MR - 1)  # cross has two sides
    products += count["again"] * -(-need.columns // need.NR) * need.NR * need.width
    assert count["products"] == products
    least, most = need.selected_of_bound(share)
    most += count["listed"] + need.rows * (2 + need.lanes)
    assert least <= count["selected"] <= most
    assert count["compared"] <= most_passes(need.wide) * count["selected"]


def check_row_threshold(need, count, over_negatives, passes, keep=False):
    """Row by row: the threshold, and (2 passes) the loss, which has kept cosines at hand."""
    assert (count["listed"], count["again"]) == (0, 0)
    wanted = need.row_cosines(1 if keep and need.mode != "paired" else passes)
    assert {name: count[name] for name in wanted} == wanted
    assert count["exponentials"] == (passes - 1) * need.rows * need.negatives
    inside = need.mode in ("unpaired", "paired")  # the positive is added to the row
    n = need.negatives if over_negatives else need.columns + inside
    k = n - round(0.99 * (n - 1))
    compared = count["compared"] - (passes - 1) * need.rows * need.negatives
    if 2 * (2 * k + 32) > n // 4:  # too short for lists
        assert count["selected"] == need.rows * n
        least = count["selected"]
    else:  # a pass over each row, and selection from lists and of the rows that are unlike the last
        least = need.rows * n
        assert need.rows * k <= count["selected"] < least / 2
    assert least <= compared <= least + most_passes(need.wide) * count["selected"]


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float", "double"])
@pytest.mark.parametrize(("mode", "sizes"), SMALLER)
def test_two_threads_do_the_work_of_one(core, mode, sizes, dtype):
    if dtype == F64 and ops.isa().startswith("avx512_"):
        pytest.skip("that level has no double of its own")
    z = problem("tight", mode, *sizes, dtype)
    for what in (GIVEN, ADAPTIVE, THRESHOLD, ROW_RANGE):
        one, two = (core.count(z, mode, what=what, dtype=dtype, threads=n) for n in (1, 2))
        for of_one, of_two in zip(one, two, strict=True):
            if what == THRESHOLD:  # a thread's first row has no limit of a row before
                for name in ("compared", "selected"):
                    assert of_two.pop(name) <= 1.1 * of_one.pop(name)
            assert of_one == of_two


@pytest.mark.parametrize(("mode", "sizes"), SMALLER)
def test_double(core, mode, sizes):
    if ops.isa().startswith("avx512_"):
        pytest.skip("that level has no double of its own")
    need = Need(core, mode, *sizes, dtype=F64)
    z = problem("gauss", mode, *sizes, F64)
    forward, backward = core.count(z, mode, dtype=F64)
    check_given(need, forward)
    assert backward == need.backward(False, (1, 1, 1))
    check_adaptive(need, core.count(z, mode, dtype=F64, what=ADAPTIVE)[0], False, False, True)


@pytest.mark.parametrize("dz", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize(("mode", "sizes"), CASES)
def test_a_gradient_that_is_not_wanted_costs_nothing(core, mode, sizes, dz):
    if dz[2] and mode not in ("unpaired", "paired"):
        pytest.skip("there is no third input")
    need = Need(core, mode, *sizes)
    found = core.count(problem("gauss", mode, *sizes), mode, dz=dz)[1]
    wanted = need.backward(False, dz)
    if not any(dz):
        wanted = dict.fromkeys(wanted, 0)
    elif mode == "unpaired" and need.by_tiles and dz == (0, 1, 0):  # z1 meets its partner only
        wanted |= dict(products=0, exponentials=0)
    assert found == wanted


@pytest.mark.parametrize(("mode", "sizes"), SMALLER)
def test_the_threshold_and_the_bounds_of_rows_by_themselves(core, mode, sizes):
    need = Need(core, mode, *sizes)
    z = problem("cluster", mode, *sizes)
    for over_negatives in (0, 1):
        count = core.count(z, mode, what=THRESHOLD, over_negatives=over_negatives)[0]
        check_row_threshold(need, count, bool(over_negatives), passes=1)
    count = core.count(z, mode, what=ROW_RANGE)[0]
    n = need.columns + (mode in ("unpaired", "paired"))
    zero = dict(exponentials=0, selected=0, listed=0, again=0)
    assert count == need.row_cosines() | zero | dict(compared=need.rows * n)


def test_the_threshold_of_long_rows_goes_by_lists(core):
    mode, sizes = "unpaired", (100, 6200, 9)
    need = Need(core, mode, *sizes)
    count = core.count(problem("gauss", mode, *sizes), mode, what=THRESHOLD)[0]
    _, share = need.share(0.99, False)
    blocks = [min(192, 6200 - k) for k in range(0, 6200, 192)]
    cosines = sum(need.product(min(96, 100 - i), n) for i in (0, 96) for n in blocks)
    assert count["products"] == need.bound(share) + cosines
    assert (count["dots"], count["rows"]) == (need.B * need.D, need.unit_rows)
    assert (count["exponentials"], count["again"]) == (0, 0)
    least, most = need.selected_of_bound(share)
    assert least < count["selected"] <= most + 100 * (need.capacity(share) + 2 + need.lanes)
    listed = 100 * sum(-(-n // need.NR) * need.NR for n in blocks)
    assert listed < count["compared"] <= listed + most_passes(False) * count["selected"]


@pytest.mark.parametrize("mode", ["ntxent", "query", "cross", "unpaired"])
def test_a_block_takes_its_share_of_the_work(core, mode):
    """Its cosines are computed once, for threshold, loss and gradient; an exponential serves both
    rows of a pair."""
    B, K, D = sizes = 331, 397, 40
    first, images = 80, 60
    need = Need(core, mode, *sizes)
    z = problem("cluster", mode, *sizes)
    forward, backward = core.count(z, mode, what=BLOCK, first=first, images=images, keep=1)
    sides = 2 if need.both else 1
    own = sides * images
    listed = own * need.columns  # at most
    assert need.columns < forward.pop("compared") / own
    assert 0 < forward.pop("selected") < listed / 2
    assert forward == dict(
        products=sides * need.product(images, need.columns), dots=2 * images * D,
        rows=need.unit_rows + 2 * images, exponentials=own * need.negatives, listed=0, again=0,
    )  # fmt: skip
    expected = dict.fromkeys(backward, 0) | dict(rows=need.unit_rows)
    # z0's and z1's rows of the block; all negatives, if they are a third input
    owners = [images, images, *([K] if mode == "unpaired" else [])]
    for n, (_, met, terms, anchors) in zip(owners, need.sides(), strict=False):
        expected["dots"] += n * D
        expected["exponentials"] += n * met * (1 if terms == 2 else terms)
        for columns in parts(met, 512):
            expected["products"] += need.gathered(n, columns)
            expected["products"] += 0 if anchors else need.product(n, columns)
    assert backward == expected


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_weight_of_its_own_costs_an_exponential_more_at_most(core, beta):
    mode, sizes = "ntxent", SIZES["tiles"]
    need = Need(core, mode, *sizes)
    forward, backward = core.count(problem("cluster", mode, *sizes), mode, beta=beta)
    each = 2 if beta == 0.5 else 1
    assert forward["exponentials"] == each * need.summed()
    assert backward["exponentials"] == each * need.backward(False, (1, 1, 1))["exponentials"]


# ---- labels and logits ----


@pytest.mark.parametrize("positives", [0, 1], ids=["outside", "inside"])
@pytest.mark.parametrize("guided", [False, True], ids=["", "guide"])
@pytest.mark.parametrize("mode", ["ntxent", "query"])
def test_a_labelled_loss(core, mode, guided, positives):
    """By tiles; and where a guide decides, block by block."""
    B, D, E = 203, 40, 19
    M = 707 if mode == "query" else 0
    g = torch.Generator().manual_seed(0)
    sides = [B, M] if M else [B]
    z = [torch.randn(n, D, generator=g) for n in sides]
    ids = [torch.arange(n) % 7 for n in sides]
    given = dict(ids=ids, positives=positives)
    if guided:
        given |= dict(guide=[torch.randn(n, E, generator=g) for n in sides])
    forward, backward = core.count(z, mode, **given)
    need = Need(core, mode, B, 0, D, M=M)
    assert need.by_tiles
    N, candidates = need.rows, need.columns
    unit_rows = need.unit_rows * (1 + guided)
    widths = [need, *([Need(core, mode, B, 0, E, M=M)] if guided else [])]
    nothing = dict.fromkeys(forward, 0)
    products = sum(each.product(N, candidates) for each in widths)
    if guided:
        entries = dict(exponentials=N * candidates, compared=N * candidates)
        assert forward == nothing | entries | dict(products=products, rows=unit_rows)
        expected = nothing | dict(rows=unit_rows)
        for owners, met, terms, _ in need.sides():
            expected["dots"] += owners * D
            expected["exponentials"] += owners * met * terms
            for n in parts(met, 512):
                expected["products"] += sum(each.product(owners, n) for each in widths)
                expected["products"] += need.gathered(owners, n)
        assert backward == expected
    else:
        assert forward == nothing | dict(
            products=need.cosines(), exponentials=need.summed(), rows=unit_rows
        )
        assert backward == need.backward(False, (1, 1, 0))

    if mode == "ntxent" and not guided:
        adaptive = core.count(z, mode, what=ADAPTIVE, over_negatives=1, **given)[0]
        check_one_pass(need, adaptive, unit_rows)
    threshold = core.count(z, mode, what=THRESHOLD, quantile=0.9, over_negatives=1, **given)[0]
    negatives = int((ids[0][:, None] != ids[-1]).sum())
    assert threshold["selected"] == negatives
    assert negatives <= threshold["compared"] <= most_passes(False) * negatives
    assert threshold | dict(selected=0, compared=0) == nothing | dict(
        products=sum(each.product(N, candidates) for each in widths), rows=unit_rows
    )


def check_one_pass(need, count, rows):
    """Threshold and loss of several positives, with one product of all rows and one of the sample;
    the sums may have a second pass, and a row that its list does not serve is done whole."""
    _, share = need.share(0.99, True)
    assert count["rows"] == rows
    again = count["again"] * -(-need.columns // need.NR) * need.NR * need.width
    few = need.rows // 16 + 2 * (need.MR - 1)
    assert count["again"] <= few
    once = need.bound(share) + need.cosines() + again
    if count["products"] == once:
        listed = count["listed"]
        more = count["exponentials"] - need.summed()
        assert 0 < listed <= more <= listed + count["again"] * need.columns
    else:
        assert count["products"] == once + need.cosines()
        assert count["exponentials"] == 2 * need.summed()


def test_a_loss_of_logits(core):
    N, C = 53, 271
    g = torch.Generator().manual_seed(0)
    logits, target = 10 * torch.randn(N, C, generator=g), torch.arange(N) % C
    forward, backward = core.count([logits], "logits", ids=[target])
    nothing = dict.fromkeys(forward, 0)
    assert forward == nothing | dict(exponentials=N * C, compared=N * C)
    assert backward == nothing | dict(exponentials=N * (C + 1))  # the target's as both classes
    rule = dict(what=THRESHOLD, quantile=0.9, over_negatives=1)
    threshold = core.count([logits], "logits", ids=[target], **rule)[0]
    selected = N * (C - 1)
    assert threshold == nothing | dict(selected=selected, compared=threshold["compared"])
    assert selected <= threshold["compared"] <= most_passes(False) * selected


def test_many_logits_are_read_once_for_threshold_and_loss(core):
    N, C = 5, 4999
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(N, C, generator=g), torch.arange(N) * 1000
    rule = dict(what=ADAPTIVE, quantile=0.99, over_negatives=1)
    forward, _ = core.count([logits], "logits", ids=[target], **rule)
    listed = forward["listed"]  # about 23 of 1,024 of a sample are above a limit
    assert 0.01 * N * C < listed < 0.04 * N * C
    selected = N * 1024 + listed
    assert N * 1024 < forward["selected"] <= selected + N * 16
    assert N * C < forward["compared"] <= N * C + most_passes(False) * forward["selected"]
    assert forward["exponentials"] == N * C + listed
    rest = {k: n for k, n in forward.items() if k in ("products", "dots", "rows", "again")}
    assert not any(rest.values())


# ---- products of bfloat16, in plain C where the CPU has none ----


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the level is for x86-64")
def test_rows_multiplied_by_pairs(tmp_path):
    skip_unless_available("avx2")
    flags = ("-DHEX_EMULATE_BF16", "-Wno-psabi")
    core = build("avx512_bf16", tmp_path / "core.so", ROOT / "csrc", *flags)
    for mode, sizes in (case.values for case in SMALLER):
        need = Need(core, mode, *sizes, dtype=BF16)
        z = problem("gauss", mode, *sizes, BF16)
        forward, backward = core.count(z, mode, dtype=BF16)
        check_given(need, forward)
        assert backward == need.backward(False, (1, 1, 1)), (mode, sizes)
        check_adaptive(need, core.count(z, mode, dtype=BF16, what=ADAPTIVE)[0], False, False, True)
