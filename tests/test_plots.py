# SPDX-License-Identifier: MIT
"""hex.plots: that each figure holds the numbers it was given, without a change of matplotlib's
settings, and what is said of arguments that cannot be drawn.
"""

import copy
import math
import pickle
import re
import subprocess
import sys

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
import numpy as np  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from hex import HEXLoss, plots  # noqa: E402
from hex.watch import class_share  # noqa: E402

NAN, INF = math.nan, math.inf
B, SIDE = 9, 5


def line(axis):
    """What the first line of a panel goes through."""
    return [tuple(map(float, point)) for point in axis.lines[0].get_xydata()]


def texts(figure) -> str:
    return " | ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def png(figure) -> bytes:
    """Draws it, which is when matplotlib warns of what has no room. No text may be cut off."""
    data = figure._repr_png_()
    assert data.startswith(b"\x89PNG")
    width, height = figure.bbox.size
    ticks = [
        tick for axis in figure.axes for tick in axis.get_xticklabels() + axis.get_yticklabels()
    ]
    for text in figure.findobj(matplotlib.text.Text):
        if text.get_visible() and text.get_text().strip() and text not in ticks:  # may be outside
            box = text.get_window_extent()
            assert box.x0 >= -1 and box.x1 <= width + 1, text
            assert box.y0 >= -1 and box.y1 <= height + 1, text
    return data


def two_groups(dtype=torch.float32):
    """Two views of images in two groups, which are their classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(B) % 2
    centres = torch.randn(2, 8, generator=generator)
    z = centres[labels] + 0.4 * torch.randn(2, B, 8, generator=generator)
    return *z.to(dtype), labels


def images(*shape) -> torch.Tensor:
    return torch.rand(B, *shape, generator=torch.Generator().manual_seed(1))


# ---- over the steps of a training ---------------------------------------------------------------


def test_every_statistic_has_a_panel_with_its_numbers_at_each_step():
    history = {"share": [0.1, 0.2, 0.3], "eps": torch.tensor([0.9, 0.8, 0.7]), "hard": (3, 2, 1)}
    figure = plots.threshold(history)
    eps, hard, share = figure.axes
    assert line(eps) == [(0, pytest.approx(0.9)), (1, pytest.approx(0.8)), (2, pytest.approx(0.7))]
    assert line(hard) == [(0, 3), (1, 2), (2, 1)]
    assert line(share) == [(0, 10), (1, 20), (2, 30)]
    assert share.get_xlabel() == "step" and share.get_ylim() == (0, 102)
    assert hard.get_ylim()[0] == 0
    assert "0.90, in step 0; 0.70 at the end" in eps.get_title("left")
    assert "1.0 at the end" in hard.get_title("left")
    assert "30 % of the denominator" in share.get_title("left")
    assert "tau_plus" not in texts(figure)  # what the loss does with a class that is not drawn
    png(figure)


def test_epochs_are_counted_from_their_steps_and_the_end_is_the_last_of_them():
    history = {"eps": np.array([0.2, 0.6, 0.5, 0.3]), "class_share": [NAN, 0.5, NAN, 0.9]}
    figure = plots.threshold(history, 2, chance=0.1, negatives=14)
    eps, share = figure.axes
    assert [x for x, _ in line(eps)] == [0.5, 1, 1.5, 2]
    assert line(share) == [(1, 50), (2, 90)]  # where it was measured
    assert share.lines[1].get_ydata()[0] == 10
    assert "all negatives: 10 %" in texts(figure)
    assert share.get_xlabel() == "epoch" and share.get_xlim() == (0, 2)
    assert "0.60, in epoch 1; 0.40 at the end" in eps.get_title("left")
    assert "90 % is of the anchor's own class at the end" in share.get_title("left")
    assert "expects only a share tau_plus" in " ".join(texts(figure).split())
    png(figure)


def test_how_many_negatives_there_are_is_said_beside_the_size_of_h():
    (hard,) = plots.threshold({"hard": [5.0, 4.0]}, negatives=510).axes
    assert hard.get_title("left").endswith("4.0 of an anchor's 510 at the end")


def test_a_warm_up_is_a_gap_and_a_training_without_a_threshold_is_said_to_have_none():
    eps, hard = plots.threshold({"eps": [INF, INF, 0.5], "hard": [0, 0, 2.0]}).axes
    (_, a), (_, b), (_, c) = line(eps)
    assert math.isnan(a) and math.isnan(b) and c == 0.5
    assert eps.get_title("left") == "The threshold eps: 0.50 at the end"
    figure = plots.threshold({"eps": [INF, INF], "class_share": [NAN, NAN]})
    eps, share = figure.axes
    assert eps.get_title("left") == "eps: no threshold"
    assert share.get_title("left") == "H has no members"
    png(figure)


def test_a_history_of_one_step_is_a_point():
    figure = plots.threshold({"eps": [0.5]})
    assert line(figure.axes[0]) == [(0, 0.5)] and figure.axes[0].lines[0].get_marker() == "o"
    png(figure)


def test_the_statistics_of_a_training_are_drawn_as_they_come():
    z0, z1, labels = two_groups()
    criterion, history = HEXLoss(), {}
    for _ in range(3):
        criterion(z0, z1)
        figures = criterion.statistics() | {
            "class_share": class_share(z0, z1, labels, criterion.last.eps)
        }
        for name, value in figures.items():
            history.setdefault(name, []).append(value)
    figure = plots.threshold(history)
    assert len(figure.axes) == 4
    for axis, name, unit in zip(figure.axes, history, (1, 1, 100, 100), strict=True):
        assert [y for _, y in line(axis)] == pytest.approx([unit * float(v) for v in history[name]])


LOG = """epoch,hex/class_share,hex/eps,hex/hard,hex/share,step,train_loss
0,,inf,0.0,0.0,4,2.5
0,,,,,4,2.4
1,0.25,0.8125,2.5,0.125,9,2.25
"""


def test_the_log_of_lightning_is_read_as_a_history(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(LOG)
    history = plots.read_csv(path)
    assert list(history) == ["step", "eps", "hard", "share", "class_share"]
    assert history["step"] == [4, 9] and history["eps"] == [INF, 0.8125]
    assert history["hard"] == [0, 2.5] and history["share"] == [0, 0.125]
    assert math.isnan(history["class_share"][0]) and history["class_share"][1] == 0.25
    figure = plots.threshold(history, steps_per_epoch=5)
    assert [x for x, _ in line(figure.axes[0])] == [1, 2]
    assert line(figure.axes[3]) == [(2, 25)]
    assert [x for x, _ in line(plots.threshold(history).axes[0])] == [4, 9]
    path.write_text(LOG.replace("hex/", "hex/criterion/"))
    assert plots.read_csv(str(path), "hex/criterion/")["hard"] == [0, 2.5]
    with pytest.raises(ValueError, match="^path: got a log of epoch, hex/criterion/class_share, "):
        plots.read_csv(path)
    path.write_text("")
    with pytest.raises(ValueError, match="^path: got a log of nothing, wanted one with "):
        plots.read_csv(path)


# ---- a batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ("ntxent", "query", "cross"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_a_histogram_has_each_negatives_cosine_and_shades_those_in_h(mode, dtype):
    z0, z1, labels = two_groups(dtype)
    criterion = HEXLoss(threshold=0.6, mode=mode)
    criterion(z0, z1)
    eps = criterion.last.eps
    figure = plots.cosines(z0, z1, eps, labels, mode=mode, title="Now")
    (axis,) = figure.axes
    others, same = axis.patches[:2]
    u0, u1 = (torch.nn.functional.normalize(z.double()) for z in (z0, z1))
    u, v = (torch.cat([u0, u1]),) * 2 if mode == "ntxent" else (u0, u1)
    c, index = u @ v.T, torch.arange(len(u))
    negative = (index[:, None] - index) % B != 0
    alike = labels.repeat(len(u) // B)[:, None] == labels.repeat(len(u) // B)
    for patch, among in ((others, negative & ~alike), (same, negative & alike)):
        counts, _ = np.histogram(c[among], 80, (-1, 1))
        assert patch.get_data().values == pytest.approx(100 * counts / counts.sum(), abs=1e-4)
    (shade,) = [p for p in axis.patches if isinstance(p, matplotlib.patches.Rectangle)]
    assert (shade.get_x(), shade.get_width()) == (pytest.approx(0.6), pytest.approx(0.4))
    assert float(axis.lines[0].get_xdata()[0]) == pytest.approx(0.6)
    share = float(class_share(z0, z1, labels, eps, mode=mode))
    hard = float(criterion.last.hard)
    title = f"Now: H has {hard:.1f} negatives per anchor, {100 * share:.0f} % of its class"
    assert axis.get_title("left") == title
    png(figure)


def test_without_labels_there_is_one_histogram_and_nothing_is_said_of_classes():
    z0, z1, _ = two_groups()
    figure = plots.cosines(z0.numpy(), z1.numpy(), 0.5)
    (axis,) = figure.axes
    assert len(axis.patches) == 2 and "class" not in texts(figure)
    assert axis.patches[0].get_data().values.sum() == pytest.approx(100)
    png(figure)


@pytest.mark.parametrize("eps, width", ((INF, 0), (1.0, 0), (-3.0, 2)))
def test_an_eps_outside_of_all_cosines_shades_nothing_or_everything(eps, width):
    z0, z1, labels = two_groups()
    figure = plots.cosines(z0, z1, eps, labels)
    (axis,) = figure.axes
    assert axis.patches[2].get_width() == pytest.approx(width)
    members = (2 * B - 2) if eps < 0 else 0
    assert f"H has {members:.1f} negatives per anchor" in axis.get_title("left")
    assert ("% of its class" in axis.get_title("left")) == (eps < 0)
    png(figure)


def test_a_class_with_no_other_or_no_second_image_has_no_histogram():
    z0, z1, _ = two_groups()
    for labels, name in ((torch.zeros(B), "anchor's class"), (torch.arange(B), "other classes")):
        figure = plots.cosines(z0[:, :4], z1[:, :4], 0.5, labels.long())
        (label,) = figure.axes[0].get_legend().get_texts()
        assert name in label.get_text()
        png(figure)


def test_histograms_are_drawn_side_by_side_into_a_figure_of_ones_own():
    z0, z1, labels = two_groups()
    figure = Figure(figsize=(8, 7), layout="constrained")
    for panel, eps in zip(figure.subfigures(2, 1), (0.3, 0.8), strict=True):
        assert plots.cosines(z0, z1, eps, labels, into=panel) is panel
    assert [float(axis.lines[0].get_xdata()[0]) for axis in figure.axes] == [0.3, 0.8]


SHAPES = ((SIDE, SIDE), (1, SIDE, SIDE), (SIDE, SIDE, 1), (3, SIDE, SIDE), (SIDE, SIDE, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_nearest_negatives_are_shown_and_those_in_h_framed_by_class(shape):
    z0, z1, labels = two_groups()
    x0, x1 = images(*shape), images(*shape).flip(0)
    eps, chosen, most = 0.75, torch.tensor([4, 0, B + 2]), 12
    figure = plots.neighbours(x0, x1, z0, z1, eps, labels, anchors=chosen, most=most)
    chosen = chosen.tolist()
    cells = np.array(figure.axes, dtype=object).reshape(len(chosen), most + 2)
    u = torch.nn.functional.normalize(torch.cat([z0, z1]))
    c, both = u @ u.T, torch.cat([x0, x1])
    low, high = both.min(), both.max()
    frames, pale = set(), 0
    for row, anchor in zip(cells, chosen, strict=True):
        positive = (anchor + B) % (2 * B)
        own = {anchor, positive}
        order = [j for j in c[anchor].argsort(descending=True).tolist() if j not in own]
        assert row[0].get_ylabel() == f"{sum(float(c[anchor, j]) > eps for j in order)} in H"
        for cell, j in zip(row, [anchor, positive, *order[:most]], strict=True):
            wanted = (both[j] - low) / (high - low)
            if 3 in shape:
                wanted = wanted.movedim(0, -1) if shape[0] == 3 else wanted
            shown = np.asarray(cell.images[0].get_array())
            np.testing.assert_allclose(shown, wanted.numpy().reshape(shown.shape), atol=1e-6)
            if j == anchor:
                continue
            assert cell.get_xlabel() == f"{float(c[anchor, j]):.3f}"
            framed = cell.spines["left"].get_visible()
            assert framed == (j != positive and float(c[anchor, j]) > eps)
            assert (cell.images[0].get_alpha() == 1) == (framed or j == positive)
            if framed:
                alike = labels[j % B] == labels[anchor % B]
                colour = to_hex(cell.spines["left"].get_edgecolor()).upper()
                assert colour == (plots.BLUE if alike else plots.ORANGE)
                frames.add(colour)
            elif j != positive:
                pale += 1
    assert plots.BLUE in frames and pale > 0
    png(figure)


def test_a_negative_of_another_class_in_h_is_orange_and_without_labels_grey():
    z0, z1, labels = two_groups()
    x = images(SIDE, SIDE)
    for given, wanted in ((labels, {plots.BLUE, plots.ORANGE}), (None, {plots.GREY})):
        figure = plots.neighbours(x, x, z0, z1, -2.0, given, anchors=1, most=99, title="At last")
        assert len(figure.axes) == 2 * B  # the anchor, its positive and all negatives
        frames = {to_hex(a.spines["left"].get_edgecolor()).upper() for a in figure.axes[2:]}
        assert frames == wanted
        assert ("orange" in texts(figure)) == (given is not None)
        assert "At last, eps = -2.000: H has 16.0 negatives per anchor" in texts(figure)


def test_the_members_of_h_that_are_not_shown_are_counted():
    z0, z1, labels = two_groups()
    x = images(SIDE, SIDE)
    figure = plots.neighbours(x, x, z0, z1, -2.0, labels, anchors=2, most=6)
    assert [axis.get_title("left") for axis in figure.axes[7::8]] == ["and 10 more"] * 2


def test_images_all_of_one_colour_can_be_drawn():
    z0, z1, labels = two_groups()
    x, title = (torch.ones(B, 4, 4), np.ones((B, 4, 4))), "After epoch 100"
    png(plots.neighbours(*x, z0, z1, 0.5, labels, most=1, anchors=1, title=title))


# ---- matplotlib ---------------------------------------------------------------------------------


def test_matplotlib_is_imported_by_the_first_picture_and_pyplot_and_its_settings_left_alone():
    code = """
import sys, warnings
from hex import plots
warnings.simplefilter("error")
print("matplotlib" in sys.modules, "numpy" in vars(plots))
import matplotlib
settings = lambda: dict(dict.items(matplotlib.rcParams))  # to ask for the backend would choose one
before = settings()
plots.threshold({"eps": [0.5, 0.4]})._repr_png_()
print("matplotlib.pyplot" in sys.modules, settings() == before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.split() == ["False", "False", "False", "True"]


def test_settings_of_ones_own_come_back_after_an_error_too():
    with matplotlib.rc_context({"font.size": 33.0}):
        with pytest.raises(ValueError):
            plots.neighbours(images(2), images(2), *two_groups()[:2], 0.5)
        plots.threshold({"eps": [0.5]})
        assert matplotlib.rcParams["font.size"] == 33


def test_without_matplotlib_an_error_says_what_to_install(monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError) as caught:
        plots.threshold({"eps": [0.5]})
    assert str(caught.value) == (
        "hex.plots needs matplotlib, which is not installed: pip install 'hex-ssl[plots]'"
    )


def test_a_matplotlib_that_lacks_a_package_of_its_own_speaks_for_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="matplotlib.figure"):
        plots.threshold({"eps": [0.5]})


def test_a_figure_is_copied_pickled_and_logged():
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    figure = plots.threshold({"eps": [0.5, 0.25]})
    again = pickle.loads(pickle.dumps(figure))
    assert line(again.axes[0]) == line(copy.deepcopy(figure).axes[0]) == [(0, 0.5), (1, 0.25)]
    assert png(again) == png(figure)
    assert tensorboard._utils.figure_to_image(figure).ndim == 3


def test_a_notebook_shows_a_figure_once_as_a_png():
    formatters = pytest.importorskip("IPython.core.formatters")
    shown, _ = formatters.DisplayFormatter().format(plots.threshold({"eps": [0.5]}))
    assert sorted(shown) == ["image/png", "text/plain"]


# ---- refusals -----------------------------------------------------------------------------------

Z, X = torch.eye(4, 3), torch.ones(4, 5, 5)
ERRORS = (
    (lambda: plots.threshold([0.5]), TypeError, "history: got list, wanted a mapping"),
    (lambda: plots.threshold({}), ValueError,
     "history: got nothing, wanted some of 'eps', 'hard', 'share', 'class_share', 'step'"),
    (lambda: plots.threshold({"eps": [1], "loss": [1]}), ValueError,
     "history: got 'loss', wanted some of 'eps', 'hard', 'share', 'class_share', 'step'"),
    (lambda: plots.threshold({"step": [1, math.nan], "eps": [0.1, 0.2]}), ValueError,
     "history['step']: got one that is not finite, wanted numbers of steps"),
    (lambda: plots.threshold({"step": [1]}), ValueError,
     "history: got 'step', wanted some of 'eps', 'hard', 'share', 'class_share', 'step'"),
    (lambda: plots.threshold({"eps": []}), ValueError,
     "history['eps']: got 0 numbers, wanted at least one"),
    (lambda: plots.threshold({"eps": [1, 2], "class_share": [1]}), ValueError,
     "history['class_share']: got 1 numbers, wanted as many as 'eps' has, 2; NaN stands where one "
     "was not measured"),
    (lambda: plots.threshold({"eps": 3}), TypeError, "history['eps']: got int, wanted numbers"),
    (lambda: plots.threshold({"eps": ["high"]}), TypeError,
     "history['eps']: got list, wanted numbers"),
    (lambda: plots.threshold({"eps": torch.ones(2, 2)}), TypeError,
     "history['eps']: got list, wanted numbers"),
    (lambda: plots.threshold({"eps": [1]}, 0), ValueError,
     "steps_per_epoch: got 0, wanted a number in [1, inf)"),
    (lambda: plots.threshold({"eps": [1]}, "1"), TypeError,
     "steps_per_epoch: got str, wanted a number"),
    (lambda: plots.threshold({"eps": [1]}, chance=10), ValueError,
     "chance: got 10, wanted a number in [0, 1]"),
    (lambda: plots.threshold({"eps": [1]}, negatives=0), ValueError,
     "negatives: got 0, wanted an integer >= 1"),
    (lambda: plots.cosines("z", Z, 0), TypeError, "z0: got str, wanted a torch.Tensor"),
    (lambda: plots.cosines(Z, Z.int().numpy(), 0), TypeError,
     "z1: got torch.int32, wanted torch.float64, float32, bfloat16 or float16"),
    (lambda: plots.cosines(Z, Z[1:], 0), ValueError,
     "z1: got shape (3, 3), wanted that of z0, (4, 3)"),
    (lambda: plots.cosines(Z[:1], Z[:1], 0), ValueError,
     "z0: got shape (1, 3), wanted (B, D) with B >= 2"),
    (lambda: plots.cosines(Z, Z, "0"), TypeError, "eps: got str, wanted a number or a tensor"),
    (lambda: plots.cosines(Z, Z, torch.zeros(8)), ValueError,
     "eps: got shape (8,), wanted ()"),
    (lambda: plots.cosines(Z, Z, NAN), ValueError, "eps: got nan, wanted a cosine"),
    (lambda: plots.cosines(Z, Z, torch.tensor(NAN)), ValueError, "eps: got nan, wanted a cosine"),
    (lambda: plots.cosines(Z, Z, 0, [1, 2]), ValueError, "labels: got shape (2,), wanted (4,)"),
    (lambda: plots.cosines(Z, Z, 0, list("abcd")), TypeError,
     "labels: got list, wanted a torch.Tensor"),
    (lambda: plots.cosines(Z, Z, 0, mode="all"), ValueError,
     "mode: got 'all', wanted one of 'ntxent', 'query', 'cross'"),
    (lambda: plots.neighbours("x", X, Z, Z, 0), TypeError,
     "images0: got str, wanted a tensor or an array"),
    (lambda: plots.neighbours(X, X[1:], Z, Z, 0), ValueError,
     "images1: got shape (3, 5, 5), wanted (4, H, W), grey, or (4, 3, H, W) or (4, H, W, 3)"),
    (lambda: plots.neighbours(X, torch.ones(4, 2, 5, 5), Z, Z, 0), ValueError,
     "images1: got shape (4, 2, 5, 5), wanted (4, H, W), grey, or (4, 3, H, W) or (4, H, W, 3)"),
    (lambda: plots.neighbours(X, torch.ones(4, 3, 5, 5), Z, Z, 0), ValueError,
     "images1: got shape (4, 3, 5, 5), wanted that of images0, (4, 1, 5, 5)"),
    (lambda: plots.neighbours(X, torch.ones(4, 5, 6), Z, Z, 0), ValueError,
     "images1: got shape (4, 1, 5, 6), wanted that of images0, (4, 1, 5, 5)"),
    (lambda: plots.neighbours(X, X, Z, Z, 0, anchors=[8]), ValueError,
     "anchors: got [8], wanted row numbers below 8"),
    (lambda: plots.neighbours(X, X, Z, Z, 0, anchors=[]), ValueError,
     "anchors: got [], wanted row numbers below 8"),
    (lambda: plots.neighbours(X, X, Z, Z, 0, anchors=[-1]), ValueError,
     "anchors: got -1, wanted an integer >= 0"),
    (lambda: plots.neighbours(X, X, Z, Z, 0, anchors=[0.5]), TypeError,
     "anchors: got float, wanted an integer"),
    (lambda: plots.neighbours(X, X, Z, Z, 0, anchors=0), ValueError,
     "anchors: got 0, wanted an integer >= 1"),
    (lambda: plots.neighbours(X, X, Z, Z, 0, anchors=None), TypeError,
     "anchors: got NoneType, wanted an integer or several"),
    (lambda: plots.neighbours(X, X, Z, Z, 0, most=0), ValueError,
     "most: got 0, wanted an integer >= 1"),
)  # fmt: skip


@pytest.mark.parametrize("call, kind, text", ERRORS, ids=[text for *_, text in ERRORS])
def test_a_wrong_argument_is_named(call, kind, text):
    with pytest.raises(kind, match=f"^{re.escape(text)}$"):
        call()
