# SPDX-License-Identifier: MIT
"""What the ranks of torch.distributed tell each other for `gather_distributed=True`.

Communication only moves numbers and never adds them: every sum over the rows of all ranks is made
by each rank itself, in the order of the rows, so that all ranks have the same bits. What is
gathered when, and what is computed of it, is in sharded.py.

    group   the data-parallel ranks, G of them, each with the images of its own batch
    B       the images of all ranks, in the order of the ranks
"""

import copy
import math
import struct
import weakref
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .checks import check_process_group, check_rows_are

__all__ = ["Meeting", "Ranks", "Share", "agree"]


class Ranks:
    """The process group of a loss. It is kept by deepcopy and refused by pickle.

    Args:
        group: a ProcessGroup, or None for all ranks.
        checks: whether the ranks compare what they bring before they gather it.
    """

    def __init__(self, group: Any, checks: bool) -> None:
        check_process_group(group)
        self.group, self.checks = group, checks
        self.name = _name(group)
        self.met = False  # whether the ranks have compared their thresholds on a GPU

    def are_several(self) -> bool:
        """Whether there is a process group with other ranks."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return copy.copy(self)

    def __copy__(self) -> "Ranks":
        return Ranks(self.group, self.checks)

    def __reduce__(self) -> Any:
        if self.group is not None:
            raise TypeError(
                "process_group: a loss with a process group cannot be pickled, because the group "
                "exists in this run alone; save the loss's state_dict() instead"
            )
        return Ranks, (None, self.checks)


class Meeting(NamedTuple):
    """A call of a loss on all ranks, before it is known what each brings."""

    ranks: Ranks
    rows: Sequence[int] | None
    """The images of every rank, where the caller says them."""
    loss: tuple[Any, ...]
    """The options of the loss, which every rank must have alike."""
    state: Tensor | None
    """That of the threshold, too."""

    def share(self, images: int, tau: Tensor, *brought: Tensor | None) -> "Share":
        """The place of this rank's batch among those of all.

        Args:
            images: of this rank.
            tau: the temperature, which the ranks compare where that needs no waiting.
            brought: the batch's tensors, or None, of which the ranks compare dtype and shape but
                the number of rows.

        Raises:
            ValueError: the ranks bring what does not fit. It is raised on every rank alike, and
                before anything is gathered.
            NotImplementedError: under a torch.func transform.
        """
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "gather_distributed: got True under a torch.func transform, wanted False, because "
                "the ranks cannot exchange tensors inside the transform"
            )
        ranks, rows = self.ranks, self.rows
        size, rank = dist.get_world_size(ranks.group), dist.get_rank(ranks.group)
        share = Share(ranks, (images,) * size if rows is None else tuple(rows), rank, None)
        like = next(t for t in brought if t is not None)
        traced = _is_traced(like)
        if not ranks.checks or like.is_meta or (not traced and _is_captured(like)):
            if rows is not None:
                check_rows_are(rows, images, size, rank)
        elif traced:
            facts = [images, _digest_of_rows(rows), 0, 0, 0, 0]
            agreed = torch.ops.hex.agree(like.detach(), facts, rows, ranks.name)
            share = share._replace(agreed=agreed)
        else:
            tensors = [None if t is None else (t.dtype, *t.shape[1:]) for t in brought]
            # Of a call that learns on one rank alone the thresholds would part.
            learns = torch.is_grad_enabled() and any(
                t is not None and t.requires_grad for t in brought
            )
            options = (*self.loss, {"needs a gradient": learns})
            digests = [_digest_of_rows(rows), _digest(tensors), _digest(options)]
            facts = [images, *digests, self._digest_of_state(), _bits_of(tau)]
            agree(like.device, facts, rows, ranks.group, (tensors, options))
        return share

    def _digest_of_state(self) -> int:
        """0 where it cannot be read, or not without waiting for the device."""
        state = self.state
        if state is None or type(state) not in _PLAIN or state.is_meta:
            return 0
        if state.is_cuda:
            if self.ranks.met:
                return 0
            self.ranks.met = True
        return zlib.crc32(state.cpu().numpy().tobytes())


class Share(NamedTuple):
    """This rank's images among those of all ranks."""

    ranks: Ranks
    rows: tuple[int, ...]
    """The images of each rank."""
    rank: int
    agreed: Tensor | None
    """Of a graph: what its gathers wait for, the check of what the ranks bring."""

    # Methods, no properties: torch 2.10 compiles none of a NamedTuple.

    def size(self) -> int:
        """G, the number of ranks."""
        return len(self.rows)

    def first(self) -> int:
        return sum(self.rows[: self.rank])

    def images(self) -> int:
        return self.rows[self.rank]

    def total(self) -> int:
        return sum(self.rows)

    def of_views(self, views: int) -> "Share":
        """The same where every image has so many rows, one after another."""
        return self._replace(rows=tuple(views * n for n in self.rows))

    def gather(self, *tensors: Tensor | None) -> list[Any]:
        """Of each tensor (n, ...) that of all ranks, (B, ...), in their order; without gradient.

        One collective, whatever the number of tensors: they travel side by side, as bytes.
        """
        there = [t.detach() for t in tensors if t is not None]
        if _is_traced(there[0]):
            gathered = torch.ops.hex.gather(there, self.agreed, self.rows, self.ranks.name)
        else:
            gathered = _gather_together(there, self.rows, self.ranks.group)
        every = iter(gathered)
        return [None if t is None else next(every) for t in tensors]


def _gather_together(tensors: Sequence[Tensor], rows: Sequence[int], group: Any) -> list[Tensor]:
    flat = [_bytes(t) for t in tensors]
    x = _gather(flat[0] if len(flat) == 1 else torch.cat(flat, 1), rows, group)
    parts = x.split_with_sizes([f.shape[1] for f in flat], 1)
    return [_restore(part, t) for part, t in zip(parts, tensors, strict=True)]


def _bytes(t: Tensor) -> Tensor:
    flat = t.reshape(t.shape[0], math.prod(t.shape[1:]))
    return flat.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _restore(part: Tensor, like: Tensor) -> Tensor:
    if not part.shape[1]:  # without features, and torch views no bytes as wider numbers there
        return like.new_empty((part.shape[0], *like.shape[1:]))
    aligned = part.clone(memory_format=torch.contiguous_format)  # also of one row, or none
    return aligned.view(like.dtype).reshape(part.shape[0], *like.shape[1:])


def _gather(x: Tensor, rows: Sequence[int], group: Any) -> Tensor:
    """(n, ...) to (B, ...): padded to the most rows that a rank has, for a collective wants one
    number of all."""
    most = max(rows)
    if x.is_meta:
        return x.new_empty((sum(rows), *x.shape[1:]))
    if x.shape[0] < most:
        x = torch.cat([x, x.new_zeros((most - x.shape[0], *x.shape[1:]))])
    out = x.new_empty((len(rows) * most, *x.shape[1:]))
    # torch 2.13 warns of the old name, all_gather_into_tensor, which is the only one in 2.10.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x.contiguous(), group=group)
    if min(rows) == most:
        return out
    return torch.cat([out[k * most : k * most + n] for k, n in enumerate(rows)])


# ---- whether the ranks bring what fits ----------------------------------------------------------


def _is_captured(z: Tensor) -> bool:
    """Whether this is the recording of a CUDA graph, in which the host has no part."""
    return z.is_cuda and torch.cuda.is_current_stream_capturing()


_MOST_NAMED = 8  # ranks in an error
_PLAIN = (Tensor, torch.nn.Parameter)  # which have a number to read


def _digest(x: Any) -> int:
    return 1 + zlib.crc32(repr(x).encode())


def _digest_of_rows(rows: Sequence[int] | None) -> int:
    """By arithmetic, which a compiler can follow."""
    digest = 1 if rows is None else 2
    for n in rows or ():
        digest = (digest * 1000003 + n) % (1 << 61)
    return digest


def agree(
    device: torch.device, facts: Sequence[int], rows: Sequence[int] | None, group: Any, own: Any
) -> None:
    """Compares what the ranks bring: the images of each; digests, of which 0 is not known; and the
    bits of the temperature, which may differ by rounding.

    Six integers a rank; on a GPU they go by the host, which no stream waits for.

    Args:
        own: what the digests of tensors and options are of, or None without digests.
    """
    group = group if device.type == "cpu" else _host_group(group)
    mine = torch.tensor(facts, dtype=torch.int64, device="cpu")
    every = _gather(mine[None], (1,) * dist.get_world_size(group), group)
    if rows is None and torch.equal(every, mine.expand_as(every)):
        return
    images, said, tensors, options, state, tau = every.T.tolist()
    if other := _differ(said):
        raise ValueError(
            f"rows: got different values on ranks 0 and {other} (None counts as one), wanted the "
            f"same on all ranks; this rank has {rows}"
        )
    if rows is not None and list(rows) != images:
        raise ValueError(
            f"rows: got {tuple(rows)}, wanted the number of images of each rank, {tuple(images)}"
        )
    if rows is None and len(set(images)) > 1:
        other = next(k for k, n in enumerate(images) if n != images[0])
        named = [0, other] if len(images) > _MOST_NAMED else range(len(images))
        raise ValueError(
            f"gather_distributed: got {_list([images[k] for k in named])} rows on ranks "
            f"{_list(named)}, wanted the same number: use drop_last=True in the loader, or pass "
            "rows="
        )
    for column, what, here in (
        (tensors, "dtypes or shapes", f"this rank has {own and own[0]}"),
        (options, "options", f"this rank has {own and own[1]}"),
        (state, "thresholds", "load the same state_dict and call set_epoch on every rank"),
    ):
        if other := _differ(column):
            raise ValueError(
                f"gather_distributed: got different {what} on ranks 0 and {other}, wanted the same "
                f"on all ranks; {here}"
            )

    temperatures = [_number_of(bits) for bits in tau if bits]
    low, high = min(temperatures, default=1.0), max(temperatures, default=1.0)
    if high - low > 1e-3 * abs(high):
        raise ValueError(
            f"temperature: got values from {low:g} to {high:g}, wanted the same on all ranks"
        )


def _bits_of(tau: Tensor) -> int:
    """0 where it cannot be read without waiting for the device, or is not finite."""
    if not tau.is_cpu or type(tau) not in _PLAIN or not math.isfinite(tau.item()):
        return 0
    bits: int = struct.unpack("<q", struct.pack("<d", tau.item()))[0]
    return bits


def _number_of(bits: int) -> float:
    number: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return number


def _differ(digests: Sequence[int]) -> int:
    """The first rank with another digest than rank 0, or 0 where there is none."""
    return next((k for k, d in enumerate(digests) if d and digests[0] and d != digests[0]), 0)


def _list(values: Sequence[int]) -> str:
    *rest, last = map(str, values)
    return f"{', '.join(rest)} and {last}"


# ---- groups -------------------------------------------------------------------------------------

_groups: Any = weakref.WeakValueDictionary()  # by name, which a compiled graph can hold
_hosts: Any = weakref.WeakKeyDictionary()


def _name(group: Any) -> str:
    if group is None:
        return ""
    name: str = group.group_name
    _groups[name] = group
    return name


def _group(name: str) -> Any:
    return _groups[name] if name else None


def _host_group(group: Any) -> Any:
    """A group of the same ranks for tensors of the host: itself if it has a backend for them, else
    one that is made when it is first asked for, on all ranks at once."""
    if "cpu" in dist.get_backend_config(group):
        return group
    group = group or dist.group.WORLD
    if group not in _hosts:
        ranks = dist.get_process_group_ranks(group)
        _hosts[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _hosts[group]


# ---- in a graph each is one operator ------------------------------------------------------------


def _is_traced(z: Tensor) -> bool:
    """Whether the call becomes a graph, or is for the shapes alone."""
    if torch.compiler.is_compiling():
        return True
    return isinstance(z, FakeTensor) or get_proxy_mode() is not None


@torch.library.custom_op("hex::agree", mutates_args=())
def _agree_op(like: Tensor, facts: Sequence[int], rows: Sequence[int] | None, group: str) -> Tensor:
    agree(like.device, facts, rows, _group(group), None)
    return like.new_empty(0)


@_agree_op.register_fake
def _(like: Tensor, facts: Sequence[int], rows: Sequence[int] | None, group: str) -> Tensor:
    return like.new_empty(0)


@torch.library.custom_op("hex::gather", mutates_args=())
def _gather_op(
    tensors: Sequence[Tensor], agreed: Tensor | None, rows: Sequence[int], group: str
) -> list[Tensor]:
    return _gather_together(tensors, rows, _group(group))


@_gather_op.register_fake
def _(
    tensors: Sequence[Tensor], agreed: Tensor | None, rows: Sequence[int], group: str
) -> list[Tensor]:
    return [t.new_empty((sum(rows), *t.shape[1:])) for t in tensors]
