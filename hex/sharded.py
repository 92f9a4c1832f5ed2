# SPDX-License-Identifier: MIT
"""The loss of the rows of all ranks, of which each rank computes its own anchors'.

    1. gather    the embeddings of all ranks, with labels, groups and guides (problem.py)
    2. quantiles of the rank's anchors, against all candidates; gathered
    3. settle    eps, their mean, and the step of the tracker: on every rank the same
    4. forward   loss and statistics of the rank's anchors at eps; gathered
    5. backward  the gradient of the rank's rows from all embeddings and all rows' statistics

So each rank does N^2 / G of the work of N rows, three collectives move N D + 11 N numbers, and the
backward has none. A threshold that is no quantile of this batch saves the second. Where negatives
are the rank's own, and of logits, the candidates stay there: nothing is gathered but the numbers
of the rows.

The gradient of the rank's rows is multiplied by G, because data-parallel training averages over the
ranks; that of the temperature, which every rank computes whole, is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .distributed import Share

if TYPE_CHECKING:
    from .problem import Problem

__all__ = ["Part", "adaptive_loss", "loss", "row_range", "threshold"]


class Part(NamedTuple):
    """What of a problem is this rank's."""

    share: Share
    """Of the images."""
    own: tuple[Tensor, Tensor, Tensor]
    """z0, z1 and negatives of this rank alone, as they have a gradient."""
    views: int = 1
    """Rows of an image in z0, one after another."""
    sides: int = 1
    """2 where rows of z1 are anchors too."""
    gathered: bool = True
    """Whether the problem is of all ranks; else of this one's candidates."""
    whole: bool = False
    """Whether the operators have to be given no block: z1 has another number of rows than z0."""

    def place(self) -> tuple[int, int]:
        """The rank's rows of z0 among those of all ranks: the first, and their number."""
        return self.views * self.share.first(), self.views * self.share.images()

    def block(self) -> tuple[int, int]:
        """The rank's rows among those of the problem, as the operators take them."""
        first, count = self.place()
        return ops.WHOLE if self.whole else (first if self.gathered else 0, count)

    def gather(self, rows: Tensor) -> Tensor:
        """(R, own anchors) to (R, all anchors), contiguous, in the order of one process."""
        apart = rows.reshape(rows.shape[0], self.sides, self.place()[1])
        every: Tensor
        (every,) = self.share.of_views(self.views).gather(apart.permute(2, 1, 0))
        return every.permute(2, 1, 0).contiguous().flatten(1)


def threshold(p: Problem, quantile: float, over: str) -> Tensor:
    """The mean over all anchors of the row's quantile; 0-d float64."""
    part = _part(p)
    own, _ = ops.block_quantiles(p.measured(), quantile, over, 0, part.block())
    rows = part.gather(own[None])
    none = rows.isposinf()
    sums = ops.total(torch.cat([torch.where(none, 0.0, rows), (~none).to(rows)]))
    return sums[0] / sums[1]


def row_range(p: Problem) -> tuple[Tensor, Tensor]:
    """Least and largest cosine of each row of this rank's."""
    return ops.block_range(p.measured(), _part(p).block())


def adaptive_loss(
    p: Problem, state: Tensor, rule: tuple[Any, ...], tracking: tuple[Any, ...],
    cache_bytes: int | None,
) -> tuple[Tensor, ops.Seen, Tensor, Tensor]:  # fmt: skip
    """The loss, mean |H| and share, at the eps of a tracker; and eps, and its new state."""
    part = _part(p)
    quantile, over_negatives, *step = tracking
    lagged = step[2]
    over = "negatives" if over_negatives else "all"
    keep = ops.bytes_to_keep(cache_bytes)  # for the forward, even where no backward comes
    # What the quantiles keep of a block serves its forward, which has another order for the whole.
    at_first, keep = (0, keep) if part.whole else (keep, 0)
    own, kept = ops.block_quantiles(p.measured(), quantile, over, at_first, part.block())
    if lagged:  # eps is known: the quantiles travel with the losses
        unknown = own.new_full((1,), torch.nan)
        eps, _ = ops.settle(unknown, state, tuple(step))
        every, kept = _forward(p, eps, kept, rule, keep, own)
        rows, every = every[-1], every[:-1]
        _, state = ops.settle(rows, state, tuple(step))
    else:
        eps, state = ops.settle(part.gather(own[None])[0], state, tuple(step))
        every, kept = _forward(p, eps, kept, rule, keep)
    value, hard, share, _ = _finish(p, every, kept, rule)
    return value, (hard, share), eps, state


def loss(
    p: Problem, eps: Tensor, rule: tuple[Any, ...], cache_bytes: int | None
) -> tuple[Tensor, ops.Seen, Tensor]:
    """The loss, and the means of |H| and share, and of eps. eps: 0-d, or of this rank's anchors."""
    if not ops.has_block(p.inputs[0]):
        return _plain_loss(p, eps, rule)
    keep = ops.bytes_to_keep(cache_bytes, wanted=_learns(p))
    if not eps.dim():
        value, hard, share, _ = _finish(p, *_forward(p, eps, None, rule, keep), rule)
        return value, (hard, share), eps
    # Of logits the statistics have another number for an eps from 1 on.
    every, kept = _forward(p, eps, None, rule, keep, eps)
    value, hard, share, mean = _finish(p, every[:-1], kept, rule, every[-1])
    return value, (hard, share), mean


def _part(p: Problem) -> Part:
    assert p.part is not None
    return p.part


def _forward(
    p: Problem, eps: Tensor, kept: Tensor | None, rule: tuple[Any, ...], keep: int, *more: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and statistics, and what else there is a number of for each anchor, of all anchors; and
    the cosines for the backward."""
    part = _part(p)
    rows, stats, kept = ops.block_forward(
        p.inputs, eps, p.tau.detach(), kept, rule, keep, part.block()
    )
    return part.gather(torch.cat([rows[None], stats, *(x[None].to(rows) for x in more)])), kept


def _learns(p: Problem) -> bool:
    """Whether a backward may come; or a forward-mode derivative, which is then refused."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in p.learner())


def _finish(
    p: Problem, every: Tensor, kept: Tensor, rule: tuple[Any, ...], eps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss with its gradient, and the means of |H|, share and eps, from all numbers."""
    part, reduction = _part(p), rule[1]
    rows, stats = every[0], every[1:]
    named = [rows, stats[ops.COUNT], stats[ops.SHARE], stats[ops.EPS] if eps is None else eps]
    sums = ops.total(torch.stack(named))
    value, means = _reduce(rows, sums[0], reduction), sums / max(rows.shape[0], 1)
    if _learns(p):
        own = stats
        if not part.gathered:
            at, count = part.place()
            own = stats[:, at : at + count].contiguous()
        value = _attach(
            *part.own, p.tau, value, *p.inputs, own, stats[ops.DTAU], kept,
            rule, part.block(), part.share.size(), 0 if part.gathered else part.place()[0],
        )  # fmt: skip
    return _in_order(value, part.views, reduction), means[1], means[2], means[3]


def _reduce(rows: Tensor, total: Tensor, reduction: int) -> Tensor:
    if reduction == ops.REDUCTIONS["none"]:
        return rows
    mean = reduction == ops.REDUCTIONS["mean"]
    return (total / max(rows.shape[0], 1) if mean else total).to(rows)


def _in_order(value: Tensor, views: int, reduction: int) -> Tensor:
    """The rows of the first view of all images come first."""
    if reduction != ops.REDUCTIONS["none"] or views == 1:
        return value
    return value.reshape(-1, views).T.flatten()


# ---- the derivative -----------------------------------------------------------------------------
# The loss is at hand when it gets its derivative, for the ranks talk to each other before: in plain
# sight of the compiler, and in no backward.


class _Final(ops.Function):
    """Gradients that cannot be differentiated again, as a function of what they depend on."""

    @staticmethod
    def forward(number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.clone() for g in tensors[:number])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        raise RuntimeError(
            "hex-ssl: a loss with gather_distributed=True has no second derivative, because the "
            "ranks exchange nothing in the backward; use gather_distributed=False"
        )


_final = ops.in_graph(_Final)


class _Attach(ops.Function):
    """The gradient of the loss in own z0, z1, negatives, and in tau."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        value: Tensor = arguments[4].clone()
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4], *inputs[5:-4])
        ctx.options = inputs[-4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # read once, for a checkpoint unpacks them once
        *own, tau = saved[:4]
        *inputs, stats, dtau, kept = saved[4:]
        rule, block, ranks, first = ctx.options
        go = grad.to(torch.float64)
        if rule[1] == ops.REDUCTIONS["mean"]:
            go = go / max(dtau.shape[0], 1)
        go = go.expand(dtau.shape[0])
        needs = ctx.needs_input_grad[:4]
        bits = sum(need << k for k, need in enumerate(needs[:3]))
        gradients: list[Tensor | None] = [None] * 4
        if bits:
            theirs = go[first : first + stats.shape[1]]
            parts = ops.block_backward(
                theirs, tuple(inputs), tau.detach(), stats, kept, rule, bits, block
            )
            gradients[:3] = [part * ranks if need else None
                             for part, need in zip(parts, needs, strict=False)]  # fmt: skip
        if needs[3]:
            gradients[3] = ops.total((go * dtau.to(go))[None]).reshape(tau.shape).to(tau)
        if torch.is_grad_enabled():
            there = [g for g in gradients if g is not None]
            again = iter(_final(len(there), *there, grad, *own, tau))
            gradients = [None if g is None else next(again) for g in gradients]
        return *gradients, *[None] * (len(ctx.needs_input_grad) - 4)


_attach = ops.in_graph(_Attach)


# ---- without kernels ----------------------------------------------------------------------------


class _Own(ops.Function):
    """Rows of all ranks, with the gradient of those of this rank; and of tau, if the derivative of
    each row in it is known."""

    @staticmethod
    def forward(own: Tensor, tau: Tensor, every: Tensor, dtau: Tensor, first: int,
                ranks: int) -> Tensor:  # fmt: skip
        return every.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        own, tau, _, dtau, ctx.first, ctx.ranks = inputs
        ctx.save_for_backward(own, tau, dtau)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        own, tau, dtau = ctx.saved_tensors
        gradients = [grad[ctx.first : ctx.first + own.shape[0]] * ctx.ranks]
        if ctx.needs_input_grad[1]:
            gradients.append(ops.total((grad * dtau)[None]).reshape(tau.shape).to(tau))
        if torch.is_grad_enabled():
            gradients = list(_final(len(gradients), *gradients, grad, own, tau))
        return gradients[0], gradients[1] if len(gradients) > 1 else None, None, None, None, None


_own = ops.in_graph(_Own)


def _plain_loss(p: Problem, eps: Tensor, rule: tuple[Any, ...]) -> tuple[Tensor, ops.Seen, Tensor]:
    """`loss` by the formulas. Every rank computes all rows of a gathered problem."""
    part, tau, reduction = _part(p), p.tau, rule[1]
    ranks, (first, _) = part.share.size(), part.block()
    if part.gathered:
        z = [
            _own(own, tau.detach(), every, tau, first, ranks) if every.numel() else every
            for own, every in zip(part.own, p.inputs[:3], strict=True)
        ]
        if eps.dim():
            eps = part.gather(eps[None])[0]
        rows, *others = ops.plain_rows((*z, *p.inputs[3:]), eps, tau, rule)
        means = [x.mean(dtype=torch.float64) for x in (*others, eps)]
        total = rows.sum(dtype=torch.float64)
    else:
        inputs = (*part.own, *p.inputs[3:])

        def rows_of(tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return ops.plain_rows(inputs, eps, tau, rule)

        own, hard, share = rows_of(tau.detach())
        dtau = torch.zeros_like(own)
        if tau.requires_grad:
            one = torch.ones_like(tau)
            dtau = torch.func.jvp(lambda t: rows_of(t)[0], (tau.detach(),), (one,))[1]
        of_own = [x.detach().to(own) for x in (own, hard, share, eps.expand_as(own), dtau)]
        every = part.gather(torch.stack(of_own))
        rows = _own(own, tau, every[0], every[4], part.place()[0], ranks)
        means = list((ops.total(every[1:4]) / max(rows.shape[0], 1)).unbind())
        total = rows.sum(dtype=torch.float64)
    value = _in_order(_reduce(rows, total, reduction), part.views, reduction)
    return value, (means[0], means[1]), means[2] if eps.dim() else eps
