# SPDX-License-Identifier: MIT
"""hex.watch: the share of H that is of the anchor's class is that of the pairs counted one by one,
and its H is that of the losses.
"""

import math
import re
import textwrap

import pytest
import torch
from conftest import DTYPES
from data import MODES, batch, eps_in_a_gap
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode

from hex import HEXLoss, HEXSupConLoss, ThresholdTracker, watch
from hex.watch import class_share

B, D, K, CLASSES = 23, 11, 17, 4


def drawn(mode: str, dtype: torch.dtype = torch.float64):
    """Two views, labels, and the arguments of the mode's negatives."""
    z0, z1, negatives = batch("cluster", B, D, mode, K)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (B,), generator=generator)
    options = {"mode": mode}
    if negatives is not None:
        of = torch.randint(CLASSES, negatives.shape[:-1], generator=generator)
        options = {"negatives": negatives.to(dtype), "negative_labels": of}
    return z0.to(dtype), z1.to(dtype), labels, options


def pairs(z0, z1, labels, mode="ntxent", negatives=None, negative_labels=None, ignored=None):
    """Of each anchor with each of its negatives: its row, the cosine, and if the classes match."""
    ignored = torch.zeros(1, 1) if ignored is None else torch.atleast_2d(ignored)
    high, wide = ignored.shape  # which repeats
    sides = ((z0, z1),) if mode == "query" or negatives is not None else ((z0, z1), (z1, z0))
    for side, (anchors, others) in enumerate(sides):
        for i, anchor in enumerate(anchors):
            its = []
            if negatives is None:
                first = B * (1 - side) if mode == "ntxent" else 0
                its += [(others[j], labels[j], first + j) for j in range(B) if j != i]
                if mode == "ntxent":
                    its += [(anchors[j], labels[j], B * side + j) for j in range(B) if j != i]
            elif negatives.dim() == 2:
                its += zip(negatives, negative_labels, range(K), strict=True)
            else:
                its += zip(negatives[i], negative_labels[i], range(K), strict=True)
            for z, label, column in its:
                if ignored[(side * B + i) % high, column % wide]:
                    continue
                c = float(cosine_similarity(anchor.double(), z.double(), dim=0))
                yield side * B + i, c, bool(label == labels[i])


def counted(found, eps: Tensor) -> tuple[float, int]:
    """The share, and how many members there are; eps is 0-d, or of each row."""
    members = [same for row, c, same in found if c > (eps[row] if eps.dim() else eps)]
    return sum(members) / len(members), len(members)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_it_is_the_share_of_the_pairs_counted_one_by_one_in_the_h_of_the_loss(
    mode, dtype, monkeypatch
):
    z0, z1, labels, options = drawn(mode, dtype)
    found = list(pairs(z0, z1, labels, **options))
    cosines = torch.tensor([c for _, c, _ in found], dtype=torch.float64)
    of_loss = {name: options[name] for name in ("mode",) if name in options}
    for near in (0.1, 0.5, 0.9):
        eps = eps_in_a_gap(cosines, near)
        wanted, members = counted(found, eps)
        for numbers in (
            2**20,
            50,
            1,
        ):  # how many cosines a block has: all, some, those of an anchor
            monkeypatch.setattr(watch, "_NUMBERS", numbers)
            share = class_share(z0, z1, labels, eps, **options)
            assert share.dtype == torch.float64 and share.shape == ()
            assert share.item() == wanted
        criterion = HEXLoss(threshold=float(eps), **of_loss)
        rows = 2 * B if mode in ("ntxent", "cross") else B
        criterion(z0, z1, options.get("negatives"))
        assert criterion.statistics()["hard"] == pytest.approx(members / rows, rel=1e-6)


SHAPES = {
    "ntxent": [(B, B), (2 * B, 2 * B)], "query": [(B, B)], "cross": [(B, B), (2 * B, B)],
    "unpaired": [(B, K), (K,)], "paired": [(B, K)],
}  # fmt: skip


@pytest.mark.parametrize("mode, shape", [(mode, shape) for mode in MODES for shape in SHAPES[mode]])
def test_what_the_loss_ignores_is_in_no_h(mode, shape, monkeypatch):
    z0, z1, labels, options = drawn(mode)
    ignored = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.4
    if mode == "paired":  # what is ignored is padding
        options["negatives"] = options["negatives"].masked_fill(ignored[..., None], math.nan)
    options["ignored"] = ignored
    found = list(pairs(z0, z1, labels, **options))
    eps = eps_in_a_gap(torch.tensor([c for _, c, _ in found], dtype=torch.float64), 0.5)
    wanted, members = counted(found, eps)
    for numbers in (2**20, 50):
        monkeypatch.setattr(watch, "_NUMBERS", numbers)
        assert class_share(z0, z1, labels, eps, **options).item() == wanted
    of_loss = {name: options[name] for name in ("mode",) if name in options}
    criterion = HEXLoss(threshold=float(eps), **of_loss)
    criterion(z0, z1, options.get("negatives"), ignored=ignored)
    rows = 2 * B if mode in ("ntxent", "cross") else B
    assert criterion.statistics()["hard"] == pytest.approx(members / rows, rel=1e-6)
    every = class_share(z0, z1, labels, eps, **options | {"ignored": torch.ones_like(ignored)})
    assert every.isnan()


def test_where_the_own_class_is_ignored_none_of_h_is_of_it():
    z0, z1, labels, _ = drawn("ntxent")
    same = labels[:, None] == labels
    assert class_share(z0, z1, labels, -0.5) > 0
    assert class_share(z0, z1, labels, -0.5, ignored=same) == 0
    none = class_share(z0[:0], z1[:0], labels[:0], -0.5, ignored=same[:0, :0])
    assert none.isnan()
    no_negatives = {"negatives": z0[:0], "negative_labels": labels[:0], "ignored": same[:, :0]}
    assert class_share(z0, z1, labels, -0.5, **no_negatives).isnan()


@pytest.mark.parametrize("mode", ("ntxent", "query", "cross"))
def test_the_thresholds_by_the_positive_are_those_that_the_guide_on_logging_makes(mode):
    z0, z1, labels, _ = drawn(mode)
    criterion = HEXLoss(threshold=ThresholdTracker.by_positive(0.3), mode=mode)
    criterion(z0, z1)
    eps = cosine_similarity(z0, z1) - 0.3
    if mode != "query":
        eps = torch.cat([eps, eps])
    right = class_share(z0, z1, labels, criterion._last[0], mode=mode)
    assert class_share(z0, z1, labels, eps, mode=mode) == right
    assert class_share(z0, z1, labels, criterion.last.eps, mode=mode) != right


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rest_of_h_is_the_h_of_a_loss_to_which_the_class_is_no_negative(dtype):
    """HEXSupConLoss has the images of the anchor's class as positives; these may be in no H."""
    z0, z1, labels, _ = drawn("ntxent", dtype)
    every = HEXLoss()
    every(z0, z1)
    others = HEXSupConLoss(threshold=float(every.last.eps))
    others(torch.stack([z0, z1], 1), labels)
    share = class_share(z0, z1, labels, every.last.eps)
    assert 0 < share < 1
    assert share.item() == pytest.approx(1 - float(others.last.hard / every.last.hard), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_threshold_for_each_anchor_is_compared_with_its_own_cosines(mode):
    z0, z1, labels, options = drawn(mode)
    found = list(pairs(z0, z1, labels, **options))
    rows = 1 + max(row for row, *_ in found)
    assert rows == (2 * B if mode in ("ntxent", "cross") else B)
    eps = torch.linspace(-0.2, 0.9, rows, dtype=torch.float64)
    assert class_share(z0, z1, labels, eps, **options).item() == counted(found, eps)[0]


def test_what_rounding_does_to_a_cosine_or_a_threshold_moves_nothing_into_h():
    z = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    labels = torch.zeros(2, dtype=torch.int64)
    criterion = HEXLoss(threshold=0.6)  # as float32 it is more, and so is this cosine
    criterion(z, z)
    assert criterion.last.hard == 2 and class_share(z, z, labels, 0.6) == 1
    above = float(torch.tensor(0.6))
    assert class_share(z, z, labels, above).isnan()
    for seed in range(9):  # every cosine is 1, or by rounding more or less
        z0, z1, _ = batch("collapsed", B, D, seed=seed)
        assert class_share(z0.float(), z1.float(), torch.arange(B), 1.0).isnan()


def test_all_negatives_give_the_share_of_chance_and_an_empty_h_none():
    z0, z1, labels, _ = drawn("ntxent")
    same = (labels[:, None] == labels).sum() - B
    chance = class_share(z0, z1, labels, -math.inf)
    assert float(chance) == pytest.approx(float(same / (B * (B - 1))))
    for eps in (math.inf, 1.0, torch.tensor(math.nan, dtype=torch.float64)):
        assert class_share(z0, z1, labels, eps).isnan()
    assert class_share(z0[:0], z1[:0], labels[:0], -1).isnan()
    assert class_share(z0[:1], z1[:1], labels[:1], -1).isnan()  # no negatives


@pytest.mark.parametrize("scale", (1e-30, 1e30))
def test_rows_of_any_length_count_alike_and_those_without_a_direction_are_in_no_h(scale):
    z0, z1, labels, _ = drawn("ntxent", torch.float32)
    eps = eps_in_a_gap(torch.tensor([c for _, c, _ in pairs(z0, z1, labels)]), 0.4)
    assert class_share(z0 * scale, z1, labels, eps) == class_share(z0, z1, labels, eps)
    broken = z0.clone()
    broken[3], broken[5] = torch.nan, 0  # the cosines of zeros are 0
    found = [pair for pair in pairs(broken, z1, labels) if not math.isnan(pair[1])]
    assert len(found) < 2 * B * (2 * B - 2)
    assert class_share(broken, z1, labels, eps).item() == counted(found, eps)[0]


def test_it_has_no_gradient_and_is_the_same_under_autocast():
    z0, z1, labels, _ = drawn("ntxent", torch.float32)
    z0.requires_grad_()
    for eps in torch.linspace(-0.5, 0.9, 20):
        share = class_share(z0, z1, labels, eps)
        assert not share.requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(class_share(z0, z1, labels, eps), share)
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(class_share(z0, z1, labels.to(dtype), eps), share)


@pytest.mark.parametrize("mode", MODES)
def test_it_is_made_on_the_device_of_the_embeddings(mode):
    z0, z1, labels, options = drawn(mode)
    there = {k: x.to("meta") if isinstance(x, Tensor) else x for k, x in options.items()}
    share = class_share(z0.to("meta"), z1.to("meta"), labels, 0.5, **there)
    assert (share.device.type, share.shape, share.dtype) == ("meta", (), torch.float64)


class Largest(TorchDispatchMode):
    """How many numbers the largest result of an operator has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def test_nothing_is_as_large_as_all_pairs():
    images = 3 * 400
    z0, z1 = torch.randn(2, images, 3, generator=torch.Generator().manual_seed(2)).unbind()
    labels = torch.arange(images) % 5
    ignored = torch.eye(images, dtype=torch.bool)
    with Largest() as largest:
        class_share(z0, z1, labels, 0.3)
        class_share(z0, z1, labels, 0.3, ignored=ignored)
    assert 4 * images**2 > 5 * watch._NUMBERS
    assert images**2 // 4 < largest.numbers <= watch._NUMBERS


def test_the_lines_for_a_training_loop_log_all_four_figures(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (lines,) = re.findall(r"((?:^    .*\n)+)", watch.__doc__, re.MULTILINE)
    code = textwrap.dedent(lines)
    assert len(code.splitlines()) == 3
    z0, z1, labels, _ = drawn("ntxent")
    criterion = HEXLoss()
    criterion(z0, z1)
    names = {"criterion": criterion, "z0": z0, "z1": z1, "labels": labels, "step": 7}
    with tensorboard.SummaryWriter(tmp_path) as writer:
        exec(code, names | {"writer": writer, "class_share": class_share})
    log = events.EventAccumulator(str(tmp_path)).Reload()
    wanted = criterion.statistics() | {
        "class_share": float(class_share(z0, z1, labels, criterion.last.eps))
    }
    assert sorted(log.Tags()["scalars"]) == sorted(f"hex/{name}" for name in wanted)
    for name, value in wanted.items():
        (event,) = log.Scalars(f"hex/{name}")
        assert (event.step, event.value) == (7, pytest.approx(value, rel=1e-6))


Z, Y = torch.ones(4, 3), torch.ones(4, dtype=torch.int64)
ERRORS = (
    (lambda: class_share([1], Z, Y, 0), TypeError, "z0: got list, wanted a torch.Tensor"),
    (lambda: class_share(Z, Z[1:], Y, 0), ValueError,
     "z1: got shape (3, 3), wanted that of z0, (4, 3)"),
    (lambda: class_share(Z, Z, [1], 0), TypeError, "labels: got list, wanted a torch.Tensor"),
    (lambda: class_share(Z, Z, Y[1:], 0), ValueError, "labels: got shape (3,), wanted (4,)"),
    (lambda: class_share(Z, Z, Y.float(), 0), TypeError,
     "labels: got torch.float32, wanted an integer dtype"),
    (lambda: class_share(Z, Z, Y.to("meta"), 0), ValueError,
     "labels: got device meta, wanted that of the embeddings, cpu"),
    (lambda: class_share(Z, Z, Y, "adaptive"), TypeError,
     "eps: got str, wanted a number or a tensor"),
    (lambda: class_share(Z, Z, Y, math.nan), ValueError, "eps: got nan, wanted a cosine"),
    (lambda: class_share(Z, Z, Y, torch.zeros(4)), ValueError,
     "eps: got shape (4,), wanted () or (8,)"),
    (lambda: class_share(Z, Z, Y, torch.zeros(8), mode="query"), ValueError,
     "eps: got shape (8,), wanted () or (4,)"),
    (lambda: class_share(Z, Z, Y, torch.zeros(8), negatives=Z, negative_labels=Y), ValueError,
     "eps: got shape (8,), wanted () or (4,)"),
    (lambda: class_share(Z, Z, Y, 0, mode="all"), ValueError,
     "mode: got 'all', wanted one of 'ntxent', 'query', 'cross'"),
    (lambda: class_share(Z, Z, Y, 0, negatives=Z[:, :2], negative_labels=Y), ValueError,
     "negatives: got shape (4, 2), wanted (K, 3) or (4, K, 3)"),
    (lambda: class_share(Z, Z, Y, 0, negatives=Z), TypeError,
     "negative_labels: got NoneType, wanted a torch.Tensor"),
    (lambda: class_share(Z, Z, Y, 0, negatives=Z[1:], negative_labels=Y), ValueError,
     "negative_labels: got shape (4,), wanted (3,)"),
    (lambda: class_share(Z, Z, Y, 0, negative_labels=Y), ValueError,
     "negative_labels: got some, wanted None without negatives"),
    (lambda: class_share(Z, Z, Y, 0, ignored=Y), TypeError,
     "ignored: got torch.int64, wanted torch.bool, True for a negative that does not count"),
    (lambda: class_share(Z, Z, Y, 0, mode="cross", ignored=Y > 0), ValueError,
     "ignored: got shape (4,), wanted (4, 4) or (8, 4)"),
)  # fmt: skip


@pytest.mark.parametrize("call, kind, text", ERRORS, ids=[text for *_, text in ERRORS])
def test_a_wrong_argument_is_named(call, kind, text):
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        call()
