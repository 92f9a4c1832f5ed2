# SPDX-License-Identifier: MIT
"""The study of the method: the table and the choice in it, rows and claims, measures, the report.

Runs are of the study "tiny", on digits, about half a second each.
"""

import importlib.util
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

for name in ("torchvision", "sklearn", "statsmodels", "matplotlib", "rich", "lightning", "lightly"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the examples need {name}, which is not installed", allow_module_level=True)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import study  # noqa: E402
from common import data, evaluate, plain  # noqa: E402
from common.options import parser_of  # noqa: E402
from effect import differences, measure, plots, report, rows  # noqa: E402
from effect.run import Images, read_superclasses  # noqa: E402
from effect.run import run as run_one  # noqa: E402
from effect.table import CPU, LOSSES, STUDIES, TINY, UNTRAINED, Config, plan  # noqa: E402
from PIL import Image  # noqa: E402
from scipy import stats  # noqa: E402
from simclr import SimCLR  # noqa: E402

TINY_STUDY = STUDIES["tiny"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments: object) -> int:
    return study.main(["run", "tiny", *map(str, arguments)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The rows of the whole tiny study."""
    path = tmp_path_factory.mktemp("study") / "rows.jsonl"
    assert run("--rows", path) == 0
    return path


def without_cost(all_rows: rows.Rows) -> rows.Rows:
    return {key: {**row, "cost": None} for key, row in all_rows.items()}


def test_a_killed_study_goes_on_with_the_rows_of_one_that_was_not(whole, tmp_path):
    path = tmp_path / "rows.jsonl"
    command = sys.executable, str(ROOT / "examples/study.py"), "run", "tiny", "--rows", str(path)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not path.exists() or path.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = rows.read(path)
    assert 2 <= len(done) < 13
    with open(path, "a") as file:  # it might have been killed while it wrote
        file.write('{"key": "tiny: main: inf')
    assert run("--rows", path, "--limit", 2) == 0
    more = rows.read(path)
    assert len(more) == len(done) + 2 and {key: more[key] for key in done} == done
    wanted = rows.read(whole)
    assert list(more) == list(wanted)[: len(more)]
    assert without_cost(more) == without_cost({key: wanted[key] for key in more})


def test_a_whole_study_runs_nothing_more(whole):
    before = whole.read_bytes()
    assert run("--rows", whole) == 0
    assert whole.read_bytes() == before


def test_a_run_that_another_process_claims_is_left_to_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, second, *_ = plan("tiny", TINY_STUDY, {})
    with rows.claim(path, first.key) as mine:
        assert mine
        assert run("--rows", path, "--limit", 1) == 0
    assert list(rows.read(path)) == [second.key]
    with rows.claim(path, first.key) as mine:
        assert mine


def test_a_run_that_diverges_is_named_in_a_line_and_leaves_no_row(tmp_path, capsys, monkeypatch):
    path, epochs = tmp_path / "rows.jsonl", []

    def spoiled(model, optimizer, epoch, losses, images):
        epochs.append(epoch)
        last = len(epochs) == 2 * TINY.epochs  # of the second run that trains
        losses = [math.nan, *losses[1:]] if last else losses
        evaluate.check_finite(model, optimizer, epoch, losses, images)

    monkeypatch.setattr(plain, "check_finite", spoiled)
    assert run("--rows", path) == 1
    errors = capsys.readouterr().err
    key, _, text = errors.removeprefix("study.py: ").partition(" diverged: ")
    assert text == f"the loss of step 1 of epoch {TINY.epochs} is nan\n"
    there = rows.read(path)
    assert len(there) == 2 and key not in there  # with the one that is untrained
    assert key in {config.key for config in plan("tiny", TINY_STUDY, rows.without_test(there))}


def test_rows_that_contradict_the_table_are_refused(whole, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(whole.read_text().replace('"lr": 0.003', '"lr": 0.004'))
    assert run("--rows", path) == 2
    assert "take another file with --rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, said", [("no json", "wanted a JSON object"), ('{"a": 1}', "wanted a JSON object")]
)
def test_a_line_that_is_no_row_is_named(tmp_path, capsys, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    assert run("--rows", path) == 2
    assert f"{path}:1: {said}" in capsys.readouterr().err


def test_a_second_row_of_a_run_is_named(whole, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(whole.read_text() + whole.read_text().splitlines()[0] + "\n")
    with pytest.raises(rows.RowsError, match=r":14: a second row of 'tiny: main: untrained"):
        rows.read(path)


def test_runs_of_a_seed_are_pairs_and_of_two_seeds_are_not(whole):
    pairing = {}
    for row in rows.read(whole).values():
        if row["loss"] != "untrained":
            pairing.setdefault(row["seed"], set()).add(tuple(row["pairing"].values()))
    assert len(pairing) == 3
    assert all(len(found) == 1 for found in pairing.values())
    (weights0, draws0), (weights1, draws1) = pairing[0].pop(), pairing[1].pop()
    assert weights0 != weights1 and draws0 != draws1


def test_differences_of_runs_that_are_no_pair_are_refused(whole):
    runs = differences.compared("tiny", TINY_STUDY, rows.read(whole))
    other = json.loads(json.dumps(runs["infonce"][0]))
    other["pairing"]["draws"] = "others"
    with pytest.raises(rows.RowsError, match="are no pair"):
        differences.difference(runs["paper q0.9"], {0: other}, "knn")


def test_temperatures_are_chosen_by_validation_scores_and_never_by_test_scores(whole):
    all_rows = rows.without_test(rows.read(whole))
    assert not any("test" in row for row in all_rows.values())
    for tau in (0.1, 0.2):
        found = json.loads(json.dumps(all_rows))
        for row in found.values():
            row["validation"]["knn"] = float(row["temperature"] == tau)
        runs = plan("tiny", TINY_STUDY, found)
        assert {run.temperature for run in runs if run.seed == 1} == {tau}


def test_the_second_stage_waits_for_every_temperature(whole):
    found = rows.without_test(rows.read(whole))
    del found["tiny: main: infonce tau=0.1 seed=0"]
    later = [run.loss.name for run in plan("tiny", TINY_STUDY, found) if run.seed == 1]
    assert later == ["paper q0.9", "released q0.9"]


def made_up(config: Config) -> dict:
    """A row that needed no training."""
    scores = {"knn": (len(config.loss.name) + 10 * (config.temperature or 0)) / 100, "linear": 0.5}
    return {"validation": scores, "temperature": config.temperature}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_plan_ends_and_names_no_run_twice(name):
    found, steps = {}, 0
    while left := [run for run in plan(name, STUDIES[name], found) if run.key not in found]:
        found |= {run.key: made_up(run) for run in left}
        steps += 1
        assert steps < 10
    runs = plan(name, STUDIES[name], found)
    assert len({run.key for run in runs}) == len(runs)
    losses = {run.loss.name for run in runs if run.regime == "main"}
    assert losses == {loss.name for loss in LOSSES} | {UNTRAINED.name}
    # the best tuned setting of each form goes on with the baselines
    more = {run.loss.name for run in runs if (run.regime, run.seed) == ("main", 4)}
    assert more == {"infonce", "decoupled", "hcl", "paper q0.99", "released q0.99"}
    leads = {(r.regime, r.loss.name) for r in runs if r.seed in (3, 4) and r.regime != "main"}
    assert leads == {(x, name) for x, names in STUDIES[name].leads.items() for name in names}
    assert {run.regime for run in runs} == {"main", *STUDIES[name].regimes}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_every_loss_of_the_table_trains(loss):
    torch.manual_seed(0)
    options = parser_of(SimCLR, "study").parse_args([])
    vars(options).update(loss.for_setup(CPU, 0.2), epochs=CPU.epochs)
    images, _ = data.load("digits")
    model = SimCLR(options, images)
    model.criterion.set_epoch(CPU.epochs - 1)  # after every warm-up, and when a schedule is lowest
    views = images.views(torch.arange(128))
    value = model(*views)
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    hard = float(model.criterion.last.hard)
    assert hard == {"infonce": 0, "decoupled": 0, "hcl": 254}.get(loss.name, hard)
    assert loss.family not in ("paper", "released") or 0 < hard < 254


def test_decoupled_infonce_has_no_positive_in_its_denominator():
    loss = next(x for x in LOSSES if x.name == "decoupled")
    options = parser_of(SimCLR, "study").parse_args([])
    vars(options).update(loss.for_setup(CPU, 0.2))
    criterion = SimCLR(options, data.load("digits")[0]).criterion
    torch.manual_seed(0)
    z = torch.randn(2, 32, 16, dtype=torch.float64, requires_grad=True)
    unit = torch.nn.functional.normalize(z.flatten(0, 1))
    logits = unit @ unit.T / 0.2
    image = torch.arange(64) % 32
    denominator = logits.masked_fill(image[:, None] == image, -math.inf).logsumexp(1)
    plain = (denominator - logits[torch.arange(64), torch.arange(64).roll(32)]).mean()
    (wanted,) = torch.autograd.grad(plain, z)
    (got,) = torch.autograd.grad(criterion(z[0], z[1]), z)
    torch.testing.assert_close(got, wanted)


def test_bfloat16_trains_too(tmp_path):
    images = Images("digits", None, torch.device("cpu"))
    setup = replace(TINY, amp="bf16")
    row = run_one(Config("tiny", "main", LOSSES[3], 0.2, 0, setup), images, "here")
    assert row["validation"]["linear"] > 0.9


def folder(root: Path, sizes=(8, 10)) -> Path:
    """Photographs of 4 classes, which differ in colour, of several sizes: 720 and 80."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 180), ("test", 20)):
        for number, name in enumerate(("ant", "bee", "car", "dray")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                size = sizes[i % len(sizes)]
                pixels = rng.integers(0, 120, (size, size + i % 3, 3), dtype=np.uint8)
                pixels[..., number % 3] += np.uint8(60 + 15 * number)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_a_folder_of_images_with_superclasses_is_studied(tmp_path):
    root, path, file = folder(tmp_path / "images"), tmp_path / "rows.jsonl", tmp_path / "super.json"
    file.write_text(json.dumps(dict(ant="insect", bee="insect", car="vehicle", dray="vehicle")))
    options = "--data", "folder", "--root", root, "--image-size", 8, "--superclasses", file
    assert run(*options, "--rows", path, "--limit", 2) == 0
    row = rows.read(path)["tiny: main: infonce tau=0.2 seed=0"]
    assert row["setup"]["data"] == "folder"
    assert row["images"] == {"train": 512, "validation": 200, "test": 80}
    assert row["test"]["super_knn"] > 0.6
    last = row["looks"][-1]
    assert last["chance"]["superclass"] == pytest.approx(0.5, abs=0.05)
    assert last["near"]["superclass"] > last["chance"]["superclass"]


def test_regimes_about_other_classes_are_left_out_and_it_is_said(tmp_path, capsys):
    arguments = ["list", "cpu", "--data", "folder", "--rows", str(tmp_path / "rows.jsonl")]
    assert study.main(arguments) == 0
    assert "left out, because they name classes of cifar10: siblings" in capsys.readouterr().out


NAMES = {"ant": "insect", "bee": "insect", "car": "vehicle"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "no JSON"),
        ('["ant"]', "wanted an object"),
        (json.dumps(NAMES | {"ant": 1}), "wanted an object"),
        (json.dumps({"ant": "insect"}), "no superclass for bee, car"),
        (json.dumps(NAMES | {"cow": "animal"}), "there are no classes cow"),
        (json.dumps(dict.fromkeys(NAMES, "thing")), "wanted two superclasses or more"),
    ],
)
def test_a_wrong_file_of_superclasses_is_named(tmp_path, text, said):
    path = tmp_path / "super.json"
    path.write_text(text)
    with pytest.raises(data.DataError, match=said) as caught:
        read_superclasses(path, list(NAMES))
    assert str(path) in str(caught.value)


def test_a_missing_file_of_superclasses_and_a_missing_folder_are_named(tmp_path, capsys):
    assert run("--superclasses", tmp_path / "none", "--rows", tmp_path / "rows.jsonl") == 2
    assert "none: No such file" in capsys.readouterr().err
    assert run("--data", "folder", "--rows", tmp_path / "rows.jsonl") == 2
    assert "needs --root" in capsys.readouterr().err
    options = "--data", "folder", "--root", tmp_path, "--rows", tmp_path / "rows.jsonl"
    assert run(*options) == 2
    assert "wanted train/ and test/" in capsys.readouterr().err


def test_too_few_images_and_unknown_classes_are_named():
    images = Images("digits", None, torch.device("cpu"))
    with pytest.raises(data.DataError, match="1297 training images: 200 held out and 1097 left"):
        images.splits(replace(TINY, train=1200), 0)
    with pytest.raises(data.DataError, match=r"no classes \['cat'\]"):
        images.splits(replace(TINY, classes=("cat",)), 0)


def test_what_is_held_out_is_trained_on_at_no_seed_and_seeds_train_on_different_images():
    images = Images("digits", None, torch.device("cpu"))
    splits = [images.splits(TINY, seed) for seed in (0, 1)]
    pixels = [
        [{image.numpy().tobytes() for image in part._images} for part in split] for split in splits
    ]
    (train0, held0, test0), (train1, held1, test1) = pixels
    assert held0 == held1 and test0 == test1 and train0 != train1
    assert not held0 & (train0 | train1)
    siblings, held, test = images.splits(
        replace(TINY, train=200, batch=64, classes=("one", "two")), 0
    )
    for part in (siblings, held, test):
        assert set(part.labels.tolist()) == {1, 2}


def test_effective_rank_counts_directions_of_equal_spread():
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(4)[:, None]
    axes = torch.cat([torch.eye(4), torch.eye(4)]) * signs
    assert measure.effective_rank(axes + 5) == pytest.approx(4)  # where the rows are is no matter
    assert measure.effective_rank(signs * torch.ones(4)) == pytest.approx(1, abs=1e-3)
    assert measure.effective_rank(torch.ones(8, 4)) == 1
    flat = torch.cat([axes, signs * torch.ones(4)])  # the second class is a line
    labels = torch.tensor([0, 1]).repeat_interleave(8)
    assert measure.rank_within(flat, labels) == pytest.approx(2.5, abs=1e-3)


def test_uniformity_and_alignment_are_those_of_their_paper():
    z = torch.nn.functional.normalize(torch.randn(2, 20, 4), dim=-1)
    square = [(a - b).square().sum() for i, a in enumerate(z[0]) for b in z[0][:i]]
    wanted = torch.stack(square).mul(-2).exp().mean().log()
    assert measure.uniformity(z[0]) == pytest.approx(float(wanted), abs=1e-5)
    assert measure.alignment(z[0], z[0]) == 0
    assert measure.alignment(z[0], -z[0]) == pytest.approx(4, abs=1e-5)


def test_a_look_counts_the_pairs_that_are_in_h():
    images = Images("digits", None, torch.device("cpu"))
    train, held, _ = images.splits(TINY, 0)
    superclasses = torch.arange(10) % 2
    look = measure.Look(held, superclasses, 64)
    options = parser_of(SimCLR, "study").parse_args(["--quantile", "0.9"])
    model = SimCLR(options, train)
    state = torch.get_rng_state()
    seen = look(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert int(model.criterion.threshold.updates) == 0
    assert len(look.labels) == 192  # whole batches of 200
    model.eval()
    pairs = same = 0
    cosines = []
    with torch.no_grad():
        for views, labels in zip(look.views, look.labels.split(64), strict=True):
            z = [torch.nn.functional.normalize(model.embed(view)) for view in views]
            model.criterion(*z)
            rows_of, twice, image = torch.cat(z), labels.repeat(2), torch.arange(128) % 64
            negatives = image[:, None] != image
            inside = (rows_of @ rows_of.T > model.criterion.last.eps) & negatives
            pairs += int(inside.sum())
            # the nearest 1 % of 126 negatives is one
            only = (rows_of @ rows_of.T).masked_fill(~negatives, -1)
            cosines.append(float(only.amax(1).mean()))
            same += int((inside & (twice[:, None] % 2 == twice % 2)).sum())
    assert pairs > 0
    assert seen["near_cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert seen["own"]["size"] == pytest.approx(pairs / 384)
    assert seen["own"]["superclass"] == pytest.approx(same / pairs)


def test_p_values_are_those_of_the_paired_t_test_and_of_holm():
    a, b = [0.5, 0.52, 0.55, 0.54], [0.49, 0.53, 0.51, 0.5]
    found = differences.summary(x - y for x, y in zip(a, b, strict=True))
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found.error == pytest.approx(stats.sem([x - y for x, y in zip(a, b, strict=True)]))
    one = differences.summary([0.1])
    assert (one.error, one.p) == (None, 1)
    assert differences.summary([0.25] * 3).p == 0 and differences.summary([0.0] * 3).p == 1
    # Holm: 4 x 0.005, 3 x 0.01, and never less than the one before
    assert differences.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert differences.holm([]) == []


def test_the_report_is_drawn_from_the_rows_and_keeps_what_people_wrote(whole, tmp_path, capsys):
    path = tmp_path / "effect.md"
    blocks = "".join(f"<!-- study tiny {b} -->\nold\n<!-- end -->\n" for b in report.BLOCKS)
    path.write_text(f"# Ours\n\n{blocks}Also ours.\n<!-- study gpu main -->\n<!-- end -->\n")
    assert study.main(["report", "--rows", str(whole), "--document", str(path)]) == 0
    text = path.read_text()
    assert text.startswith("# Ours\n") and "Also ours." in text and "old" not in text
    assert "No runs of `gpu` so far." in text
    runs = differences.compared("tiny", TINY_STUDY, rows.read(whole))
    knn = [100 * row["test"]["knn"] for row in runs["infonce"].values()]
    assert f"| {np.mean(knn):.1f}\u00a0±\u00a0{stats.sem(knn):.1f} |" in text
    assert len(list((tmp_path / "images").glob("effect-tiny-*.png"))) == 4
    assert report.filled(text, STUDIES, rows.read(whole)) == text


def test_the_picture_of_the_regimes_has_a_panel_for_each_that_ran(whole):
    runs = differences.compared("tiny", TINY_STUDY, rows.read(whole))
    families = {loss.name: loss.family for loss in TINY_STUDY.losses}
    assert plots.regimes({"main": runs, "other": {}}, families) is None
    figure = plots.regimes({"main": runs, "other": {}, "third": runs}, families)
    assert [panel.get_title("left") for panel in figure.axes] == ["main", "third"]
    lines = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert lines == ["HEX paper q0.9", "HEX released q0.9"]


def test_a_new_document_has_every_table_of_the_studies_with_rows(whole, tmp_path, capsys):
    path = tmp_path / "new" / "effect.md"
    assert study.main(["report", "--rows", str(whole), "--document", str(path)]) == 0
    text = path.read_text()
    assert [block for _, _, block, _ in report.BLOCK.findall(text)] == list(report.BLOCKS)
    assert "study gpu" not in text
    missing = tmp_path / "none.jsonl"
    assert study.main(["report", "--rows", str(missing), "--document", str(path)]) == 2
    assert f"{missing}: there are no rows" in capsys.readouterr().err


def test_a_block_that_does_not_exist_is_named(whole, tmp_path, capsys):
    path = tmp_path / "effect.md"
    path.write_text("<!-- study tiny mian -->\n<!-- end -->\n")
    assert study.main(["report", "--rows", str(whole), "--document", str(path)]) == 2
    assert "<!-- study tiny mian -->: there is no such" in capsys.readouterr().err


@pytest.mark.skipif(not study.ROWS.exists(), reason="no committed rows beside the tests")
def test_the_document_states_what_the_committed_rows_say():
    committed = rows.read(study.ROWS)
    text = study.DOCUMENT.read_text()
    assert report.filled(text, STUDIES, committed) == text
    assert len(report.BLOCK.findall(text)) >= 8
    for name, kind in STUDIES.items():
        for config in plan(name, kind, rows.without_test(committed)):
            if row := committed.get(config.key):
                assert {k: row[k] for k in config.described()} == config.described()
    assert study.ROWS.stat().st_size < 1e6
