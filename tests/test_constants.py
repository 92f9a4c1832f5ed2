# SPDX-License-Identifier: MIT
"""Tensors that are made once, of a temperature and of what a problem lacks (problem.py): whatever
is at work around a call, those that it keeps serve every later one, and it can use those there are.
"""

import pytest
import torch
from conftest import problem
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from hex import HEXLoss, InfoNCELoss, hex_loss
from hex import problem as problems

Z = problem("cluster", 8, 4, dtype=torch.float32).inputs


class Passing(TorchFunctionMode):
    """Gives what every function gives, as a subclass."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result.as_subclass(Other) if type(result) is torch.Tensor else result


class Other(torch.Tensor):
    pass


def fake(criterion):
    with FakeTensorMode() as mode:
        type(criterion)(0.3)(*(mode.from_tensor(z) for z in Z))


def inference(criterion):
    with torch.inference_mode():
        criterion(*Z)


def function_mode(criterion):
    with Passing():
        criterion(*Z)


def default_device(criterion):
    with torch.device("meta"):
        criterion(*Z)


def functionalize(criterion):
    with pytest.raises(RuntimeError, match="Functionalize rule"):  # torch has none
        torch.func.functionalize(criterion)(*Z)


def vmap(criterion):
    torch.func.vmap(criterion)(*(torch.stack((z, z)) for z in Z))


def grad(criterion):
    torch.func.grad(criterion)(*Z)


def symbols(criterion):
    names = [node.name for node in make_fx(criterion)(*Z).graph.nodes]
    assert {"full", "new_empty"} <= set(names)


def jit_trace(criterion):
    torch.jit.trace(criterion.forward, Z)


AROUND = [fake, inference, function_mode, default_device, functionalize,
          vmap, grad, symbols, jit_trace]  # fmt: skip


def train(criterion):
    z = [z.clone().requires_grad_() for z in Z]
    value = criterion(*z)
    value.backward()
    return value.detach(), *(x.grad for x in z)


@pytest.fixture
def nothing_kept():
    problems._constants.clear()
    yield
    problems._constants.clear()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("loss", [lambda: HEXLoss(0.3), lambda: InfoNCELoss(0.3)])
@pytest.mark.parametrize("around", AROUND)
def test_what_a_call_keeps_is_ordinary_and_what_is_kept_serves_every_call(
    around, loss, nothing_kept
):
    wanted = train(loss())
    for kept in (False, True):
        if not kept:
            problems._constants.clear()
        around(loss())
        for x in (x for made in problems._constants.values() for x in made):
            assert type(x) is torch.Tensor and x.is_cpu and not x.is_inference()
            assert not torch._C._functorch.is_functorch_wrapped_tensor(x)
        found = train(loss())
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert problems._constants


def test_a_schedule_of_the_temperature_keeps_few(nothing_kept):
    criterion = InfoNCELoss()
    for step in range(200):
        criterion.temperature = 0.1 + step / 1000
        tau = torch.tensor(criterion.temperature, dtype=torch.float64)
        assert criterion(*Z) == InfoNCELoss(tau)(*Z)
    assert len(problems._constants) <= 64


def test_who_writes_to_what_a_loss_has_saved_changes_no_other_loss(nothing_kept):
    wanted = train(InfoNCELoss(0.3))
    value = InfoNCELoss(0.3)(*(z.clone().requires_grad_() for z in Z))
    numbers = [x for x in value.grad_fn.saved_tensors if x.dim() == 0]
    assert numbers
    for x in numbers:
        x.mul_(2)
    assert all(torch.equal(a, b) for a, b in zip(train(InfoNCELoss(0.3)), wanted, strict=True))


def test_a_threshold_and_a_temperature_may_be_one_number(nothing_kept):
    z = [z.double().requires_grad_() for z in Z]
    apart = torch.tensor(0.4).double()
    values = [hex_loss(*z, eps=0.4, temperature=0.4), hex_loss(*z, eps=apart, temperature=0.4)]
    first, second = (torch.autograd.grad(v, z, create_graph=True) for v in values)
    assert values[0] != hex_loss(*z, eps=0.9, temperature=0.4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    twice = [torch.autograd.grad(sum(g.square().sum() for g in gs), z) for gs in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))


def test_a_tensor_that_has_outlived_its_transform_is_what_it_was():
    leaked = []

    def leak(z0):
        leaked.append(z0)
        return z0.sum()

    torch.func.grad(leak)(Z[0])
    assert torch._C._functorch.is_functorch_wrapped_tensor(leaked[0])
    criterion = HEXLoss(0.3)
    assert criterion(leaked[0], Z[1]) == HEXLoss(0.3)(*Z)
    assert criterion.last is None
