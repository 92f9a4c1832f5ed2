# SPDX-License-Identifier: MIT
"""The losses in training loops as they are found: sharded, in mixed precision, with hooks, with
settings of torch's own. Each is held against the plain step.
"""

import contextlib

import pytest
import ranks
import torch
from conftest import default_dtype
from data import f64
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from hex import HEXCrossEntropyLoss, HEXLoss, HEXSupConLoss, ThresholdTracker

LOSSES = {
    "hex": lambda: HEXLoss(threshold=tracker()),
    "sup_con": lambda: HEXSupConLoss(threshold=tracker()),
    "cross_entropy": lambda: HEXCrossEntropyLoss(0.1, threshold=tracker()),
}


def tracker() -> ThresholdTracker:
    return ThresholdTracker.adaptive(0.9, momentum=0.5)


class Model(nn.Module):
    def __init__(self, kind: str = "hex", dtype=torch.float64) -> None:
        super().__init__()
        self.kind = kind
        self.head = nn.Linear(8, 8, dtype=dtype)
        self.criterion = LOSSES[kind]()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        if not self.head.weight.is_meta:
            with torch.no_grad():
                for p in self.head.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))

    def forward(self, z0, z1):
        return call(self.criterion, self.kind, self.head(z0), self.head(z1))


def call(loss, kind, z0, z1):
    if kind == "hex":
        return loss(z0, z1)
    target = torch.arange(len(z0)) % 5
    if kind == "sup_con":
        return loss(torch.stack([z0, z1], 1), target)
    return loss(z0 @ z1.T / 10, target)


def batches(steps: int = 3, images: int = 40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(2, images, 8, generator=generator, dtype=dtype).unbind()


def train(model, steps=3, dtype=torch.float64, around=contextlib.nullcontext):
    """Weights and statistics after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for z0, z1 in batches(steps, dtype=dtype):
        optimizer.zero_grad()
        with around():
            value = model(z0, z1)
        value.backward()
        optimizer.step()
    return value.detach()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


# ---- settings of torch --------------------------------------------------------------------------


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "deterministic": deterministic,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_setting_of_torch_changes_no_bit(kind, setting):
    plain, under = Model(kind), None
    train(plain)
    with SETTINGS[setting]():
        under = Model(kind)
        train(under)
    assert_same(weights(plain), weights(under))
    assert torch.equal(plain.criterion.threshold.state, under.criterion.threshold.state)
    assert plain.criterion.statistics() == under.criterion.statistics()


# ---- loops --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_accumulate_over_several_calls(kind):
    model, total = Model(kind), None
    for z0, z1 in batches():
        model(z0, z1).backward()
    got = [p.grad.clone() for p in model.parameters()]
    other = Model(kind)
    for z0, z1 in batches():
        grads = torch.autograd.grad(other(z0, z1), list(other.parameters()))
        total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
    assert_same(got, total)


@pytest.mark.parametrize("kind", LOSSES)
def test_hooks_of_tensors_and_modules_see_the_gradient_and_may_change_it(kind):
    model, seen = Model(kind), []
    model.criterion.register_forward_hook(lambda _, __, value: value * 2)
    model.criterion.register_full_backward_hook(lambda _, grads, __: seen.append(grads[0].clone()))
    z0, z1 = next(batches())
    z0 = z0.requires_grad_()
    z0.register_hook(lambda grad: grad * 3)
    model(z0, z1).backward()
    other = Model(kind)
    y0 = z0.detach().requires_grad_()
    other(y0, z1).backward()
    torch.testing.assert_close(z0.grad, 6 * y0.grad, rtol=1e-12, atol=0)
    assert len(seen) == 1 and seen[0].isfinite().all()


@pytest.mark.parametrize("kind", LOSSES)
def test_in_mixed_precision_with_a_scaler_a_step_with_an_infinity_is_left_out(kind):
    model = Model(kind, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seen = [weights(model)]
    for step, (z0, z1) in enumerate(batches(dtype=torch.float32)):
        if step == 1:
            z0 = z0.clone()
            z0[3, 2] = torch.inf
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = model(z0, z1)
        assert value.dtype == torch.float32
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(weights(model))
    assert not torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[2][0], seen[3][0])
    assert_same(seen[1], seen[2])
    threshold = model.criterion.threshold
    assert [int(threshold.updates), int(threshold.skipped)] == [2, 1]


class Wrapped(torch.Tensor):
    """A subclass as libraries have them, with torch's own way through."""


@pytest.mark.parametrize("kind", LOSSES)
def test_a_subclass_of_tensor_is_a_tensor(kind):
    z0, z1 = next(batches())
    loss, other = LOSSES[kind](), LOSSES[kind]()
    w0 = z0.clone().as_subclass(Wrapped).requires_grad_()
    y0 = z0.clone().requires_grad_()
    value, expected = call(loss, kind, w0, z1), call(other, kind, y0, z1)
    value.backward()
    expected.backward()
    assert torch.equal(value.as_subclass(torch.Tensor), expected)
    assert torch.equal(w0.grad.as_subclass(torch.Tensor), y0.grad)


# ---- sharded ------------------------------------------------------------------------------------


WAYS = ("FSDP", "fully_shard", "fully_shard from meta")


def sharded(rank: int):
    return {way: sharded_step(rank, way) for way in WAYS}


def sharded_step(rank: int, way: str):
    if way == "FSDP":
        model = FullyShardedDataParallel(Model(), device_id=torch.device("cpu"))
    elif way == "fully_shard":
        model = Model()
        fully_shard(model)
    else:
        with torch.device("meta"):
            model = Model()
        fully_shard(model)
        model.to_empty(device="cpu")
        model.criterion.threshold.reset_parameters()
        full = Model().head
        for sharded_p, whole in zip(model.head.parameters(), full.parameters(), strict=True):
            first = rank * sharded_p.to_local().shape[0]
            with torch.no_grad():
                local = whole[first : first + sharded_p.to_local().shape[0]]
                sharded_p.to_local().copy_(local)
    value = train(model)
    return f64([float(value), *model.criterion.threshold.state.tolist()])


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return ranks.run(sharded, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_model_trains_as_a_whole_one(way, seen):
    """Both ranks have the same batches, so that the mean of their gradients is that of one."""
    model = Model()
    value = train(model)
    wanted = f64([float(value), *model.criterion.threshold.state.tolist()])
    for got in (rank[way] for rank in seen):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)
