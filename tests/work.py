# SPDX-License-Identifier: MIT
"""What the CPU core did for a problem, counted by itself (work.c), and what the algorithm needs.

`need` and its kin are derived from the sizes and the tables of csrc/cpu: MACs of register tiles and
exponentials of vectors come with their padding, so the numbers are exact. Ranges stand where the
values of the batch decide. Nothing here knows a clock or a CPU.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data import MODES
from torch import Tensor

ROOT = Path(__file__).parents[1]
COUNTS = "products dots rows exponentials compared selected listed again".split()
GIVEN, ADAPTIVE, BLOCK, THRESHOLD, ROW_RANGE = range(5)
F32, F64, _, BF16 = range(4)

integer, real, pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def structure(name: str, *fields: tuple[str, Any]) -> Any:
    each = [(field, kind) for names, kind in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": each})


Request = structure(
    "Request",
    ("what mode several positives dtype over_negatives B M K D guide_D threads keep", integer),
    ("first images", integer),
    ("dz", integer * 3), ("eps tau beta tau_plus quantile", real),
    ("z", pointer * 3), ("guide ids groups", pointer * 2),
)  # fmt: skip
OPTIONS = dict(
    eps=0.4, tau=0.1, beta=1.0, tau_plus=0.0,  # tau_plus 0: no floor acts
    quantile=0.99, dtype=F32, threads=1, dz=(1, 1, 1),
)  # fmt: skip


class Core(NamedTuple):
    """A level of the core that counts, loaded."""

    library: ctypes.CDLL
    dots: bool  # bfloat16 rows are multiplied by pairs

    def sides(self, wide: bool) -> tuple[int, int]:
        mr, nr = integer(), integer()
        self.library.tile_sides(integer(wide), ctypes.byref(mr), ctypes.byref(nr))
        return mr.value, nr.value

    def count(self, z: Sequence[Tensor], mode: str, **given: Any) -> list[dict[str, int]]:
        """Of the forward and the backward. With ids, or in mode "logits", positives are several."""
        several = "ids" in given
        pointers = {name: given.pop(name, ()) for name in ("guide", "ids", "groups")}
        o = {**OPTIONS, "several": several, **given, "mode": [*MODES, "logits"].index(mode)}
        o |= dict(zip("BMK", (x.shape[-2] for x in z), strict=False), D=z[0].shape[1])
        if pointers["guide"]:
            o["guide_D"] = pointers["guide"][0].shape[1]
        for name, tensors in (pointers | {"z": z}).items():
            size = 3 if name == "z" else 2
            o[name] = (pointer * size)(*[x.data_ptr() for x in tensors])
        o["dz"] = (integer * 3)(*o["dz"])
        counts = (integer * len(COUNTS) * 2)()
        self.library.count.restype = ctypes.c_char_p
        if error := self.library.count(ctypes.byref(Request(**o)), counts):
            raise RuntimeError(error)
        return [dict(zip(COUNTS, row, strict=True)) for row in counts]


def build(
    level: str, target: Path, csrc: Path = ROOT / "csrc", *extra: str, floats_only: bool = False
) -> Core:
    """Not optimised: that is sooner done, and what is counted is the same."""
    command = os.environ.get("CC", "gcc").split()
    command += [
        "-std=gnu17",
        "-Werror",
        "-O0",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-pthread",
    ]
    levels = csrc / "cpu" / "levels"
    command += [f'-DLEVEL_FILE="{levels}/{level}.h"', f'-DCPU_FILE="{csrc}/cpu/cpu.h"']
    units = [levels / f"{level}_f32.c"]
    if floats_only or level.startswith("avx512_"):
        command += ["-DFLOAT_ONLY"]
    else:
        units += [levels / f"{level}_f64.c"]
    command += ["-DHEX_COUNT_WORK", *extra, str(Path(__file__).with_suffix(".c")), *map(str, units)]
    command += ["-o", str(target), "-lm"]
    subprocess.run(command, check=True)
    return Core(ctypes.CDLL(str(target)), level.startswith("avx512_"))


# ---- what the algorithm needs ----


def up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def parts(n: int, size: int) -> list[int]:
    return [min(size, n - k) for k in range(0, n, size)]


class Need:
    """A problem's sizes, with the names and the numbers of csrc/cpu: schedule.h, quantile.h,
    onepass.h, blocks.h."""

    def __init__(
        self, core: Core, mode: str, B: int, K: int, D: int, dtype: int = F32, M: int | None = None
    ) -> None:
        self.wide = dtype == F64
        self.MR, self.NR = core.sides(self.wide)
        self.lanes = self.NR // 2
        self.even = 2 if core.dots and dtype == BF16 else 1  # pairs of rows
        M = B if M is None else M  # rows of z1: others where positives are told by ids
        self.mode, self.B, self.M, self.K, self.D = mode, B, M, K, D
        self.width = up(D, self.NR)
        self.symmetric, self.both = mode == "ntxent", mode in ("ntxent", "cross")
        self.rows = B + M if self.both else B
        self.columns = {"ntxent": B + M, "unpaired": K, "paired": K}.get(mode, M)
        self.negatives = self.columns - {"ntxent": 2, "unpaired": 0, "paired": 0}.get(mode, 1)
        self.anchors = B + M if self.symmetric else B  # of a field
        self.by_tiles = mode != "paired" and B >= 16 and self.columns >= 192
        self.unit_rows = B + M + (K if mode == "unpaired" else 0)
        most = 96 if self.wide else 192
        if self.symmetric:
            self.row_block = self.column_block = min(96 if B + M <= 1024 else 192, most)
        else:
            self.row_block = min(48 if B <= 384 else 96 if B <= 1536 else 192, most)
            self.column_block = most

    def tiles(self) -> Iterator[tuple[int, int, bool]]:
        """Rows and columns of each tile of cosines, half of them where c_ij = c_ji; on the
        diagonal?"""
        columns = parts(self.columns, self.column_block)
        for i, rows in enumerate(parts(self.anchors, self.row_block)):
            for j, n in enumerate(columns):
                if not self.symmetric or i <= j:
                    yield rows, n, self.symmetric and i == j

    def product(self, rows: int, columns: int) -> int:
        return up(rows, self.MR) * up(columns, self.NR) * self.width

    def gathered(self, rows: int, columns: int) -> int:
        """Of columns' rows into `rows` others."""
        return up(rows, self.MR) * up(columns, self.even) * self.width

    def cosines(self) -> int:
        return sum(self.product(rows, n) for rows, n, _ in self.tiles())

    def summed(self) -> int:
        """Exponentials of a pass that makes sums: one for the row and the column."""
        return sum(rows * up(n, self.NR) for rows, n, _ in self.tiles())

    def share(self, quantile: float, over_negatives: bool) -> tuple[int, float]:
        """The quantile's rank from above, and its share of the row."""
        n = self.negatives if over_negatives else self.columns + (self.mode == "unpaired")
        k = n - round(quantile * (n - 1))
        return k, k / n

    def samples(self) -> int:
        return 128 if self.columns <= 1024 else 256

    def capacity(self, share: float) -> int:
        most = share + 11 * math.sqrt(share * (1 - share) / self.samples())
        return up(int(most * self.columns) + 16, 16) if most <= 0.25 else 0

    def lowest(self, share: float) -> int:
        """The rank of the lowest limit among the samples."""
        m = self.samples()
        return math.ceil(m * share + 6 * math.sqrt(m * share * (1 - share)))

    def bound(self, share: float) -> int:
        """Products with the sampled rows, which are the rows where a vector of anchors is done at
        once."""
        sides = self.anchors, self.samples()
        side = self.product(*(sides[::-1] if self.lowest(share) <= 16 else sides))
        return 2 * side if self.mode == "cross" else side

    def selected_of_bound(self, share: float) -> tuple[int, int]:
        """One among all samples; or three a row, the others among those above what that gave."""
        m, lowest = self.samples(), self.lowest(share)
        more = 0 if lowest <= 16 else 2 * up(lowest - 1, self.lanes)
        return self.rows * m, self.rows * (m + more)

    def sides(self) -> list[tuple[int, int, int, bool]]:
        """Of each input in its turn, row by row: owners, rows that they meet, how many of the two
        kinds of terms each entry has, and whether they are anchors."""
        B, M, K = self.B, self.M, self.K
        return {
            "ntxent": [(B, B + M, 2, True), (M, B + M, 2, True), (0, 0, 0, False)],
            "query": [(B, M, 1, True), (M, B, 1, False), (0, 0, 0, False)],
            "cross": [(B, B, 2, True), (B, B, 2, True), (0, 0, 0, False)],
            "unpaired": [(B, K, 1, True), (B, 0, 0, False), (K, B, 1, False)],
            "paired": [(B, 0, 0, True), (B, 0, 0, False), (B * K, 0, 0, False)],
        }[self.mode]

    def row_cosines(self, visits: int = 1) -> dict[str, int]:
        """Of every anchor with its candidates, row by row; unit rows, and the cosine of an image's
        views, are made once for all visits."""
        if self.mode == "paired":
            dots, rows = (visits * self.K + 1) * self.B * self.D, visits * self.B * self.K
            return dict(products=0, dots=dots, rows=self.unit_rows + rows)
        products = sum(self.product(n, met) for n, met, _, anchors in self.sides() if anchors)
        return dict(products=visits * products, dots=self.B * self.D, rows=self.unit_rows)

    def backward(self, kept: bool, dz: tuple[int, int, int]) -> dict[str, int]:
        wanted = [owners for (owners, *_), want in zip(self.sides(), dz, strict=True) if want]
        need = dict(
            products=0, dots=sum(wanted) * self.D, rows=self.unit_rows, exponentials=0,
            compared=0, selected=0, listed=0, again=0,
        )  # fmt: skip
        if self.by_tiles:
            other = dz[2] if self.mode == "unpaired" else dz[1]
            for rows, n, diagonal in self.tiles():
                need["exponentials"] += rows * n
                need["products"] += 0 if kept else self.product(rows, n)
                if dz[0] or self.symmetric:
                    need["products"] += self.gathered(rows, n)
                if (other or self.symmetric) and not diagonal:
                    need["products"] += self.gathered(n, rows)
        elif self.mode == "paired":
            passes = 1 if dz[0] or dz[2] else 0  # both in one
            need["dots"] = (passes * self.K * self.B + (dz[0] + dz[1]) * self.B) * self.D
            need["rows"] += passes * self.B * self.K
            need["exponentials"] = passes * self.B * self.K
        else:
            for (owners, met, terms, anchors), want in zip(self.sides(), dz, strict=True):
                for n in parts(met, 512) if want else []:
                    need["products"] += 0 if kept and anchors else self.product(owners, n)
                    need["products"] += self.gathered(owners, n)
                    need["exponentials"] += owners * n * terms
        return need


def most_passes(wide: bool) -> int:
    """Of one selection over its row: the bounds, a count up to the least, one for each bisection
    and a last one. A bracket of cosines is at most 2 wide, and no number is left in it where it is
    as narrow as the least subnormal, 2^-149 or 2^-1074."""
    return 3 + 1 + (1074 if wide else 149)
