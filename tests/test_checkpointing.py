# SPDX-License-Identifier: MIT
"""Activation checkpointing, and what else decides whether a call is training: the second run has
the threshold of the first and stores nothing.
"""

import pytest
import torch
from data import NAN, f64
from torch import nn
from torch.utils.checkpoint import checkpoint
from tracked import STATEFUL, adaptive, counts, same, train, views

from hex import HEXCrossEntropyLoss, HEXLoss, HEXSupConLoss

WAYS = {
    "plain": (False, 1),
    "nested": (False, 2),
    "reentrant": (True, 1),
    "reentrant, nested": (True, 2),
}


def losses(options):
    labels = torch.arange(40) // 2
    hex_loss = HEXLoss(threshold=adaptive(**options))
    sup_con = HEXSupConLoss(threshold=adaptive(**options))
    entropy = HEXCrossEntropyLoss(0.1, threshold=adaptive(**options))
    guided = HEXLoss(threshold=adaptive(**options))
    yield hex_loss, lambda z0, z1: hex_loss(z0, z1)
    yield sup_con, lambda z0, z1: sup_con(z0 + z1, labels)
    yield entropy, lambda z0, z1: entropy(z0 @ z1.T / 40, torch.arange(40))
    yield guided, lambda z0, z1: guided(z0, z1, guide=(z1, z0))


def trained(options, way, number, after):
    """Gradients, statistics and states of steps in which the threshold moves much."""
    loss, function = list(losses(options))[number]
    torch.manual_seed(0)
    weight = torch.randn(8, 8, dtype=torch.float64).requires_grad_()
    seen = []

    def head(z0, z1):
        value = function(z0 @ weight, z1 @ weight)
        return (value * value).exp().log() if after else value  # saves a tensor after the loss

    def wrapped(f, reentrant):
        return lambda z0, z1: checkpoint(f, z0, z1, use_reentrant=reentrant)

    run = head
    if way:
        reentrant, times = WAYS[way]
        for _ in range(times):
            run = wrapped(run, reentrant)
    for step in range(4):
        z0, z1 = (z.requires_grad_() for z in views(40, step, shift=step))
        first = run(z0, z1)
        second = run(z1, z0 + 1)  # two forwards before a backward
        before = loss.threshold.state.clone(), loss.statistics()
        (second + first).backward()
        assert torch.equal(loss.threshold.state, before[0]) and loss.statistics() == before[1]
        seen += [weight.grad, *before[0], *(f64(x) for x in before[1].values())]
        weight.grad = None
    assert counts(loss.threshold) == [8, 0, 0]
    return seen


@pytest.mark.parametrize("number", range(4), ids=("hex", "supcon", "entropy", "guide"))
@pytest.mark.parametrize("options", STATEFUL, ids=str)
def test_under_checkpointing_the_second_run_has_the_eps_of_the_first_and_stores_nothing(
    options, number
):
    plain = [trained(options, None, number, after) for after in (False, True)]
    for k, way in enumerate(WAYS):
        after = (k + number + STATEFUL.index(options)) % 2
        for a, b in zip(plain[after], trained(options, way, number, bool(after)), strict=True):
            # The gradients of the two forwards are added in another order.
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14 if a.dim() else 0)


BETWEEN = {
    "the same batch, without gradient": lambda loss, z0, z1: torch.no_grad()(loss)(z0, z1),
    "one image": lambda loss, z0, z1: loss(z0[:1], z1[:1]),
    "none": lambda loss, z0, z1: loss(z0[:0], z1[:0]),
    "not finite": lambda loss, z0, z1: loss(z0 * NAN, z1),
    "many without gradient": lambda loss, z0, z1: [
        torch.no_grad()(loss)(*views(9, k)) for k in range(300)
    ],
    "many others": lambda loss, z0, z1: [loss(z0 + k, z1) for k in range(1, 100)],
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("way", ("plain", "reentrant"))
@pytest.mark.parametrize("options", ({"momentum": 0.5}, {"lagged": True}), ids=str)
def test_calls_between_a_forward_and_its_backward_change_no_second_run(options, way, between):
    def gradient(checkpointed: bool):
        loss = HEXLoss(threshold=adaptive(**options))
        train(loss, *views(40, 1))
        z0, z1 = (z.requires_grad_() for z in views(40, 2, shift=0.5))
        run = loss
        if checkpointed:
            run = lambda *z: checkpoint(loss, *z, use_reentrant=WAYS[way][0])  # noqa: E731
        value = run(z0, z1)
        BETWEEN[between](loss, z0, z1)
        before = loss.threshold.state.clone(), loss.statistics()
        value.backward()
        assert torch.equal(loss.threshold.state, before[0])
        assert loss.statistics() == pytest.approx(before[1], nan_ok=True)
        return [z0.grad, z1.grad]

    assert same(gradient(False), gradient(True))


def test_a_loss_that_runs_in_a_backward_first_trains_there():
    """As where representations are cached and their loss is taken in a Function's backward."""

    class Cached(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss, z0, z1):
            ctx.loss = loss
            ctx.save_for_backward(z0, z1)
            return z0.new_zeros(())

        @staticmethod
        def backward(ctx, grad):
            leaves = [z.detach().requires_grad_() for z in ctx.saved_tensors]
            with torch.enable_grad():
                value = ctx.loss(*leaves)
            return None, *torch.autograd.grad(value, leaves)

    cached, plain = (HEXLoss(threshold=adaptive(momentum=0.5)) for _ in range(2))
    for step in range(3):
        inputs = views(40, step, shift=step)
        got = train(lambda *z: Cached.apply(cached, *z), *inputs)[1:]
        assert same(got, train(plain, *inputs)[1:])
        assert cached.statistics() == pytest.approx(plain.statistics())
    assert torch.equal(cached.threshold.state, plain.threshold.state)


def test_a_reentrant_checkpoint_without_gradient_is_no_training():
    loss = HEXLoss(threshold=adaptive())
    z0, z1 = views(40)
    with torch.no_grad():
        checkpoint(loss, z0.requires_grad_(), z1, use_reentrant=True)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        checkpoint(loss, z0.detach(), z1, use_reentrant=True)
    assert counts(loss.threshold) == [0, 0, 0]


def test_a_loss_without_checkpointing_in_eval_or_without_gradients_stores_nothing():
    loss = HEXLoss(threshold=adaptive())
    z0, z1 = views(40)
    with torch.no_grad():
        loss(z0.requires_grad_(), z1)
    loss(z0.detach(), z1)
    loss.eval()(z0, z1)
    assert counts(loss.threshold) == [0, 0, 0]


def test_a_learned_temperature_alone_is_training():
    """Embeddings of a frozen encoder."""
    tau = nn.Parameter(f64(0.1))
    for loss, inputs in (
        (HEXLoss(tau, threshold=adaptive(lagged=True)), views(40)),
        (
            HEXSupConLoss(tau, threshold=adaptive(lagged=True)),
            (views(40)[0], torch.arange(40) // 2),
        ),
        (
            HEXCrossEntropyLoss(tau, threshold=adaptive(lagged=True)),
            (views(40)[0], torch.zeros(40, dtype=torch.int64)),
        ),
    ):
        loss(*inputs).backward()
        assert counts(loss.threshold) == [1, 0, 0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's
@pytest.mark.parametrize("options", STATEFUL, ids=str)
def test_a_checkpoint_in_a_compiled_step_has_the_bits_of_the_step(options):
    def trained(compiled: bool):
        torch._dynamo.reset()
        loss = HEXLoss(threshold=adaptive(**options))
        run = lambda *z: checkpoint(loss, *z, use_reentrant=False)  # noqa: E731
        step = torch.compile(run, backend="aot_eager") if compiled else loss
        seen = [x for k in range(4) for x in train(step, *views(40, k, shift=k))]
        return [*seen, loss.threshold.state.clone()]

    assert same(trained(False), trained(True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's
@pytest.mark.filterwarnings("ignore:.*is not a leaf Tensor is being accessed:UserWarning")
@pytest.mark.parametrize(
    ("number", "reentrant"),
    ((0, False), (0, True), (1, False), (2, True), (3, False)),
    ids=("hex", "hex, reentrant", "supcon", "entropy, reentrant", "guide"),
)
def test_a_loss_that_is_compiled_in_a_checkpoint_trains_as_without_one(number, reentrant):
    options = ({"momentum": 0.5}, {"lagged": True})[(number + reentrant) % 2]

    def trained(compiled: bool):
        torch._dynamo.reset()
        loss, function = list(losses(options))[number]
        inside = torch.compile(function, backend="aot_eager") if compiled else function
        run = lambda *z: checkpoint(inside, *z, use_reentrant=reentrant)  # noqa: E731
        step = run if compiled else function
        seen = [x for k in range(4) for x in train(step, *views(40, k, shift=k))]
        return [*seen, loss.threshold.state.clone()]

    assert same(trained(False), trained(True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's
def test_a_whole_graph_in_a_checkpoint_is_refused_and_says_what_to_do():
    torch._dynamo.reset()
    loss = torch.compile(HEXLoss(threshold=adaptive(lagged=True)), fullgraph=True)
    with pytest.raises(Exception, match="compile around an activation checkpoint"):
        checkpoint(loss, *(z.requires_grad_() for z in views(40)), use_reentrant=False)
