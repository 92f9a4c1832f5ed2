# SPDX-License-Identifier: MIT
"""What the tests of labels, groups, guides and logits share: a call of the raw operators as one
object, and its comparison with hex/reference.py. The counterpart of conftest.Problem.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from conftest import assert_as_good_as_torch
from data import eps_in_a_gap, f64, views
from torch import Tensor

from hex import ops, reference

HEX = torch.ops.hex
PAIRINGS = ("self", "pair", "queue")
SOURCES = ("cosines", "groups", "guide")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: `differentiable` are the tensors with a gradient, tau the last of them."""

    name: str  # "labelled" or "logits"
    tensors: tuple[Tensor, ...] = dataclasses.field(repr=False)  # up to and with tau
    first: tuple[Any, ...]  # pairing; or given
    variant: int
    positives: int
    beta: float
    tau_plus: float
    about: str = ""

    def __str__(self) -> str:
        return self.about

    @property
    def places(self) -> tuple[int, ...]:
        """Of what has a gradient, in `tensors`."""
        if self.name == "logits":
            return (0, 4)
        return (0, 10) if self.first == (0,) else (0, 1, 10)

    @property
    def tau(self) -> float:
        return self.tensors[-1].item()

    @property
    def dtype(self) -> torch.dtype:
        used = self.tensors[:1] if self.name == "logits" or self.first == (0,) else self.tensors[:2]
        return torch.float64 if any(z.dtype == torch.float64 for z in used) else torch.float32

    def options(self, reduction: int) -> tuple[Any, ...]:
        kind = () if self.name == "logits" else (self.positives,)
        return *self.first, reduction, self.variant, *kind, self.beta, self.tau_plus

    def forward(self, reduction: int = 0, *changed: Tensor):
        """The operator and its arguments, with other differentiable tensors if given."""
        tensors = list(self.tensors)
        for place, value in zip(self.places, changed, strict=False):
            tensors[place] = value
        return getattr(HEX, f"{self.name}_forward").default, (*tensors, *self.options(reduction))

    def backward(self, reduction: int = 0, needs: int = 7):
        op, arguments = self.forward(0)
        stats = op(*arguments)[1]
        rows = self.grad_output()
        grad = rows if reduction == 0 else rows[0]
        if self.name == "logits":
            logits, target, score, _, tau = self.tensors
            arguments = grad, logits, target, score, tau, stats, reduction, self.beta, needs
        else:
            *inputs, _, tau = self.tensors
            arguments = grad, *inputs, tau, stats, *self.first, reduction, self.beta, needs
        return getattr(HEX, f"{self.name}_backward").default, arguments

    def grad_output(self) -> Tensor:
        rows = self.tensors[0].shape[0]
        return torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(self.dtype)

    def rows(self, *changed: Tensor) -> Tensor:
        """The kernels' loss of each row, differentiable."""
        function = ops.labelled.loss if self.name == "labelled" else ops.logits.loss
        return function(*self.forward(0, *changed)[1])[0]

    def plain(self, *changed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's rows, |H| and share."""
        tensors = list(self.forward(0, *changed)[1][: len(self.tensors)])
        rest = (self.beta, self.tau_plus, self.variant, self.positives)
        if self.name == "labelled":
            return reference.labelled_rows(*tensors, *self.first, *rest)
        return reference.logits_rows(*tensors, *self.first, *rest[:3])

    def values(self, function, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows and gradients of a function of the differentiable tensors, in a dtype."""
        z = [self.tensors[k] for k in self.places]
        z = [t.to(dtype if t.dim() else torch.float64).detach().requires_grad_() for t in z]
        rows = function(*z)
        rows = rows[0] if isinstance(rows, tuple) else rows
        return rows.detach(), torch.autograd.grad(rows, z, self.grad_output().to(rows))


def labelled(
    N: int = 23, D: int = 7, pairing: str = "self", source: str = "cosines", *, M: int = 31,
    kind: str = "cluster", labels: int = 5, masked: bool = False,
    dtype: torch.dtype = torch.float64, variant: str = "paper", positives: str = "outside",
    near: float = 0.3, tau: float = 0.1, beta: float = 1.0, tau_plus: float = 0.1, seed: int = 0,
) -> Call:  # fmt: skip
    """Embeddings of data.py with labels drawn from `labels` of them."""
    generator = torch.Generator().manual_seed(seed)
    z = views(kind, max(N, M), D, seed)
    x, other = z[0][:N].to(dtype), z[1].to(dtype)

    def draw(count: int, n: int = labels) -> Tensor:
        return torch.randint(0, n, (count,), generator=generator)

    ids, none = draw(N), torch.empty(0, dtype=torch.int64)
    mask = torch.empty((0, 0), dtype=torch.bool)
    y, candidate_ids = x[:0], none
    if pairing == "pair":
        y, candidate_ids = other[:M], draw(M)
    elif pairing == "queue":
        ids = torch.arange(N)
        y = torch.cat([other[:N], views(kind, M, D, seed + 5)[0].to(dtype)])
        candidate_ids = torch.cat([ids, torch.full((M,), -1)])
    if masked:
        b = N // 2 if N % 2 == 0 else N
        mask = torch.rand(b, b, generator=generator) < 0.3
    groups = candidate_groups = none
    guide = candidate_guide = x.new_empty((0, 0))
    m = len(y) if len(y) else N
    if source == "groups":
        groups = draw(N, 4)
        candidate_groups = draw(m, 4) if pairing != "self" else none
    elif source == "guide":
        guide = views(kind, N, D + 3, seed + 9)[0].to(dtype)
        candidate_guide = guide[:0]
        if pairing != "self":
            candidate_guide = views(kind, m, D + 3, seed + 11)[1].to(dtype)
    code = PAIRINGS.index(pairing)
    score = (x, y) if source != "guide" else (guide, candidate_guide)
    c = reference.labelled_cosines(*(z.double() for z in score), code)
    negative = reference.labelled_table(x, y, ids, candidate_ids, mask, code).negative
    eps = eps_in_a_gap(c[negative], near) if negative.sum() > 2 else f64(0.3)
    return Call(
        "labelled",
        (x, y, ids, candidate_ids, mask, groups, candidate_groups, guide, candidate_guide, eps,
         f64(tau)),
        (code,), int(variant == "released"), int(positives == "inside"), beta, tau_plus,
        f"{kind} {N} x {D} {pairing} {source} {variant} {positives} {dtype} seed {seed}",
    )  # fmt: skip


def logits(
    N: int = 19, C: int = 37, source: str = "cosines", *, dtype: torch.dtype = torch.float64,
    variant: str = "paper", near: float = 0.3, tau: float = 0.1, left_out: float = 0.2,
    beta: float = 1.0, tau_plus: float = 0.1, seed: int = 0,
) -> Call:  # fmt: skip
    """Logits of cosines of data.py's clusters, some columns -inf, targets anywhere."""
    generator = torch.Generator().manual_seed(seed)
    z = views("cluster", max(N, C), 9, seed)
    c = reference.labelled_cosines(z[0][:N], z[1][:C], 1)
    target = torch.randint(0, C, (N,), generator=generator)
    values = (c / tau).masked_fill(torch.rand(N, C, generator=generator) < left_out, -torch.inf)
    values[torch.arange(N), target] = c[torch.arange(N), target] / tau
    values = values.to(dtype)
    score = values.new_empty((0, 0))
    if source == "groups":
        score = (torch.rand(N, C, generator=generator) < 0.3).to(dtype)
    elif source == "guide":
        score = views("cluster", N, C, seed + 3)[0].tanh().to(dtype)
    negative = reference.logits_table(values, target).negative
    seen = values.double() * tau if source == "cosines" else score.double()
    eps = eps_in_a_gap(seen[negative], near) if negative.sum() > 2 else f64(near)
    return Call(
        "logits", (values, target, score, eps, f64(tau)), (source == "groups",),
        int(variant == "released"), 0, beta, tau_plus, f"{N} x {C} {source} {variant} {dtype}",
    )  # fmt: skip


def check(p: Call) -> None:
    """Values, |H|, share and every gradient of the kernels against the reference."""
    op, arguments = p.forward()
    loss, stats = op(*arguments)
    inputs = [p.tensors[k] for k in p.places]
    wide = [z.double() for z in inputs]
    truth = p.plain(*wide)
    assert loss.dtype == stats.dtype == p.dtype
    assert torch.equal(stats[ops.labelled.count].double(), truth[1].double()), p
    # What the rows are differences of: -mean_P l and log D, each up to 1/tau.
    size = 2 / p.tau if p.variant or p.name == "labelled" else 0.0
    condition = (1 + p.tau_plus) / (1 - p.tau_plus) if not p.variant else 1.0
    same = p.plain(*(z.to(p.dtype if z.dim() else torch.float64) for z in inputs))
    for name, ours, a, b in (
        ("loss", loss, same[0], truth[0]),
        ("share", stats[ops.labelled.share], same[2], truth[2]),
    ):
        assert_as_good_as_torch(ours, a, b, tau=p.tau, dtype=p.dtype, condition=condition,
                                scale=size, about=(name, p))  # fmt: skip
    _, ours = p.values(p.rows, inputs[0].dtype)
    _, plain = p.values(p.plain, p.dtype)
    _, exact = p.values(p.plain, torch.float64)
    mass = 2 / p.tau * condition * p.grad_output().abs().max().item()
    for k, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        z = inputs[k]
        assert a.dtype == z.dtype, p
        if z.dim() and p.name == "labelled":
            length = z.double().norm(dim=-1)
            scale = mass / length[length > 0].min().item() if length.any() else 0.0
        else:
            scale = mass * (1 if z.dim() else p.grad_output().numel() / p.tau)
        assert_as_good_as_torch(a, b, c, tau=p.tau, dtype=p.dtype, condition=condition, scale=scale,
                                about=(k, p))  # fmt: skip
