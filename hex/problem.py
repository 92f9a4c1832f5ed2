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
    candidates           all rows    the candidates      of the same label
    logits               rows        columns             the target          -inf

Negatives that do not count (`ignored`) are left out, too.

To the operators all of them are tensors z0, z1 and negatives (or logits in place of z0) and, where
there are any, a mask, and the ids, groups and guide of all their rows, one after another; of logits
the ids are the targets. A layout checks all its arguments first and then gathers the rows of other
ranks, if that is wanted.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, sharded
from ._calls import cat, is_ordinary
from .checks import (
    Positives,
    Reduction,
    Variant,
    check_base_temperature,
    check_cache_bytes,
    check_candidates,
    check_features,
    check_flag,
    check_groups,
    check_guide,
    check_guide_of_candidates,
    check_guide_of_features,
    check_has_numbers,
    check_ignored,
    check_labels,
    check_logits,
    check_mask,
    check_mode,
    check_negatives,
    check_number,
    check_one_decider,
    check_positives,
    check_reduction,
    check_temperature,
    check_variant,
    check_views,
)
from .distributed import Meeting
from .sharded import Part

__all__ = [
    "Problem",
    "Rule",
    "checked_rule",
    "eps_tensor",
    "number_tensor",
    "of_features",
    "of_logits",
    "of_views",
    "unknown_eps",
]


class Rule(NamedTuple):
    """What is computed of a problem: the options of a loss, checked by `checked_rule`."""

    reduction: Reduction
    variant: Variant
    beta: float
    tau_plus: float
    decoupled: bool
    positives: Positives
    base_temperature: float | None
    cache_bytes: int | None


def checked_rule(
    *, beta: float, tau_plus: float, variant: Variant, reduction: Reduction,
    decoupled: bool = False, positives: Positives = "outside",
    base_temperature: float | None = None, cache_bytes: int | None = None,
) -> Rule:  # fmt: skip
    """The options of a loss as one.

    Raises:
        TypeError, ValueError: an option of the wrong type or value. The text names it.
    """
    beta = check_number("beta", beta, 0, math.inf, open_end=True)
    tau_plus = check_number("tau_plus", tau_plus, 0, 1, open_end=True)
    check_variant(variant)
    check_reduction(reduction)
    check_positives(positives)
    base = check_base_temperature(base_temperature)
    cache = check_cache_bytes(cache_bytes)
    decoupled = check_flag("decoupled", decoupled)
    return Rule(reduction, variant, beta, tau_plus, decoupled, positives, base, cache)


class Problem(NamedTuple):
    """A checked batch, laid out; and what can be computed of it."""

    inputs: tuple[Tensor, ...]
    """z0, z1, negatives, ids, mask, groups, guide; empty where there are none."""
    tau: Tensor
    mode: int
    several: bool
    """Whether an anchor may have several positives, or none."""
    anchors: int
    row_length: int
    """Cosines in a row as a whole."""
    has_self: bool
    """Whether the anchor's own is one of them."""
    h_is_given: bool = False
    """By groups: then there is no threshold."""
    guide: tuple[Tensor, ...] | None = None
    """In place of z0, z1 and negatives where the threshold is measured."""
    self_column: bool = False
    """Of logits: whether the anchor's own cosine, 1, is no column but counts."""
    part: Part | None = None
    """Where the loss is of the rows of all ranks: what of it is this rank's."""

    # Methods, no properties: torch 2.10 compiles none of a NamedTuple.

    def may_lack_positives(self) -> bool:
        """Whether rows may be without one, and `is_without_positives` tells whether all are."""
        return self.several and self.mode != ops.MODES["logits"]

    def learner(self) -> tuple[Tensor, ...]:
        """The tensors that may have a gradient."""
        z = self.inputs[:3] if self.part is None else self.part.own
        return *z, self.tau

    def loss(self, eps: Tensor, rule: Rule) -> tuple[Tensor, ops.Seen, Tensor]:
        """The reduced loss; what `ops.hard_and_share` takes, and eps (no gradient)."""
        if self.part is not None:
            value, seen, eps = sharded.loss(self, eps, self._options(rule), rule.cache_bytes)
        else:
            value, seen = ops.loss(
                self.inputs, eps, self.tau, self._options(rule), rule.cache_bytes
            )
        return self._scaled(value, rule), seen, eps

    def has_adaptive(self) -> bool:
        """Whether `adaptive_loss` serves it."""
        decided = self.h_is_given or self.guide is not None
        return not decided and ops.has_adaptive(self.inputs[0])

    def adaptive_loss(
        self, state: Tensor, rule: Rule, tracking: tuple[Any, ...]
    ) -> tuple[Tensor, ops.Seen, Tensor, Tensor]:
        """`loss` at the eps that a tracker of this state and rule gives, in one call; and eps, and
        the tracker's new state."""
        if self.part is not None:
            value, seen, eps, state = sharded.adaptive_loss(
                self, state, self._options(rule), tracking, rule.cache_bytes
            )
        else:
            value, seen, eps, state = ops.adaptive_loss(
                self.inputs, state, self.tau, self._options(rule), (self.self_column, *tracking),
                rule.cache_bytes,
            )  # fmt: skip
        return self._scaled(value, rule), seen, eps, state

    def threshold(self, quantile: float, over: str) -> Tensor:
        """The mean over rows of the row's quantile; 0-d float64, no gradient."""
        if self.part is not None:
            return sharded.threshold(self, quantile, over)
        return ops.quantile(*self.measured(), quantile, over)

    def row_range(self) -> tuple[Tensor, Tensor]:
        """Least and largest cosine of each row, or of this rank's; (N,) each, no gradient."""
        if self.part is not None:
            return sharded.row_range(self)
        return ops.row_range(*self.measured())

    def measured(self) -> tuple[Any, ...]:
        """What the threshold is measured on, as the operators take it."""
        *z, ids, mask, _, _ = self.inputs
        seen = z if self.guide is None else self.guide
        return *seen, ids, mask, self.tau, self.mode, self.several, self.self_column

    def _options(self, rule: Rule) -> tuple[Any, ...]:
        """The rule in the order of the operators' schemas."""
        positives = ops.POSITIVES[rule.positives] if self.several else ops.POSITIVES["one"]
        reduction, variant = ops.REDUCTIONS[rule.reduction], ops.VARIANTS[rule.variant]
        return (
            self.mode, reduction, positives, rule.beta, variant, rule.tau_plus, rule.decoupled
        )  # fmt: skip

    def _scaled(self, value: Tensor, rule: Rule) -> Tensor:
        if rule.base_temperature is None:
            return value
        # In float64, for tau may be narrower than the loss.
        return value * (self.tau.to(torch.float64) / rule.base_temperature).to(value)

    def is_without_positives(self) -> Tensor:
        """Of features: whether no row has one, so that every loss is 0; 0-d bool, on the device."""
        ids, mask = self.inputs[3:5]
        if mask.numel() and (mask.dtype == torch.bool or not ids.numel()):
            marked = mask == _POSITIVE
            views = self.inputs[0].shape[0] // mask.shape[0]
            if views == 1 and self.mode == ops.MODES["ntxent"]:  # without the row itself
                marked = marked.triu(1) | marked.tril(-1)
            return ~marked.any()
        if self.mode == ops.MODES["query"]:
            own, others = ids.split_with_sizes([z.shape[0] for z in self.inputs[:2]])
            return ~torch.isin(own, others).any()
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
    meeting: Meeting | None = None,
    ignored: Any = None,
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
    if ignored is not None:
        ignored = check_ignored(ignored, _ignored_shapes(z0, negatives, mode), z0.device)
    share, own, gathered = None, (z0, z1), negatives is None
    if meeting is not None:
        # Of negatives a rank may have more than another.
        mark = None if negatives is None else z0.new_empty(0, dtype=negatives.dtype)
        deciders = groups[0] if groups else None, *(guide[:2] if guide else (None, None))
        share = meeting.share(z0.shape[0], tau, z0, z1, mark, *deciders)
        if gathered:
            z0, z1, labels, *guides = share.gather(z0, z1, *deciders)
            groups = None if groups is None else (labels, None)
            guide = None if guide is None else (*guides, None)

    none, ids, no_mask, no_groups, no_guide = _nothing(z0)
    mask = no_mask if ignored is None else _codes(ignored)
    images = row_length = z0.shape[0]
    anchors, has_self = images, False
    if negatives is not None:
        mode = "paired" if negatives.dim() == 3 else "unpaired"
        row_length = 1 + negatives.shape[-2]
    else:
        negatives = none
        if mode != "query":
            anchors = 2 * images
        if mode == "ntxent":
            row_length, has_self = 2 * images, True
    labels, seen, rows = no_groups, None, no_guide
    if groups is not None:
        of_images, others = groups
        both = [of_images, of_images]
        labels = torch.cat(both if others is None else [*both, others.flatten()])
    if guide is not None:
        g0, g1, its = guide
        seen = g0, g1, g0.new_empty((0, g0.shape[1])) if its is None else its
        rows = cat([g.flatten(0, -2) for g in seen])
    part = None
    if share is not None:
        sides = 2 if gathered and mode != "query" else 1
        part = Part(share, (*own, negatives), sides=sides, gathered=gathered)
        if not gathered:
            z0, z1, negatives, anchors = z0.detach(), z1.detach(), negatives.detach(), share.total()
    return Problem(
        (z0, z1, negatives, ids, mask, labels, rows), tau, ops.MODES[mode], False, anchors,
        row_length, has_self, groups is not None, seen, part=part,
    )  # fmt: skip


def of_features(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    groups: Any = None,
    guide: Any = None,
    meeting: Meeting | None = None,
    candidates: Tensor | None = None,
    candidate_labels: Tensor | None = None,
    ignored: Any = None,
) -> Problem:
    """Rows with several positives: all of the first view come first. Those of all ranks go by
    images, each with its views one after another, so that every rank's come together."""
    check_features(features, labels, mask)
    check_one_decider(groups, guide)
    if candidates is not None or candidate_labels is not None:
        check_candidates(features, labels, mask, candidates, candidate_labels)
        return _of_candidates(
            features, labels, candidates, candidate_labels, temperature, groups, guide, meeting,
            ignored,
        )  # fmt: skip
    device, images = features.device, features.shape[0]
    if labels is not None:
        labels = check_labels("labels", labels, (images,), device)
    if mask is not None:
        positive = check_mask(mask, images, device)
    if groups is not None:
        groups = check_labels("groups", groups, (images,), device)
    if guide is not None:
        guide = check_guide_of_features(guide, features)
    if ignored is not None:
        ignored = check_ignored(ignored, [(images, images)], device)
    tau = _tau_tensor(temperature, features)
    views = features.shape[1] if features.dim() > 2 else 1
    share, own, in_rows = None, features, _view_major
    if meeting is not None:
        share, in_rows = meeting.share(images, tau, features, labels, groups, guide), _image_major
        features, labels, groups, guide = share.gather(features, labels, groups, guide)

    ids = torch.arange(features.shape[0], device=device) if labels is None else labels
    x = in_rows(features)
    z1 = x.new_empty((0, x.shape[1]))
    negatives, no_ids, no_mask, no_groups, no_guide = _nothing(x)
    seen = None
    if guide is not None:
        g = in_rows(guide)
        seen = g, g.new_empty((0, g.shape[1])), g.new_empty((0, g.shape[1]))
    part = None
    if share is not None:
        part = Part(share, (in_rows(own), z1, negatives), views)
        ids = ids[:, None].expand(-1, views).flatten()
        groups = None if groups is None else groups[:, None].expand(-1, views).flatten()
    else:
        ids, groups = ids.repeat(views), None if groups is None else groups.repeat(views)
    marks = no_mask if mask is None else positive
    if ignored is not None:  # beside a mask, which the ids would add positives to
        ids, marks = (ids, _codes(ignored)) if mask is None else (no_ids, _codes(ignored, positive))
    inputs = (
        x, z1, negatives, ids, marks,
        no_groups if groups is None else groups, no_guide if seen is None else seen[0],
    )  # fmt: skip
    rows = x.shape[0]
    return Problem(
        inputs, tau, ops.MODES["ntxent"], True, rows, rows, True, groups is not None, seen,
        part=part,
    )  # fmt: skip


def _of_candidates(
    features: Tensor, labels: Any, candidates: Any, candidate_labels: Any,
    temperature: float | Tensor, groups: Any, guide: Any, meeting: Meeting | None, ignored: Any,
) -> Problem:  # fmt: skip
    """Rows with labels, in the order of `of_features`, against candidates with labels of their own.
    Of many ranks, each has its own candidates. What is ignored may be a positive, too: then a mask
    says who is one, and the labels do not."""
    device, images, number = features.device, features.shape[0], candidates.shape[0]
    labels = check_labels("labels", labels, (images,), device)
    others = check_labels("candidate_labels", candidate_labels, (number,), device)
    if groups is not None:
        groups = check_groups(groups, features, candidates, "candidate")
    if guide is not None:
        guide = check_guide_of_candidates(guide, features, candidates)
    if ignored is not None:
        ignored = check_ignored(ignored, [(images, number)], device)
    tau = _tau_tensor(temperature, features)
    views = features.shape[1] if features.dim() > 2 else 1
    share = None
    if meeting is not None:
        deciders = groups[0] if groups else None, guide[0] if guide else None
        mark = features.new_empty(0, dtype=candidates.dtype)  # a rank may have more than another
        share = meeting.share(images, tau, features, mark, *deciders)
    in_rows = _view_major if share is None else _image_major

    def of_rows(ids: Tensor) -> Tensor:
        return ids.repeat(views) if share is None else ids[:, None].expand(-1, views).flatten()

    x = in_rows(features)
    negatives, ids, marks, alike, rows = _nothing(x)
    seen, part, anchors = None, None, x.shape[0]
    if ignored is None or not ignored.numel():
        ids = torch.cat([of_rows(labels), others])
    else:  # of all views of an image; the rows of a mask repeat in the order of one process
        alone = labels[:, None] == others
        marks = torch.where(ignored, _LEFT_OUT, alone.to(torch.uint8) * _POSITIVE)
        if share is not None:
            marks = marks.repeat_interleave(views, 0)
    if groups is not None:
        alike = torch.cat([of_rows(groups[0]), groups[1]])
    if guide is not None:
        seen = in_rows(guide[0]), guide[1], guide[1].new_empty((0, guide[1].shape[1]))
        rows = cat(seen[:2])
    if share is not None:
        part = Part(share, (x, candidates, negatives), views, gathered=False, whole=True)
        x, candidates, anchors = x.detach(), candidates.detach(), views * share.total()
    return Problem(
        (x, candidates, negatives, ids, marks, alike, rows), tau, ops.MODES["query"], True,
        anchors, number, False, groups is not None, seen, part=part,
    )  # fmt: skip


def of_logits(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    self_column: bool = False,
    meeting: Meeting | None = None,
) -> Problem:
    """Given logits, cosines / temperature; self_column: the anchor's own counts in its row."""
    target = check_logits(logits, target)
    tau = _tau_tensor(temperature, logits)
    rows, columns = logits.shape
    z1 = logits.new_empty((0, columns))
    negatives, _, *none = _nothing(logits)
    part = None
    if meeting is not None:
        share = meeting.share(rows, tau, logits[:, :0])
        part = Part(share, (logits, z1, negatives), gathered=False)
        logits, rows = logits.detach(), share.total()
    return Problem(
        (logits, z1, negatives, target, *none), tau, ops.MODES["logits"], True, rows,
        columns + self_column, self_column, self_column=self_column, part=part,
    )  # fmt: skip


# ---- parts --------------------------------------------------------------------------------------


def _nothing(like: Tensor) -> tuple[Tensor, ...]:
    """negatives, ids, mask, groups and guide where there are none: each a tensor of its own, for
    torch.compile refuses one that is passed twice."""
    return _constant(like, (like.shape[1], like.dtype), lambda: (
        like.new_empty((0, like.shape[1])),
        like.new_empty(0, dtype=torch.int64), like.new_empty((0, 0), dtype=torch.bool),
        like.new_empty(0, dtype=torch.int64), like.new_empty((0, 0), dtype=torch.float32),
    ))  # fmt: skip


_POSITIVE, _LEFT_OUT = 1, 2  # HEX_CODE_* in csrc/hex.h


def _ignored_shapes(z0: Tensor, negatives: Tensor | None, mode: str) -> list[tuple[int, ...]]:
    """Those that `ignored` may have beside two views: a row for each image or anchor, a column for
    each image or candidate."""
    images = z0.shape[0]
    if negatives is not None:
        count = negatives.shape[-2]
        return [(images, count), (count,)] if negatives.dim() == 2 else [(images, count)]
    shapes: list[tuple[int, ...]] = [(images, images)]
    if mode != "query":
        shapes.append((2 * images, 2 * images if mode == "ntxent" else images))
    return shapes


def _codes(ignored: Tensor, positive: Tensor | None = None) -> Tensor:
    """The mask of the operators. A bool may have another byte than 0 and 1, which `!= 0` mends."""
    codes = (ignored != 0).to(torch.uint8) * _LEFT_OUT
    return codes if positive is None else torch.where(positive, _POSITIVE, codes)


def _view_major(z: Tensor) -> Tensor:
    return z if z.dim() == 2 else z.flatten(2).transpose(0, 1).flatten(0, 1)


def _image_major(z: Tensor) -> Tensor:
    return z if z.dim() == 2 else z.flatten(2).flatten(0, 1)


_constants: dict[Hashable, tuple[Tensor, ...]] = {}  # of the CPU, of the last calls
_MOST_CONSTANTS = 64  # a temperature may have another value at each step


def _constant(
    like: Tensor, key: Hashable, make: Callable[[], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `make` gives for the key and a tensor like this one, with numbers that never change.

    To make it takes longer than the loss of a few rows, so it is kept, if it is of the CPU: on a
    GPU it may be of the memory of a graph that is being captured. What is made while a transform or
    a mode is at work may be of no use after it, and what somebody wrote to, among the tensors that
    a loss has saved, is made anew. So is all that is traced, for a graph should show how.
    """
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if traced or type(like) is not Tensor or not like.is_cpu:
        return make()
    made = _constants.get(key)
    if made is None or made[0]._version:
        made = make()
        if is_ordinary():
            if len(_constants) >= _MOST_CONSTANTS:
                _constants.clear()
            _constants[key] = made
    return made


# ---- numbers ------------------------------------------------------------------------------------


def number_tensor(value: float, like: Tensor) -> Tensor:
    """A Python number as the operators take it: 0-d float64, which nobody may write to."""
    if torch.compiler.is_compiling():  # of full() it would make a graph for each value
        return torch.ones((), dtype=torch.float64, device=like.device) * value
    return _constant(
        like, value, lambda: (torch.full((), value, dtype=torch.float64, device=like.device),)
    )[0]


def eps_tensor(eps: float | Tensor, like: Tensor) -> Tensor:
    """A checked eps as the operators take it: float64, 0-d or one value a row, no gradient."""
    if isinstance(eps, Tensor):
        check_has_numbers("eps", eps, like.device)
        return eps.detach().to(like.device, torch.float64)
    return number_tensor(float(eps), like)


def unknown_eps(like: Tensor) -> Tensor:
    """The eps of a batch whose H was given, and the statistic."""
    return torch.full((), math.nan, dtype=torch.float64, device=like.device)


def _tau_tensor(temperature: float | Tensor, like: Tensor) -> Tensor:
    """tau as the operators take it: 0-d, float32 or float64, on the batch's device."""
    temperature = check_temperature(temperature)
    if not isinstance(temperature, Tensor):
        return number_tensor(temperature, like)
    check_has_numbers("temperature", temperature, like.device)
    wide = temperature.dtype in (torch.float32, torch.float64)
    if temperature.dim():  # (1,), say: sharded training wants one dimension
        temperature = temperature.reshape(())
    return temperature.to(like.device, temperature.dtype if wide else torch.float32)
