# SPDX-License-Identifier: MIT
"""Losses that gather, each called alike by a rank on its part of a batch and by one process on the
whole, for the tests of `gather_distributed`.

One process has the candidates of all ranks: where the negatives are a rank's own queue, the whole
repeats that queue for each image of the rank.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from hex import HEXCrossEntropyLoss, HEXLoss, HEXSupConLoss, InfoNCELoss, ThresholdTracker, ops

FEATURES, D, K = 12, 10, 9
TAU = 0.2


def adaptive(quantile: float = 0.9, **options: Any) -> ThresholdTracker:
    """Over negatives: the default, 0.99, has nothing in H of a batch as small as ours."""
    return ThresholdTracker.adaptive(quantile, **options)


class Case(NamedTuple):
    """loss(**options) called in one of CALLS."""

    loss: Callable[..., nn.Module]
    call: str
    options: dict[str, Any]  # a function in it makes the value, new for each loss
    gathered: int  # collectives of data in its forward

    def make(self, **more: Any) -> nn.Module:
        made = {name: value() if callable(value) else value for name, value in self.options.items()}
        return self.loss(**made, **more)


def criterion(**options) -> HEXLoss:
    """A threshold with a momentum, so that each step shows in the next."""
    return HEXLoss(threshold=adaptive(momentum=0.5), gather_distributed=True, **options)


class Encoded(NamedTuple):
    """What a loss is given."""

    z0: Tensor
    z1: Tensor
    own: Tensor  # (n, K, D)
    queue: Tensor  # (K, D) of a rank, (n, K, D) of one process
    logits: Tensor  # (n, 1 + K): the positive, and the queue
    labels: Tensor
    tau: Tensor

    def guide(self) -> tuple[Tensor, Tensor]:
        return self.z0.detach() ** 3, self.z1.detach() ** 3

    def three_views(self) -> Tensor:
        return torch.stack((self.z0, self.z1, self.z0 + self.z1), 1)


def _queue_groups(e: Encoded) -> tuple[Tensor, Tensor]:
    others = torch.arange(K) % 3
    return e.labels % 3, others if e.queue.dim() == 2 else others.expand(len(e.z0), K)


def _ignored(e: Encoded) -> Tensor:
    return (torch.arange(K) + e.labels[:, None]) % 3 == 0


CALLS: dict[str, Callable[..., Tensor]] = {
    "views": lambda loss, e, **o: loss(e.z0, e.z1, **o),
    "groups": lambda loss, e, **o: loss(e.z0, e.z1, groups=e.labels, **o),
    "guide": lambda loss, e, **o: loss(e.z0, e.z1, guide=e.guide(), **o),
    "queue": lambda loss, e, **o: loss(e.z0, e.z1, e.queue, **o),
    "queue groups": lambda loss, e, **o: loss(e.z0, e.z1, e.queue, groups=_queue_groups(e), **o),
    "queue ignored": lambda loss, e, **o: loss(e.z0, e.z1, e.queue, ignored=_ignored(e), **o),
    "own": lambda loss, e, **o: loss(e.z0, e.z1, e.own, **o),
    "own ignored": lambda loss, e, **o: loss(e.z0, e.z1, e.own, ignored=_ignored(e), **o),
    "own guide": lambda loss, e, **o: loss(
        e.z0, e.z1, e.own, guide=(*e.guide(), e.own.detach() ** 3), **o
    ),
    "labels": lambda loss, e, **o: loss(torch.stack((e.z0, e.z1), 1), e.labels, **o),
    "one view": lambda loss, e, **o: loss(e.z0, e.labels, **o),
    "three views": lambda loss, e, **o: loss(e.three_views(), **o),
    "labels groups": lambda loss, e, **o: loss(
        torch.stack((e.z0, e.z1), 1), e.labels, groups=e.labels % 2, **o
    ),
    "views guide": lambda loss, e, **o: loss(
        e.three_views(), guide=e.three_views().detach() ** 3, **o
    ),
    "logits": lambda loss, e, **o: loss(e.logits, torch.zeros_like(e.labels), **o),
}


def _cross_entropy(**options: Any) -> nn.Module:
    return HEXCrossEntropyLoss(TAU, **options)


def _by_range() -> ThresholdTracker:
    return ThresholdTracker.fixed(0.8, normalize_rows=True)


def _by_positive() -> ThresholdTracker:
    return ThresholdTracker.by_positive(0.3)


_MEASURED = {"threshold": adaptive}
_RELEASED = _MEASURED | {"variant": "released"}
_OTHER = {"beta": 0.5, "tau_plus": 0.2}
CASES = {
    "ntxent": Case(HEXLoss, "views", _MEASURED, 3),
    "ntxent over all": Case(
        HEXLoss, "views", _OTHER | {"threshold": lambda: adaptive(0.93, over="all")}, 3
    ),
    "ntxent released": Case(HEXLoss, "views", _RELEASED, 3),
    "ntxent decoupled": Case(HEXLoss, "views", _MEASURED | {"decoupled": True}, 3),
    "ntxent at 0.3": Case(HEXLoss, "views", _OTHER | {"threshold": 0.3}, 2),
    "ntxent by range": Case(HEXLoss, "views", {"threshold": _by_range}, 2),
    "ntxent lagged": Case(HEXLoss, "views", {"threshold": lambda: adaptive(lagged=True)}, 2),
    "ntxent InfoNCE": Case(InfoNCELoss, "views", {}, 2),
    "cross": Case(HEXLoss, "views", _MEASURED | {"mode": "cross"}, 3),
    "cross released at 0.3": Case(
        HEXLoss, "views", {"threshold": 0.3, "variant": "released", "mode": "cross"}, 2
    ),
    "cross InfoNCE": Case(InfoNCELoss, "views", {"mode": "cross"}, 2),
    "query": Case(HEXLoss, "views", _MEASURED | {"mode": "query"}, 3),
    "query by range": Case(HEXLoss, "views", {"threshold": _by_range, "mode": "query"}, 2),
    "query InfoNCE": Case(InfoNCELoss, "views", {"mode": "query"}, 2),
    "groups": Case(HEXLoss, "groups", {}, 2),
    "groups cross": Case(HEXLoss, "groups", {"mode": "cross"}, 2),
    "groups query": Case(HEXLoss, "groups", _OTHER | {"mode": "query"}, 2),
    "guide": Case(HEXLoss, "guide", _MEASURED, 3),
    "guide cross": Case(HEXLoss, "guide", _MEASURED | {"mode": "cross"}, 3),
    "guide query": Case(HEXLoss, "guide", _MEASURED | {"mode": "query"}, 3),
    "queue": Case(HEXLoss, "queue", _MEASURED, 2),
    "queue released": Case(HEXLoss, "queue", _RELEASED, 2),
    "queue at 0.3": Case(HEXLoss, "queue", {"threshold": 0.3}, 1),
    "queue InfoNCE": Case(InfoNCELoss, "queue", {}, 1),
    "queue groups": Case(HEXLoss, "queue groups", {}, 1),
    "queue ignored": Case(HEXLoss, "queue ignored", _MEASURED, 2),
    "own": Case(HEXLoss, "own", _MEASURED | _OTHER, 2),
    "own ignored": Case(HEXLoss, "own ignored", _MEASURED, 2),
    "own over all": Case(HEXLoss, "own", {"threshold": lambda: adaptive(0.8, over="all")}, 2),
    "own guide": Case(HEXLoss, "own guide", _MEASURED, 2),
    "labels": Case(HEXSupConLoss, "labels", _MEASURED, 3),
    "labels inside": Case(HEXSupConLoss, "labels", _MEASURED | {"positives": "inside"}, 3),
    "labels released": Case(HEXSupConLoss, "labels", _RELEASED | {"base_temperature": 0.07}, 3),
    "labels excluded": Case(HEXSupConLoss, "labels", _MEASURED | {"variant": "excluded"}, 3),
    "labels decoupled": Case(
        HEXSupConLoss, "labels", _MEASURED | {"decoupled": True, "positives": "inside"}, 3
    ),
    "labels of one view": Case(HEXSupConLoss, "one view", _MEASURED, 3),
    "labels and groups": Case(HEXSupConLoss, "labels groups", {}, 2),
    "SupCon": Case(HEXSupConLoss, "labels", {"threshold": None}, 2),
    "three views": Case(HEXSupConLoss, "three views", _MEASURED | _OTHER, 3),
    "three views inside": Case(HEXSupConLoss, "three views", {
        "threshold": lambda: adaptive(0.8, over="all"), "positives": "inside"
    }, 3),
    "three views and a guide": Case(HEXSupConLoss, "views guide", _MEASURED, 3),
    "by positive": Case(HEXLoss, "views", {"threshold": _by_positive, "variant": "excluded"}, 2),
    "by positive of a guide": Case(
        HEXLoss, "guide", {"threshold": _by_positive, "mode": "query"}, 2
    ),
    "by positive with a queue": Case(HEXLoss, "queue", {"threshold": _by_positive}, 1),
    "logits by positive, eps above 1": Case(
        _cross_entropy, "logits", {"threshold": lambda: ThresholdTracker.by_positive(-0.3)}, 1
    ),
    "logits by positive": Case(_cross_entropy, "logits", {"threshold": _by_positive}, 1),
    "logits": Case(_cross_entropy, "logits", _MEASURED, 2),
    "logits with the own column": Case(_cross_entropy, "logits", {
        "threshold": lambda: adaptive(0.8, over="all"), "self_column": True
    }, 2),
    "logits released at 0.3": Case(
        _cross_entropy, "logits", {"threshold": 0.3, "variant": "released"}, 1
    ),
}  # fmt: skip


# ---- batches ------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Images, what an encoder makes z0, z1, own and queue of, and their labels."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    labels: Tensor

    def encoded(
        self, encode: Callable[..., Any], rounded: Callable[[Tensor], Tensor] = Tensor.double
    ) -> Encoded:
        """By an `Encoder`. The loss is given what `rounded` makes of the float64."""
        z0, z1, own, queue, tau = encode(*self.inputs)
        u0, u1, u = (nn.functional.normalize(z, dim=-1) for z in (z0, z1, queue))
        columns = torch.cat((u1[:, None], u.expand(len(z0), K, D)), 1)
        logits = (u0[:, None] * columns).sum(2) / tau
        return Encoded(*map(rounded, (z0, z1, own, queue, logits)), self.labels, tau)


class Batch:
    """A batch of sum(cut) images, of which rank r has cut[r], one after another.

    With shared=True all ranks have the same queue.
    """

    def __init__(self, cut: Iterable[int], seed: int = 0, shared: bool = False) -> None:
        self.cut = tuple(cut)
        images, ranks = sum(self.cut), len(self.cut)
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, FEATURES, generator=generator, dtype=torch.float64)

        self.labels = torch.randint(7, (images,), generator=generator)
        x = noise(7)[self.labels]
        self.x = x + noise(images), x + noise(images)
        self.own, self.queues = noise(images, K), noise(1 if shared else ranks, K)
        if shared:
            self.queues = self.queues.expand(ranks, K, FEATURES)

    def whole(self) -> Part:
        owner = torch.arange(len(self.cut)).repeat_interleave(torch.tensor(self.cut))
        return Part((*self.x, self.own, self.queues[owner]), self.labels)

    def part(self, rank: int) -> Part:
        its = slice(sum(self.cut[:rank]), sum(self.cut[: rank + 1]))
        x0, x1 = self.x
        return Part((x0[its], x1[its], self.own[its], self.queues[rank]), self.labels[its])

    def rows(self) -> dict[str, tuple[int, ...]]:
        """The argument that an uneven cut needs."""
        return {} if len(set(self.cut)) == 1 else {"rows": self.cut}


class Encoder(nn.Module):
    """Of float64, with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, D)).double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 3)
        self.tau = nn.Parameter(torch.tensor(TAU, dtype=torch.float64))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """What the body makes of each, and the temperature."""
        return [*map(self.body, inputs), self.tau * 1]


def leaves(part: Part, dtype: torch.dtype) -> Encoded:
    """Embeddings of the dtype, which have gradients themselves, as the temperature has."""
    x0, x1, own, queue = part.inputs
    logits = (x0[:, None] * queue).sum(2) / 20
    z = [x.to(dtype).clone().requires_grad_() for x in (x0, x1, own, queue, logits)]
    return Encoded(*z, part.labels, torch.tensor(TAU, dtype=torch.float64, requires_grad=True))


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """What a device without kernels runs: the composed formulas."""
    with mock.patch.object(ops, "_KERNELS", {"meta"}), mock.patch.object(ops, "_warned", {"cpu"}):
        yield


def total(value: Tensor) -> Tensor:
    """What is done with the rows of all ranks: weights that all know."""
    if value.dim() == 0:
        return value
    return (value * torch.linspace(0.5, 1.5, len(value), dtype=torch.float64)).sum()


def statistics(loss: Any) -> dict[str, Tensor]:
    """Of the last batch, and the threshold's state where there is one."""
    found = loss.last._asdict()
    return found if loss.threshold is None else found | {"state": loss.threshold.state.clone()}


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def assert_close(ours: Iterable[Tensor], wanted: Iterable[Tensor]) -> None:
    """The numbers of two steps in float64."""
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-11, atol=1e-13)


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor], about: object) -> None:
    """To the bit; NaN is NaN."""
    assert one.keys() == two.keys()
    for name in one:
        a, b = one[name], two[name]
        same = a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        assert same and torch.equal(a.isnan(), b.isnan()), (name, about)
