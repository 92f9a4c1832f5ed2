# SPDX-License-Identifier: MIT
"""The losses under torch.func, torch.compile, torch.export, autocast and without gradients.

What is compared: the transformed call with the plain one, bit for bit, since the same kernels do
both; second derivatives with those of hex/reference.py. That every way of running the loss leaves
the threshold as it should be is tested here too; the tracker by itself in test_tracker.py.
"""

import io
import warnings

import pytest
import torch
from conftest import DTYPES, Problem, problem
from data import FORMS, MODES, f64
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter

from hex import (
    HEXLoss,
    HEXSupConLoss,
    ThresholdTracker,
    batch_threshold,
    hex_cross_entropy,
    hex_loss,
)

VARIANTS = FORMS

# What torch.compile itself does while it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be inst:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def state(loss: HEXLoss) -> dict[str, list[float]]:
    """All that a tracker keeps, as numbers that compare exactly."""
    return {name: value.tolist() for name, value in loss.state_dict().items()}


def gradient(p: Problem, z0: Tensor, grad_of: int = 0) -> Tensor:
    """By backward(), of the mean of the rows in one input."""
    inputs = [z.detach().clone() for z in (z0, *p.inputs[1:])]
    inputs[grad_of].requires_grad_()
    p.loss(*inputs, reduction="mean").backward()
    return inputs[grad_of].grad


def a_step(loss, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
    z0 = z0.clone().requires_grad_()
    value = loss(z0, z1)
    value.backward()
    return value.detach(), z0.grad


def batches(count: int, B: int = 83, D: int = 11):
    return [problem("cluster", B, D, seed=s, dtype=torch.float32).inputs for s in range(count)]


# ---- torch.func ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_func_grad_is_the_gradient_of_backward_in_every_input(mode, variant):
    p = problem("cluster", 9, 5, mode, variant=variant, dtype=torch.float32)
    for k in range(len(p.inputs)):
        grad = torch.func.grad(lambda *z: p.loss(*z, reduction="mean"), k)(*p.inputs)
        assert torch.equal(grad, gradient(p, p.inputs[0], k))


def test_func_grad_in_the_temperature_is_the_gradient_of_backward():
    p = problem("cluster", 9, 5)
    tau = f64(p.tau)
    grad = torch.func.grad(lambda t: p.loss(*p.inputs, tau=t, reduction="sum"))(tau)
    leaf = tau.clone().requires_grad_()
    p.loss(*p.inputs, tau=leaf, reduction="sum").backward()
    assert torch.equal(grad, leaf.grad)
    assert grad != 0


def test_func_grad_of_the_module_is_the_gradient_of_backward():
    (z0, z1, *_) = problem("cluster", 83, 5).inputs
    grad, value = torch.func.grad_and_value(HEXLoss())(z0, z1)
    expected_value, expected = a_step(HEXLoss(), z0, z1)
    assert torch.equal(value, expected_value)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("mode", MODES)
def test_vmap_gives_each_batch_its_own_loss_and_gradient_without_a_warning(mode):
    p = problem("cluster", 9, 5, mode)
    z = torch.stack([p.inputs[0] * s + 0.1 * s for s in (1, -2, 0.5)])

    def loss(z0: Tensor) -> Tensor:
        return p.loss(z0, *p.inputs[1:], reduction="mean")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = torch.vmap(loss)(z)
        grads = torch.vmap(torch.func.grad(loss))(z)
        rows = torch.vmap(lambda z0: p.loss(z0, *p.inputs[1:]), in_dims=1, out_dims=1)(
            z.movedim(0, 1)
        )
    assert torch.equal(values, torch.stack([loss(z0) for z0 in z]))
    assert torch.equal(grads, torch.stack([gradient(p, z0) for z0 in z]))
    assert torch.equal(rows, torch.stack([p.loss(z0, *p.inputs[1:]) for z0 in z], 1))


def test_vmap_runs_over_thresholds_and_temperatures():
    z0, z1 = problem("cluster", 9, 5).inputs
    eps, tau = torch.linspace(-1, 1, 7).double(), torch.linspace(0.05, 1, 7)
    values = torch.vmap(lambda e, t: hex_loss(z0, z1, eps=e, temperature=t))(eps, tau)
    one_by_one = [hex_loss(z0, z1, eps=e, temperature=t) for e, t in zip(eps, tau, strict=True)]
    assert torch.equal(values, torch.stack(one_by_one))
    assert values.unique().numel() == 7


def test_vmap_of_the_threshold_is_that_of_each_batch():
    z0, z1 = problem("cluster", 9, 5).inputs
    z = torch.stack([z0, z1, z0 + z1])
    values = torch.vmap(lambda a: batch_threshold(a, z1, over="negatives"))(z)
    assert torch.equal(values, torch.stack([batch_threshold(a, z1, over="negatives") for a in z]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, on its first use of this mode
def test_forward_mode_is_refused_and_never_silently_zero():
    z0, z1 = problem("cluster", 9, 5).inputs
    labels = torch.arange(9) % 3
    for loss in (
        lambda z: hex_loss(z, z1, eps=0.2),
        HEXLoss(threshold=ThresholdTracker.adaptive(over="negatives")),
        lambda z: HEXSupConLoss(threshold=0.2)(z, labels),
        lambda z: hex_cross_entropy(z, labels, eps=0.2, temperature=0.5),
    ):
        loss = (lambda z, m=loss: m(z, z1)) if isinstance(loss, HEXLoss) else loss
        refused = (
            "^hex-ssl: a loss has no forward-mode derivative .jvp, .*; use grad, vjp or jacrev"
        )
        with pytest.raises(NotImplementedError, match=refused):
            torch.func.jvp(loss, (z0,), (torch.ones_like(z0),))
        with pytest.raises(NotImplementedError, match=refused):
            torch.func.jacfwd(loss)(z0)
        with pytest.raises(NotImplementedError, match=refused):
            torch.func.hessian(loss)(z0)
        with (
            pytest.raises(NotImplementedError, match=refused),
            torch.autograd.forward_ad.dual_level(),
        ):
            loss(torch.autograd.forward_ad.make_dual(z0, torch.ones_like(z0)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_jacrev_of_the_gradient_is_the_hessian(mode, variant):
    p = problem("cluster", 5, 3, mode, K=4, variant=variant, tau=0.4)
    z0 = p.inputs[0]
    ours = torch.func.jacrev(torch.func.grad(lambda z: p.loss(z, *p.inputs[1:]).sum()))(z0)
    plain = torch.func.jacrev(
        torch.func.grad(lambda z: p.reference(z, *p.inputs[1:], tau=f64(p.tau))[0].sum())
    )(z0)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10 * plain.abs().max().item())
    flat = ours.reshape(z0.numel(), z0.numel())
    torch.testing.assert_close(flat, flat.T, rtol=1e-9, atol=1e-10 * flat.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_penalty_is_differentiated_in_every_input(mode, variant):
    p = problem("cluster", 7, 4, mode, variant=variant, tau=0.4)

    def penalty_gradients(loss) -> tuple[Tensor, ...]:
        z = [x.clone().requires_grad_() for x in p.inputs]
        tau = f64(p.tau).requires_grad_()
        grads = torch.autograd.grad(loss(*z, tau=tau).sum(), (*z, tau), create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in grads), (*z, tau))

    ours = penalty_gradients(p.loss)
    plain = penalty_gradients(lambda *z, tau: p.reference(*z, tau=tau)[0])
    for name, a, b in zip(p.names, ours, plain, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * b.abs().max().item())


@pytest.mark.parametrize(
    "transform",
    (
        lambda loss, z0, z1: torch.func.grad(loss)(z0, z1),
        lambda loss, z0, z1: torch.vmap(loss, (0, None))(torch.stack([z0, z1]), z1),
        lambda loss, z0, z1: torch.func.vjp(loss, z0, z1)[1](f64(1.0)),
    ),
    ids=("grad", "vmap", "vjp"),
)
def test_under_func_transforms_nothing_is_stored(transform):
    z0, z1 = problem("cluster", 83, 5).inputs
    loss = HEXLoss(threshold=ThresholdTracker.adaptive(momentum=0.5))
    a_step(loss, z0, z1)
    before, last = state(loss), loss.last
    transform(loss, 2 * z0 + z1, z1)
    assert state(loss) == before
    assert loss.last == last
    a_step(loss, 2 * z0 + z1, z1)
    assert state(loss) != before


# ---- torch.compile and torch.export --------------------------------------------------------------


def test_compiles_once_whatever_the_threshold_and_temperature_and_equals_eager():
    counter = CompileCounter()
    compiled = torch.compile(hex_loss, fullgraph=True, backend=counter)
    for i, (z0, z1) in enumerate(batches(9)):
        options = {"eps": f64(0.1 * i), "temperature": f64(0.05 + 0.1 * i)}
        ours = a_step(lambda a, b, o=options: compiled(a, b, **o), z0, z1)
        eager = a_step(lambda a, b, o=options: hex_loss(a, b, **o), z0, z1)
        assert all(map(torch.equal, ours, eager))
    assert counter.frame_count == 1


def test_a_compiled_adaptive_step_has_one_operator():
    called = []

    def compiler(graph, _):
        called.extend(str(n.target) for n in graph.graph.nodes if str(n.target).startswith("hex."))
        return make_boxed_func(graph)

    module = HEXLoss()
    z0, z1 = batches(1)[0]
    a_step(
        torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=compiler)), z0, z1
    )
    assert called == ["hex.adaptive.default", "hex.backward.default"]


def of_logits(a: Tensor, b: Tensor) -> Tensor:
    target = torch.arange(len(a))
    return hex_cross_entropy(a @ b.T / len(a), target, eps=0.2, temperature=0.5)


@pytest.mark.parametrize(
    ("module", "loss"),
    (
        (HEXLoss(), None),
        (HEXLoss(threshold=0.2), None),
        (HEXSupConLoss(), lambda module, a, b: module(torch.stack((a, b), 1))),
        (None, lambda _, a, b: hex_loss(a, b, eps=0.2)),
        (None, lambda _, a, b: of_logits(a, b)),
    ),
    ids=("adaptive", "fixed", "sup_con", "function", "logits"),
)
def test_a_transform_inside_a_compiled_function_is_in_its_graph_and_leaves_nothing(module, loss):
    z0, z1 = batches(1)[0]
    inside = torch.func.grad(lambda a, b: loss(module, a, b) if loss else module(a, b))
    expected = inside(z0, z1)
    got = torch.compile(inside, backend="aot_eager", fullgraph=True)(z0, z1)
    assert expected.abs().max() > 0
    assert torch.equal(got, expected)
    assert module is None or module.last is None


@pytest.mark.parametrize(
    "threshold",
    (
        lambda: ThresholdTracker.adaptive(warmup_epochs=1, momentum=0.9, monotonic=True),
        lambda: ThresholdTracker.adaptive(over="negatives", lagged=True),
        lambda: ThresholdTracker.step(0.9, 0.1, 2, normalize_rows=True),
        lambda: None,
    ),
    ids=("adaptive", "lagged", "rows", "none"),
)
def test_a_module_compiles_once_over_steps_and_epochs_and_equals_eager(threshold):
    counter = CompileCounter()
    module, eager = HEXLoss(threshold=threshold()), HEXLoss(threshold=threshold())
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for i, (z0, z1) in enumerate(batches(9)):
        module.set_epoch(i // 3)
        eager.set_epoch(i // 3)
        assert all(map(torch.equal, a_step(compiled, z0, z1), a_step(eager, z0, z1)))
        assert state(module) == state(eager)
        assert module.statistics() == eager.statistics()
    assert counter.frame_count == 1


def test_a_learned_temperature_compiles_once_while_it_moves():
    counter = CompileCounter()
    module = HEXLoss(torch.nn.Parameter(torch.tensor(0.2)))
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    seen = set()
    for z0, z1 in batches(5):
        optimiser.zero_grad()
        a_step(compiled, z0, z1)
        optimiser.step()
        seen.add(module.temperature.item())
    assert len(seen) == 5
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", MODES)
def test_aot_autograd_traces_forward_and_backward_of_every_mode(mode):
    p = problem("cluster", 9, 5, mode)
    compiled = torch.compile(p.loss, fullgraph=True, backend="aot_eager")

    def grads(loss) -> tuple[Tensor, ...]:
        z = [x.clone().requires_grad_() for x in p.inputs]
        tau = f64(p.tau).requires_grad_()
        return torch.autograd.grad(loss(*z, tau=tau, reduction="mean"), (*z, tau))

    for ours, eager in zip(grads(compiled), grads(p.loss), strict=True):
        assert torch.equal(ours, eager)


def test_a_compiled_module_serves_inputs_without_a_gradient_too():
    z0, z1 = batches(1)[0]
    module = HEXLoss()
    for _ in range(2):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(z0, z1), module(z0, z1))
        module.eval()


@pytest.mark.parametrize("threshold", ("adaptive", 0.2))
def test_one_tensor_as_both_views_compiles_too(threshold):
    module = HEXLoss(threshold=threshold)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    z = batches(1)[0][0]
    ours, expected = (a_step(lambda a, _, f=f: f(a, a), z, z) for f in (compiled, module))
    assert all(map(torch.equal, ours, expected))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, on importing inductor
@pytest.mark.parametrize("mode", ("default", "reduce-overhead", "max-autotune"))
def test_inductor_compiles_a_training_step(mode):
    module, eager = HEXLoss(), HEXLoss()
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for z0, z1 in batches(2):
        ours, expected = a_step(compiled, z0, z1), a_step(eager, z0, z1)
        assert all(map(torch.equal, ours, expected))
        assert state(module) == state(eager)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.10's own
def test_export_survives_a_file_and_gives_the_same_loss():
    module = HEXLoss(0.2, threshold=0.3).eval()
    first, second = batches(2)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, first), file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for z0, z1 in (first, second):
        assert torch.equal(loaded(z0, z1), module(z0, z1))


# ---- autocast, and no gradient -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_neither_value_nor_gradient_nor_dtype(mode, dtype):
    p = problem("cluster", 9, 5, mode, dtype=dtype)
    plain, plain_grad = p.loss(*p.inputs), gradient(p, p.inputs[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, cast_grad = p.loss(*p.inputs), gradient(p, p.inputs[0])
    assert plain.dtype == cast.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.equal(plain, cast)
    assert plain_grad.dtype == cast_grad.dtype == dtype
    assert torch.equal(plain_grad, cast_grad)


@pytest.mark.parametrize("own", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_guide_and_vmap_take_either_half_precision_under_autocast(own, dtype):
    z0, z1 = problem("cluster", 9, 5, dtype=dtype).inputs
    z, wide = torch.stack([z0.float(), z1.float()]).to(dtype), z1.double()

    def values():
        grads = torch.vmap(torch.func.grad(lambda x: hex_loss(x, z1, eps=0.2)))(z)
        return grads, *(HEXLoss(threshold=0.2)(z0, z1, guide=(z0, g)) for g in (z1, wide))

    with torch.autocast("cpu", own):
        ours = values()
    assert all(map(torch.equal, ours, values()))


def test_under_autocast_the_output_of_a_half_layer_goes_in_as_it_is():
    z0, z1 = batches(1)[0]
    layer, module = torch.nn.Linear(11, 7), HEXLoss(threshold=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = layer(z0), layer(z1)
        loss = module(a, b)
    assert a.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(loss, module(a, b))
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("context", (torch.no_grad, torch.inference_mode))
def test_without_gradients_the_value_is_the_same_and_the_threshold_stays_bit_for_bit(context):
    (z0, z1), (y0, y1) = batches(2)
    loss = HEXLoss(threshold=ThresholdTracker.adaptive(momentum=0.5))
    a_step(loss, z0, z1)
    before = state(loss)
    with context():
        value = loss(y0, y1)
    assert not value.requires_grad
    assert state(loss) == before
    assert loss.last.eps == loss.threshold.update(batch_threshold(y0, y1), store=False)
    assert torch.equal(value, a_step(loss, y0, y1)[0])  # which stores
    assert state(loss) != before


def test_evaluation_and_inputs_without_gradient_leave_the_threshold_bit_for_bit():
    (z0, z1), (y0, y1) = batches(2)
    loss = HEXLoss()
    a_step(loss, z0, z1)
    before = state(loss)
    loss(y0, y1)
    loss.eval()
    a_step(loss, y0, y1)
    assert state(loss) == before
    loss.train()
    a_step(loss, y0, y1)
    assert state(loss) != before
