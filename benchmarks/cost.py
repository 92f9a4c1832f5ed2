# SPDX-License-Identifier: MIT
"""A model on paper, not a measurement: what a step of HEXLoss costs a rank of up to 1024 GPUs.

    python benchmarks/cost.py       prints the table of docs/distributed.md

The GPU is an H100 with bfloat16 embeddings, in nodes of 8. A time is bytes over a bandwidth, or
operations over a rate, and a latency for each gather; nothing overlaps, and the host is fast enough
to launch. N is the rows of all ranks, two of an image.
"""

from __future__ import annotations

import math

RATE = 425e12  # operations a second in products: what the goals of docs/cuda.md ask of the kernels
MEMORY = 2.5e12  # bytes a second that a kernel reads and writes in the GPU's memory
NODE = 8  # GPUs
LINK = 360e9  # bytes a second that a GPU receives inside a node: NVLink, 80 % of 450 GB/s
NETWORK = 320e9  # and a node from others: 8 cards of 400 Gbit/s, at 80 %
LATENCY = 15e-6  # seconds a gather takes however little it brings, inside a node
HOP, RANK = 6e-6, 0.3e-6  # seconds more for each doubling of the nodes, and for each rank

ITEM = 2  # bytes a number: bfloat16
CHUNK = 128  # features that the backward's products take at a time
QUANTILE, STATISTICS = 4, 40  # bytes a row: its quantile; its loss and nine statistics

SIZES = ((256, 128), (1024, 512), (4096, 1024))  # images a rank, features
RANKS = (8, 128, 1024)


def operations(features: int) -> int:
    """Of a pair of rows: 6 D for the quantiles and the loss, the rest for the gradient."""
    return (6 + 2 * (math.ceil(features / CHUNK) + 1)) * features


def gather(total: float, ranks: int) -> float:
    """Seconds until every rank has `total` bytes, of which it had its own."""
    if ranks <= NODE:
        return total * (ranks - 1) / ranks / LINK + LATENCY
    bandwidth = min(LINK, NETWORK)
    wait = LATENCY + HOP * math.log2(ranks / NODE) + RANK * ranks
    return total * (ranks - 1) / ranks / bandwidth + wait


def step(images: int, features: int, ranks: int) -> dict[str, float]:
    """Seconds of a rank, by what it does."""
    rows = 2 * images * ranks
    size = rows * features * ITEM
    return {
        "products": operations(features) * rows * 2 * images / RATE,
        "gather z": gather(size, ranks),
        "gather the rest": gather(QUANTILE * rows, ranks) + gather(STATISTICS * rows, ranks),
        "unit rows": 3 * 2 * size / MEMORY,  # read and written by each of three operators
    }


def table() -> str:
    names = list(step(*SIZES[0], RANKS[0]))
    head = ["images a GPU", "D", "GPUs", "N", "MB of z", "all rows on every GPU", "sharded", *names]
    lines = [[*head, "most of it"], ["---:"] * (len(head) + 1)]
    for images, features in SIZES:
        for ranks in RANKS:
            parts, rows = step(images, features, ranks), 2 * images * ranks
            whole = parts["products"] * ranks + parts["gather z"] + parts["unit rows"]
            sizes = images, features, ranks, rows, round(rows * features * ITEM / 1e6)
            times = [f"{x * 1e3:.2g}" if x < 1e-2 else f"{x * 1e3:.0f}"
                     for x in (whole, sum(parts.values()), *parts.values())]  # fmt: skip
            most = max(parts, key=parts.__getitem__)
            share = f"{most}, {parts[most] / sum(parts.values()):.0%}"
            lines.append([*map(str, sizes), *times, share])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
