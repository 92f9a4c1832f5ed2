# SPDX-License-Identifier: MIT
"""Figures computed from a record, and the goals that they are held against.

A goal is a ratio of figures of one run, never a time. The ratios were set on a CPU with AVX-512.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from parts import BF16, PRODUCT
from peers import COMPILED_HEX, HEX, PLAIN_HEX, PLAIN_INFO_NCE, Method

Record = Mapping[str, Any]

SIZES = ("512", "1024", "2048", "4096", "8192", "4096x512")
SPEED = {  # how many times as fast as these HEXLoss is to be, retained heap, by size
    PLAIN_HEX: (7, 7, 9, 10, 10, 8),
    COMPILED_HEX: (5, 6, 7, 8, 8, 5),
    PLAIN_INFO_NCE: (3, 3.3, 3.8, 4.2, 4.2, 4),
}
SHARE = (0.55, 0.68, 0.75, 0.82, 0.84, 0.80)  # of 4 N^2 D operations at the rate of the product
HARD = 1.25  # times the time of the ordinary batch
THREADS = {"512": 1.5, "4096": 1.85, "8192": 1.85}  # times as fast in two threads
HALF = 1.03  # times the time of float32: no slower, but for what the clock is good for
DOTS = 1.4  # times as fast in bfloat16 with its dot products as in float32
WIDE = 5  # times as fast in float64 as plain HEX
SHAPES = 3  # times as fast as plain InfoNCE on the same
LARGE_MB = 200  # of 65536 rows, where memory is O(N D)
LARGE_PAIR = 1.2  # times the time of a pair of 8192 rows


def most_mb(rows: int, features: int) -> float:
    """Beyond inputs and outputs, from 4096 rows on: 8 % of an N x N matrix and what is O(N D)."""
    return (0.08 * 4 * rows**2 + 24 * rows * features) / 1e6


class Figures:
    """The results of a record, by case, method and what else they are told apart by."""

    def __init__(self, record: Record) -> None:
        self.results = record["results"]
        self.cases = list(dict.fromkeys(result["case"] for result in self.results))
        self.methods = list(dict.fromkeys(result["method"] for result in self.results))

    def find(self, case: str, method: Method | str, **more: Any) -> dict[str, Any] | None:
        wanted = {"case": case, "method": getattr(method, "name", method), **more}
        for result in self.results:
            if all(result.get(key) == value for key, value in wanted.items()):
                return result
        return None

    def ms(self, case: str, method: Method | str, **more: Any) -> float | None:
        """The median of the samples."""
        found = self.find(case, method, **more)
        return found and statistics.median(found["ms"])

    def best(self, case: str, method: Method | str, **more: Any) -> float | None:
        """The least of the samples: on the wall clock the others have neighbours in them."""
        found = self.find(case, method, **more)
        return found and min(found["ms"])

    def ratio(self, case: str, slow: Method | str, fast: Method | str, **more: Any) -> float | None:
        return quotient(self.ms(case, slow, **more), self.ms(case, fast, **more))

    def rate(self, method: str, **more: Any) -> float | None:
        """Of a product, GF/s: the most of all samples of the run, for it is a peak that is asked
        for, and a neighbour on the same core takes a fifth of it for seconds."""
        found = [
            result["flop"] / min(result["ms"]) / 1e6
            for result in self.results
            if result["method"] == method and more.items() <= result.items()
        ]
        return max(found, default=None)

    def own_rate(self, case: str, method: Method, **more: Any) -> float | None:
        """Of a symmetric loss at 4 N^2 D operations: N^2 D for the cosines of all pairs of rows,
        half of which are computed, and twice that for their pull on both rows; GF/s."""
        found = self.find(case, method, **more)
        if not found:
            return None
        flop = 4.0 * found["rows"] ** 2 * found["features"]
        return flop / statistics.median(found["ms"]) / 1e6

    def share(self, case: str, method: Method = HEX, **more: Any) -> float | None:
        """Of the ideal: of the rate of the core's own product in cache, in the same run."""
        return quotient(self.own_rate(case, method, **more), self.rate(PRODUCT, **more))

    def best_share(self, case: str, method: Method = HEX, **more: Any) -> float | None:
        """The same in the best sample, where neighbours took least."""
        ms, best = self.ms(case, method, **more), self.best(case, method, **more)
        share, gain = self.share(case, method, **more), quotient(ms, best)
        return share * gain if share and gain else None

    def at_the_ideal(self, case: str, slow: Method) -> float | None:
        """How many times as fast as another the loss would be at the ideal; retained heap."""
        ratio = self.ratio(case, slow, HEX, heap="retained")
        return quotient(ratio, self.share(case, heap="retained"))

    def beyond_mb(self, case: str, method: Method = HEX) -> float | None:
        """The peak without what is returned, the gradient in both views. In float32."""
        found = self.find(case, method, heap="stock")
        return found and found["peak_mb"] - 4 * found["rows"] * found["features"] / 1e6


def nanoseconds_a_pair(result: Mapping[str, Any]) -> float:
    return 1e6 * statistics.median(result["ms"]) / result["rows"] ** 2


def quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


class Goal(NamedTuple):
    about: str
    got: float
    wanted: float
    least: bool  # whether `wanted` is a least, or a most
    form: str

    @property
    def met(self) -> bool:
        return self.got >= self.wanted if self.least else self.got <= self.wanted

    def cells(self) -> tuple[str, str]:
        """The figure and the goal."""
        bound = "at least" if self.least else "at most"
        return self.form.format(self.got), f"{bound} {self.form.format(self.wanted)}"


def all_of(records: Mapping[str, Record]) -> list[Goal]:
    """Every goal that there is a figure for."""
    found: list[Goal] = []

    def add(
        about: str, got: float | None, wanted: float, least: bool = True, form: str = "{:.3g}x"
    ) -> None:
        if got is not None:
            found.append(Goal(about, got, wanted, least, form))

    figures = {part: Figures(record) for part, record in records.items()}
    if sizes := figures.get("sizes"):
        for slow, wanted in SPEED.items():
            for size, least in zip(SIZES, wanted, strict=True):
                got = sizes.ratio(size, slow, HEX, heap="retained")
                add(f"{slow.name} / {HEX.name} at {size}", got, least)
        for size, least in zip(SIZES, SHARE, strict=True):
            share = sizes.share(size, heap="retained")
            add(f"share of the ideal at {size}", share, least, form="{:.0%}")
        for size in ("4096", "8192", "4096x512"):
            if (mb := sizes.beyond_mb(size)) is not None:
                most = most_mb(*(int(n) for n in (size + "x128").split("x")[:2]))
                add(f"memory beyond the results at {size}", mb, most, False, "{:.1f} MB")
    if data := figures.get("data"):
        for kind in data.cases[1:]:
            slower = quotient(data.ms(kind, HEX), data.ms(data.cases[0], HEX))
            add(f"{kind} batch / ordinary one", slower, HARD, False)
    if types := figures.get("types"):
        for name in ("bfloat16", "float16"):
            slower = quotient(types.ms(name, HEX), types.ms("float32", HEX))
            add(f"{name} / float32", slower, HALF, False)
        add("plain HEX / hex HEXLoss in float64", types.ratio("float64", PLAIN_HEX, HEX), WIDE)
    if shapes := figures.get("shapes"):
        for case in shapes.cases:
            add(f"plain InfoNCE / hex HEXLoss, {case}", shapes.ratio(case, PLAIN_INFO_NCE, HEX),
                SHAPES)  # fmt: skip
    if threads := figures.get("threads"):
        for size, least in THREADS.items():
            one, two = (threads.best(size, HEX, threads=n) for n in (1, 2))
            add(f"two threads at {size}", quotient(one, two), least)
    if isa := figures.get("isa"):
        level = "avx512_bf16"
        faster = quotient(isa.ms("4096", HEX, isa=level), isa.ms(BF16, HEX, isa=level))
        add(f"float32 / bfloat16 at HEX_ISA={level}", faster, DOTS)
    if large := figures.get("large"):
        few, many = large.results
        about = f"{many['rows']} rows"
        add(f"memory of {about}", many["peak_mb"], LARGE_MB, False, "{:.0f} MB")
        slower = nanoseconds_a_pair(many) / nanoseconds_a_pair(few)
        add(f"time a pair at {about} / at {few['rows']}", slower, LARGE_PAIR, False)
    return found
