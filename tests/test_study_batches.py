# SPDX-License-Identifier: MIT
"""The comparison of batch sizes in the study of the method: its runs, its table and its picture.

The rows are those of the study "cpu" that are committed, as if they were of several batch sizes.
"""

import importlib.util
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

for name in ("torchvision", "sklearn", "statsmodels", "matplotlib", "rich", "tensorboard"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the examples need {name}, which is not installed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import study  # noqa: E402
from effect import plots, report, rows  # noqa: E402
from effect.differences import compared, difference, holm  # noqa: E402
from effect.table import MAIN, STUDIES, plan, sizes  # noqa: E402
from test_study_pictures import FAMILIES, words  # noqa: E402

if not study.ROWS.exists():
    pytest.skip("no committed rows beside the tests", allow_module_level=True)

NAMES = "infonce", "decoupled", "paper q0.99", "released q0.99"
STUDY = replace(
    STUDIES["cpu"],
    losses=tuple(loss for loss in STUDIES["cpu"].losses if loss.name in NAMES),
    regimes={"batch 128": {"batch": 128, "lr": 2e-3}, "longer": {"batch": 64, "epochs": 4}},
)
PAIRS = [(x, "infonce") for x in NAMES[1:]] + [("released q0.99", "decoupled")]


@pytest.fixture(scope="module")
def two_sizes():
    """Rows of three seeds at two sizes. At 128 the released form has a point more of k-NN, and its
    last seed has not run."""
    there = {}
    for key, row in rows.read(study.ROWS).items():
        if (row["study"], row["regime"]) != ("cpu", MAIN) or row["seed"] not in STUDY.seeds:
            continue
        there[key] = row
        other = json.loads(json.dumps(row)) | {"regime": "batch 128", "key": f"{key} 128"}
        if row["loss"] == "released q0.99":
            other["test"]["knn"] += 0.01
        if (row["loss"], row["seed"]) != ("released q0.99", 2):
            there[other["key"]] = other
    return there


def test_only_regimes_that_differ_in_the_batch_and_its_learning_rate_are_sizes():
    assert sizes(STUDY) == {128: "batch 128", 256: MAIN}
    assert sizes(STUDIES["cpu"]) == {256: MAIN}


def test_the_table_has_every_planned_comparison_and_counts_what_has_run(two_sizes):
    text = report.batches("cpu", STUDY, two_sizes)
    assert text.startswith("23 of 24 runs have been made: 4 losses, 3 seeds and 2 batch sizes.\n")
    lines = [
        [cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines()[4:]
    ]
    titles = [[report.title(x) for x in pair] for pair in PAIRS]
    assert [line[:3] for line in lines] == [[b, *pair] for b in ("128", "256") for pair in titles]
    assert [line[3] for line in lines] == ["3", "3", "2", "2", "3", "3", "3", "3"]
    runs = compared("cpu", STUDY, two_sizes)
    found = [difference(runs[a], runs[b], "score") for a, b in PAIRS]
    # What has not run at three seeds counts as a comparison that shows nothing.
    p = [found[0].p, found[1].p, 1.0, 1.0, *(d.p for d in found)]
    for line, raw, adjusted in zip(lines, p, holm(p), strict=True):
        assert line[7:] == (["", ""] if line[3] == "2" else [f"{raw:.3f}", f"{adjusted:.3f}"])
    for line, one in zip(lines[4:], found, strict=True):
        assert line[4] == report.signed(one).strip("*").replace(" ", "\u00a0")
    knn = [row["test"]["knn"] for seed, row in runs["released q0.99"].items() if seed < 2]
    base = [row["test"]["knn"] for seed, row in runs["infonce"].items() if seed < 2]
    mean = 100 * sum(a + 0.01 - b for a, b in zip(knn, base, strict=True)) / 2
    assert lines[2][5].split("\u00a0")[0] == f"{mean:+.1f}"


def test_a_seed_beyond_those_of_the_study_is_not_counted_among_its_runs(two_sizes):
    text = report.batches("cpu", replace(STUDY, seeds=(0, 1)), two_sizes)
    assert text.startswith("16 of 16 runs have been made: 4 losses, 2 seeds")


def test_the_cost_counts_trained_runs_alone_and_names_those_that_it_times(two_sizes):
    seconds = [r["cost"]["cpu_all"] for r in two_sizes.values() if r["loss"] != "untrained"]
    assert len(seconds) < len(two_sizes)
    counted = f"{len(seconds)} runs took {sum(seconds) / 3600:.1f} hours of CPU time in all, not "
    text = report.cost("cpu", STUDY, two_sizes)
    assert text.startswith(counted) and ". A run of the main grid took" in text
    # If all regimes differ in the batch size, the size says which runs are meant.
    by_size = replace(STUDY, regimes={"batch 128": STUDY.regimes["batch 128"]})
    text = report.cost("cpu", by_size, two_sizes)
    assert text.startswith(counted) and ". A run with batch size 256 took" in text


def test_the_study_has_four_losses_with_five_seeds_at_four_sizes():
    batch, found = STUDIES["batch"], {}
    assert list(sizes(batch)) == [32, 64, 128, 256]
    names = [loss.name for loss in batch.losses]
    assert report.planned(batch) == [
        *((x, "infonce") for x in names[1:]), ("released q0.99 neg", "decoupled")
    ]  # fmt: skip
    scores = {"validation": {"knn": 0.5, "linear": 0.5}}
    while left := [run for run in plan("batch", batch, found) if run.key not in found]:
        found |= {run.key: scores for run in left}
    runs = [run for run in plan("batch", batch, found) if run.loss.name != "untrained"]
    assert len({(r.setup.batch, r.loss.name, r.seed) for r in runs}) == len(runs) == 80
    assert {(r.setup.batch, r.setup.epochs, r.temperature) for r in runs} == {
        (size, 10, 0.1) for size in sizes(batch)
    }


def test_the_picture_shows_every_seed_of_every_pair():
    runs = compared("cpu", STUDIES["cpu"], rows.read(study.ROWS))
    runs = {loss: {k: r for k, r in mine.items() if k < 3} for loss, mine in runs.items()}
    one = {"infonce": runs["infonce"]}
    pairs = [("decoupled", "infonce"), ("released q0.99 neg", "decoupled")]
    assert plots.batches({64: one, 256: one}, FAMILIES, pairs) is None
    figure = plots.batches({32: {}, 64: one, 256: runs}, FAMILIES, pairs)
    boxes = words(figure)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    for panel, (loss, baseline) in zip(figure.axes, pairs, strict=True):
        (dots,) = [line for line in panel.lines if line.get_alpha()]
        assert [*dots.get_xdata()] == [2] * 3  # the third size; the others have no such runs
        score = [
            [100 * (row["test"]["knn"] + row["test"]["linear"]) / 2 for row in runs[x].values()]
            for x in (loss, baseline)
        ]
        assert [*dots.get_ydata()] == pytest.approx([a - b for a, b in zip(*score, strict=True)])
    plots.plt.close(figure)
