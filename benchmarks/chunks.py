# SPDX-License-Identifier: MIT
"""Memory and time of a step whose batch is encoded in chunks (docs/guides/large_batches.md).

    python benchmarks/chunks.py            # prints the table
    python benchmarks/chunks.py --write    # and puts it into the page

What is measured is the recipe of that page. measure.py says what memory is.
"""

import argparse
import re
import time
from pathlib import Path

import measure
import torch
from torch import nn

from hex import HEXLoss

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "large_batches.md"
BLOCK = re.compile(r"(<!-- chunks -->\n).*?(<!-- end -->)", re.DOTALL)
BATCHES, CHUNK = (128, 256, 512, 1024), 64


def recipe() -> dict[str, object]:
    """What the first block of Python on the page defines."""
    source = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    names: dict[str, object] = {}
    exec(compile(source, str(PAGE), "exec"), names)
    return names


def network() -> nn.Module:
    """From images to 128 features, with GroupNorm, so that chunks change no number."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((32, 1), (64, 2), (128, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(8, width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def table(batches: tuple[int, ...], chunk: int) -> str:
    """A line for each number of images: MB and seconds, of the whole batch and in chunks."""
    in_chunks, encoder, criterion = recipe()["in_chunks"], network(), HEXLoss()
    ways = {
        "whole": encoder,
        f"in chunks of {chunk}": lambda view: in_chunks(encoder, view, size=chunk),
    }

    def steps(batch: int):
        views = torch.randn(2, batch, 3, 32, 32)
        for encode in ways.values():

            def step(encode=encode):
                encoder.zero_grad()
                criterion(*map(encode, views)).backward()

            step()
            yield step

    memory = {n: [f"{measure.peak_mb(step):.0f}" for step in steps(n)] for n in batches}
    measure.retain_heap()  # or the time of large batches would be that of fresh pages
    seconds = {n: [f"{cpu_seconds(step):.2f}" for step in steps(n)] for n in batches}
    head = ["images", *(f"{way}, {unit}" for unit in ("MB", "s") for way in ways)]
    lines = [head, ["---:"] * len(head), *([str(n), *memory[n], *seconds[n]] for n in batches)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_seconds(step) -> float:
    """The least of a few calls."""
    found = []
    for _ in range(measure.FEW):
        start = time.process_time()
        step()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    here = measure.machine("cpu")
    text = f"{table(BATCHES, CHUNK)}\n\n{here['on']}; {here['date']}."
    print(text)
    if options.write:
        PAGE.write_text(BLOCK.sub(rf"\1\n{text}\n\n\2", PAGE.read_text()))


if __name__ == "__main__":
    main()
