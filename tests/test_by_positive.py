# SPDX-License-Identifier: MIT
"""ThresholdTracker.by_positive: eps of a row is the cosine with its positive less a margin.

That the loss is GISTEmbed's with the variant "excluded" is in test_gist.py. Ranks are among the
cases of gathered.py, for test_distributed.py and its like.
"""

import copy
import math
import pickle

import pytest
import torch
from conftest import without_kernels
from data import f64, views
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hex import (
    HEXCrossEntropyLoss,
    HEXLoss,
    HEXSupConLoss,
    ThresholdTracker,
    hex_cross_entropy,
    hex_loss,
    ops,
    positive,
    reference,
)
from hex.problem import of_views

B, D, K = 17, 9, 11
LAYOUTS = ("ntxent", "query", "cross", "unpaired", "paired")
by_positive = ThresholdTracker.by_positive


def batch(layout: str, kind: str = "cluster", D: int = D) -> list[Tensor]:
    """z0, z1 and the negatives of a layout."""
    z0, z1 = views(kind, B + B * K, D)
    z, others = [z0[:B], z1[:B]], z0[B:]
    if layout == "unpaired":
        z.append(others[:K])
    elif layout == "paired":
        z.append(others.reshape(B, K, D))
    return z


def mode(layout: str) -> dict:
    return {"mode": layout} if layout in ("ntxent", "query", "cross") else {}


def of_positives(layout: str, z0: Tensor, z1: Tensor) -> Tensor:
    c = torch.nn.functional.cosine_similarity(z0, z1)
    return torch.cat([c, c]) if layout in ("ntxent", "cross") else c


def test_eps_is_the_cosine_of_each_row_with_its_positive_less_the_margin():
    for layout in LAYOUTS:
        z = batch(layout)
        c = of_positives(layout, *z[:2])
        for margin, relative, eps in (
            (0.0, False, c),
            (0.2, False, c - 0.2),
            (-0.01, False, c + 0.01),
            (0.3, True, 0.7 * c),
        ):
            for variant in ("paper", "released", "excluded"):
                options = dict(variant=variant, reduction="none", **mode(layout))
                module = HEXLoss(0.2, threshold=by_positive(margin, relative), **options)
                rows = module(*z)
                wanted = hex_loss(*z, eps=eps + 1e-13, temperature=0.2, **options)
                torch.testing.assert_close(rows, wanted, rtol=1e-12, atol=0)
                torch.testing.assert_close(module.last.eps, eps.mean(), rtol=0, atol=1e-12)
                table, _, negative = reference.cosines(*(*z, None)[:3], layout)
                hard = ((table > eps[:, None] + 1e-13) & negative).sum(1).double().mean()
                assert module.last.hard == hard
                assert hard > 0 or margin <= 0


def test_a_relative_margin_lowers_the_threshold_of_a_negative_cosine_too():
    z0, z1 = batch("query")
    module = HEXLoss(threshold=by_positive(0.25, relative=True), mode="query", reduction="none")
    module(z0, -z1)
    c = of_positives("query", z0, -z1)
    assert (c < 0).all()
    torch.testing.assert_close(module.last.eps, (1.25 * c).mean(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_a_guide_it_is_the_cosine_of_the_guide(layout):
    z, guide = batch(layout), batch(layout, "gauss", D + 4)
    c = of_positives(layout, *guide[:2])
    options = dict(threshold=by_positive(0.1), **mode(layout))
    guided = HEXLoss(**options)
    guided(*z, guide=tuple(guide))
    torch.testing.assert_close(guided.last.eps, c.mean() - 0.1, rtol=0, atol=1e-12)
    itself = HEXLoss(**options)
    torch.testing.assert_close(itself(*z, guide=tuple(z)), itself(*z), rtol=1e-12, atol=0)
    assert guided.last.hard != itself.last.hard


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_of_logits_it_is_that_of_the_target_times_the_temperature(dtype):
    z0, z1 = batch("query")
    logits = (reference.problem_cosines(z0, z1, z0[:0], 1, False) / 0.2).to(dtype)
    logits[:, -1] = -math.inf
    target = torch.arange(B) * 5 % (B - 1)
    module = HEXCrossEntropyLoss(0.2, threshold=by_positive(0.1003), reduction="none")
    rows = module(logits, target)
    c = 0.2 * logits.double().gather(1, target[:, None]).squeeze(1)
    eps = c - 0.1003 + 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(module.last.eps, eps.mean(), rtol=0, atol=1e-7)
    wanted = hex_cross_entropy(logits, target, eps=eps, temperature=0.2, reduction="none")
    torch.testing.assert_close(rows, wanted)
    assert module.last.hard > 0


def test_a_target_that_is_no_column_is_refused_as_ever():
    logits = torch.randn(4, 5)
    module = HEXCrossEntropyLoss(0.2, threshold=by_positive())
    for target in (torch.tensor([0, 1, 2, 5]), torch.tensor([0, -1, 2, 3])):
        with pytest.raises(RuntimeError, match=r"target: got .*, wanted a column in \[0, 5\)"):
            module(logits, target)
    with pytest.raises(RuntimeError, match="target: got 0"):
        module(logits[:, :0], torch.zeros(4, dtype=torch.int64))


# ---- rounding -----------------------------------------------------------------------------------


def duplicates(D: int, dtype: torch.dtype, rows: int = 60) -> tuple[Tensor, Tensor]:
    """Every positive has a duplicate, at whatever cosine; all else is farther from the anchor."""
    generator = torch.Generator().manual_seed(D)
    axes = torch.linalg.qr(torch.randn(2 * rows, 2 * rows, generator=generator).double())[0]
    wide = torch.zeros(rows, D, dtype=torch.float64)
    width = min(D, 2 * rows)
    wide[:, :width] = axes[:rows, :width] * 3
    if D > width:
        wide[:, width:] = torch.randn(1, D - width, generator=generator).double() / 99
    noise = torch.randn(rows, D, generator=generator).double() / (2 * math.sqrt(D))
    z0, z1 = wide.to(dtype), (wide + noise).to(dtype)
    return torch.cat([z0, z0]), torch.cat([z1, z1])


@pytest.mark.parametrize("D", (120, 257, 768, 3001))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_a_duplicate_of_the_positive_is_never_in_h(dtype, D, monkeypatch):
    z0, z1 = duplicates(D, dtype)
    module = HEXLoss(threshold=by_positive(), mode="query")
    module(z0, z1)
    assert module.last.hard == 0
    narrow = module.threshold.by_positive(1e-3)
    closer = HEXLoss(threshold=narrow, mode="query")
    closer(z0, z1)
    assert closer.last.hard == 1  # a margin above the rounding has it in H
    monkeypatch.setattr(positive, "rounding", lambda p: 0.0)
    module(z0, z1)
    assert module.last.hard > 0  # by chance, if rounding is not allowed for


@pytest.mark.parametrize("D", (1, 2, 7, 64, 512, 4096))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_the_kernels_are_no_further_from_the_exact_cosine_than_the_rounding_says(dtype, D):
    for kind in ("gauss", "near_collapsed"):
        for layout in ("ntxent", "query", "unpaired"):
            z = [x.to(dtype) for x in batch(layout, kind, D)]
            p = of_views(*z, *[None] * (3 - len(z)), layout if len(z) < 3 else "query", 0.1)
            exact = reference.problem_cosines(
                *(x.double() for x in p.inputs[:3]), p.mode, False
            )  # fmt: skip
            low, high = ops.row_range(*p.measured())
            least = positive.rounding(p)
            assert least <= 2 * (D + 4) * torch.finfo(dtype).eps
            for ours, truth in ((low, exact.amin(1)), (high, exact.amax(1))):
                # In float64 the reference is as far from the exact cosine as the kernels.
                assert (ours.double() - truth.clamp(-1, 1)).abs().max() <= 2 * least


def test_more_is_allowed_where_float32_may_be_rounded_before_it_is_multiplied(monkeypatch):
    z = [x.float() for x in batch("query")]
    p, wide = of_views(*z, None, "query", 0.1), of_views(*batch("query"), None, "query", 0.1)
    exact, of_wide = positive.rounding(p), positive.rounding(wide)
    monkeypatch.setattr(ops, "_allow_tf32", lambda z: True)
    assert positive.rounding(p) == exact + 2 * 2.0**-8
    assert positive.rounding(wide) == of_wide
    bf16 = torch.backends.mkldnn.matmul
    if not ops._HAS_BF16:
        return
    monkeypatch.undo()
    before = bf16.fp32_precision
    try:
        bf16.fp32_precision = "bf16"
        module = HEXLoss(threshold=by_positive(), mode="query")
        module(*duplicates(768, torch.float32))
        assert module.last.hard == 0
    finally:
        bf16.fp32_precision = before


# ---- the module around it -----------------------------------------------------------------------


def test_in_the_warm_up_h_is_empty():
    z = batch("ntxent")
    tracker = by_positive(0.2, warmup_epochs=2)
    module, plain = HEXLoss(threshold=tracker), HEXLoss(threshold=by_positive(0.2))
    found = []
    for epoch in range(3):
        module.set_epoch(epoch)
        found.append(module(z[0].requires_grad_(), z[1]))
        assert tracker.value.isinf() == module.last.eps.isinf() == (epoch < 2)
    info_nce = HEXLoss(threshold=None)(*z)
    assert found[0] == found[1] == info_nce
    assert found[2] == plain(*z) != info_nce
    assert tracker.value.isnan()
    assert tracker.history == []


def test_a_warm_up_that_no_epoch_ends_is_warned_of():
    module = HEXLoss(threshold=by_positive(warmup_epochs=1))
    with pytest.warns(UserWarning, match="set_epoch was never called, so the warm-up never ends"):
        module(*batch("ntxent"))


def test_an_empty_h_is_right_and_one_with_all_negatives_is_warned_of():
    z0 = views("gauss", B, D)[0].requires_grad_()
    fine = HEXLoss(threshold=by_positive(), mode="query")
    for epoch in range(2):
        fine.set_epoch(epoch)
        fine(z0, z0)  # no negative is nearer than the anchor itself
    assert fine.last.hard == 0
    module = HEXLoss(threshold=by_positive(2.5), variant="released")
    module.set_epoch(0)
    module(z0, z0)
    text = r"every negative was above .* were 0\. Use a smaller margin \(Thresh"
    with pytest.warns(UserWarning, match=text):
        module.set_epoch(1)


def test_a_positive_of_nan_makes_its_own_row_nan_alone():
    z0, z1 = batch("query")
    z0[3, 2] = math.nan
    rows = HEXLoss(threshold=by_positive(), mode="query", reduction="none")(z0, z1)
    assert rows.isnan().nonzero().flatten().tolist() == [3]


def test_state_copies_and_the_repr():
    tracker = by_positive(0.05, relative=True, warmup_epochs=3)
    assert str(tracker) == (
        "ThresholdTracker(by_positive, margin=0.05, relative=True, warmup_epochs=3)"
    )
    module = HEXLoss(threshold=tracker)
    module.set_epoch(2)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert str(twin) == str(module)
        assert int(twin.threshold.epoch) == 2
        assert twin(*batch("ntxent")) == module(*batch("ntxent"))
    other = HEXLoss(threshold=by_positive(0.05, relative=True, warmup_epochs=3))
    other.load_state_dict(module.state_dict())
    assert int(other.threshold.epoch) == 2
    assert all(x.isfinite().all() for x in module.state_dict().values())


def test_it_stores_nothing_but_the_epoch():
    module = HEXLoss(threshold=by_positive())
    before = module.threshold.state.clone()
    module(*(z.requires_grad_() for z in batch("ntxent"))).backward()
    assert torch.equal(module.threshold.state, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it traces
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_graph_vmap_a_checkpoint_and_plain_formulas_give_the_same(layout, monkeypatch):
    z, guide = batch(layout), tuple(batch(layout, "gauss"))
    module = HEXLoss(0.2, threshold=by_positive(0.1), variant="excluded", **mode(layout))
    torch._dynamo.reset()  # of what was compiled of the other layouts
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)

    def value_and_gradients(function) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in z]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    for given in ({}, {"guide": guide}):
        eager = value_and_gradients(lambda *z, g=given: module(*z, **g))
        graph = value_and_gradients(lambda *z, g=given: compiled(*z, **g))
        again = value_and_gradients(
            lambda *z, g=given: checkpoint(lambda *z: module(*z, **g), *z, use_reentrant=False)
        )
        with monkeypatch.context() as patch:
            without_kernels(patch)
            plain = value_and_gradients(lambda *z, g=given: module(*z, **g))
        for found in (graph, again, plain):
            for a, b in zip(found, eager, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        both = [torch.stack([x, 2 * x.flip(-1)]) for x in z]
        each = [module(*(x[k] for x in both), **given) for k in range(2)]
        mapped = torch.vmap(lambda *z, g=given: module(*z, **g))(*both)
        torch.testing.assert_close(mapped, torch.stack(each), rtol=1e-12, atol=0)
    gradient = torch.func.grad(lambda x: module(x, *z[1:]))(z[0])
    torch.testing.assert_close(gradient, value_and_gradients(module)[1], rtol=1e-12, atol=1e-14)


def test_half_precision_and_autocast():
    z = [x.bfloat16() for x in batch("ntxent")]
    module, wide = (HEXLoss(threshold=by_positive(0.1)) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        value = module(*z)
    torch.testing.assert_close(value, wide(*(x.float() for x in z)), rtol=1e-6, atol=0)
    assert module.last.eps == wide.last.eps


def test_the_threshold_has_no_gradient():
    z = [x.requires_grad_() for x in batch("ntxent")]
    ours = HEXLoss(0.2, threshold=by_positive(0.1))(*z)
    c = of_positives("ntxent", *z).detach()
    wanted = hex_loss(*z, eps=c - 0.1, temperature=0.2)
    for a, b in zip(*(torch.autograd.grad(x, z) for x in (ours, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_empty_batches():
    for layout in LAYOUTS:
        z = [x[:0] if x.dim() == 3 or k < 2 else x for k, x in enumerate(batch(layout))]
        assert HEXLoss(threshold=by_positive(), **mode(layout))(*z) == 0
    assert HEXCrossEntropyLoss(1, threshold=by_positive())(torch.ones(0, 3), f64([]).long()) == 0


def test_what_has_no_single_positive_or_no_schedule_is_refused():
    tracker, module = by_positive(), HEXSupConLoss()
    before = module.threshold
    refused = pytest.raises(ValueError, match="^threshold: got by_positive in a loss that allows")
    with refused:
        HEXSupConLoss(threshold=tracker)
    with refused:
        module.threshold = tracker
    assert module.threshold is before
    with pytest.raises(RuntimeError, match="^current: got the rule 'by_positive', wanted 'fixed'"):
        tracker.current()
    with pytest.raises(RuntimeError, match="^update: got the rule 'by_positive', wanted 'adaptiv"):
        tracker.update(f64(0.3), store=True)
    for bad in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"^margin: got {bad}, wanted a finite number$"):
            by_positive(bad)
    with pytest.raises(TypeError, match="^margin: got str, wanted a number$"):
        by_positive("0")
    with pytest.raises(TypeError, match="^relative: got int, wanted a bool"):
        by_positive(0.1, relative=1)
    with pytest.raises(TypeError, match="^warmup_epochs: got float"):
        by_positive(warmup_epochs=1.5)
