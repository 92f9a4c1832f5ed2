# SPDX-License-Identifier: MIT
"""Pictures of what the threshold does, for a run of your own::

    threshold    eps, the size of H and what is in H, over the steps of a training
    cosines      the cosines of the negatives of a batch, with H
    neighbours   anchors with their nearest negatives, as images
    read_csv     the history that `threshold` draws, from Lightning's CSVLogger

Each picture is a new matplotlib Figure, which you save or log::

    plots.threshold(history).savefig("threshold.png")
    writer.add_figure("hex/threshold", plots.threshold(history), step)

A notebook shows it where it is the last line of a cell. No settings or open figures of matplotlib
are changed: pyplot is not used. matplotlib is imported by the first call and is not needed by
the rest of hex-ssl: pip install 'hex-ssl[plots]'.

What is drawn is measured elsewhere: by the loss (`criterion.statistics()`) and by watch.py.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference
from .checks import (
    Mode,
    check_candidate,
    check_count,
    check_eps,
    check_labels,
    check_mode,
    check_number,
    check_views,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "STYLE",
    "cosines",
    "neighbours",
    "read_csv",
    "threshold",
]

#: A colour of Okabe and Ito's, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_SAME, _OTHER = BLUE, ORANGE  # negatives of the anchor's class, and of other classes

#: The settings of matplotlib with which all pictures are drawn.
STYLE: dict[Any, Any] = {
    "font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.dpi": 110,
}  # fmt: skip

_KEYS = ("eps", "hard", "share", "class_share")

_WHAT_HAPPENS_TO_H = """\
H holds the negatives of an anchor whose cosine with it is above eps. The paper's form of the loss
repels them, and expects only a share tau_plus of them (0.1 by default) to be of the anchor's own
class. The released form leaves them out, so that they are neither repelled nor attracted."""


@contextlib.contextmanager
def _new_figure(width: float, height: float) -> Iterator[Figure]:
    """A new figure, of inches, to be drawn in this style."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError(
            "hex.plots needs matplotlib, which is not installed: pip install 'hex-ssl[plots]'"
        ) from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        # IPython asks an object for this; for a figure without pyplot nothing else answers.
        vars(figure)["_repr_png_"] = functools.partial(_png, figure)
        yield figure


def _png(figure: Figure) -> bytes:
    to = io.BytesIO()
    figure.savefig(to, format="png")
    return to.getvalue()


# ---- over the steps of a training ---------------------------------------------------------------


def threshold(
    history: Mapping[str, Any],
    steps_per_epoch: float | None = None,
    *,
    chance: float | None = None,
    negatives: int | None = None,
) -> Figure:
    """Draws over training what `criterion.statistics()` says, and the share of the anchor's class.

    Args:
        history: one sequence of numbers for each panel, all of one length, with a number for each
            step: any of "eps", "hard" and "share", as in `criterion.statistics()`, and
            "class_share", as of `hex.watch.class_share`. NaN stands where one was not measured, so
            that "class_share" may be measured at a few steps only. An eps of +inf (a warm-up, which
            is InfoNCE) is a gap in the line. If only some steps are there, as in a log,
            "step" has their numbers, counted from 0.
        steps_per_epoch: None, or how many steps an epoch has. The axis then counts epochs, and what
            is said of the end is the mean of the last epoch, else it is the last value.
        chance: None, or the share of all negatives that is of the anchor's class, to compare
            "class_share" with: `class_share(z0, z1, labels, -math.inf)`.
        negatives: None, or how many negatives an anchor has.

    Returns:
        A matplotlib Figure with a panel for each sequence.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value. The text names it.
        ImportError: matplotlib is not installed.

    Example:
        >>> from hex import plots
        >>> history = {"eps": [0.8, 0.7, 0.6], "class_share": [math.nan, 0.3, 0.4]}
        >>> figure = plots.threshold(history, chance=0.1)
    """
    series = _checked_history(history)
    if steps_per_epoch is not None:
        check_number("steps_per_epoch", steps_per_epoch, 1, math.inf, open_end=True)
    if chance is not None:
        check_number("chance", chance, 0, 1)
    if negatives is not None:
        check_count("negatives", negatives, 1)
    unit = "step" if steps_per_epoch is None else "epoch"
    steps = series.pop("step", None) or [float(k) for k in range(len(next(iter(series.values()))))]
    x = steps if steps_per_epoch is None else [(s + 1) / steps_per_epoch for s in steps]
    drawn = {
        "eps": (BLUE, "threshold eps\n(cosine)"),
        "hard": (GREEN, "mean size of H\n(negatives)"),
        "share": (GREY, "local term Q\n(% of denominator)"),
        "class_share": (ORANGE, "own class\n(% of H)"),
    }
    with _new_figure(7.5, 2.35 * len(series) + 0.9) as figure:
        axes = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
        for axis, name in zip(axes, series, strict=True):
            colour, label = drawn[name]
            percent = 100 if "share" in name else 1
            measured = [(a, b) for a, b in zip(x, series[name], strict=True) if not math.isnan(b)]
            values = [percent * b if math.isfinite(b) else math.nan for _, b in measured]
            few = "o" if len(values) < 10 else None  # a line through two points may hide them
            axis.plot([a for a, _ in measured], values, color=colour, marker=few, markersize=4)
            axis.set_ylabel(label)
            axis.set_title(_title(name, measured, unit, chance, negatives))
            if name == "hard":
                axis.set_ylim(bottom=0)
            elif percent == 100:
                axis.set_ylim(0, 102)  # a line at 100 % is seen whole
            if name == "class_share" and chance is not None:
                axis.axhline(100 * chance, color=GREY, linestyle="--", linewidth=1)
                axis.text(
                    0.995, 100 * chance + 2, f"all negatives: {100 * chance:.0f} %",
                    color=GREY, ha="right", transform=axis.get_yaxis_transform(),
                )  # fmt: skip
        axes[-1].set_xlabel(unit)
        axes[-1].locator_params(axis="x", integer=True)
        if max(x) > min(x):
            axes[-1].set_xlim(0 if unit == "epoch" else min(x), max(x))
        figure.align_ylabels()
        if "class_share" in series:
            figure.supxlabel(_WHAT_HAPPENS_TO_H, x=0.01, ha="left", fontsize=9, color=GREY)
    return figure


def _checked_history(history: Any) -> dict[str, list[float]]:
    """The history as lists, in the order of the panels; "step", if there is one, comes last."""
    if not isinstance(history, Mapping):
        raise TypeError(f"history: got {type(history).__name__}, wanted a mapping")
    known = (*_KEYS, "step")
    unknown = [name for name in history if name not in known]
    if unknown or not any(name in history for name in _KEYS):
        got = ", ".join(map(repr, unknown or history)) or "nothing"
        raise ValueError(f"history: got {got}, wanted some of {', '.join(map(repr, known))}")
    series = {name: _numbers(f"history[{name!r}]", history[name]) for name in known
              if name in history}  # fmt: skip
    if not all(map(math.isfinite, series.get("step", []))):
        raise ValueError("history['step']: got one that is not finite, wanted numbers of steps")
    first, *others = series
    for name in others:
        if len(series[name]) != len(series[first]):
            raise ValueError(
                f"history[{name!r}]: got {len(series[name])} numbers, wanted as many as {first!r} "
                f"has, {len(series[first])}; NaN stands where one was not measured"
            )
    if not series[first]:
        raise ValueError(f"history[{first!r}]: got 0 numbers, wanted at least one")
    return series


def _numbers(name: str, values: Any) -> list[float]:
    """A sequence of numbers, or an array or a tensor with one axis, as floats."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: got {type(values).__name__}, wanted numbers") from None


def _title(
    name: str, measured: list[tuple[float, float]], unit: str, chance: float | None,
    negatives: int | None,
) -> str:  # fmt: skip
    """What the panel shows, in a line."""
    there = [(a, b) for a, b in measured if math.isfinite(b)]
    if not there:
        return {"eps": "eps: no threshold", "class_share": "H has no members"}.get(name, name)
    last = [b for a, b in there if a > there[-1][0] - (unit == "epoch")] or [there[-1][1]]
    end = sum(last) / len(last)
    if name == "eps":
        at, highest = max(there, key=lambda point: point[1])
        when = f"{unit} {math.ceil(at) if unit == 'epoch' else int(at)}"
        most = "" if at == there[-1][0] else f"at most {highest:.2f}, in {when}; "
        return f"The threshold eps: {most}{end:.2f} at the end"
    if name == "hard":
        of = "" if negatives is None else f" of an anchor's {negatives}"
        return f"H, the negatives above it: {end:.1f}{of} at the end"
    if name == "share":
        return f"Q, the term of H: {100 * end:.0f} % of the denominator at the end"
    return f"What is in H: {100 * end:.0f} % is of the anchor's own class at the end"


def read_csv(path: str | Path, prefix: str = "hex/") -> dict[str, list[float]]:
    """The history of a training that Lightning logged, for `threshold`.

    Args:
        path: a metrics.csv of Lightning's CSVLogger, to which `hex.lightning.HEXCallback` logged.
        prefix: how the names in the log begin: that of the callback, and with several losses the
            name of the loss too, "hex/criterion/".

    Returns:
        "step" and those of "eps", "hard", "share" and "class_share" that were logged, each a list
        with a number for each logged step. NaN stands where one was not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: nothing was logged under these names.
    """
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    names = [name for name in _KEYS if prefix + name in columns]
    logged = [row for row in rows if any(row[prefix + name] for name in names)]
    if not logged or "step" not in columns:
        raise ValueError(
            f"path: got a log of {', '.join(columns) or 'nothing'}, wanted one with step and "
            f"{prefix}eps; with several losses the name of one belongs to the prefix, as in "
            "'hex/criterion/'"
        )
    places = {"step": "step", **{name: prefix + name for name in names}}
    return {name: [float(row[at] or math.nan) for row in logged] for name, at in places.items()}


# ---- a batch ------------------------------------------------------------------------------------


class _Pairs:
    """The cosines of a batch with what is known of each pair: each (N, M), on the CPU."""

    def __init__(self, z0: Any, z1: Any, eps: Any, labels: Any, mode: Mode) -> None:
        check_mode(mode)
        z0, z1 = _tensor(z0), _tensor(z1)
        check_views(z0, z1)
        if z0.shape[0] < 2:
            raise ValueError(f"z0: got shape {tuple(z0.shape)}, wanted (B, D) with B >= 2")
        images = z0.shape[0]
        if isinstance(eps, Tensor):
            check_candidate("eps", eps)
            eps = float(eps)
        check_eps(eps, 0)
        self.eps = float(eps)
        with torch.no_grad():
            c, _, self.negative = reference.cosines(z0.cpu(), z1.cpu(), None, mode)
        self.cosines = c.to(torch.float64).clamp(-1, 1)
        self.hard = self.negative & (self.cosines > self.eps)
        self.same: Tensor | None = None
        if labels is not None:
            y = check_labels("labels", _tensor(labels), (images,), torch.device("cpu"))
            of_rows, of_columns = (y.repeat(size // images) for size in c.shape)
            self.same = of_rows[:, None] == of_columns

    def members(self) -> str:
        """How large H is, and whose."""
        hard = int(self.hard.sum())
        text = f"H has {hard / len(self.hard):.1f} negatives per anchor"
        if self.same is not None and hard:
            text += f", {100 * int((self.hard & self.same).sum()) / hard:.0f} % of its class"
        return text


def _tensor(value: Any) -> Any:
    """A tensor of what is none: an array, a list. The checks name what cannot be one."""
    if isinstance(value, Tensor):
        return value.detach()
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def cosines(
    z0: Any, z1: Any, eps: float | Tensor, labels: Any = None, *, mode: Mode = "ntxent",
    title: str = "", into: SubFigure | None = None,
) -> Figure | SubFigure:  # fmt: skip
    """Draws the histogram of the negatives' cosines, with H, those above eps, shaded.

    Args:
        z0, z1: (B, D), two views of a batch, tensors or arrays. All pairs are in memory at a time.
        eps: the threshold, a number or a 0-d tensor: `criterion.last.eps`.
        labels: None, or (B,) integers. Negatives of the anchor's class and of others then have a
            histogram each, with a sum of 100 %.
        mode: that of the loss.
        title: what to say before the size of H, as "After epoch 3".
        into: None, or a matplotlib SubFigure to draw into, for several in one picture.

    Returns:
        A new matplotlib Figure, or `into`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value. The text names it.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from hex import plots
        >>> figure = plots.cosines(*torch.randn(2, 64, 8), eps=0.6, labels=torch.arange(64) % 4)
    """
    pairs = _Pairs(z0, z1, eps, labels, mode)
    groups = [(pairs.negative, GREY, "negatives")]
    if pairs.same is not None:
        groups = [
            (pairs.negative & ~pairs.same, _OTHER, "negatives of other classes"),
            (pairs.negative & pairs.same, _SAME, "negatives of the anchor's class"),
        ]
    with _new_figure(7.5, 3.2) as figure:
        drawn = figure if into is None else into
        axis = drawn.subplots()
        for among, colour, name in groups:
            values = pairs.cosines[among]
            if not len(values):
                continue  # all images are of one class, or no two are
            counts = torch.histc(values, 80, -1, 1) * (100 / len(values))
            edges = torch.linspace(-1, 1, 81).tolist()
            each = len(values) / len(pairs.cosines)
            axis.stairs(
                counts.tolist(), edges, fill=True, color=colour, alpha=0.55,
                label=f"{name} ({each:.0f} per anchor)",
            )  # fmt: skip
        above = min(max(pairs.eps, -1), 1)
        axis.axvspan(above, 1, color=GREY, alpha=0.15, linewidth=0)
        if abs(pairs.eps) <= 1:
            axis.axvline(pairs.eps, color="black")
            axis.text(above, 1.0, f"eps = {pairs.eps:.2f} ", ha="right", va="top",
                      transform=axis.get_xaxis_transform())  # fmt: skip
        if above < 1:
            axis.text((above + 1) / 2, 1.0, "H", ha="center", va="top",
                      transform=axis.get_xaxis_transform())  # fmt: skip
        axis.set_title(f"{title}{': ' if title else ''}{pairs.members()}")
        axis.set(xlim=(-1, 1), xlabel="cosine of anchor and negative", ylabel="share of pairs (%)")
        axis.set_ylim(0, 1.35 * axis.get_ylim()[1])
        axis.legend(loc="upper left", fontsize=10)
    return drawn


def neighbours(
    images0: Any, images1: Any, z0: Any, z1: Any, eps: float | Tensor, labels: Any = None, *,
    anchors: int | Sequence[int] = 6, most: int = 8, title: str = "",
) -> Figure:  # fmt: skip
    """Draws anchors with their positive and their nearest negatives, as images.

    The negatives in H have a frame: blue if they are of the anchor's class, orange if not, grey
    without labels. The next ones, below eps and not in H, are pale. Under each is its cosine with
    the anchor.

    Args:
        images0, images1: the images of the two views, tensors or arrays: (B, H, W), (B, 1, H, W) or
            (B, H, W, 1) in grey, or (B, 3, H, W) or (B, H, W, 3) in colour. Their smallest number
            is drawn black and their greatest white.
        z0, z1: (B, D), the embeddings of the same images.
        eps: the threshold, a number or a 0-d tensor: `criterion.last.eps`.
        labels: None, or (B,) integers.
        anchors: how many to draw, the first of z0; or which, numbers below 2B of the rows of z0 and
            then of z1.
        most: how many negatives to draw of each.
        title: what to say before the size of H, as "After epoch 3".

    Returns:
        A matplotlib Figure.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value. The text names it.
        ImportError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from hex import plots
        >>> images, z0, z1 = torch.rand(16, 28, 28), *torch.randn(2, 16, 8)
        >>> figure = plots.neighbours(images, images, z0, z1, eps=0.5, anchors=[0, 3])
    """
    pairs = _Pairs(z0, z1, eps, labels, "ntxent")
    rows = len(pairs.cosines)
    first, second = (
        _pictures(f"images{k}", x, rows // 2) for k, x in enumerate((images0, images1))
    )
    if first.shape != second.shape:
        got, wanted = (tuple(x.permute(0, 3, 1, 2).shape) for x in (second, first))
        raise ValueError(f"images1: got shape {got}, wanted that of images0, {wanted}")
    images = torch.cat([first, second])
    low, high = images.min(), images.max()
    images = (images - low) / (high - low).clamp(min=1e-12)
    chosen = _anchors(anchors, rows)
    most = min(check_count("most", most, 1), rows - 2)
    width = max(6.8, 1.02 * (most + 2) + 0.6)  # of the text above, if few are shown
    with _new_figure(width, 1.3 * len(chosen) + 1.4) as figure:
        axes = figure.subplots(len(chosen), most + 2, squeeze=False)
        for cells, anchor in zip(axes, chosen, strict=True):
            c = pairs.cosines[anchor].nan_to_num(-1).masked_fill(~pairs.negative[anchor], -2)
            nearest = c.sort(descending=True, stable=True).indices[:most].tolist()
            positive = (anchor + rows // 2) % rows
            for cell, j in zip(cells, (anchor, positive, *nearest), strict=True):
                in_h = bool(pairs.hard[anchor, j])
                _show(cell, images[j], 1.0 if in_h or j in (anchor, positive) else 0.4)
                colour = "black"
                if in_h:
                    same = pairs.same is not None and bool(pairs.same[anchor, j])
                    colour = GREY if pairs.same is None else _SAME if same else _OTHER
                cell.spines[:].set(visible=in_h or j == anchor, color=colour, linewidth=2.5)
                if j != anchor:
                    text = f"{float(pairs.cosines[anchor, j]):.3f}"
                    if j != positive and not in_h:
                        colour = GREY
                    cell.set_xlabel(text, fontsize=10, color=colour, labelpad=3)
            size = int(pairs.hard[anchor].sum())
            cells[0].set_ylabel(f"{size} in H", fontsize=10)
            if size > most:
                cells[-1].set_title(f"and {size - most} more", fontsize=9)
        for cell, name in zip(axes[0], ("anchor", "positive", "nearest negatives"), strict=False):
            cell.set_title(name, fontsize=10)
        whose = "" if pairs.same is None else " (blue: of the anchor's class, orange: of another)"
        figure.suptitle(
            f"{title}{', ' if title else ''}eps = {pairs.eps:.3f}: {pairs.members()}\n"
            f"Framed: in H{whose}.\nPale: below eps, not in H. Numbers: cosines.",
            x=0.01, ha="left", fontsize=12,
        )  # fmt: skip
    return figure


def _pictures(name: str, images: Any, count: int) -> Tensor:
    """(B, H, W, 1 or 3) float32."""
    x = _tensor(images)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(images).__name__}, wanted a tensor or an array")
    if x.dim() == 3:
        x = x[..., None]
    elif x.dim() == 4 and x.shape[-1] not in (1, 3):
        x = x.movedim(1, -1)
    if x.dim() != 4 or x.shape[0] != count or x.shape[-1] not in (1, 3) or not x.numel():
        got = tuple(_tensor(images).shape)
        raise ValueError(
            f"{name}: got shape {got}, wanted ({count}, H, W), grey, or ({count}, 3, H, W) or "
            f"({count}, H, W, 3)"
        )
    return x.to("cpu", torch.float32)


def _anchors(anchors: Any, rows: int) -> list[int]:
    if hasattr(anchors, "tolist"):
        anchors = anchors.tolist()
    if isinstance(anchors, int):
        return list(range(min(check_count("anchors", anchors, 1), rows)))
    if not isinstance(anchors, Sequence):
        raise TypeError(f"anchors: got {type(anchors).__name__}, wanted an integer or several")
    chosen = [check_count("anchors", a, 0) for a in anchors]
    if not chosen or max(chosen) >= rows:
        raise ValueError(f"anchors: got {chosen}, wanted row numbers below {rows}")
    return chosen


def _show(cell: Axes, image: Tensor, alpha: float) -> None:
    grey = image.shape[-1] == 1
    cell.imshow(
        image.squeeze(-1).numpy() if grey else image.numpy(), cmap="gray", vmin=0, vmax=1,
        alpha=alpha,
    )  # fmt: skip
    cell.set(xticks=[], yticks=[])
