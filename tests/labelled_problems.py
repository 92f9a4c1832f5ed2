# SPDX-License-Identifier: MIT
"""What the tests of labels, groups, guides and logits share: a call of the raw operators as one
object, and its comparison with hex/reference.py. The counterpart of conftest.Problem.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import operators
import torch
from conftest import BY_DOTS, assert_as_good_as_torch, condition_of
from data import MODES as OF_VIEWS
from data import batch, eps_in_a_gap, f64, form, views
from torch import Tensor

from hex import ops, reference

HEX = torch.ops.hex
PAIRINGS = ("self", "pair", "queue")
MODES = {"self": "ntxent", "pair": "query", "queue": "unpaired", "logits": "logits"}
MODES |= {mode: mode for mode in OF_VIEWS}  # the pairings of two views, where one is the positive
SOURCES = ("cosines", "groups", "guide")


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: `tensors` are x, y, ids, candidate_ids, mask, groups, candidate_groups, guide,
    candidate_guide, eps and tau of labelled rows, or logits, target, eps and tau. Of two views x is
    z0, and y has z1 and the negatives, one after another."""

    name: str  # "labelled" or "logits"
    tensors: tuple[Tensor, ...] = dataclasses.field(repr=False)  # up to and with tau
    pairing: str
    variant: int
    positives: int  # -1: one, of two views
    beta: float
    tau_plus: float
    decoupled: bool
    about: str = ""

    def __str__(self) -> str:
        return self.about

    @property
    def places(self) -> tuple[int, ...]:
        """Of what has a gradient, in `tensors`."""
        if self.name == "logits":
            return (0, 3)
        return (0, 10) if self.pairing == "self" else (0, 1, 10)

    @property
    def tau(self) -> float:
        return self.tensors[-1].item()

    @property
    def dtype(self) -> torch.dtype:
        used = self.tensors[:1] if self.name == "logits" else self.tensors[:2]
        return torch.float64 if any(z.dtype == torch.float64 for z in used) else torch.float32

    @property
    def code(self) -> int:
        """The mode of the operators."""
        return ops.MODES[MODES[self.pairing]]

    def inputs(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """z0, z1, negatives, ids, mask, groups and guide of the operators."""
        if self.name == "logits":
            logits, target, *_ = tensors
            none = logits[:0].detach()
            _, mask, groups, guide = operators.nothing(logits)
            return logits, none, none.clone(), target, mask, groups, guide
        x, y, ids, candidates, mask, groups, candidate_groups, guide, candidate_guide, *_ = tensors
        others = y.shape[0] if self.pairing in ("self", "pair") else x.shape[0]
        negatives = y[others:]
        if self.pairing == "paired":
            negatives = negatives.view(others, -1, y.shape[1])
        guides = guide if not guide.numel() else torch.cat([guide, candidate_guide])
        return (
            x, y[:others], negatives, torch.cat([ids, candidates]), mask,
            torch.cat([groups, candidate_groups]), guides,
        )  # fmt: skip

    def options(self, reduction: int) -> tuple[Any, ...]:
        return (
            self.code, reduction, 1 + self.positives, self.beta, self.variant, self.tau_plus,
            self.decoupled,
        )  # fmt: skip

    def plain_options(self) -> tuple[Any, ...]:
        """The last arguments of reference.problem_rows."""
        return (
            self.code, 1 + self.positives, self.beta, self.variant, self.tau_plus, self.decoupled
        )  # fmt: skip

    def changed(self, *differentiable: Tensor) -> list[Tensor]:
        """The tensors, with other differentiable ones if given."""
        tensors = list(self.tensors)
        for place, value in zip(self.places, differentiable, strict=False):
            tensors[place] = value
        return tensors

    def forward(self, reduction: int = 0, *differentiable: Tensor):
        """The operator and its arguments."""
        tensors = self.changed(*differentiable)
        arguments = (*self.inputs(tensors), *tensors[-2:], *self.options(reduction), 0, False)
        return HEX.forward.default, arguments

    def backward(self, reduction: int = 0, needs: int = 15):
        op, arguments = self.forward(0)
        _, stats, kept = op(*arguments)
        rows = self.grad_output()
        grad = rows if reduction == 0 else rows[0]
        inputs, tau = self.inputs(list(self.tensors)), self.tensors[-1]
        options = self.code, reduction, 1 + self.positives, self.beta, False, needs
        return HEX.backward.default, (grad, *inputs, tau, stats, kept, *options)

    def measured(self, self_column: bool = False) -> tuple[Any, ...]:
        """The arguments of ops.row_range, and the first of ops.quantile."""
        *z, _, _ = self.inputs(list(self.tensors))
        return *z, self.tensors[-1], self.code, self.positives >= 0, self_column

    def quantile(self, quantile: float = 0.9, over: bool = False, bounds: bool = False,
                 self_column: bool = False):  # fmt: skip
        *tensors, code, several, _ = self.measured()
        options = code, several, False, self_column, quantile, over, bounds
        return HEX.quantile.default, (*tensors, *options)

    def grad_output(self) -> Tensor:
        rows = self.tensors[0].shape[0] * (2 if self.pairing in ("ntxent", "cross") else 1)
        values = torch.randn(rows, generator=torch.Generator().manual_seed(1))
        return values.to(self.tensors[0].device, self.dtype)

    def to(self, device: str) -> Call:
        return dataclasses.replace(self, tensors=tuple(t.to(device) for t in self.tensors))

    def rows(self, *differentiable: Tensor) -> Tensor:
        """The kernels' loss of each row, differentiable."""
        tensors = self.changed(*differentiable)
        return ops.loss(self.inputs(tensors), *tensors[-2:], self.options(0))[0]

    def plain(self, *differentiable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's rows, |H| and share."""
        tensors = self.changed(*differentiable)
        return reference.problem_rows(*self.inputs(tensors), *tensors[-2:], *self.plain_options())

    @property
    def condition(self) -> float:
        """Of the debiasing: `condition_of` the problem."""
        wide = [self.tensors[k].double() for k in self.places]
        variant = reference.VARIANTS[self.variant]
        return condition_of(lambda: self.plain(*wide), self.tau_plus, variant, self.decoupled)

    def values(self, function, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows and gradients of a function of the differentiable tensors, in a dtype."""
        z = [self.tensors[k] for k in self.places]
        z = [t.to(dtype if t.dim() else torch.float64).detach().requires_grad_() for t in z]
        rows = function(*z)
        rows = rows[0] if isinstance(rows, tuple) else rows
        return rows.detach(), torch.autograd.grad(rows, z, self.grad_output().to(rows))

    def in_blocks(self, cut: tuple[int, ...], quantile: float = 0.9) -> dict[str, Tensor]:
        """Loss and statistics, the quantiles of both kinds of row, bounds and gradients, a block of
        anchors after another; they begin and end at `cut`. Not of views that are both anchors."""
        blocks = [(a, b - a) for a, b in itertools.pairwise(cut)]

        def rows(operator: Any, arguments: tuple[Any, ...]) -> list[Tensor]:
            its = [operator(*arguments, *block)[:2] for block in blocks]
            return [torch.cat(of_blocks, -1) for of_blocks in zip(*its, strict=True)]

        *inputs, eps, tau = self.forward()[1][:9]
        none, rule = eps.new_empty(0, dtype=self.dtype), self.options(0)
        loss, stats = rows(HEX.block_forward, (*inputs, eps, tau, none, *rule, 0, False))
        of_all, of_negatives = (
            rows(HEX.block_quantiles, (*self.quantile(quantile, over)[1], 0))[0]
            for over in (False, True)
        )
        low, high = rows(HEX.block_quantiles, (*self.quantile(bounds=True)[1], 0))
        found = {"loss": loss, "stats": stats, "all": of_all, "negatives": of_negatives,
                 "low": low, "high": high}  # fmt: skip
        arguments = (self.grad_output(), *inputs, tau, stats, none, *rule[:4], False, 15)
        its = zip(*(HEX.backward(*arguments, *block) for block in blocks), strict=True)
        for name, parts in zip(("dx", "dy", "dnegatives", "dtau"), its, strict=True):
            if name in ("dx", "dy") or parts[0].dim() == 3:
                found[name] = torch.cat(parts)
            else:  # of all anchors, in every block
                found[name] = parts[0]
                assert all(torch.equal(x, parts[0]) for x in parts)
        return found


def _codes(name: str) -> tuple[int, bool]:
    """Of one of data.FORMS: the variant as the operators take it, and whether it is decoupled."""
    options = form(name)
    return ops.VARIANTS[options["variant"]], options["decoupled"]


def labelled(
    N: int = 23, D: int = 7, pairing: str = "self", source: str = "cosines", *, M: int = 31,
    kind: str = "cluster", labels: int = 5, masked: bool = False,
    dtype: torch.dtype = torch.float64, guide_dtype: torch.dtype | None = None,
    variant: str = "paper", positives: str = "outside", near: float = 0.3, tau: float = 0.1,
    beta: float = 1.0, tau_plus: float = 0.1, seed: int = 0,
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
        of_guide = guide_dtype or dtype
        guide = views(kind, N, D + 3, seed + 9)[0].to(of_guide)
        candidate_guide = guide[:0]
        if pairing != "self":
            candidate_guide = views(kind, m, D + 3, seed + 11)[1].to(of_guide)
    code, decoupled = _codes(variant)
    p = Call(
        "labelled",
        (x, y, ids, candidate_ids, mask, groups, candidate_groups, guide, candidate_guide, f64(0.3),
         f64(tau)),
        pairing, code, int(positives == "inside"), beta, tau_plus, decoupled,
        f"{kind} {N} x {D} {pairing} {source} {variant} {positives} {dtype} seed {seed}",
    )  # fmt: skip
    return _with_eps(p, near)


def viewed(
    B: int = 13, D: int = 7, mode: str = "ntxent", source: str = "groups", *, K: int = 11,
    kind: str = "cluster", dtype: torch.dtype = torch.float64, variant: str = "paper",
    near: float = 0.3, tau: float = 0.1, beta: float = 1.0, tau_plus: float = 0.1, seed: int = 0,
) -> Call:  # fmt: skip
    """Two views and negatives of data.py, with groups, a guide or (for a mask) the cosines."""
    z0, z1, *rest = (z for z in batch(kind, B, D, mode, K, seed) if z is not None)
    y = torch.cat([z1, *(z.flatten(0, -2) for z in rest)]).to(dtype)
    no_ids, no_mask, groups, guide = operators.nothing(z0)
    candidate_groups, candidate_guide = groups, guide
    if source == "groups":
        groups, candidate_groups = torch.arange(B + len(y)).mul(7).remainder(4).split([B, len(y)])
    elif source == "guide":
        guides = views(kind, B + len(y), D + 3, seed + 9)[0].to(dtype)
        guide, candidate_guide = guides.split([B, len(y)])
    code, decoupled = _codes(variant)
    p = Call(
        "labelled",
        (z0.to(dtype), y, no_ids, no_ids, no_mask, groups, candidate_groups, guide, candidate_guide,
         f64(0.3), f64(tau)),
        mode, code, -1, beta, tau_plus, decoupled,
        f"{kind} {B} x {D} {mode} {source} {variant} {dtype} seed {seed}",
    )  # fmt: skip
    return _with_eps(p, near)


def coded(
    pairing: str = "ntxent", N: int = 13, D: int = 7, source: str = "cosines", *, M: int = 11,
    size: tuple[int, int] | None = None, labels: bool = True, share: float = 0.4,
    marked: float = 0.1, near: float = 0.3, seed: int = 0, **options: Any,
) -> Call:  # fmt: skip
    """One of `labelled` or `viewed` with a mask of codes: `share` of it is left out, and `marked`
    of it are positives. size: of the mask; by default the whole table, all anchors by images or
    one row for all, by the seed. labels: whether labels, too, say who is a positive."""
    if pairing in OF_VIEWS:
        p = viewed(N, D, pairing, source, K=M, near=near, seed=seed, **options)
    else:
        p = labelled(N, D, pairing, source, M=M, near=near, seed=seed, **options)
    z0, z1, negatives, *_ = p.inputs(list(p.tensors))
    both = pairing in ("ntxent", "cross")
    rows = 2 * N if both else N
    columns = {"self": N, "pair": M, "queue": N + M, "ntxent": 2 * N, "query": N, "cross": N}
    columns = columns.get(pairing, M)
    if size is None:
        size = (rows, columns), (N, columns // (1 + (pairing == "ntxent"))), (1, columns)
        size = size[seed % 3]
    generator = torch.Generator().manual_seed(seed + 17)
    u = torch.rand(*size, generator=generator)
    mask = (u < share).to(torch.uint8) * 2
    mask[u > 1 - marked] = 1
    if not labels:
        p = dataclasses.replace(
            p, tensors=(*p.tensors[:2], *[p.tensors[2][:0]] * 2, *p.tensors[4:])
        )
    p = dataclasses.replace(
        p, tensors=(*p.tensors[:4], mask, *p.tensors[5:]),
        about=f"{p.about} codes {tuple(size)}{'' if labels else ' alone'}",
    )  # fmt: skip
    return _with_eps(p, near)


def _with_eps(p: Call, near: float) -> Call:
    """With a threshold where no cosine is that it is compared with."""
    *z, ids, mask, _, guide = p.inputs(list(p.tensors))
    several = p.positives >= 0
    negative = reference.problem_table(
        *z, ids, mask, p.tensors[-1], p.code, several, False
    ).negative
    if negative.sum() <= 2:
        return p
    if guide.numel():
        own, others, rest = guide.tensor_split((len(z[0]), len(z[0]) + len(z[1])))
        z = [own, others, rest.view(*z[2].shape[:-1], guide.shape[1])]
    c = reference.problem_cosines(*(x.double() for x in z), p.code, several)
    eps = eps_in_a_gap(c[negative], near)
    return dataclasses.replace(p, tensors=(*p.tensors[:-2], eps, p.tensors[-1]))


def logits(
    N: int = 19, C: int = 37, *, dtype: torch.dtype = torch.float64, variant: str = "paper",
    near: float = 0.3, tau: float = 0.1, left_out: float = 0.2, beta: float = 1.0,
    tau_plus: float = 0.1, seed: int = 0,
) -> Call:  # fmt: skip
    """Logits of cosines of data.py's clusters, some columns -inf, targets anywhere."""
    generator = torch.Generator().manual_seed(seed)
    z = views("cluster", max(N, C), 9, seed)
    c = reference.problem_cosines(z[0][:N], z[1][:C], z[0][:0], ops.MODES["query"], True)
    target = torch.randint(0, C, (N,), generator=generator)
    values = (c / tau).masked_fill(torch.rand(N, C, generator=generator) < left_out, -torch.inf)
    values[torch.arange(N), target] = c[torch.arange(N), target] / tau
    values = values.to(dtype)
    negative = reference.logits_table(values, target).negative
    seen = values.double() * tau
    eps = eps_in_a_gap(seen[negative], near) if negative.sum() > 2 else f64(near)
    code, decoupled = _codes(variant)
    return Call(
        "logits", (values, target, eps, f64(tau)), "logits", code, 0, beta, tau_plus, decoupled,
        f"{N} x {C} {variant} {dtype}",
    )  # fmt: skip


def check(p: Call) -> None:
    """Values, |H|, share and every gradient of the kernels against the reference."""
    op, arguments = p.forward()
    loss, stats, _ = op(*arguments)
    inputs = [p.tensors[k] for k in p.places]
    wide = [z.double() for z in inputs]
    truth = p.plain(*wide)
    assert loss.dtype == stats.dtype == p.dtype
    assert torch.equal(stats[ops.COUNT].double(), truth[1].double()), p
    # What the rows are differences of: -mean_P l and log D, each up to 1/tau.
    size = 2 / p.tau if p.variant or p.decoupled or p.name == "labelled" else 0.0
    condition = p.condition
    same = p.plain(*(z.to(p.dtype if z.dim() else torch.float64) for z in inputs))
    for name, ours, a, b in (
        ("loss", loss, same[0], truth[0]),
        ("share", stats[ops.SHARE], same[2], truth[2]),
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
        if BY_DOTS and a.dtype == torch.bfloat16 and p.positives < 0:
            b = b.to(torch.bfloat16)  # as in conftest.check
        assert_as_good_as_torch(a, b, c, tau=p.tau, dtype=p.dtype, condition=condition, scale=scale,
                                about=(k, p))  # fmt: skip
