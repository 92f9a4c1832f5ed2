# SPDX-License-Identifier: MIT
"""The one problem that every loss is: each mode laid out for the operators of ops.py.

Anchors have candidates; of these some are positives and the others negatives, or are left out; and
a threshold on the cosine, groups, or the cosines of a guide decide which negatives are in H.

    layout               anchors     candidates          positives           left out
    "ntxent"             z0 and z1   z0 and z1           the other view      the anchor itself
    "query"              z0          z1                  the same row
    "cross"              z0          z1                  the same row
      and back           z1          z0                  the same row
    negatives (K, D)     z0          z1, then the K      the same row of z1  the other rows of z1
    negatives (B, K, D)  z0          own z1, own K       own row of z1
    features             all rows    all rows            of the same label,  the anchor itself
                                                         or marked in a mask
    logits               rows        columns             the target          -inf

The layouts of views have operators of their own as long as a threshold on their own cosines
decides. With groups or a guide they are laid out as rows with labels, an image's number being its
label, and negatives of each anchor's own as logits. A layout checks all its arguments first and
then gathers the rows of other ranks, if that is wanted.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .checks import (
    check_features,
    check_groups,
    check_guide,
    check_guide_of_features,
    check_labels,
    check_logits,
    check_mask,
    check_mode,
    check_negatives,
    check_no_mask_to_gather,
    check_no_negatives_to_gather,
    check_one_decider,
    check_temperature,
    check_views,
)
from .distributed import gather, gather_constant

__all__ = [
    "Problem",
    "Rule",
    "eps_tensor",
    "number_tensor",
    "of_features",
    "of_logits",
    "of_views",
    "unknown_eps",
]


class Rule(NamedTuple):
    """What is computed of a problem: the options of a loss."""

    reduction: str
    variant: str
    beta: float
    tau_plus: float
    positives: str = "outside"
    base_temperature: float | None = None


class Block(NamedTuple):
    """Anchors that one call of an operator serves."""

    form: ops.Form
    inputs: tuple[Tensor, ...]
    kind: int


class Problem(NamedTuple):
    """A checked batch, laid out; and what can be computed of it."""

    learner: tuple[Tensor, ...]
    """The tensors that may have a gradient, tau the last."""
    blocks: tuple[Block, ...]
    """Several follow each other in the rows of the result."""
    measured: tuple[Any, ...]
    """What the threshold is measured on: a form of the operators, and their arguments."""
    anchors: int
    row_length: int
    """Cosines in a row as a whole."""
    has_self: bool
    """Whether the anchor's own is one of them."""
    h_is_given: bool
    """By groups: then there is no threshold."""
    labels: tuple[Tensor, Tensor] | None = None
    """Of features, whose rows may be without a positive: their labels, and the mask."""

    def loss(self, eps: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
        """The reduced loss, and of each row |H| and the local term's share (no gradient)."""
        reduction = ops.REDUCTIONS[rule.reduction]
        if len(self.blocks) == 1:
            value, hard, share = self._of_block(self.blocks[0], eps, reduction, rule)
        else:
            each = eps.chunk(len(self.blocks)) if eps.dim() else [eps] * len(self.blocks)
            rows = [
                self._of_block(block, its, ops.REDUCTIONS["none"], rule)
                for block, its in zip(self.blocks, each, strict=True)
            ]
            value, hard, share = (torch.cat(parts) for parts in zip(*rows, strict=True))
            value = reference.reduce(value, reduction)
        if rule.base_temperature is not None:
            value = value * (self.learner[-1] / rule.base_temperature).to(value)
        return value, hard, share

    def _of_block(
        self, block: Block, eps: Tensor, reduction: int, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor]:
        form, inputs, kind = block
        variant = ops.VARIANTS[rule.variant]
        by_form = (ops.POSITIVES[rule.positives],) if form is ops.labelled else ()
        options = kind, reduction, variant, *by_form, rule.beta, rule.tau_plus
        return form.loss(*inputs, eps, self.learner[-1], *options)

    def has_adaptive(self) -> bool:  # no property: torch 2.10 compiles none of a NamedTuple
        """Whether `adaptive_loss` serves it."""
        block = self.blocks[0]
        return block.form is ops.views and ops.has_adaptive(block.inputs[0])

    def adaptive_loss(
        self, state: Tensor, rule: Rule, tracking: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`loss` at the eps that a tracker of this state and rule gives, in one call; and eps, and
        the tracker's new state."""
        z0, z1, negatives, tau = self.learner
        return ops.adaptive_loss(
            z0, z1, negatives, state, tau, self.blocks[0].kind, ops.REDUCTIONS[rule.reduction],
            ops.VARIANTS[rule.variant], rule.beta, rule.tau_plus, *tracking,
        )  # fmt: skip

    def threshold(self, quantile: float, over: str) -> Tensor:
        """The mean over rows of the row's quantile; 0-d float64, no gradient."""
        form, *arguments = self.measured
        value: Tensor = form.threshold(*arguments, quantile, over)
        return value

    def row_range(self) -> tuple[Tensor, Tensor]:
        """Least and largest cosine of each row; (N,) each, no gradient."""
        form, *arguments = self.measured
        low, high = form.row_range(*arguments)
        return low, high

    def is_without_positives(self) -> Tensor:
        """Of features: whether no row has one, so that every loss is 0; 0-d bool, on the device."""
        assert self.labels is not None
        ids, mask = self.labels
        if mask.numel():
            views = ids.shape[0] // mask.shape[0]
            others = mask if views > 1 else mask.triu(1) | mask.tril(-1)
            return ~others.any()
        ids = ids.sort().values
        return ~(ids[1:] == ids[:-1]).any()


# ---- layouts ------------------------------------------------------------------------------------


def of_views(
    z0: Tensor,
    z1: Tensor,
    negatives: Tensor | None,
    mode: str,
    temperature: float | Tensor,
    groups: Any = None,
    guide: Any = None,
    gathers: bool = False,
) -> Problem:
    """Two views of a batch, and negatives from outside."""
    check_mode(mode)
    check_views(z0, z1)
    if negatives is not None:
        check_negatives(negatives, z0)
    tau = _tau_tensor(temperature, z0)
    if groups is not None or guide is not None:
        check_one_decider(groups, guide)
        groups = None if groups is None else check_groups(groups, z0, negatives)
        guide = None if guide is None else check_guide(guide, z0, negatives)
    if gathers:
        check_no_negatives_to_gather(negatives)
        z0, z1 = gather(z0), gather(z1)
        if groups is not None:
            groups = gather_constant(groups[0]), None
        if guide is not None:
            guide = gather_constant(guide[0]), gather_constant(guide[1]), None

    images = row_length = z0.shape[0]
    anchors, has_self = images, False
    if negatives is not None:
        mode = "own" if negatives.dim() == 3 else "shared"
        row_length = 1 + negatives.shape[-2]
    else:
        negatives = z0.new_empty((0, z0.shape[1]))
        if mode != "query":
            anchors = 2 * images
        if mode == "ntxent":
            row_length, has_self = 2 * images, True
    kind = ops.MODES[mode]
    inputs = z0, z1, negatives
    learner = *inputs, tau
    if groups is None and guide is None:
        block = Block(ops.views, inputs, kind)
        return Problem(
            learner, (block,), (ops.views, *inputs, kind), anchors, row_length, has_self, False
        )
    seen = inputs
    if guide is not None:
        g0, g1, others = guide
        seen = g0, g1, g0.new_empty((0, g0.shape[1])) if others is None else others
    blocks = _with_decider(mode, inputs, tau, groups, None if guide is None else seen)
    return Problem(
        learner, blocks, (ops.views, *seen, kind), anchors, row_length, has_self, guide is None
    )


def of_features(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    groups: Tensor | None = None,
    guide: Tensor | None = None,
    gathers: bool = False,
) -> Problem:
    """Rows with several positives, view-major: all of the first view come first."""
    check_features(features, labels, mask)
    check_one_decider(groups, guide)
    device, images = features.device, features.shape[0]
    if labels is not None:
        labels = check_labels("labels", labels, (images,), device)
    if mask is None:
        positive = torch.empty((0, 0), dtype=torch.bool, device=device)
    else:
        positive = check_mask(mask, images, device)
    if groups is not None:
        groups = check_labels("groups", groups, (images,), device)
    if guide is not None:
        guide = check_guide_of_features(guide, features)
    tau = _tau_tensor(temperature, features)
    if gathers:
        check_no_mask_to_gather(mask)
        features = gather(features)
        labels, groups, guide = (
            None if x is None else gather_constant(x) for x in (labels, groups, guide)
        )

    views = features.shape[1] if features.dim() > 2 else 1
    ids = torch.arange(features.shape[0], device=device) if labels is None else labels
    x, ids = _view_major(features), ids.repeat(views)
    seen = x if guide is None else _view_major(guide)
    block = _labelled(
        "self", (x, None), (ids, None), (None if groups is None else groups.repeat(views), None),
        (None if guide is None else seen, None), positive,
    )  # fmt: skip
    pairs = seen, seen.new_empty((0, seen.shape[1])), ids, ids[:0], positive, ops.PAIRINGS["self"]
    rows = x.shape[0]
    return Problem(
        (x, tau), (block,), (ops.labelled, *pairs), rows, rows, True, groups is not None,
        (ids, positive),
    )  # fmt: skip


def of_logits(
    logits: Tensor, target: Tensor, temperature: float | Tensor, self_column: bool = False
) -> Problem:
    """Given logits, cosines / temperature; self_column: the anchor's own counts in its row."""
    target = check_logits(logits, target)
    tau = _tau_tensor(temperature, logits)
    rows, columns = logits.shape
    block = Block(ops.logits, (logits, target, logits.new_empty((0, 0))), False)
    measured = ops.logits, logits, target, tau, self_column
    return Problem(
        (logits, tau), (block,), measured, rows, columns + self_column, self_column, False
    )


# ---- views with groups or a guide ---------------------------------------------------------------

Two = tuple[Tensor | None, Tensor | None]  # of anchors, of candidates where they are others


def _with_decider(
    mode: str, inputs: tuple[Tensor, ...], tau: Tensor, groups: Two | None,
    guide: tuple[Tensor, ...] | None,
) -> tuple[Block, ...]:  # fmt: skip
    """Views whose H is decided by groups, or by the cosines of a guide."""
    z0, z1, negatives = inputs
    g0, g1, g_negatives = (None, None, None) if guide is None else guide
    own, others = (None, None) if groups is None else groups
    rows = torch.arange(z0.shape[0], device=z0.device)
    if mode == "ntxent":
        views, ids = (torch.cat([z0, z1]), None), (rows.repeat(2), None)
        return (_labelled("self", views, ids, (_cat(own, own), None), (_cat(g0, g1), None)),)
    if mode == "query":
        return (_labelled("pair", (z0, z1), (rows, rows), (own, own), (g0, g1)),)
    if mode == "cross":
        return (
            _labelled("pair", (z0, z1), (rows, rows), (own, own), (g0, g1)),
            _labelled("pair", (z1, z0), (rows, rows), (own, own), (g1, g0)),
        )
    if mode == "shared":
        nobody = torch.full((negatives.shape[0],), -1, device=z0.device)
        return (
            _labelled("queue", (z0, torch.cat([z1, negatives])), (rows, torch.cat([rows, nobody])),
                      (own, _cat(own, others)), (g0, _cat(g1, g_negatives))),
        )  # fmt: skip
    # Negatives of each anchor's own: their cosines are D times smaller than they are themselves, so
    # the rows of logits are made here.
    wide = any(z.dtype == torch.float64 for z in inputs)
    c = _own_cosines(inputs, torch.float64 if wide else torch.float32)  # (B, 1 + K)
    if guide is not None:
        score = _own_cosines(guide, c.dtype)
    else:
        assert own is not None and others is not None
        score = (torch.cat([own[:, None], others], 1) == own[:, None]).to(c.dtype)
    return (Block(ops.logits, (c / tau.to(c), torch.zeros_like(rows), score), guide is None),)


def _labelled(
    pairing: str, embeddings: Two, ids: Two, groups: Two, guides: Two, mask: Tensor | None = None
) -> Block:
    """Rows with labels, an empty tensor for what there is none of."""
    x, y = embeddings
    assert x is not None and ids[0] is not None
    if y is None:
        y = x.new_empty((0, x.shape[1]))
    if mask is None:
        mask = torch.empty((0, 0), dtype=torch.bool, device=x.device)
    guide, candidate_guide = guides
    if guide is None:
        guide = x.new_empty((0, 0))
    if candidate_guide is None:
        candidate_guide = guide.new_empty((0, guide.shape[1]))
    # Each a tensor of its own: torch.compile refuses one that is passed twice.
    own, its, none = ids[0].view(-1), ids[1], ids[0]
    candidates = none[:0] if its is None else its.view(-1)
    group, of_candidates = groups
    group = none[:0] if group is None else group.view(-1)
    of_candidates = none[:0] if of_candidates is None else of_candidates.view(-1)
    inputs = x, y, own, candidates, mask, group, of_candidates, guide, candidate_guide
    return Block(ops.labelled, inputs, ops.PAIRINGS[pairing])


def _cat(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else torch.cat([first, second])


def _own_cosines(inputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(B, 1 + K): of each anchor with its positive and its own negatives."""
    u0, u1, un = (reference.unit_rows(z.to(dtype)) for z in inputs)
    others = reference.dots(un, u0.unsqueeze(1)).squeeze(-1)
    return torch.cat([(u0 * u1).sum(-1, keepdim=True), others], 1)


def _view_major(z: Tensor) -> Tensor:
    return z if z.dim() == 2 else z.flatten(2).transpose(0, 1).flatten(0, 1)


# ---- numbers ------------------------------------------------------------------------------------


def number_tensor(value: float, device: torch.device) -> Tensor:
    """A Python number as the operators take it: 0-d float64."""
    if torch.compiler.is_compiling():  # of full() it would make a graph for each value
        return torch.ones((), dtype=torch.float64, device=device) * value
    return torch.full((), value, dtype=torch.float64, device=device)


def eps_tensor(eps: float | Tensor, device: torch.device) -> Tensor:
    """A checked eps as the operators take it: float64, 0-d or one value a row, no gradient."""
    if isinstance(eps, Tensor):
        return eps.detach().to(device, torch.float64)
    return number_tensor(float(eps), device)


def unknown_eps(like: Tensor) -> Tensor:
    """The eps of a batch whose H was given, and the statistic."""
    return torch.full((), math.nan, dtype=torch.float64, device=like.device)


def _tau_tensor(temperature: float | Tensor, like: Tensor) -> Tensor:
    """tau as the operators take it: 0-d, float32 or float64, on the batch's device."""
    temperature = check_temperature(temperature)
    if not isinstance(temperature, Tensor):
        return number_tensor(temperature, like.device)
    wide = temperature.dtype in (torch.float32, torch.float64)
    if temperature.dim():  # (1,), say: sharded training wants one dimension
        temperature = temperature.reshape(())
    return temperature.to(like.device, temperature.dtype if wide else torch.float32)
