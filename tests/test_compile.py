# SPDX-License-Identifier: MIT
"""Every loss under torch.compile: inside and around func transforms, at sizes that change, with
Python numbers that change, and with one tensor as several arguments.

What is compared: the compiled call with the plain one. The same kernels do both, so in float64 they
may differ by what the order of torch's own operators around them makes of a rounding error.
test_transforms.py has what a module keeps over compiled steps.
"""

import pytest
import torch
from data import f64
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hex import (
    HEXCrossEntropyLoss,
    HEXLoss,
    HEXSupConLoss,
    InfoNCELoss,
    ThresholdTracker,
    hex_cross_entropy,
    hex_loss,
    hex_sup_con,
    info_nce,
)
from hex.open_clip import HEXClipLoss

B, D = 12, 5

pytestmark = [
    # What torch itself does while it traces an autograd.Function.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*which is not a leaf Tensor is being accessed:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Rows about a common direction: at eps = 0.4 some negatives are in H and some are not."""
    generator = torch.Generator().manual_seed(seed)
    return 0.7 + torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_same(ours: Tensor, eager: Tensor) -> None:
    assert eager.abs().max() > 0
    torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12 * eager.abs().max().item())


def losses():
    """Name and loss of an embedding (B, D): every function and module, mode and operator."""
    z1, queue, own = numbers(B, D, seed=1), numbers(9, D, seed=2), numbers(B, 9, D, seed=3)
    labels, groups, others = torch.arange(B) % 4, torch.arange(B) // 3, torch.arange(9) // 3
    options = {"eps": 0.4, "temperature": 0.3}
    same = labels[:, None] == labels
    guide = numbers(B, D, seed=7), numbers(B, D, seed=8)
    cross, with_queue = (HEXLoss(0.3, threshold=0.4, mode=m) for m in ("cross", "ntxent"))
    yield "hex_loss", lambda z: hex_loss(z, z1, **options)
    yield "hex_loss own", lambda z: hex_loss(z, z1, own, **options)
    yield "guide cross", lambda z: cross(z, z1, guide=guide)
    yield "groups shared", lambda z: with_queue(z, z1, queue, groups=(groups, others))
    tracker = ThresholdTracker.adaptive(0.9, over="negatives")
    adaptive = HEXLoss(0.3, threshold=tracker, mode="query")
    info, sup_con, logits = InfoNCELoss(0.3), HEXSupConLoss(0.3), HEXCrossEntropyLoss(0.3)
    yield "HEXLoss", lambda z: adaptive(z, z1)
    yield "info_nce", lambda z: info_nce(z, z1, queue)
    yield "InfoNCELoss", lambda z: info(z, z1)
    yield "labels", lambda z: hex_sup_con(z, labels, **options)
    yield "mask", lambda z: hex_sup_con(z, mask=same, **options)
    yield "ignored", lambda z: adaptive(z, z1, ignored=same)
    yield "labels ignored", lambda z: hex_sup_con(z, labels, ignored=~same, **options)
    yield "HEXSupConLoss", lambda z: sup_con(torch.stack((z, z1), 1), groups=groups)
    yield "cross entropy", lambda z: hex_cross_entropy(z, labels, **options)
    yield "HEXCrossEntropyLoss", lambda z: logits(z @ z1.T, labels)


LOSSES = dict(losses())

TRANSFORMS = {
    "grad": torch.func.grad,
    "vmap of grad": lambda loss: (
        lambda z: torch.vmap(torch.func.grad(loss))(torch.stack((z, z.flip(0) * z)))
    ),
    "grad of grad": lambda loss: torch.func.grad(lambda z: torch.func.grad(loss)(z).square().sum()),
    "vjp": lambda loss: lambda z: torch.func.vjp(loss, z)[1](torch.ones((), dtype=z.dtype))[0],
}
WITH_ALL = ("hex_loss", "HEXLoss", "labels")


@pytest.mark.filterwarnings("ignore:ThresholdTracker. the 0.99 quantile of a row")
@pytest.mark.parametrize(
    ("name", "transform"),
    [(n, t) for n in LOSSES for t in TRANSFORMS if t == "grad" or n in WITH_ALL],
)
def test_a_func_transform_around_or_inside_what_is_compiled_gives_the_eager_gradient(
    name, transform
):
    loss, transform, z = LOSSES[name], TRANSFORMS[transform], numbers(B, D)
    eager = transform(loss)(z)
    assert_same(torch.compile(transform(loss), backend="eager", fullgraph=True)(z), eager)
    if name in WITH_ALL:
        assert_same(transform(torch.compile(loss, backend="eager"))(z), eager)


# ---- sizes that change ---------------------------------------------------------------------------

SIZES = (2, 5, 16, 17, 96, 97, 192, 193, 385, 513)  # around the limits of what the core keeps


class Labelled(nn.Module):
    """A loss of embeddings and labels as one of the two inputs that the tests here hand over."""

    def __init__(self, loss: nn.Module, views: bool = False) -> None:
        super().__init__()
        self.loss, self.views = loss, views

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        labels = torch.arange(z0.shape[0], device=z0.device) % 2
        return self.loss(torch.stack((z0, z1), 1) if self.views else z0, labels)


def resizable() -> dict[str, nn.Module]:
    tracker = ThresholdTracker.adaptive(0.9, over="negatives")
    return {
        **{mode: HEXLoss(threshold=0.4, mode=mode) for mode in ("ntxent", "query", "cross")},
        "adaptive": HEXLoss(threshold=tracker),
        "views": Labelled(HEXSupConLoss(threshold=0.4), views=True),
        "labels": Labelled(HEXSupConLoss(threshold=0.4)),
        "logits": Labelled(HEXCrossEntropyLoss(0.1, threshold=0.4)),
    }


@pytest.mark.parametrize(
    ("name", "ranged"),
    [*((name, True) for name in resizable() if name != "cross"), ("labels", False)],
)
def test_one_graph_serves_every_batch_size(name, ranged):
    compiled, eager = resizable()[name], resizable()[name]
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        compiled, backend=counter, fullgraph=True, dynamic=None if ranged else True
    )
    graphs = set()
    for images in SIZES:
        results = []
        for loss in (step, eager):
            z0, z1 = numbers(2, images, D).unbind()
            z0, z1 = z0.clone().requires_grad_(), z1.clone()
            if ranged:
                for z in (z0, z1):
                    torch._dynamo.mark_dynamic(z, 0, min=2, max=4096)
            value = loss(z0, z1)
            value.backward()
            results.append((value, z0.grad))
        assert all(map(torch.equal, *results)), images
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


FACTORS = numbers(5, D)
UNKNOWN = {
    "ntxent": lambda z0, z1, k: HEXLoss(threshold=0.4)(z0, z1),
    "guide": lambda z0, z1, k: HEXLoss(threshold=0.4)(z0, z1, guide=(z1, z0)),
    "paired": lambda z0, z1, k: InfoNCELoss()(z0, z1, z1[:, None] * FACTORS),
    "labels": lambda z0, z1, k: HEXSupConLoss(threshold=0.4)(z0, k, groups=k),
    "mask": lambda z0, z1, k: HEXSupConLoss(threshold=0.4)(z0, mask=k[:, None] == k),
    "ignored": lambda z0, z1, k: HEXLoss(threshold=0.4)(z0, z1, ignored=k[:, None] == k),
    "logits": lambda z0, z1, k: HEXCrossEntropyLoss(0.1, threshold=0.4)(z0, k),
    "clip": lambda z0, z1, k: HEXClipLoss(threshold=0.4)(z0, z1, 2.0),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_sizes_that_the_compiler_does_not_know_are_taken_for_right_and_guarded(name):
    backend = "aot_eager" if name in ("ntxent", "labels", "logits") else "eager"
    loss = torch.compile(UNKNOWN[name], backend=backend, fullgraph=True)
    labels = torch.arange(B) % 2
    for z0, z1, k in ((*numbers(2, B, D), labels), (*numbers(2, 5, D), labels[:5].clone())):
        expected = UNKNOWN[name](z0, z1, k)
        for x in (z0, z1, k):
            torch._dynamo.decorators.mark_unbacked(x, 0)
        assert_same(loss(z0, z1, k), expected)
    z0, z1, k = numbers(B, D), numbers(7, D), labels[:6].clone()
    for x in (z0, z1, k):
        torch._dynamo.decorators.mark_unbacked(x, 0)
    with pytest.raises(AssertionError, match=r"size\(\)\[0\] == "):  # torch's guard
        loss(z0, z1, k)


# strict export says that a module keeps its last statistics
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize(
    ("name", "strict"),
    [*((name, False) for name in resizable()), ("ntxent", True), ("views", True)],
)
def test_a_loss_is_exported_for_a_range_of_batch_sizes(name, strict):
    module = resizable()[name].eval()
    given = tuple(numbers(2, 100, D).unbind())
    images = torch.export.Dim("B", min=2)  # also where the cosines are too many to be kept
    program = torch.export.export(
        module, given, dynamic_shapes=({0: images},) * 2, strict=strict
    ).module()
    for size in (3, 17, 400):
        z = tuple(numbers(2, size, D).unbind())
        assert_same(program(*z), module(*z))


# ---- Python numbers that change ------------------------------------------------------------------

NUMBERS = {
    "hex_loss temperature": lambda z, t: hex_loss(z, z.flip(0), eps=0.4, temperature=t),
    "hex_loss eps": lambda z, t: hex_loss(z, z.flip(0), eps=t),
    "hex_sup_con eps": lambda z, t: hex_sup_con(z, torch.arange(B) % 4, eps=t, temperature=t),
    "hex_cross_entropy eps": lambda z, t: hex_cross_entropy(
        z, torch.arange(B) % 4, eps=t, temperature=t
    ),
}


def count(counter: CompileCounterWithBackend, call) -> list[int]:
    counts = []
    for k in range(10):  # more than the compiler's limit of graphs
        call(0.1 + 0.05 * k)
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_with_each_call_makes_no_graph_after_the_second(name):
    loss, z, counter = NUMBERS[name], numbers(B, D), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    counts = count(counter, lambda t: assert_same(compiled(z, t), loss(z, t)))
    assert counts[0] < counts[-1] == counts[2]


@pytest.mark.parametrize("name", ("adaptive", "views", "logits"))
def test_a_temperature_attribute_that_changes_makes_no_graph_after_the_second(name):
    module, counter = resizable()[name], CompileCounterWithBackend("aot_eager")
    loss = getattr(module, "loss", module)
    z = tuple(numbers(2, B, D).unbind())
    compiled = torch.compile(module, backend=counter, fullgraph=True)

    def step(t: float) -> None:
        loss.temperature = t
        assert_same(compiled(*z), module(*z))

    counts = count(counter, step)
    assert counts[0] < counts[-1] == counts[2]


# ---- one tensor as several arguments -------------------------------------------------------------

Z, OTHER, IDS, ONE = numbers(B, D), numbers(B, D, seed=1), torch.arange(B) // 3, f64(0.3)
GROUPED = HEXLoss(0.3, threshold=0.4)
SUP_CON = HEXSupConLoss(0.3, threshold=0.4)
TWICE = {
    "views": lambda z: hex_loss(z, z, eps=0.4),
    "all three": lambda z: hex_loss(z, z, z, eps=0.4),
    "guide of all": lambda z: GROUPED(z, OTHER, z, guide=(z, OTHER, z)),
    "groups": lambda z: GROUPED(z, OTHER, Z, groups=(IDS, IDS)),
    "temperature is eps": lambda z: hex_loss(z, OTHER, eps=ONE, temperature=ONE),
    "guide of features": lambda z: SUP_CON(z, IDS, guide=z),
    "groups are labels": lambda z: SUP_CON(z, IDS, groups=IDS),
    "logits": lambda z: hex_cross_entropy(z, IDS, eps=ONE, temperature=ONE),
}


@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_as_several_arguments_compiles_into_one_graph(name):
    def step(loss) -> tuple[Tensor, Tensor]:
        z = Z.clone().requires_grad_()
        value = loss(z)
        value.backward()
        return value.detach(), z.grad

    eager = step(TWICE[name])
    compiled = step(torch.compile(TWICE[name], backend="aot_eager", fullgraph=True))
    for ours, expected in zip(compiled, eager, strict=True):
        assert_same(ours, expected)
