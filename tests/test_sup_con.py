# SPDX-License-Identifier: MIT
"""HEXSupConLoss and hex_sup_con: several positives, against formulas and the losses people use.

The kernels' values and derivatives are in test_labels.py. Peers: pytorch-metric-learning from
PyPI, skipped where it is not installed; SupContrast's and solo-learn's by their formulas.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from data import FORMS, f64, form, views
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hex import (
    HEXLoss,
    HEXSupConLoss,
    InfoNCELoss,
    Statistics,
    ThresholdTracker,
    hex_loss,
    hex_sup_con,
    ops,
    reference,
)
from hex.problem import of_features

# pytorch-metric-learning imports what scripts a function, at its first use
SCRIPTS = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
B, D = 21, 9
LABELS = torch.arange(B) % 4


def features(V: int = 2, kind: str = "cluster", B: int = B) -> Tensor:
    """(B, V, D) float64."""
    z = [views(kind, B, D, seed)[0] for seed in range(V)]
    if V == 2:
        z = list(views(kind, B, D))
    return torch.stack(z, 1)


def check(ours, peer, *inputs: Tensor, part: float = 1e-9) -> None:
    """Values and gradients, to a part of the largest."""
    results = []
    for function in (ours, peer):
        z = [x.clone().requires_grad_() for x in inputs]
        value = function(*z)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), z)))
    for a, b in zip(*results, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=part * b.abs().max().item())


# ---- identities ---------------------------------------------------------------------------------


@pytest.mark.parametrize("positives", ("outside", "inside"))
def test_two_views_with_the_local_term_off_are_info_nce(positives):
    x = features()
    check(HEXSupConLoss(0.2, threshold=None, positives=positives),
          lambda x: InfoNCELoss(0.2)(x[:, 0], x[:, 1]), x)  # fmt: skip


@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("positives", ("outside", "inside"))
def test_with_a_single_positive_it_is_hex(positives, variant):
    x = features()
    options = dict(eps=0.4, temperature=0.2, beta=0.7, tau_plus=0.2, **form(variant))
    for reduction in ("none", "mean", "sum"):
        check(
            lambda x, r=reduction: hex_sup_con(x, positives=positives, reduction=r, **options),
            lambda x, r=reduction: hex_loss(x[:, 0], x[:, 1], reduction=r, **options),
            x,
        )
    rows = x.transpose(0, 1).flatten(0, 1)
    check(lambda rows: hex_sup_con(rows, torch.arange(B).repeat(2), **options),
          lambda rows: hex_loss(*rows.chunk(2), **options), rows)  # fmt: skip


def test_beta_and_tau_plus_0_are_sup_con_for_every_threshold():
    x = features(3)
    check(lambda x: hex_sup_con(x, LABELS, eps=0.3, beta=0, tau_plus=0),
          lambda x: hex_sup_con(x, LABELS, eps=math.inf), x)  # fmt: skip


def test_labels_ids_and_a_mask_are_ways_to_say_the_same():
    x = features(3)
    mask = LABELS[:, None] == LABELS
    by_labels = hex_sup_con(x, LABELS, eps=0.3, reduction="none")
    assert torch.equal(hex_sup_con(x, mask=mask, eps=0.3, reduction="none"), by_labels)
    for kind in (torch.float32, torch.float16, torch.int64, torch.uint8):
        assert torch.equal(hex_sup_con(x, mask=mask.to(kind), eps=0.3, reduction="none"), by_labels)
    rows = x.transpose(0, 1).flatten(0, 1)
    assert torch.equal(hex_sup_con(rows, LABELS.repeat(3), eps=0.3, reduction="none"), by_labels)
    eye = torch.eye(B)
    assert torch.equal(hex_sup_con(x, eps=0.3), hex_sup_con(x, mask=eye, eps=0.3))


def test_other_axes_are_flattened():
    x = features().reshape(B, 2, 3, 3)
    assert torch.equal(hex_sup_con(x, eps=0.3), hex_sup_con(x.flatten(2), eps=0.3))


# ---- the formula, letter by letter --------------------------------------------------------------


def by_letter(
    x: Tensor, ids: list[int], eps: float, tau: float, beta: float, tau_plus: float,
    positives: str, variant: str, decoupled: bool,
) -> list[float]:  # fmt: skip
    """Each row by loops over its cosines, as docs/math.md has it."""
    u = F.normalize(x)
    c = (u @ u.T).tolist()
    losses = []
    for i in range(len(ids)):
        others = [j for j in range(len(ids)) if j != i]
        p = [c[i][j] / tau for j in others if ids[j] == ids[i]]
        negatives = [c[i][j] for j in others if ids[j] != ids[i]]
        hard = [v / tau for v in negatives if v > eps]
        rest = [v / tau for v in negatives if v <= eps]
        if not p:
            losses.append(0.0)
            continue
        total = sum(map(math.exp, p))
        numerator = sum(p) / len(p) if positives == "outside" else math.log(total)
        far = sum(map(math.exp, rest))
        if variant == "released":
            constant = len(negatives) * math.exp(-1 / tau)
            losses.append(math.log(far) + constant - numerator if rest else 0.0)
            continue
        near = 0.0
        if hard and variant == "paper":
            mean = sum(math.exp(beta * v) for v in hard) / len(hard)
            weighted = sum(math.exp(beta * v) / mean * math.exp(v) for v in hard)
            debiased = weighted - tau_plus * len(hard) * total / len(p)
            near = max(debiased / (1 - tau_plus), len(hard) * math.exp(-1 / tau))
        denominator = near + far if decoupled else total + near + far
        losses.append(math.log(denominator) - numerator if denominator else 0.0)
    return losses


@pytest.mark.parametrize("variant", FORMS)
@pytest.mark.parametrize("positives", ("outside", "inside"))
def test_it_is_the_formula_letter_by_letter(positives, variant):
    floors = 0
    for tau_plus, beta, eps in ((0.1, 1.0, 0.3), (0.0, 0.0, 0.1), (0.7, 0.5, -0.2), (0.9, 2.0, -2)):
        x = features(kind="cluster" if tau_plus < 0.5 else "clamped")
        x, ids = x.transpose(0, 1).flatten(0, 1)[:-1], LABELS.repeat(2)[:-1].clone()
        ids[7] = 99  # alone
        options = dict(beta=beta, tau_plus=tau_plus, positives=positives, **form(variant))
        rows = hex_sup_con(x, ids, eps=eps, temperature=0.5, reduction="none", **options)
        wanted = f64(by_letter(x, ids.tolist(), eps, 0.5, **options))
        torch.testing.assert_close(rows, wanted, rtol=1e-10, atol=1e-12)
        off = hex_sup_con(x, ids, eps=eps, temperature=0.5, reduction="none",
                          **(options | {"tau_plus": 0.0}))  # fmt: skip
        floors += int((rows != off).sum())
    assert (floors > 0) == variant.startswith("paper")  # tau_plus matters there and nowhere else


# ---- the losses that people use ------------------------------------------------------------------


def sup_contrast(features: Tensor, mask: Tensor, tau: float) -> Tensor:
    """L_out of Khosla et al. 2020, equation 2, of each row; view-major, mask (B, B)."""
    z = F.normalize(features.transpose(0, 1).flatten(0, 1))
    views, n = features.shape[1], len(z)
    other = ~torch.eye(n, dtype=torch.bool)
    logits = z @ z.T / tau
    log_p = logits - torch.logsumexp(logits.masked_fill(~other, -math.inf), 1, keepdim=True)
    positive = mask.bool().repeat(views, views) & other
    total = torch.where(positive, log_p, 0.0).sum(1)
    return -total / positive.sum(1).clamp(min=1)


@pytest.mark.parametrize("V", (2, 3))
@pytest.mark.parametrize("tau", (0.07, 0.5))
def test_sup_contrast(tau, V):
    asymmetric = torch.rand(B, B, generator=torch.Generator().manual_seed(0)) < 0.2
    for mask, arguments in (
        (torch.eye(B), {}),
        (LABELS[:, None] == LABELS, {"labels": LABELS}),
        (asymmetric, {"mask": asymmetric}),
    ):
        ours = HEXSupConLoss(tau, threshold=None, base_temperature=0.07)
        check(
            lambda x, a=arguments, o=ours: o(x, **a),
            lambda x, m=mask: tau / 0.07 * sup_contrast(x, m, tau).mean(),
            features(V),
        )


def test_solo_learn():
    def solo(z: Tensor, indexes: Tensor) -> Tensor:
        z = F.normalize(z)
        sim = torch.exp(z @ z.T / 0.2)
        other = ~torch.eye(len(z), dtype=torch.bool)
        same = (indexes[:, None] == indexes) & other
        pos = (sim * same).sum(1)
        return -torch.log(pos / (sim * other).sum(1)).mean()

    x, indexes = features().transpose(0, 1).flatten(0, 1), LABELS.repeat(2)
    ours = HEXSupConLoss(0.2, threshold=None, positives="inside")
    check(lambda x: ours(x, indexes), lambda x: solo(x, indexes), x)


@SCRIPTS
@pytest.mark.parametrize("tau", (0.1, 0.5))
def test_pytorch_metric_learning_sup_con_averages_only_rows_with_a_positive(tau):
    losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
    x = features()[:, 0]
    check(lambda x: HEXSupConLoss(tau, threshold=None)(x, LABELS),
          lambda x: losses.SupConLoss(tau)(x, LABELS), x)  # fmt: skip
    alone = torch.where(torch.arange(B) < 6, 100 + torch.arange(B), LABELS)  # six have none
    check(lambda x: HEXSupConLoss(tau, threshold=None, reduction="sum")(x, alone) / (B - 6),
          lambda x: losses.SupConLoss(tau)(x, alone), x)  # fmt: skip


@SCRIPTS
def test_pytorch_metric_learning_ntxent_leaves_the_other_positives_out_of_the_denominator():
    losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
    x = features()[:, 0]
    with_labels = losses.NTXentLoss(0.2)(x, LABELS)
    ours = HEXSupConLoss(0.2, threshold=None)(x, LABELS)
    assert ours > with_labels + 0.1  # a larger denominator, the same numerator
    pairs = torch.arange(B - 1) // 2  # of one positive each: no others to leave out
    check(lambda x: HEXSupConLoss(0.2, threshold=None)(x, pairs),
          lambda x: losses.NTXentLoss(0.2)(x, pairs), x[:-1])  # fmt: skip


# ---- labels of any kind -------------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(-3, 3), min_size=1, max_size=17),
    D=st.integers(1, 9),
    dtype=st.sampled_from((torch.float64, torch.float32)),
    eps=st.sampled_from((-2.0, 0.11, math.inf)),
    positives=st.sampled_from(("outside", "inside")),
    variant=st.sampled_from(FORMS),
)
def test_any_labels_give_what_the_reference_gives(labels, D, dtype, eps, positives, variant):
    ids = torch.tensor(labels)
    x = torch.randn(len(labels), D, generator=torch.Generator().manual_seed(D)).to(dtype)
    x = x.requires_grad_()
    options = dict(positives=positives, **form(variant))
    rows = hex_sup_con(x, ids, eps=eps, temperature=0.3, reduction="none", **options)
    p = of_features(x.double(), ids, None, 0.3)
    rule = 1.0, ops.VARIANTS[options["variant"]], 0.1, options["decoupled"]
    truth = reference.problem_rows(
        *p.inputs, f64(eps), p.tau, p.mode, ops.POSITIVES[positives], *rule
    )[0]
    near = 1e-9 if dtype == torch.float64 else 2e-4
    if D > 1:  # with one feature cosines are 1 or -1 but for rounding: exactly at a tie of H
        torch.testing.assert_close(rows.double(), truth, rtol=near, atol=near)
    alone = (ids[:, None] == ids).sum(1) == 1
    assert (rows[alone] == 0).all()
    grad = torch.autograd.grad(rows.sum(), x)[0]
    assert grad.isfinite().all()


# ---- the module ---------------------------------------------------------------------------------


def test_the_threshold_follows_training_and_the_statistics_tell():
    module = HEXSupConLoss(0.2, threshold=ThresholdTracker.adaptive(0.9, over="negatives"))
    x = features().requires_grad_()
    module.set_epoch(3)
    value = module(x, LABELS)
    ids = LABELS.repeat(2)
    c = reference.cosines(x[:, 0], x[:, 1], None, "ntxent")[0]
    negative = ids[:, None] != ids
    quantiles = [c[i][negative[i]].sort().values for i in range(2 * B)]
    eps = torch.stack([q[round(0.9 * (len(q) - 1))] for q in quantiles]).mean()
    torch.testing.assert_close(module.last.eps, eps.detach(), rtol=0, atol=1e-12)
    assert torch.equal(module.threshold.value, module.last.eps)
    assert int(module.threshold.updates) == 1
    assert isinstance(module.last, Statistics)
    assert module.statistics()["hard"] > 0
    torch.testing.assert_close(value, hex_sup_con(x, LABELS, eps=eps, temperature=0.2))
    module.eval()(x, LABELS)
    with torch.no_grad():
        module.train()(x, LABELS)
    module(features(), LABELS)
    assert int(module.threshold.updates) == 1  # only a training step with a gradient counts


def test_a_threshold_of_the_scaled_row_is_taken_row_by_row():
    tracker = ThresholdTracker.fixed(0.8, normalize_rows=True)
    module = HEXSupConLoss(0.2, threshold=tracker, reduction="none")
    x = features()
    c = reference.cosines(x[:, 0], x[:, 1], None, "ntxent")[0]
    eps = c.amin(1) + 0.8 * (1 - c.amin(1))
    torch.testing.assert_close(
        module(x, LABELS), hex_sup_con(x, LABELS, eps=eps, temperature=0.2, reduction="none")
    )


def test_groups_and_a_guide_decide_h():
    x, guide = features(), features(kind="gauss")
    module = HEXSupConLoss(0.2, threshold=ThresholdTracker.adaptive(over="negatives"))
    groups = torch.arange(B) % 2
    value = module(x.requires_grad_(), LABELS, groups=groups)
    assert module.last.eps.isnan()
    assert int(module.threshold.updates) == int(module.threshold.skipped) == 0
    torch.testing.assert_close(value, hex_sup_con(x, LABELS, groups=groups, temperature=0.2))
    # labels modulo 4 of one parity: B / 2 are of the group, those of one's own label positives
    same = (groups.repeat(2)[:, None] == groups.repeat(2)) & (
        LABELS.repeat(2)[:, None] != LABELS.repeat(2)
    )
    assert module.last.hard == same.sum(1).double().mean()
    guided = module(x, LABELS, guide=guide)
    eps = module.last.eps
    torch.testing.assert_close(
        guided, hex_sup_con(x, LABELS, guide=guide, eps=eps, temperature=0.2)
    )
    own = HEXSupConLoss(0.2, threshold=ThresholdTracker.adaptive(over="negatives"))
    torch.testing.assert_close(own(guide, LABELS), own(guide, LABELS, guide=guide))
    assert int(module.threshold.updates) == 1
    assert eps == own.last.eps


def test_base_temperature_scales_the_loss_and_learns_with_the_temperature():
    tau = torch.nn.Parameter(f64(0.2))
    module = HEXSupConLoss(tau, threshold=0.3, base_temperature=0.1)
    module(features(), LABELS).backward()
    step = 1e-6
    low, high = (
        hex_sup_con(features(), LABELS, eps=0.3, temperature=0.2 + d, base_temperature=0.1)
        for d in (-step, step)
    )
    torch.testing.assert_close(tau.grad, (high - low) / (2 * step), rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it traces
def test_func_vmap_and_a_compiled_graph():
    x = torch.stack([features(), features(kind="gauss")])

    def loss(x):
        return hex_sup_con(x, LABELS, eps=0.3, temperature=0.2)

    each = torch.stack([loss(x[0]), loss(x[1])])
    torch.testing.assert_close(torch.vmap(loss)(x), each, rtol=0, atol=0)
    z = x[0].clone().requires_grad_()
    grad = torch.autograd.grad(loss(z), z)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), grad, rtol=0, atol=0)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(loss, (x[0],), (x[0],))
    module = HEXSupConLoss(0.2, threshold=ThresholdTracker.adaptive(over="negatives"))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for function in (module, compiled):
        z = x[0].clone().requires_grad_()
        value = function(z, LABELS)
        results.append((value.detach(), torch.autograd.grad(value, z)[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_features_under_autocast_give_float32(dtype):
    x = features().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        value = HEXSupConLoss(0.2, threshold=0.31)(x, LABELS)
    value.backward()
    wide = hex_sup_con(x.double(), LABELS, eps=0.31, temperature=0.2)
    assert value.dtype == torch.float32
    assert x.grad.dtype == dtype
    torch.testing.assert_close(value.double(), wide, rtol=1e-5, atol=0)


def test_devices_without_kernels_run_the_formulas(monkeypatch):
    x = features().requires_grad_()
    kernel = hex_sup_con(x, LABELS, eps=0.3)
    monkeypatch.setattr(ops, "_KERNELS", {"meta"})
    with pytest.warns(RuntimeWarning, match="no kernels for device 'cpu'"):
        plain = hex_sup_con(x, LABELS, eps=0.3)
    torch.testing.assert_close(kernel, plain)
    module = HEXSupConLoss(threshold=ThresholdTracker.adaptive(over="negatives"))
    a = module(x, LABELS)  # no second warning
    monkeypatch.undo()
    torch.testing.assert_close(a, module(x, LABELS))
    ops._warned.clear()


def test_empty_batches_are_0():
    x = torch.empty(0, 2, 3, requires_grad=True)
    assert hex_sup_con(x, eps=0.3, reduction="none").shape == (0,)
    value = hex_sup_con(x, eps=0.3)
    value.backward()
    assert value == 0
    assert x.grad.shape == x.shape


def test_its_repr_tells_its_options():
    text = repr(HEXSupConLoss(0.07, threshold=None, positives="inside", base_temperature=0.1))
    assert "temperature=0.07" in text
    assert "positives='inside'" in text
    assert "base_temperature=0.1" in text
    assert "mode=" not in text


X = torch.ones(4, 2, 3)
ERRORS = [
    (dict(features=[1.0]), TypeError, "features: got list, wanted a torch.Tensor"),
    (dict(features=X.int()), TypeError, "features: got torch.int32, wanted"),
    (dict(features=X[0, 0]), ValueError, "features: got shape (3,), wanted (B, V, D) or (N, D)"),
    (dict(features=X[:, 0]), ValueError, "labels, mask: got neither, wanted one of them"),
    (dict(labels=torch.ones(3).int()), ValueError, "labels: got shape (3,), wanted (4,)"),
    (dict(labels=torch.ones(4)), TypeError, "labels: got torch.float32, wanted an integer dtype"),
    (dict(labels=[1, 2, 3, 4]), TypeError, "labels: got list, wanted a torch.Tensor"),
    (dict(mask=torch.ones(4)), ValueError, "mask: got shape (4,), wanted (4, 4)"),
    (dict(mask=[[1]]), TypeError, "mask: got list, wanted a torch.Tensor"),
    *(
        (dict(mask=mask), ValueError, "mask: got values other than 0 and 1, wanted 1 for positives")
        for mask in (
            torch.eye(4) / 2,
            -torch.eye(4),
            2 * torch.eye(4).int(),
            torch.eye(4) / 0,
            torch.nn.Parameter(torch.eye(4) / 2),
        )
    ),
    (dict(labels=torch.ones(4).int(), mask=torch.eye(4)), ValueError, "labels, mask: got both"),
    (dict(features=X[:, 0], labels=X[:, 1]), TypeError, "labels: got a second batch of embeddings"),
    (dict(groups=torch.ones(5).int()), ValueError, "groups: got shape (5,), wanted (4,)"),
    (dict(groups=torch.ones(4).int(), guide=X), ValueError, "groups, guide: got both"),
    (dict(guide=X[:3]), ValueError, "guide: got shape (3, 2, 3), wanted that of features"),
    (dict(guide=X[:, :1]), ValueError, "guide: got shape (4, 1, 3), wanted that of features"),
    (dict(guide=X.int()), TypeError, "guide: got torch.int32"),
]


@pytest.mark.parametrize("arguments, error, text", ERRORS)
def test_a_bad_argument_is_named(arguments, error, text):
    module = HEXSupConLoss()
    with pytest.raises(error) as caught:
        module(**({"features": X} | arguments))
    assert text in str(caught.value)
    assert module.last is None


@pytest.mark.parametrize(
    "options, error",
    [(dict(positives="both"), ValueError), (dict(base_temperature=0), ValueError),
     (dict(base_temperature="0.1"), TypeError), (dict(temperature=-1.0), ValueError),
     (dict(reduction="all"), ValueError), (dict(variant="old"), ValueError)],
)  # fmt: skip
def test_a_bad_option_is_named(options, error):
    with pytest.raises(error, match=f"{next(iter(options))}: got"):
        HEXSupConLoss(**options)


def test_the_function_wants_a_threshold_or_groups():
    with pytest.raises(ValueError, match="eps, groups: got neither"):
        hex_sup_con(X)
    with pytest.raises(ValueError, match="eps, groups: got both"):
        hex_sup_con(X, eps=0.3, groups=torch.ones(4).int())


def test_a_guide_takes_no_gradient_and_hexloss_agrees_with_two_views():
    x, guide = features(), features(kind="gauss").requires_grad_()
    x.requires_grad_()
    value = HEXSupConLoss(threshold=0.2)(x, guide=guide)
    value.backward()
    assert guide.grad is None
    other = HEXLoss(threshold=0.2)(x[:, 0], x[:, 1], guide=(guide[:, 0], guide[:, 1]))
    # the one takes the positive's cosine from the product, the other from a sum of its own
    torch.testing.assert_close(value, other, rtol=1e-14, atol=0)


class Named(torch.Tensor):
    """A subclass of no behaviour of its own."""


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's
@pytest.mark.parametrize("way", ("compiled", "subclass"))
def test_a_soft_mask_is_refused_as_the_graph_runs(way):
    loss = HEXSupConLoss()
    ones = torch.eye(4)
    if way == "compiled":
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    else:
        ones = ones.as_subclass(Named)
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss(x, mask=ones).as_subclass(torch.Tensor), HEXSupConLoss()(x))
    with pytest.raises(RuntimeError, match="mask: got values other than 0 and 1"):
        loss(x, mask=ones / 2)


def test_a_soft_mask_is_refused_under_func_transforms():
    soft, x = torch.eye(4) / 2, X[:, 0].clone()
    with pytest.raises(ValueError, match="mask: got values other than 0 and 1"):
        torch.func.grad(lambda f: hex_sup_con(f, mask=soft, eps=0.3))(x)
    with pytest.raises(ValueError, match="mask: got values other than 0 and 1"):
        torch.vmap(lambda f: hex_sup_con(f, mask=soft, eps=0.3))(x[None])


def test_a_mask_on_the_meta_device_has_no_values():
    x = X.to("meta")
    assert HEXSupConLoss()(x, mask=torch.eye(4, device="meta")).is_meta
