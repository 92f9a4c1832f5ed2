# SPDX-License-Identifier: MIT
"""torch.ops.hex.*: what torch asks of an operator, and what the kernels refuse.

A kernel checks for memory safety whatever it is called with and answers with a RuntimeError; the
friendlier errors of the Python functions are in test_modules.py. The values are in test_loss.py,
test_gradient.py and test_threshold_op.py.
"""

import itertools
import os
import warnings

import pytest
import operators
import torch
from conftest import DTYPES, Problem, problem
from data import MODES, f64, leaves
from torch._subclasses.fake_tensor import FakeTensorMode

from hex import HEXLoss, ThresholdTracker, batch_threshold, hex_loss, ops

HEX = torch.ops.hex


def forward(p: Problem, reduction: int = 0):
    return HEX.forward.default, (*p.raw()[:6], reduction, *p.raw()[7:])


def backward(p: Problem, reduction: int = 0, needs: int = 15):
    stats, kept = HEX.forward(*p.raw())[1:]
    grad = p.grad_output() if reduction == 0 else p.grad_output()[0]
    z0, z1, negatives, _, tau, mode = p.raw()[:6]
    arguments = grad, z0, z1, negatives, tau, stats, kept, mode, reduction, p.beta, needs
    return HEX.backward.default, arguments


def threshold(p: Problem, quantile: float = 0.9, over_negatives: bool = False):
    z0, z1, negatives, _, _, mode = p.raw()[:6]
    return HEX.threshold.default, (z0, z1, negatives, mode, quantile, over_negatives)


def row_range(p: Problem):
    z0, z1, negatives, _, _, mode = p.raw()[:6]
    return HEX.row_range.default, (z0, z1, negatives, mode)


OPS = (forward, backward, threshold, row_range)

# ---- what torch asks ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, mode, dtype, device):
    k = MODES.index(mode)
    variant = "released" if k % 2 else "paper"
    p = problem("cluster", 7, 5, mode, dtype=dtype, device=device, variant=variant)
    options = {}
    if op is forward:
        options = {"reduction": k % 3}
    elif op is backward:
        options = {"reduction": (k + 1) % 3, "needs": 15 - k}
    elif op is threshold:
        options = {"over_negatives": bool(k % 2)}
    torch.library.opcheck(*op(p, **options))


def test_opcheck_of_an_empty_batch_strided_inputs_and_a_threshold_for_each_row(device):
    empty = problem("gauss", 4, 5, device=device)
    empty = empty.with_(inputs=tuple(z[:0] for z in empty.inputs))
    p = problem("cluster", 7, 5, "own", device=device)
    strided = p.with_(inputs=tuple(z.mT.contiguous().mT for z in p.inputs))
    rows = p.with_(eps=torch.linspace(-1, 1, 7, dtype=torch.float64, device=device))
    for p, op in itertools.product((empty, strided, rows), OPS):
        if p is not empty or op is not threshold:  # that is NaN, which opcheck calls different
            torch.library.opcheck(*op(p))


def described(result):
    result = result if isinstance(result, tuple) else (result,)
    return [(tuple(t.shape), t.stride(), t.dtype) for t in result]


@pytest.mark.parametrize("mode", MODES)
def test_fakes_and_meta_tensors_have_the_shape_strides_and_dtype_of_the_real(mode, device):
    mixtures = [(t, t, t) for t in DTYPES]
    mixtures += [
        (torch.float16, torch.bfloat16, torch.float64),
        (torch.float32, torch.float64, torch.float16),
    ]
    calls = [(forward, {"reduction": r}) for r in range(3)]
    calls += [(backward, {"reduction": n % 3, "needs": n}) for n in range(16)]
    calls += [(threshold, {}), (threshold, {"over_negatives": True}), (row_range, {})]
    some = [calls[0], calls[3 + 15], *calls[-2:]]
    cases = [(mixtures[0], c) for c in calls] + list(itertools.product(mixtures[1:], some))
    for dtypes, (make, options) in cases:
        op, arguments = make(problem("gauss", 5, 3, mode, dtype=dtypes, device=device), **options)
        real = described(op(*arguments))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            faked = [fake.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]
            assert described(op(*faked)) == real, (dtypes, options)
        metas = [a.to("meta") if torch.is_tensor(a) else a for a in arguments]
        assert described(op(*metas)) == real, (dtypes, options)


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


# ---- what the kernels refuse --------------------------------------------------------------------

Z, EMPTY, QUEUE = torch.arange(15.0).reshape(5, 3), torch.empty(0, 3), torch.eye(4, 3)
EPS, TAU = f64(0.3), f64(0.1)
ROWS, STATS, KEPT = torch.ones(10), torch.zeros(9, 10), torch.zeros(0)
FLOATING = "expected a dense CPU tensor of float64, float32, bfloat16 or float16"
NUMBERS = "expected float32 or float64 of shape"
CHOICES = "expected beta >= 0 and tau_plus in [0, 1)"
DAMAGED = "its storage is smaller than its shape says (freed or resized?)"
OF_FORWARD = "expected the contiguous (statistics, rows) tensor of the forward"


def call(op, **changes):
    """An operator on arguments that are right but for the changes."""
    arguments = {
        "forward": dict(z0=Z, z1=Z, negatives=EMPTY, eps=EPS, tau=TAU, mode=0, reduction=0)
        | dict(variant=0, beta=1.0, tau_plus=0.1, keep=True),
        "backward": dict(grad=ROWS, z0=Z, z1=Z, negatives=EMPTY, tau=TAU, stats=STATS)
        | dict(kept=KEPT, mode=0, reduction=0, beta=1.0, needs=15),
        "threshold": dict(z0=Z, z1=Z, negatives=EMPTY, mode=0, quantile=0.9, over_negatives=False),
        "row_range": dict(z0=Z, z1=Z, negatives=EMPTY, mode=0),
    }[op]
    return getattr(HEX, op)(*(arguments | changes).values())


def freed(z):
    z = z.clone()
    z.untyped_storage().resize_(0)
    return z


def shrunk(z):
    z = z.clone()
    z.untyped_storage().resize_(z.numel() * z.element_size() - 1)
    return z


def repeated(*shape):
    """A tensor of any size whose elements are all one number in memory."""
    return torch.ones(()).expand(shape)


REFUSED = [
    # op, changed arguments, text after "hex::<op>: "
    ("forward", dict(z0=Z.int()), f"z0: {FLOATING}"),
    ("forward", dict(z1=Z.to(torch.complex64)), f"z1: {FLOATING}"),
    ("forward", dict(negatives=EMPTY.bool()), f"negatives: {FLOATING}"),
    ("forward", dict(z0=Z.to(torch.float8_e4m3fn)), f"z0: {FLOATING}"),
    ("forward", dict(eps=torch.tensor(1)), f"eps: {FLOATING}"),
    ("forward", dict(tau=torch.tensor(True)), f"tau: {FLOATING}"),
    ("forward", dict(z0=Z[0]), "z0: expected 2 dimensions, got 1"),
    ("forward", dict(z1=Z[None]), "z1: expected 2 dimensions, got 3"),
    ("forward", dict(negatives=EMPTY[None]), "negatives: expected 2 dimensions, got 3"),
    ("forward", dict(mode=4), "negatives: expected 3 dimensions, got 2"),
    ("forward", dict(z1=Z[:, :2]), "z1: expected D = 3 features, got 2"),
    ("forward", dict(negatives=EMPTY[:, :1]), "negatives: expected D = 3 features, got 1"),
    ("forward", dict(mode=4, negatives=Z[:, None, 1:]),
     "negatives: expected D = 3 features, got 2"),
    ("forward", dict(z1=Z[:4]), "z1: expected as many rows as z0, 5, got 4"),
    ("forward", dict(mode=4, negatives=QUEUE[:, None]),
     "negatives: expected (B, K, D) with the B of z0"),
    ("forward", dict(negatives=QUEUE), "negatives: expected none (0, D) in this mode"),
    ("forward", dict(mode=1, negatives=QUEUE), "negatives: expected none (0, D) in this mode"),
    ("forward", dict(mode=2, negatives=QUEUE), "negatives: expected none (0, D) in this mode"),
    ("forward", dict(mode=5), "mode: expected 0 to 4"),
    ("forward", dict(mode=-1), "mode: expected 0 to 4"),
    ("forward", dict(mode=2**32), "mode: expected 0 to 4"),
    ("forward", dict(reduction=3), "reduction: expected 0, 1 or 2"),
    ("forward", dict(reduction=-1), "reduction: expected 0, 1 or 2"),
    ("forward", dict(variant=2), "variant: expected 0 or 1"),
    ("forward", dict(variant=-1), "variant: expected 0 or 1"),
    ("forward", dict(beta=-0.5), CHOICES),
    ("forward", dict(beta=float("nan")), CHOICES),
    ("forward", dict(tau_plus=-0.1), CHOICES),
    ("forward", dict(tau_plus=1.0), CHOICES),
    ("forward", dict(tau_plus=float("nan")), CHOICES),
    ("forward", dict(eps=EPS.half()), f"eps: {NUMBERS} () or (rows,)"),
    ("forward", dict(eps=torch.ones(5)), f"eps: {NUMBERS} () or (rows,)"),
    ("forward", dict(eps=torch.ones(10, 1)), f"eps: {NUMBERS} () or (rows,)"),
    ("forward", dict(tau=torch.ones(10)), f"tau: {NUMBERS} ()"),
    ("forward", dict(tau=TAU.bfloat16()), f"tau: {NUMBERS} ()"),
    ("backward", dict(grad=torch.ones(())), f"grad: {NUMBERS} (rows,)"),
    ("backward", dict(grad=torch.ones(9)), f"grad: {NUMBERS} (rows,)"),
    ("backward", dict(reduction=1), f"grad: {NUMBERS} ()"),
    ("backward", dict(grad=ROWS.half()), f"grad: {NUMBERS} (rows,)"),
    ("backward", dict(tau=torch.ones(1)), f"tau: {NUMBERS} ()"),
    ("backward", dict(reduction=9), "reduction: expected 0, 1 or 2"),
    ("backward", dict(beta=-1.0), CHOICES),
    ("backward", dict(mode=7), "mode: expected 0 to 4"),
    ("backward", dict(z0=Z[:4]), "z1: expected as many rows as z0, 4, got 5"),
    *(
        ("backward", dict(stats=stats), f"stats: {OF_FORWARD}")
        for stats in (STATS.double(), STATS[0], STATS[:8], STATS[:, :9], STATS.T.contiguous().T,
                      torch.zeros(9, 20)[:, ::2], torch.zeros(18, 10)[::2], STATS.bfloat16())
    ),
    *(
        ("backward", dict(kept=kept), "kept: expected the contiguous tensor of the forward")
        for kept in (KEPT.double(), torch.zeros(1), torch.zeros(0, 3))
    ),
    ("threshold", dict(quantile=-0.01), "quantile: expected a number in [0, 1]"),
    ("threshold", dict(quantile=1.01), "quantile: expected a number in [0, 1]"),
    ("threshold", dict(quantile=float("nan")), "quantile: expected a number in [0, 1]"),
    ("threshold", dict(z0=Z.long()), f"z0: {FLOATING}"),
    ("row_range", dict(mode=6), "mode: expected 0 to 4"),
    *(
        (op, {name: damaged(value)}, f"{name}: {DAMAGED}")
        for damaged in (freed, shrunk)
        for op, name, value in (
            ("forward", "z0", Z), ("forward", "z1", Z), ("forward", "eps", EPS),
            ("forward", "eps", ROWS), ("forward", "tau", TAU), ("backward", "grad", ROWS),
            ("backward", "stats", STATS), ("backward", "kept", torch.zeros(9)),
            ("threshold", "z1", Z), ("row_range", "z0", Z),
        )
    ),
    ("forward", dict(mode=3, negatives=freed(QUEUE)), f"negatives: {DAMAGED}"),
    # the most rows and features there may be, or a few of them, but more than there is memory
    ("threshold", dict(z0=repeated(2**27, 2**27), z1=repeated(2**27, 2**27),
                       negatives=repeated(0, 2**27)), "out of memory"),
    ("forward", dict(mode=3, z0=repeated(5, 2**20), z1=repeated(5, 2**20),
                     negatives=repeated(2**27, 2**20)), "out of memory"),
    ("forward", dict(mode=4, z0=repeated(5, 2**20), z1=repeated(5, 2**20),
                     negatives=repeated(5, 2**27, 2**20)), "out of memory"),
    ("backward", dict(mode=4, z0=repeated(5, 2**20), z1=repeated(5, 2**20), grad=torch.ones(5),
                      negatives=repeated(5, 2**27, 2**20), stats=torch.zeros(9, 5), needs=4),
     "cannot allocate an output"),
]  # fmt: skip


@pytest.mark.parametrize(
    "op, changes, text",
    REFUSED,
    ids=[f"{i}-{op}-{list(c)[0]}" for i, (op, c, _) in enumerate(REFUSED)],
)
def test_a_kernel_refuses_what_it_cannot_read_safely(op, changes, text):
    with pytest.raises(RuntimeError) as error:
        call(op, **changes)
    assert str(error.value) == f"hex::{op}: {text}"
    assert call("forward")[0].shape == (10,)  # and works after


def other_layouts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about beta layouts and deprecated ones
        yield Z.to_sparse()
        yield Z.to_sparse_csr()
        yield Z.to_sparse_csc()
        yield Z.to_mkldnn()
        yield torch.nested.nested_tensor([Z, Z])
        yield torch.nested.nested_tensor([Z, Z], layout=torch.jagged)
        yield torch.quantize_per_tensor(Z, 0.1, 0, torch.qint8)


@pytest.mark.parametrize("op", ["forward", "backward", "threshold", "row_range"])
def test_tensors_without_plain_memory_are_refused(op):
    for z in other_layouts():
        with pytest.raises((NotImplementedError, RuntimeError)):
            call(op, z0=z)
        with pytest.raises((NotImplementedError, RuntimeError)):
            call(op, z0=z, z1=z)
        with pytest.raises((TypeError, NotImplementedError, RuntimeError)):
            hex_loss(z, z, eps=0.3)


@pytest.mark.parametrize("op", ["forward", "backward", "threshold", "row_range"])
def test_arguments_that_are_no_tensors_are_refused(op):
    for wrong in (None, 1.0, "z", [Z], object()):
        with pytest.raises((RuntimeError, TypeError)):
            call(op, z0=wrong)


def test_an_error_keeps_no_tensor_alive():
    """A kernel owns its handles: thrown past, they would keep 500 MiB here. AddressSanitizer holds
    back up to 256 MiB of what is freed."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def failing_calls(n):
        for _ in range(n):
            z = torch.ones(1 << 10, 1 << 8)
            with pytest.raises(RuntimeError):
                call("forward", z0=z, z1=z[:5], negatives=z)
            with pytest.raises(RuntimeError):
                call("forward", z0=z, z1=z, negatives=z[:0], mode=4)

    failing_calls(10)
    before = resident()
    failing_calls(500)
    assert resident() - before < 320 << 20


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
    code = ops.MODES[p.mode]
    return [*results, *operators.row_range(*p.raw()[:3], code)]


@pytest.mark.parametrize("mode", MODES)
def test_a_device_without_kernels_gives_the_same_values_with_one_warning(mode, no_kernels):
    for variant in ("paper", "released"):
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
