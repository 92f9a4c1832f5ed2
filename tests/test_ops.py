# SPDX-License-Identifier: MIT
"""torch.ops.hex.*: what torch asks of an operator, and what runs on a device without kernels.

What the kernels refuse is in test_refused_calls.py. The values are in test_values.py,
test_batch_threshold.py and test_labels.py.
"""

import itertools

import operators
import pytest
import torch
from conftest import DTYPES, Problem, problem
from data import FORMS, MODES, f64, leaves
from labelled_problems import Call, coded, labelled, logits
from torch._subclasses.fake_tensor import FakeTensorMode

from hex import HEXLoss, ThresholdTracker, batch_threshold, hex_loss, ops

HEX = torch.ops.hex


CALLS = (
    labelled(7, 5),
    labelled(7, 5, masked=True, source="guide", dtype=torch.bfloat16),
    labelled(7, 5, "pair", "groups", M=6, dtype=torch.float32, positives="inside"),
    labelled(7, 5, "queue", "guide", M=6, dtype=torch.float16),
    coded("paired", 4, 5, "guide", M=6),
    coded("self", 7, 5, "groups", dtype=torch.float32, labels=False),
    coded("unpaired", 7, 5, M=6, dtype=torch.bfloat16),
    logits(7, 6),
    logits(7, 6, dtype=torch.float16, variant="released"),
    labelled(7, 3, variant="paper decoupled"),
)
TRACKER = ThresholdTracker.adaptive(over="negatives")


# Each gives an operator and its arguments, of a batch of views or of a call of another loss.


def forward(p: Problem | Call, reduction: int = 0):
    if isinstance(p, Call):
        return p.forward(reduction)
    raw = p.raw()
    return HEX.forward.default, operators.arguments("forward", *raw[:6], reduction, *raw[7:])


def adaptive(p: Problem | Call, reduction: int = 0):
    arguments = forward(p, reduction)[1]
    _, _, groups, guide = operators.nothing(arguments[0])
    options = arguments[8:]
    state, rule = TRACKER.state.to(groups.device), TRACKER.kernel_rule()
    return HEX.adaptive.default, (*arguments[:5], groups, guide, state, *options, False, *rule)


def backward(p: Problem | Call, reduction: int = 0, needs: int = 15):
    if isinstance(p, Call):
        return p.backward(reduction, needs)
    stats, kept = operators.forward(*p.raw())[1:]
    grad = p.grad_output() if reduction == 0 else p.grad_output()[0]
    z0, z1, negatives, _, tau, mode = p.raw()[:6]
    of = grad, z0, z1, negatives, tau, stats, kept, mode, reduction, p.beta, needs
    return HEX.backward.default, operators.arguments("backward", *of)


def threshold(p: Problem | Call, over_negatives: bool = False):
    if isinstance(p, Call):
        return p.quantile(0.9, over_negatives)
    z0, z1, negatives, _, _, mode = p.raw()[:6]
    of = z0, z1, negatives, mode, 0.9, over_negatives
    return HEX.quantile.default, operators.arguments("quantile", *of)


def row_range(p: Problem | Call):
    if isinstance(p, Call):
        return p.quantile(bounds=True)
    z0, z1, negatives, _, _, mode = p.raw()[:6]
    return HEX.quantile.default, operators.arguments("row_range", z0, z1, negatives, mode)


OPS = (forward, adaptive, backward, threshold, row_range)

# ---- what torch asks ----------------------------------------------------------------------------


def options_of(op, k: int) -> dict[str, int]:
    """Others for each k."""
    return {
        forward: {"reduction": k % 3},
        adaptive: {"reduction": (k + 2) % 3},
        backward: {"reduction": (k + 1) % 3, "needs": 15 - k},
        threshold: {"over_negatives": bool(k % 2)},
        row_range: {},
    }[op]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, mode, device):
    """Every operator in every mode and, for there are more modes, with every dtype."""
    k = MODES.index(mode)
    dtype = DTYPES[(k + OPS.index(op)) % len(DTYPES)]
    variant = FORMS[k]
    p = problem("cluster", 7, 5, mode, dtype=dtype, device=device, variant=variant)
    torch.library.opcheck(*op(p, **options_of(op, k)))


@pytest.mark.parametrize(
    ("op", "k"), [(op, k) for n, op in enumerate(OPS) for k in range(n % 2, len(CALLS), 2)]
)
def test_opcheck_with_labels_and_logits(op, k):
    torch.library.opcheck(*op(CALLS[k], **options_of(op, k)))


def test_opcheck_of_an_empty_batch_strided_inputs_and_a_threshold_for_each_row(device):
    empty = problem("gauss", 4, 5, device=device)
    empty = empty.with_(inputs=tuple(z[:0] for z in empty.inputs))
    p = problem("cluster", 7, 5, "paired", device=device)
    strided = p.with_(inputs=tuple(z.mT.contiguous().mT for z in p.inputs))
    rows = p.with_(eps=torch.linspace(-1, 1, 7, dtype=torch.float64, device=device))
    for p, op in itertools.product((empty, strided, rows), OPS):
        if p is not empty or op is not threshold:  # that is NaN, which opcheck calls different
            torch.library.opcheck(*op(p))


def described(result):
    result = result if isinstance(result, tuple) else (result,)
    return [(tuple(t.shape), t.stride(), t.dtype) for t in result]


EVERY = [(make, {"reduction": r}) for make in (forward, adaptive) for r in range(3)]
EVERY += [(backward, {"reduction": n % 3, "needs": n}) for n in range(16)]
EVERY += [(threshold, {}), (threshold, {"over_negatives": True}), (row_range, {})]
SOME = [(forward, {}), (adaptive, {}), (backward, {}), (threshold, {}), (row_range, {})]


def check_descriptions(p: Problem | Call, calls) -> None:
    """Of fakes and meta tensors: those of the real."""
    for make, options in calls:
        op, arguments = make(p, **options)
        real = described(op(*arguments))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            faked = [fake.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]
            assert described(op(*faked)) == real, (p, make, options)
        metas = [a.to("meta") if torch.is_tensor(a) else a for a in arguments]
        assert described(op(*metas)) == real, (p, make, options)


@pytest.mark.parametrize("mode", MODES)
def test_fakes_and_meta_tensors_have_the_shape_strides_and_dtype_of_the_real(mode, device):
    mixtures = [(t, t, t) for t in DTYPES]
    mixtures += [
        (torch.float16, torch.bfloat16, torch.float64),
        (torch.float32, torch.float64, torch.float16),
    ]
    for dtypes in mixtures:
        p = problem("gauss", 5, 3, mode, dtype=dtypes, device=device)
        check_descriptions(p, EVERY if dtypes is mixtures[0] else SOME)


@pytest.mark.parametrize("p", CALLS, ids=str)
def test_fakes_and_meta_tensors_are_like_the_real_with_labels_and_logits(p):
    check_descriptions(p, EVERY)


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_loss_runs_on_the_meta_device(mode):
    p = problem("gauss", 40, 3, mode)
    inputs = leaves(*(z.to("meta") for z in p.inputs))
    tracker = ThresholdTracker.adaptive(over="negatives")
    module = HEXLoss(threshold=tracker, mode=p.mode if len(inputs) == 2 else "ntxent")
    loss = module.to("meta")(*inputs)
    assert loss.device.type == "meta"
    assert loss.shape == ()
    loss.backward()
    assert all(z.grad.shape == z.shape for z in inputs)


def test_negative_zero_and_lazy_tensors_are_read_right(device):
    p = problem("gauss", 6, 4, device=device)
    z0, z1 = p.inputs
    zeros = torch._efficientzerotensor(6, 4, dtype=torch.float64, device=device)
    assert torch.equal(p.loss(zeros, z1), p.loss(torch.zeros_like(z0), z1))
    assert torch.equal(p.loss(torch._neg_view(-z0), z1), p.loss(z0, z1))
    assert torch.equal(p.loss(torch.nn.Parameter(z0), z1), p.loss(z0, z1))


# ---- devices without kernels --------------------------------------------------------------------


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(ops, "_KERNELS", set())
    monkeypatch.setattr(ops, "_warned", set())


WARNING = (
    "hex-ssl has no kernels for device 'cpu': its formulas run as plain PyTorch operators there, "
    "correct but with N x N memory"
)


def everything(p: Problem):
    """Loss, gradients, threshold and row range, as a user gets them."""
    inputs, tau = leaves(*p.inputs), f64(p.tau).requires_grad_()
    results = []
    for reduction in ("none", "mean", "sum"):
        loss = p.loss(*inputs, tau=tau, reduction=reduction)
        results += [loss, *torch.autograd.grad(loss.sum(), (*inputs, tau))]
    mode = p.mode if len(inputs) == 2 else "ntxent"
    for over in ("all", "negatives"):
        results.append(batch_threshold(*inputs, mode=mode, quantile=0.8, over=over))
    *z, _, tau, code = p.raw()[:6]
    ids, mask, _, _ = operators.nothing(z[0])
    return [*results, *ops.row_range(*z, ids, mask, tau, code, False, False)]


@pytest.mark.parametrize("mode", MODES)
def test_a_device_without_kernels_gives_the_same_values_with_one_warning(mode, no_kernels):
    for variant in FORMS:
        p = problem("cluster", 9, 5, mode, variant=variant)
        with pytest.warns(RuntimeWarning) as warned:
            composed = everything(p)
        assert [str(w.message) for w in warned] == [WARNING]
        ops._KERNELS.add("cpu")
        kernels = everything(p)
        ops._KERNELS.clear()
        ops._warned.clear()
        for a, b in zip(composed, kernels, strict=True):
            assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_the_warning_points_at_the_line_of_the_caller(no_kernels):
    z0, z1 = problem("cluster", 9, 5).inputs
    for call in (
        lambda: hex_loss(z0, z1, eps=0.3),
        lambda: batch_threshold(z0, z1),
    ):
        ops._warned.clear()
        with pytest.warns(RuntimeWarning) as warned:
            call()
        assert warned[0].filename == __file__


def test_modules_work_on_a_device_without_kernels(no_kernels):
    z0, z1 = problem("cluster", 90, 5, dtype=torch.bfloat16).inputs
    tracker = ThresholdTracker.fixed(0.7, normalize_rows=True)
    losses, statistics = [], []
    with pytest.warns(RuntimeWarning, match="no kernels"):
        for _ in range(2):
            for threshold in ("adaptive", tracker, None):
                module = HEXLoss(threshold=threshold)
                (a, b) = leaves(z0, z1)
                loss = module(a, b)
                loss.backward()
                assert a.grad.dtype == torch.bfloat16
                losses.append(loss)
                statistics.append(module.statistics())
            ops._KERNELS.add("cpu")
    for a, b in zip(losses[:3], losses[3:], strict=True):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(statistics[:3], statistics[3:], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_compiled_graph_on_a_device_without_kernels_has_no_break_and_no_warning(no_kernels):
    torch._dynamo.reset()
    z0, z1 = problem("cluster", 9, 5).inputs
    compiled = torch.compile(hex_loss, backend="aot_eager", fullgraph=True)
    got = compiled(z0, z1, eps=f64(0.3))
    ops._KERNELS.add("cpu")
    torch.testing.assert_close(got, hex_loss(z0, z1, eps=0.3), rtol=1e-12, atol=1e-12)
