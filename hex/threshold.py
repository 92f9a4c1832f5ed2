# SPDX-License-Identifier: MIT
"""The threshold eps over training: measured on the batches, or scheduled over the epochs.

A tracker makes the eps of a step from the candidate of the batch (hex.batch_threshold) and what
earlier batches left. How a schedule depends on the epoch is in schedules.py, what is kept and saved
in state.py, and what is kept and not saved in recent.py. The loss measures the candidate, scales a
schedule to the range of each row, and decides what counts as training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from . import schedules
from . import state as states
from ._calls import is_in_backward, warn
from .checks import Over, check_candidate, check_choice, check_count, check_flag
from .recent import Recall, Tally

__all__ = ["ThresholdTracker"]


class ThresholdTracker(nn.Module):
    """The threshold eps, a cosine, over the steps of training. These class methods make a tracker:

        adaptive(...)              measured on the batches
        by_positive(margin)        of each anchor, the cosine with its positive less a margin
        fixed(t)                   t
        step(start, drop, every)   max(start - drop floor(epoch / every), -1)
        cosine(start, end, epochs) end + (start - end) (1 + cos(pi epoch / epochs)) / 2, then end

    Call `set_epoch(epoch)` on the loss, or on the tracker, at the start of each epoch. Epochs count
    from 0. An adaptive tracker without warm-up works without these calls. All state is in
    `state_dict`, so a run that is stopped and resumed at any step continues bit for bit.
    `load_state_dict`, even a strict one, also accepts a state that has no tracker, such as that of
    a model that was trained with another loss. The tracker then stays as it was.

    Short batches: a batch counts as short if it has less than half the anchors of the largest batch
    of this epoch and the one before, such as the last batch of an epoch. It uses its own candidate
    as eps, but does not store it, because that says little about the next batch. (If `set_epoch` is
    never called, the largest of at most the last hundred calls counts.) After twenty short batches
    in a row, their length becomes the normal one. If two sizes alternate, give each size a loss of
    its own, because the smaller one would never move the threshold.

    Activation checkpointing: the second run of a loss gets the eps of its first run and stores
    nothing. The first run is found by its candidate, among the last 256 training calls. If two
    equal batches come before one backward, both get the eps of the second. Put `torch.compile`
    around a checkpoint and not inside it. A loss that is compiled inside a checkpoint leaves the
    graph for its threshold. A loss that was compiled elsewhere, and is then called inside a
    checkpoint, does not recognise its second run. Selective checkpointing expects the same
    operators in both runs, so it refuses an adaptive threshold.

    DDP sends rank 0's buffers to all ranks before each forward, so every rank continues from rank
    0's state, as with BatchNorm. If this is turned off, each rank continues from its own state.

    Keep the tracker on the device of the embeddings (`loss.to(device)`). On another device the
    result is the same, but every step waits for copies between the devices.

    Attributes:
        state: (11,) float64, all that is stored (state.py). It contains the next four.
        epoch: the epoch of the last `set_epoch`. Before the first call it is -1, treated as 0.
        updates: how many candidates were stored.
        skipped: how many candidates were not stored because they were not finite.
        short: how many candidates were not stored because their batch was short.

    Raises:
        TypeError, ValueError: an argument of a class method has the wrong type or value.

    Example:
        >>> import torch
        >>> from hex import ThresholdTracker
        >>> tracker = ThresholdTracker.adaptive(quantile=0.99, warmup_epochs=1)
        >>> tracker.set_epoch(0)
        >>> tracker.update(torch.tensor(0.5), store=True)  # warm-up: nothing is in H
        tensor(inf, dtype=torch.float64)
        >>> tracker.set_epoch(1)
        >>> tracker.update(torch.tensor(0.5), store=True)
        tensor(0.5000, dtype=torch.float64)
        >>> tracker.history
        [(0, inf)]

    Source: Kokilepersaud et al., WACV 2025 (arXiv 2410.23200), and the released code,
    https://github.com/olivesgatech/HEX.
    """

    state: Tensor

    def __init__(self, rule: str, **options: Any) -> None:
        """The class methods call this, and fill in the defaults."""
        super().__init__()
        check_choice("rule", rule, tuple(schedules.OPTIONS))
        if sorted(options) != sorted(schedules.OPTIONS[rule]):
            raise TypeError(
                f"ThresholdTracker: got {rule!r} with {', '.join(options) or 'no options'}, wanted "
                f"ThresholdTracker.{rule}(...), which has the defaults"
            )
        self.rule = rule
        self.options = schedules.checked(rule, options)
        self.normalize_rows: bool = self.options.get("normalize_rows", False)
        self.quantile: float = self.options.get("quantile", 0.99)
        self.over: Over = self.options.get("over", "negatives")
        self.register_buffer("state", torch.zeros(states.STATE, dtype=torch.float64))
        self._tally = Tally()
        self.reset()

    @classmethod
    def adaptive(
        cls, quantile: float = 0.99, over: Over = "negatives", warmup_epochs: int = 0,
        momentum: float = 0.0, monotonic: bool = False, lagged: bool = False,
        warmup_threshold: float = math.inf,
    ) -> ThresholdTracker:  # fmt: skip
        """eps is a quantile of each row's cosines, averaged over the rows, for every batch anew.

            v_t = momentum v_(t-1) + (1 - momentum) candidate_t,  v_1 = candidate_1
            v_t = min(v_t, v_(t-1))      if monotonic
            eps_t = v_t, or v_(t-1) if lagged (+inf first)

        Args:
            quantile: in [0, 1], the quantile of each row, by nearest rank.
            over: "negatives" takes the quantile over the negatives of a row and works for batches
                of any size. "all", the authors' rule, takes it over the whole row, with the anchor
                itself and its positives. It fails for short rows (see `warn_if_too_small`).
            warmup_epochs: while epoch < warmup_epochs, eps is warmup_threshold and nothing is
                updated. The authors' `epoch <= 10` is warmup_epochs=11.
            momentum: in [0, 1), of the running mean. With 0 each batch has its own value.
            monotonic: whether eps may only fall.
            lagged: whether a batch uses the value that the batches before it left.
            warmup_threshold: the eps of the warm-up. +inf is InfoNCE. The authors use 0.9 for
                NNCLR.
        """
        return cls(
            "adaptive", quantile=quantile, over=over, warmup_epochs=warmup_epochs,
            momentum=momentum, monotonic=monotonic, lagged=lagged,
            warmup_threshold=warmup_threshold,
        )  # fmt: skip

    @classmethod
    def by_positive(
        cls, margin: float = 0.0, relative: bool = False, warmup_epochs: int = 0
    ) -> ThresholdTracker:
        """eps of an anchor is the cosine with its positive less a margin, in every batch anew.

            eps_i = c_ip - margin           or, if relative,  c_ip - |c_ip| margin
            H(i)  = { j : c_ij > eps_i + r }

        So H has the negatives that are nearer to the anchor than its positive, which are likely to
        be false ones. With the variant "excluded" they are left out, which is GISTEmbed. If the
        loss is given a guide, c are the cosines of the guide. The loss must have one positive for
        each anchor. The statistic eps is the mean of eps_i + r over the rows. Nothing is stored but
        the epoch, so `value` is NaN after the warm-up, and `history` stays empty.

        r is the most by which the kernels' cosine may be too large by rounding, 2 (D + 4) u for
        rows of D features, where u is 2^-24 in float32 and 2^-53 in float64 (positive.py). It keeps
        a duplicate of the positive out of H, which has the same cosine but for rounding. In float32
        it is 3e-5 for D = 256. Where torch is set to round float32 before it multiplies (TF32,
        bfloat16), r is 2^-10 or 2^-7 larger. For logits r is two units in the last place of 1 in
        their dtype: 2e-7 in float32, 0.002 in float16 and 0.016 in bfloat16. How they were computed
        is not known, and a margin of -1e-4 allows for larger errors.

        Args:
            margin: a finite number. With 0.05, a negative is in H as soon as it comes within 0.05
                of the positive. If it is negative, only those that are so much nearer are in H.
            relative: whether the margin is a part of the cosine.
            warmup_epochs: while epoch < warmup_epochs, H is empty. Without a guide, an untrained
                network puts many negatives nearer than the positive, most of which are true ones.

        Source: Solatorio, "GISTEmbed: Guided In-sample Selection of Training Negatives for Text
        Embedding Fine-tuning", 2024 (arXiv 2402.16829); the margins are those of NV-Retriever
        (Moreira et al. 2024, arXiv 2407.15831), as sentence-transformers has them.
        """
        return cls("by_positive", margin=margin, relative=relative, warmup_epochs=warmup_epochs)

    @classmethod
    def fixed(cls, t: float, normalize_rows: bool = False) -> ThresholdTracker:
        """One threshold for all epochs: eps = t, or eps_i = min_i + t (max_i - min_i).

        Args:
            t: < 1, or math.inf for InfoNCE. With t < -1 every negative is in H. For any other
                t >= 1, H is always empty, and a loss warns, unless it has the released form.
            normalize_rows: whether t is compared with the cosines scaled to [0, 1] in each row, as
                in all schedules of the authors. The whole row is scaled, so in mode "ntxent" max_i
                is 1, the cosine of the anchor with itself. t must then be finite.
        """
        return cls("fixed", t=t, normalize_rows=normalize_rows)

    @classmethod
    def step(
        cls, start: float, drop: float, every: int, normalize_rows: bool = False
    ) -> ThresholdTracker:
        """eps = max(start - drop floor(epoch / every), -1). The authors: 0.9, 0.1 every 25 epochs.

        Args:
            start: a finite cosine.
            drop: finite, >= 0.
            every: the number of epochs from one drop to the next, >= 1.
            normalize_rows: as in `fixed`.
        """
        return cls("step", start=start, drop=drop, every=every, normalize_rows=normalize_rows)

    @classmethod
    def cosine(
        cls,
        start: float,
        end: float,
        epochs: int,
        normalize_rows: bool = False,
        compounded: bool = False,
    ) -> ThresholdTracker:
        """eps = end + (start - end) (1 + cos(pi epoch / epochs)) / 2, and end from `epochs` on.

        Args:
            start, end: finite cosines.
            epochs: the length of the decay, >= 1.
            normalize_rows: as in `fixed`.
            compounded: whether to decay as the authors' code does. That code overwrites its start
                with the result of each epoch, so the factors multiply and the decay is much faster
                (halfway at about epoch 0.94 epochs^(2/3) instead of epochs / 2):
                eps = end + (start - end) prod_(k = 1..epoch) (1 + cos(pi k / epochs)) / 2
        """
        return cls(
            "cosine",
            start=start,
            end=end,
            epochs=epochs,
            normalize_rows=normalize_rows,
            compounded=compounded,
        )

    @property
    def epoch(self) -> Tensor:
        return self._count_of(states.EPOCH) - 1

    @property
    def updates(self) -> Tensor:
        return self._count_of(states.UPDATES)

    @property
    def skipped(self) -> Tensor:
        return self._count_of(states.SKIPPED)

    @property
    def short(self) -> Tensor:
        return self._count_of(states.SHORT)

    def _count_of(self, index: int) -> Tensor:
        return self.state[index].round().clamp(max=2**53).to(torch.int64)

    @property
    def adaptive_rule(self) -> bool:
        """Whether `update` gives eps, from a batch's candidate. Otherwise `current` gives it, or by
        the positive `below`."""
        return self.rule == "adaptive"

    @property
    def value(self) -> Tensor:
        """The threshold at this moment, as a 0-d float64 copy.

        For an adaptive tracker, it is what the last update stored, +inf before the first update,
        and warmup_threshold during warm-up. For a schedule, it is this epoch's threshold. By the
        positive, where each row of a batch has its own, it is NaN, and +inf during warm-up.
        """
        if self.rule == "by_positive":
            return self._unless_warm_up(torch.full_like(self.state[0], math.nan))
        if not self.adaptive_rule:
            return schedules.at(self.rule, self.options, self.state[states.EPOCH] - 1)
        threshold: float = self.options["warmup_threshold"]
        return torch.where(self._is_warm_up(), threshold, states.stored(self.state))

    def _is_warm_up(self) -> Tensor:
        epochs: int = self.options.get("warmup_epochs", 0)
        return self.epoch.clamp(min=0) < epochs

    def _unless_warm_up(self, eps: Tensor) -> Tensor:
        return torch.where(self._is_warm_up().to(eps.device), math.inf, eps)

    @property
    def history(self) -> list[tuple[int, float]]:
        """(epoch, value at its end) for each epoch that a `set_epoch` has ended, in order."""
        return list(self._history)

    def set_epoch(self, epoch: int) -> None:
        """Begins `epoch`, which counts from 0, and adds the epoch that ends to `history`.

        Call it between steps and outside compiled code, because it waits for the device. Naming the
        epoch that is already running changes nothing. It warns, once, if H was empty in every row
        of the epoch that ends. It also warns if H always had all negatives in the released form
        or with "excluded", so that the loss was 0.

        Raises:
            TypeError, ValueError: epoch is not an integer >= 0.
        """
        epoch = check_count("epoch", epoch, 0)
        self._epoch_set = True
        if self.state.is_meta:
            return
        before = int(self.epoch)
        if before == epoch:
            return
        if before >= 0 or int(self.updates) > 0:
            if self.rule != "by_positive":
                self._history.append((max(before, 0), float(self.value)))
            self._judge(f"epoch {max(before, 0)}")
        state = self.state.clone()
        if state[states.MOST] > 0:
            state[states.BEFORE] = state[states.MOST]
        state[states.MOST] = state[states.CALLS] = 0
        state[states.EPOCH] = epoch + 1
        self.state.copy_(state)

    def reset(self) -> None:
        """Forgets all state, the history and the warnings that were given. The options stay."""
        with torch.no_grad():
            self.state.zero_()
        self._history: list[tuple[int, float]] = []
        self._recall = Recall()
        self._warned: set[str] = set()
        self._longest_row = 0
        self.known: Tensor | None = None  # whether the last candidate was that of a second run
        self._epoch_set = False
        self._tally.reset()

    def reset_parameters(self) -> None:
        """`reset`, under the name that FSDP and others call after `to_empty`."""
        self.reset()

    def update(self, candidate: Tensor, *, store: bool, anchors: int = 0) -> Tensor:
        """Gives the eps of a batch, and stores the new state of an adaptive tracker.

        Args:
            candidate: 0-d, the batch's own threshold. If it is not finite, it counts as skipped.
                The batch then uses the stored value, which does not change.
            store: whether to store the state. False, for evaluation, gives the same eps. Nothing is
                stored under torch.func transforms. Nothing is stored either for a candidate that is
                met again in a backward, because that is the second run of a checkpoint.
            anchors: how many anchors the batch has, to recognise a short one. 0 if all are equal.

        Returns:
            0-d float64 on the candidate's device, without gradient. It is never the buffer itself.

        Raises:
            RuntimeError: the tracker is not adaptive.
            TypeError, ValueError: an argument has the wrong type or shape.
        """
        if not self.adaptive_rule:
            raise RuntimeError(f"update: got the rule {self.rule!r}, wanted 'adaptive'")
        check_candidate("candidate", candidate)
        store = check_flag("store", store)
        kind: type = type(anchors)
        if kind is bool or not issubclass(kind, (Integral, torch.SymInt)):
            raise TypeError(f"anchors: got {type(anchors).__name__}, wanted an integer")
        candidate = candidate.detach().to(torch.float64)
        state = self.state.to(candidate.device, torch.float64)
        eps, moved = states.step(state, candidate, anchors, *self.kernel_rule()[2:])
        if torch._C._are_functorch_transforms_active():
            return eps
        self.known = None
        if is_in_backward() and len(self._recall):
            eps, self.known = self._recall.find(candidate, eps)
            moved = torch.where(self.known.to(state.device), state, moved)
        if store:
            self.remember(candidate, eps)
            self.store(moved)
        return eps

    def store(self, state: Tensor, own: Tensor | None = None) -> None:
        """Stores the new state of an update made elsewhere, such as in `torch.ops.hex.adaptive`.

        Args:
            own: `self.state`, if the caller has it already: looking up a buffer takes time.
        """
        own = self.state if own is None else own
        if state.is_meta and not own.is_meta:
            return  # the call was for the shapes alone
        if self.options["warmup_epochs"] > 0:
            self._warn_without_epochs("the warm-up never ends")
        if own.dtype != torch.float64:  # FSDP's buffer_dtype casts in place
            self.state = own = own.to(torch.float64)
        own.copy_(state)

    def remember(self, candidate: Tensor, eps: Tensor) -> None:
        """Remembers the eps that a candidate was given, for the second run of a checkpoint.

        Args:
            candidate: 0-d, or the state that followed from it, which contains it.
            eps: 0-d.
        """
        self._recall.add(candidate, eps)

    def counts_unseen(self, loss: Tensor) -> bool:
        """Counts a training batch if `watch` need not look at it. Returns whether this is so."""
        return self._tally.add_unseen(loss)

    def watch(self, hard: Tensor, loss: Tensor, could_be_0: bool) -> None:
        """Counts a training batch for the warnings of `set_epoch` and `look` (see `Tally.add`)."""
        if self._tally.device != hard.device and not hard.is_meta:
            self._tally = self._tally.on(hard.device)
        self._tally.add(hard, loss, could_be_0)

    def look(self, ended: bool = False) -> None:
        """Warns if H was always empty, or had all negatives, in the batches that `watch` counted.

        If `set_epoch` was never called, this needs at least a hundred batches. If `ended`, it
        is about the last epoch, which no `set_epoch` ends. It waits for the device.
        """
        if ended:
            self._judge("the last epoch")
        elif not self._epoch_set:
            self._judge("the last {:.0f} batches", least=100)

    def _judge(self, period: str, least: int = 1) -> None:
        batches, members, nothing = self._tally.read()
        if batches < least:
            return
        period = period.format(batches)
        self._tally.reset()
        if schedules.lowest(self.rule, self.options) == math.inf or self._is_warm_up():
            return  # H is meant to be empty, or as the warm-up's threshold makes it
        if members == 0:
            if self.rule == "by_positive":
                return  # each positive was nearer than all negatives, as it should be
            if schedules.is_falling(self.rule, self.options, float(self.value)):
                return  # the schedule is still on its way down
            if self.options.get("lagged") and batches == 1:
                return  # before the first batch there is no threshold
            self._warn(
                "never any",
                f"no row of {period} had a negative above the threshold: H was empty, so the loss "
                "was InfoNCE (decoupled InfoNCE in the released form and with decoupled=True). Use "
                "a lower threshold or quantile, larger batches, or fewer ignored negatives "
                f"({self})",
            )
        elif nothing == batches:
            remedy = "higher threshold, or a schedule that falls less far"
            if self.rule == "by_positive":
                remedy = "smaller margin"
            self._warn(
                "nothing else",
                f"every negative was above the threshold in every row of {period}. The variant of "
                f"this loss leaves these out, so the loss and its gradient were 0. Use a {remedy} "
                f"({self})",
            )

    def kernel_rule(self) -> tuple[float, bool, float, bool, bool, int, float]:
        """The options of an adaptive tracker, in the order of the operator's arguments."""
        o = self.options
        return (
            self.quantile,
            self.over == "negatives",
            o["momentum"],
            o["monotonic"],
            o["lagged"],
            o["warmup_epochs"],
            o["warmup_threshold"],
        )

    def current(self) -> Tensor:
        """The threshold of a schedule in this epoch, as a new 0-d float64 on the tracker's device.

        Raises:
            RuntimeError: the tracker is adaptive, or its rule is by_positive.
        """
        if self.rule in ("adaptive", "by_positive"):
            raise RuntimeError(
                f"current: got the rule {self.rule!r}, wanted 'fixed', 'step' or 'cosine'"
            )
        if self.rule != "fixed" and torch.is_grad_enabled():
            self._warn_without_epochs("the threshold stays at its start")
        return self.value

    def below(self, positive: Tensor, rounding: float) -> Tensor:
        """The threshold of each row by the positive: see `by_positive`.

        Args:
            positive: (N,) float64, the cosine of each row with its positive.
            rounding: what is added, so that an equal cosine is not above the threshold.
        """
        margin: float = self.options["margin"]
        if self.options["warmup_epochs"] > 0 and torch.is_grad_enabled():
            self._warn_without_epochs("the warm-up never ends")
        less = positive.abs() * margin if self.options["relative"] else margin
        return self._unless_warm_up(positive - less + rounding)

    def warn_if_never(self) -> None:
        """Warns if no cosine can be above the schedule, unless that was asked for by math.inf."""
        lowest = schedules.lowest(self.rule, self.options)
        if 1 <= lowest < math.inf:
            self._warn(
                "never any",
                f"no cosine is above {lowest:g}, so H is always empty, which is InfoNCE. Use a "
                f"lower threshold, or threshold=None if InfoNCE is wanted ({self})",
            )

    def warn_if_decoupled_twice(self) -> None:
        """Warns that a loss in the released form has no positive in its denominator to leave out,
        unless the threshold is +inf at some time, where that form is InfoNCE."""
        if not schedules.is_ever_infinite(self.rule, self.options):
            self._warn(
                "decoupled twice",
                'decoupled=True changes nothing with variant="released", which has no positive in '
                f"its denominator at any threshold below +inf; leave it out ({self})",
            )

    def warn_if_too_small(self, n_row: int, has_self: bool) -> None:
        """Warns, once, if with over="all" the quantile of a row is not the cosine of a negative.

        The quantile is element k = round(quantile (n - 1)) of the n cosines in ascending order. If
        that is the anchor's cosine with itself (for the quantile 0.99: n < 52), eps is 1 and H is
        always empty. As soon as training works, the largest other cosine is the positive's. If the
        quantile is that one (n < 151, or n < 52 in a row without the anchor itself), eps follows
        the positives and H is nearly empty. The short last batch of an epoch does not count.

        Args:
            n_row: how many cosines a row has.
            has_self: whether the anchor's cosine with itself is one, as in mode "ntxent".
        """
        if self.over != "all" or not self.adaptive_rule or torch.compiler.is_compiling():
            return
        above = n_row - 1 - round(self.quantile * (n_row - 1))  # elements after the one taken
        longest, self._longest_row = self._longest_row, max(n_row, self._longest_row)
        if n_row < 1 or above > int(has_self) or 2 * n_row < longest:
            return
        taken = (
            "the anchor's similarity with itself, so eps is 1 and H is always empty"
            if has_self and above == 0
            else "usually the cosine of the positive, so H is nearly always empty"
        )
        self._warn(
            "too small",
            f"the {self.quantile:g} quantile of a row of {n_row} cosines is {taken}. Use "
            "ThresholdTracker.adaptive(over='negatives'), a lower quantile, or a larger batch",
        )

    def extra_repr(self) -> str:
        """The rule and its options."""
        return ", ".join([self.rule, *(f"{name}={v!r}" for name, v in self.options.items())])

    def get_extra_state(self) -> Tensor:
        """The history as a tensor of fixed shape, so that a state_dict has tensors only."""
        return states.pack_history(self._history)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what get_extra_state gave."""
        self._history = states.unpack_history(state)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # the model was saved with a loss that has no tracker
        saved = state_dict.get(f"{prefix}state")
        if isinstance(saved, Tensor) and saved.dtype == torch.int64 and saved.shape == (4,):
            state_dict[f"{prefix}state"] = states.converted(saved)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)
        self._epoch_set = not self.state.is_meta and int(self.epoch) >= 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ThresholdTracker:
        """`to`, `half` and the like: they move the state, which stays float64."""
        before = self.state
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.state.dtype != torch.float64:
            self.state = before.to(self.state.device)
        if not self.state.is_meta:
            self._tally = self._tally.on(self.state.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For deepcopy and pickle: leaves out what only a backward still to come needs."""
        return {**self.__dict__, "_recall": Recall(), "known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of a tracker that was pickled when its counts were no `Tally`."""
        tally = state.get("_tally")
        new = {"_recall": Recall(), "_tally": tally if isinstance(tally, Tally) else Tally()}
        super().__setstate__({**state, **new})  # type: ignore[no-untyped-call]

    def _warn_without_epochs(self, consequence: str) -> None:
        if not torch.compiler.is_compiling() and not self._epoch_set:
            self._warn(
                "no epochs",
                f"set_epoch was never called, so {consequence}; call set_epoch(epoch) on the loss "
                f"or its threshold at the start of each epoch ({self})",
            )

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warn(f"ThresholdTracker: {message}")
