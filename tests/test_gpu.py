# SPDX-License-Identifier: MIT
"""The CUDA kernels on a GPU: `pytest -m gpu`, with hex built by HEX_CUDA=1.

What only a device can show, and the battery that the emulation has passed. Where there is no device
every test here is skipped, with that as its reason.
"""

import batteries
import emulator
import operators
import pytest
import set_batteries
import torch
from batteries import assert_half_is_right, assert_threshold_is_right
from conftest import check, problem
from emulator import HEX
from labelled_problems import labelled, logits
from test_ops import OPS

from hex import (
    HEXCrossEntropyLoss,
    HEXLoss,
    HEXSupConLoss,
    ThresholdTracker,
    hex_loss,
    ops,
    reference,
)
from hex._load import cuda_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    # torch's own, once, when the first product in autograd's thread is one of cuBLAS
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA"),
]
MODES = ("ntxent", "query", "cross", "unpaired", "paired")


@pytest.fixture(autouse=True)
def kernels():
    assert cuda_problem(torch.cuda.current_device()) is None


def test_the_primitives_do_what_plain_arithmetic_does(tmp_path):
    batteries.assert_conforms(emulator.conformance_on_a_gpu(tmp_path), "cuda")


def test_the_battery_is_right():
    batteries.battery("cuda")


def test_the_battery_of_blocks_is_right():
    batteries.battery_of_blocks("cuda")


def test_the_battery_of_sets_is_right():
    set_batteries.battery_of_sets("cuda")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_right_at_the_sizes_of_training(mode):
    for B, D, K in ((128, 128, 256), (1024, 128, 4096), (513, 500, 100)):
        if mode == "paired":
            B, K = B // 8, K // 8
        p = problem("cluster", B, D, mode, K=K, dtype=torch.float32, device="cuda")
        check(p)
        assert_threshold_is_right(p)
        q = problem("cluster", B, D, mode, K=K, dtype=torch.bfloat16, device="cuda")
        assert_half_is_right(q)


def step(loss, *inputs, **given):
    """The value, without its graph: an accumulator of gradients that lives on belongs to the stream
    it was made on, and torch warns of the next backward on another."""
    value = loss(*inputs, **given)
    value.backward()
    return value.detach()


@pytest.fixture
def batch():
    p = problem("cluster", 512, 128, dtype=torch.float32, device="cuda")
    return [z.requires_grad_() for z in p.inputs]


@pytest.fixture(
    params=("views", "labels", "candidates", "groups", "guide", "logits", "by positive")
)
def training(request, batch):
    """A loss, its inputs of which some learn, and what else it is given."""
    labels = torch.arange(512, device="cuda") % 40
    if request.param == "logits":
        values = torch.randn(512, 1000, device="cuda", requires_grad=True)
        return HEXCrossEntropyLoss(0.1).cuda(), [values], {"target": labels}
    if request.param == "labels":
        features = torch.stack([z.detach() for z in batch], 1).requires_grad_()
        return HEXSupConLoss(0.1).cuda(), [features], {"labels": labels}
    if request.param == "candidates":
        memory = {"candidates": batch[1].detach()[:300], "candidate_labels": labels[:300]}
        return HEXSupConLoss(0.1).cuda(), batch[:1], {"labels": labels, **memory}
    if request.param == "by positive":
        tracker = ThresholdTracker.by_positive(0.1, warmup_epochs=1)
        loss = HEXLoss(0.1, threshold=tracker, variant="excluded").cuda()
        loss.set_epoch(1)
        return loss, batch, {}
    given = {"groups": {"groups": labels}, "guide": {"guide": tuple(z.detach() + 1 for z in batch)}}
    return HEXLoss(0.1).cuda(), batch, given.get(request.param, {})


def test_the_bits_are_the_same_on_every_run():
    for dtype in (torch.bfloat16, torch.float32):
        p = problem("cluster", 600, 130, dtype=dtype, device="cuda")
        first, eps = p.ours(), operators.threshold(*p.raw()[:3], 0, 0.99, "all")
        differ = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            again = p.ours()
            differ += (first.loss != again.loss).any()
            differ += (eps != operators.threshold(*p.raw()[:3], 0, 0.99, "all")).any()
            for name in p.names:
                differ += (first.grads[name] != again.grads[name]).any()
        assert differ == 0


def test_the_bits_of_labels_are_the_same_on_every_run():
    p = labelled(600, 130, dtype=torch.float32, labels=40).to("cuda")
    (op, forward), (_, backward), (_, measured) = p.forward(), p.backward(), p.quantile()

    def everything():
        return *op(*forward)[:2], *HEX.backward(*backward), HEX.quantile(*measured)[0]

    first, differ = everything(), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differ += sum((a != b).any().long() for a, b in zip(first, everything(), strict=True))
    assert differ == 0


# torch's own: what the mode does not see yet, it says, once in a process
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_a_training_step_never_waits_for_the_device(training):
    loss, inputs, given = training
    step(loss, *inputs, **given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(loss, *inputs, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_can_be_captured_in_a_graph(training):
    loss, inputs, given = training
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the stream in use is not the default one
        for _ in range(3):
            step(loss, *inputs, **given)
    torch.cuda.current_stream().wait_stream(side)
    for z in inputs:
        z.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(loss, *inputs, **given)
    with torch.no_grad():
        for z in inputs:
            z.add_(torch.randn_like(z))
    for z in inputs:
        z.grad.zero_()
    graph.replay()
    got = [captured.clone(), *(z.grad.clone() for z in inputs)]
    for z in inputs:
        z.grad = None
    want = [step(loss, *inputs, **given), *(z.grad for z in inputs)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


RULES = ({}, {"momentum": 0.7, "monotonic": True}, {"lagged": True, "over": "negatives"})


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_with_its_threshold_in_one_call_is_the_two_calls_to_the_bit(rule, monkeypatch):
    one, two = (HEXLoss(0.1, threshold=ThresholdTracker.adaptive(**rule)).cuda() for _ in range(2))
    for seed in range(4):
        p = problem("cluster", 300, 64, dtype=torch.bfloat16, device="cuda", seed=seed)
        inputs = [z.requires_grad_() for z in p.inputs]
        value = one(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "has_adaptive", lambda z: False)
            other = two(*inputs)
        assert torch.equal(value, other)
        assert torch.equal(one.threshold.state, two.threshold.state)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(op, mode):
    for dtype in (torch.float32, torch.float16, torch.float64):
        torch.library.opcheck(*op(problem("cluster", 7, 5, mode, dtype=dtype, device="cuda")))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_opcheck_of_labels_and_logits(dtype):
    for p in (labelled(7, 5, dtype=dtype), labelled(7, 5, "queue", "guide", M=3, dtype=dtype),
              logits(5, 9, dtype=dtype)):  # fmt: skip
        p = p.to("cuda")
        for op, arguments in (p.forward(), p.backward(), p.quantile()):
            torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_differences(mode):
    p = problem("cluster", 6, 5, mode, K=4, dtype=torch.float64, device="cuda", tau=0.5)
    inputs = [z.requires_grad_() for z in p.inputs]
    assert torch.autograd.gradcheck(p.loss, inputs, nondet_tol=0.0)


@pytest.mark.filterwarnings("ignore")  # of what torch.compile imports
def test_a_compiled_step_gives_what_eager_gives(batch):
    def loss_and_gradients(function):
        value = function(*batch)
        return value.detach(), *torch.autograd.grad(value, batch)

    eager, compiled = (HEXLoss(0.1).cuda() for _ in range(2))
    program = torch.compile(compiled, fullgraph=True)
    for _ in range(3):
        got, want = loss_and_gradients(program), loss_and_gradients(eager)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(eager.threshold.value, compiled.threshold.value)


def test_work_goes_to_the_current_stream(batch):
    loss, stream = HEXLoss(0.1).cuda(), torch.cuda.Stream()
    want = step(loss, *batch)
    gradients = [z.grad.clone() for z in batch]
    late = [z.detach().clone() for z in batch]
    for z in late:
        z.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds; then the inputs come
        for z, source in zip(late, batch, strict=True):
            z.copy_(source.detach())
        fresh = [z.requires_grad_() for z in late]
        got = step(HEXLoss(0.1).cuda(), *fresh)
    stream.synchronize()
    assert torch.equal(got, want)
    assert all(torch.equal(z.grad, g) for z, g in zip(fresh, gradients, strict=True))


def test_a_batch_that_is_not_finite_costs_mixed_precision_one_step():
    torch.manual_seed(0)
    network = torch.nn.Linear(16, 32).cuda()
    loss, scaler = HEXLoss(0.1).cuda(), torch.amp.GradScaler("cuda", init_scale=2.0**10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    weights = []
    for k in range(4):
        x = torch.randn(300, 16, device="cuda")
        if k == 2:
            x[5, 3] = torch.nan
        with torch.autocast("cuda", torch.float16):
            value = loss(network(x), network(x + 0.1))
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        weights.append(network.weight.detach().clone())
    assert value.dtype == torch.float32 and value.isfinite()
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[2], weights[3])
    assert torch.equal(weights[1], weights[2])  # the step of the NaN was left out
    assert scaler.get_scale() == 2.0**9
    assert int(loss.threshold.updates) == 3 and int(loss.threshold.skipped) == 1


def test_offsets_beyond_32_bits_are_right():
    B, D = 32768, 64  # N^2 = 2^32
    generator = torch.Generator("cuda").manual_seed(0)
    image = torch.randn(B, D, device="cuda", generator=generator)
    views = [
        (image + 0.5 * torch.randn(B, D, device="cuda", generator=generator)).requires_grad_()
        for _ in range(2)
    ]
    rows = torch.tensor([0, 1, B - 1, B, B + 1, 2 * B - 1], device="cuda")
    loss = hex_loss(*views, eps=0.35, temperature=0.1, reduction="none")
    got = torch.autograd.grad(loss[rows].sum(), views)

    z = torch.cat([v.detach() for v in views]).double().requires_grad_()
    partner = (rows + B) % (2 * B)
    others = torch.ones(len(rows), 2 * B, dtype=torch.bool, device="cuda")
    others[torch.arange(len(rows)), rows] = others[torch.arange(len(rows)), partner] = False
    negatives = z.expand(len(rows), -1, -1)[others].view(len(rows), -1, D)
    tau, eps = (torch.tensor(x, dtype=torch.float64) for x in (0.1, 0.35))
    want = reference.loss_rows(z[rows], z[partner], negatives, eps.cuda(), tau, "paired")[0]
    torch.testing.assert_close(loss[rows].double(), want, rtol=1e-4, atol=1e-5)
    (truth,) = torch.autograd.grad(want.sum(), z)
    error = (torch.cat(got).double() - truth).norm() / truth.norm()
    assert error < 1e-3


def test_rows_past_the_65536th_have_their_threshold():
    B, K, D = 70000, 300, 32
    p = problem("cluster", 40, D, "unpaired", K=K, dtype=torch.bfloat16, device="cuda")
    z0, z1 = (z.repeat(B // 40, 1) for z in p.inputs[:2])
    few = operators.threshold(*p.inputs, ops.MODES["unpaired"], 0.9, "all")
    many = operators.threshold(z0, z1, p.inputs[2], ops.MODES["unpaired"], 0.9, "all")
    torch.testing.assert_close(many, few, rtol=0, atol=1e-9)


def test_memory_does_not_grow_with_the_square_of_the_batch():
    peaks = []
    for B in (2048, 8192):
        z0, z1 = (torch.randn(B, 128, device="cuda", requires_grad=True) for _ in range(2))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(HEXLoss(0.1).cuda(), z0, z1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 6 * peaks[0]  # 16 if it did


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one_is_used():
    p = problem("cluster", 40, 30, dtype=torch.float32, device="cuda:1")
    check(p)
    assert torch.cuda.current_device() == 0
