# SPDX-License-Identifier: MIT
"""What a threshold remembers of recent batches and never saves: `Tally`, by which a threshold that
does nothing is found, and `Recall`, by which the second run of a checkpoint gets its first's eps.

What is saved is in state.py.
"""

import math
from collections import deque

import torch
from torch import Tensor

from .state import CANDIDATE

__all__ = ["Recall", "Tally"]

_RECENT = 256  # training calls that may lie between a forward and its backward
_NEAR = 1e-5  # the candidate of a second run differs from its first's by rounding at most


class Tally:
    """Counts of training batches. They stay on the batches' device, so counting does not wait."""

    def __init__(self) -> None:
        # All batches, those in which a row had members of H, and those whose loss was 0 because of
        # the threshold. (1,), because a compiled graph loses what is written to a 0-d float64 on
        # the CPU (torch 2.13).
        self._counts = tuple(torch.zeros(1, dtype=torch.float64, device="cpu") for _ in range(3))
        self.reset()

    @property
    def device(self) -> torch.device:
        return self._counts[0].device

    def reset(self) -> None:
        for count in self._counts:
            count.zero_()
        # Once a batch on the CPU had members of H and a loss, those after it need no look.
        self._uncounted, self._is_fine = 0, False

    def on(self, device: torch.device) -> "Tally":
        """One of the same counts on another device. This one stays as it is, for the replicas of
        `torch.nn.DataParallel` have it in common."""
        other = Tally()
        other._counts = tuple(count.to(device) for count in self._counts)
        other._uncounted, other._is_fine = self._uncounted, self._is_fine
        return other

    def add_unseen(self, loss: Tensor) -> bool:
        """Counts a batch if those before it say enough. Whether they do."""
        if not (_is_at_hand(loss) and self._is_fine):
            return False
        self._uncounted += 1
        return True

    def add(self, hard: Tensor, loss: Tensor, could_be_0: bool) -> None:
        """Counts a batch. A loss that is not finite tells nothing of H.

        Args:
            hard: |H| of each row.
            loss: of each row, or reduced.
            could_be_0: whether the threshold can make the loss 0.
        """
        # Not is_exporting(), which torch 2.10 takes to be True in every graph that it compiles.
        if getattr(torch.compiler, "_is_exporting_flag", False) or hard.is_meta:
            return
        batches, members, nothing = self._counts
        finite = loss.isfinite().all()
        batches.add_(finite)
        members.add_(hard.any() & finite)
        if could_be_0:
            nothing.add_(~loss.any())
        if _is_at_hand(hard):
            self._is_fine = bool(members > 0) and bool(nothing < batches)

    def read(self) -> tuple[float, float, float]:
        """All batches, those with members of H, and those whose loss was 0. Waits for the device.

        The second and third are too small where nothing depends on it: the second is above 0, and
        the third below the first.
        """
        batches, members, nothing = (float(count) for count in self._counts)
        return batches + self._uncounted, members, nothing


class Recall:
    """The candidates of the last training calls, and the eps that each was given."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[Tensor, Tensor]] = deque(maxlen=_RECENT)

    def __len__(self) -> int:
        return len(self._pairs)

    def add(self, candidate: Tensor, eps: Tensor) -> None:
        """Args: see `ThresholdTracker.remember`."""
        if not torch.compiler.is_compiling() and not candidate.is_meta:
            self._pairs.appendleft((candidate, eps))

    def find(self, candidate: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """What this candidate was given in its first run, and whether there was a first run.

        Where there was none, the first result is `eps`. A candidate that is not finite counts as
        one that has had its first run. There must be at least one pair.
        """
        candidates, given = zip(*self._pairs, strict=True)
        seen = torch.stack([x[CANDIDATE] if x.dim() else x for x in candidates])
        distance = (seen.to(candidate.device) - candidate).abs().nan_to_num(nan=math.inf)
        nearest = distance.argmin()  # of several the newest
        first = torch.stack(given).to(eps.device).index_select(0, nearest.reshape(1)).squeeze(0)
        known = distance.amin() <= _NEAR
        return torch.where(known, first, eps), known | ~candidate.isfinite()


def _is_at_hand(x: Tensor) -> bool:
    """Whether its numbers can be read without waiting for a device."""
    return x.is_cpu and type(x) is Tensor and not torch.compiler.is_compiling()
