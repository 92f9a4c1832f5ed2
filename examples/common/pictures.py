# SPDX-License-Identifier: MIT
"""What the examples' pictures share: matplotlib without a screen, its style and its colours.

Also the demo's map of images. The demo's pictures of the threshold are those of hex.plots.
"""

from collections.abc import Mapping

import matplotlib
import numpy as np

from hex.plots import BLUE, GREEN, GREY, ORANGE, STYLE

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "maps", "plt"]

plt.rcParams.update(STYLE | {"figure.constrained_layout.use": True})


def maps(panels: Mapping[str, np.ndarray], labels: np.ndarray, title: str) -> plt.Figure:
    """Draws points in the plane, (N, 2) for each panel under its title, as the digits they are."""
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 6))
    colours = plt.get_cmap("tab10").colors
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        for digit in np.unique(labels):  # it is the marker, so no one needs the colour
            axis.scatter(
                *points[labels == digit].T, marker=f"${digit}$", s=42, color=colours[digit % 10],
                linewidths=0,
            )  # fmt: skip
        axis.set(title=name, xticks=[], yticks=[])
        axis.spines[:].set_visible(True)
        axis.spines[:].set_color("lightgrey")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure
