# SPDX-License-Identifier: MIT
"""The pictures of docs/effect.md: what they show, and whether their words can be read.

They are drawn from the committed rows. test_study.py has the rows themselves and the report, and
test_study_batches.py the comparison of batch sizes.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

for name in ("torchvision", "sklearn", "statsmodels", "matplotlib", "rich", "tensorboard"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the examples need {name}, which is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import study  # noqa: E402
from effect import plots, rows  # noqa: E402
from effect.differences import compared  # noqa: E402
from effect.report import title  # noqa: E402
from effect.table import MAIN, STUDIES  # noqa: E402

if not study.ROWS.exists():
    pytest.skip("no committed rows beside the tests", allow_module_level=True)

CPU = STUDIES["cpu"]
FAMILIES = {loss.name: loss.family for loss in CPU.losses}


@pytest.fixture(scope="module")
def everywhere():
    committed = rows.read(study.ROWS)
    return {name: compared("cpu", CPU, committed, name) for name in (MAIN, *CPU.regimes)}


def words(figure):
    """The boxes of all that can be read."""
    figure.draw_without_rendering()
    found = [figure._suptitle]
    for panel in figure.axes:
        found += [panel._left_title, panel.xaxis.label, *panel.texts]
        for k, (axis, ends) in enumerate(
            ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim()))
        ):
            labels = axis.get_ticklabels()
            found += [x for x in labels if ends[0] <= x.get_position()[k] <= ends[1]]
    return [x.get_window_extent() for x in found if x.get_text() and x.get_visible()]


@pytest.mark.parametrize(
    "picture", [plots.differences, plots.threshold, plots.groups, plots.geometry, plots.regimes]
)
def test_words_of_a_picture_neither_overlap_nor_leave_it(picture, everywhere):
    figure = picture(everywhere if picture is plots.regimes else everywhere[MAIN], FAMILIES)
    boxes = words(figure)
    assert len(boxes) > 20
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    plots.plt.close(figure)


def test_losses_are_sorted_by_their_rank_within_a_class_and_all_seeds_are_shown(everywhere):
    runs = everywhere[MAIN]
    wanted = {}
    for loss in runs.keys() - {"infonce"}:
        wanted[title(loss)] = [
            row["looks"][-1]["rank_within"] - runs["infonce"][seed]["looks"][-1]["rank_within"]
            for seed, row in runs[loss].items()
        ]
    figure = plots.geometry(runs, FAMILIES)
    panel = figure.axes[0]
    names = [label.get_text() for label in panel.get_yticklabels()]  # the highest line first
    assert names == sorted(wanted, key=lambda x: sum(wanted[x]) / len(wanted[x]), reverse=True)
    dots = [line for line in panel.lines if line.get_alpha()]
    for name, y, line in zip(names, panel.get_yticks(), dots, strict=True):
        assert [*line.get_ydata()] == [y] * len(wanted[name])
        assert [*line.get_xdata()] == pytest.approx(wanted[name])
    plots.plt.close(figure)


def test_without_superclasses_the_picture_of_groups_is_of_classes(everywhere):
    runs = {
        loss: {
            seed: row | {"looks": [
                look | {"near": look["near"] | {"superclass": None}} for look in row["looks"]
            ]} for seed, row in mine.items()
        } for loss, mine in everywhere[MAIN].items()
    }  # fmt: skip
    figure = plots.groups(runs, FAMILIES)
    assert [panel.get_title("left") for panel in figure.axes] == [
        "InfoNCE: of the anchor's class, in %", "class: each loss minus InfoNCE"
    ]  # fmt: skip
    plots.plt.close(figure)


def test_a_loss_with_one_seed_is_in_no_picture_of_differences(everywhere):
    runs = dict(everywhere[MAIN])
    runs["hcl"] = {0: runs["hcl"][0]}
    for picture in (plots.differences, plots.groups, plots.geometry):
        figure = picture(runs, FAMILIES)
        lines = {x.get_text() for panel in figure.axes for x in panel.get_yticklabels()}
        assert "decoupled InfoNCE" in lines and "HCL" not in lines
        plots.plt.close(figure)
        assert picture({"infonce": runs["infonce"], "hcl": runs["hcl"]}, FAMILIES) is None
