# SPDX-License-Identifier: MIT
"""The method scripts, run on a few images: what they write, that stopping changes no bit, that HEX
is weighed against the method's own loss as the script says, and the parts that are not the loss:
queues, banks, slow encoders, the centre, captions. Then the table of all results.
"""

import csv
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch.nn import functional as F

for name in ("torchvision", "sklearn", "matplotlib", "rich", "tensorboard", "lightly"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the examples need {name}, which is not installed", allow_module_level=True)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import clip  # noqa: E402
import compare  # noqa: E402
import lightning_simclr  # noqa: E402
from common import augment, data, evaluate, options, runs, training  # noqa: E402

SCRIPTS = compare.METHODS
ADDED = ["byol", "dino", "barlow_twins", "vicreg"]  # HEX beside their own loss
SLOW = [  # the trained network, its slow average
    ("moco", "queries", "keys"),
    ("all4one", "online", "slow"),
    ("byol", "online", "target"),
    ("dino", "backbone", "teacher"),
    ("dino", "head", "teacher_head"),
]
TINY = ["--batch-size", "50", "--over", "negatives", "--knn-every", "0"]  # two steps an epoch


@pytest.fixture
def few_digits(monkeypatch):
    """Digits with 120 images to train on instead of 1297, and one draw a linear probe."""
    pixels, labels = (x[:620] for x in sklearn.datasets.load_digits(return_X_y=True))
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda return_X_y: (pixels, labels))
    monkeypatch.setattr(evaluate.linear_probe, "__defaults__", (None, 1))


def run(script: str, *arguments: object) -> int:
    module = importlib.import_module(script)
    return module.main([*TINY, *(str(argument) for argument in arguments)])


def state(folder: Path) -> dict[str, torch.Tensor]:
    return options.load_checkpoint(folder / "last.ckpt")["state_dict"]


def method_of(script: str, *arguments: str, seed: int = 0) -> training.Method:
    """A script's method, new, and always with the same weights."""
    module = importlib.import_module(script)
    (kind,) = (
        x for x in vars(module).values()
        if isinstance(x, type) and issubclass(x, training.Method)
    )  # fmt: skip
    parsed = options.parser_of(kind, script).parse_args([*TINY, *arguments])
    torch.manual_seed(seed)
    return kind(parsed, data.load("digits")[0])


def batch(method: training.Method, size: int = 40) -> list[torch.Tensor]:
    """What a method's forward gets for some digits."""
    torch.manual_seed(0)
    images, _ = data.load("digits", local_views=method.local_views)
    views, labels = next(images.batches(size))
    return [*views, labels] if method.supervised else views


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_method_stopped_and_resumed_ends_with_the_same_bits_and_result(
    script, few_digits, tmp_path, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(script, "--epochs", 2, "--out", whole) == 0
    assert "mean |H|" in capsys.readouterr().out
    assert run(script, "--epochs", 2, "--out", parts, "--stop-after", 1) == 0
    assert not (parts / "result.json").exists()
    torch.manual_seed(9)
    assert run(script, "--resume", parts) == 0
    a, b = state(whole), state(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    one, two = (json.loads((x / "result.json").read_text()) for x in (whole, parts))
    assert (one["script"], one["loss"], one["epochs"]) == (script, "hex", 2)
    assert one["objective"] == {
        "all4one": "HEX in place of InfoNCE, in both terms",
        "byol": "0.1 HEX + 0.9 base",
        "dino": "0.1 HEX + 0.9 base",
        "barlow_twins": "0.1 HEX + 0.9 base",
        "vicreg": "0.1 * 5 HEX + 0.9 base",
        "supcon": "HEX in place of SupCon",
    }.get(script, "HEX in place of InfoNCE")
    assert one["seconds"] > 0 and two["seconds"] is None
    for name in ("knn", "linear_1", "linear_5", "linear"):
        assert one[name] == two[name] > 0.2  # ten classes


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_base_is_the_method_without_hex(script, few_digits, tmp_path, capsys):
    assert run(script, "--epochs", 1, "--loss", "base", "--out", tmp_path) == 0
    assert "mean |H|" not in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["loss"] == "base" and "HEX" not in result["objective"]
    assert not any("threshold" in name for name in state(tmp_path))


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_data_is_refused_in_a_line(script, tmp_path, capsys):
    assert run(script, "--data", "folder", "--root", tmp_path, "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"{script}.py: error: --root {tmp_path}: wanted train/ and test/")
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_method_is_not_resumed(few_digits, tmp_path, capsys):
    assert run("simclr", "--epochs", 1, "--out", tmp_path) == 0
    assert run("moco", "--resume", tmp_path) == 2
    assert "wanted a run of moco.py" in capsys.readouterr().err


@pytest.mark.parametrize("script", ADDED)
def test_alpha_weighs_hex_against_the_methods_own_loss(script):
    def loss(*arguments: str) -> torch.Tensor:
        method = method_of(script, *arguments)
        return method(*batch(method)).detach()

    own, hex_alone, mixed = (loss("--alpha", alpha) for alpha in ("0", "1", "0.3"))
    torch.testing.assert_close(own, loss("--loss", "base"))
    torch.testing.assert_close(mixed, 0.3 * hex_alone + 0.7 * own)
    assert hex_alone > 1


@pytest.mark.parametrize("script", ADDED)
def test_hex_sees_the_projections_of_the_two_views(script, monkeypatch):
    method = method_of(script, "--alpha", "1")
    seen = []
    method.criterion.register_forward_hook(lambda _, z, value: seen.append((*z, value)))
    inputs = batch(method)
    loss = method(*inputs)
    ((z0, z1, value),) = seen
    assert z0.shape == z1.shape == (40, 128)
    torch.testing.assert_close(loss, (5 if script == "vicreg" else 1) * value)
    value.backward()
    assert method.backbone[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("script, fast, slow", SLOW)
def test_the_slow_network_follows_after_a_step_and_has_no_gradient(script, fast, slow):
    method = method_of(script, "--momentum", "0.75")
    fast, slow = (list(getattr(method, name).parameters()) for name in (fast, slow))
    method(*batch(method)).backward()
    assert all(p.grad is None and not p.requires_grad for p in slow)
    before = [p.clone() for p in slow]
    with torch.no_grad():
        for p in fast:
            p.add_(1)
    method.after_step(1, 100)  # the momentum is at its start, or nearly
    for old, p, q in zip(before, slow, fast, strict=True):
        torch.testing.assert_close(p, 0.75 * old + 0.25 * q, atol=1e-3, rtol=0)
    if script != "moco":  # whose momentum is constant
        before = [p.clone() for p in slow]
        method.after_step(100, 100)
        assert all(map(torch.equal, before, slow))


def test_moco_takes_the_queue_as_it_was_and_then_puts_the_new_keys_in():
    method = method_of("moco", "--loss", "base", "--queue", "100")
    view0, view1 = batch(method)
    with torch.no_grad():
        old = method.queue.bank.clone()
        loss = method(view0, view1)
        q, k = F.normalize(method.queries(view0)), F.normalize(method.keys(view1))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ old.T], dim=1) / 0.1
        wanted = F.cross_entropy(logits, torch.zeros(40, dtype=torch.int64))
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(method.queue.bank[:40], k)
        assert torch.equal(method.queue.bank[40:], old[40:])
        for _ in range(2):
            method(view0, view1)
        assert not torch.isclose(method.queue.bank[80:], old[80:]).all(1).any()  # it is full


def test_nnclr_compares_with_the_nearest_of_the_bank():
    method = method_of("nnclr", "--loss", "base", "--bank", "64")
    view0, view1 = batch(method)
    with torch.no_grad():
        bank = method.bank.bank.clone()
        loss = method(view0, view1)
        z = method.projector(method.backbone(torch.cat([view0, view1])))
        p0, p1 = F.normalize(method.predictor(z)).chunk(2)
        nearest = bank[(F.normalize(z) @ F.normalize(bank).T).argmax(1)]
        torch.testing.assert_close(method.bank.bank[:40], z[40:])
        own = torch.arange(40)
        pairs = zip(F.normalize(nearest).chunk(2), (p1, p0), strict=True)
        wanted = sum(F.cross_entropy(n @ p.T / 0.1, own) for n, p in pairs) / 2
    torch.testing.assert_close(loss, wanted)


def test_dino_sees_small_crops_and_its_centre_moves_to_the_teachers_scores():
    method = method_of("dino", "--prototypes", "32")
    views = batch(method)
    assert [view.shape for view in views] == [(40, 3, 8, 8)] * 2 + [(40, 3, 6, 6)] * 4
    with torch.no_grad():
        scores = method.teacher_head(method.teacher(torch.cat(views[:2])))
        same = method.scores(method.project(torch.cat(views[:2])))
    torch.testing.assert_close(scores, same)  # at first teacher and student are one
    method(*views)
    torch.testing.assert_close(method.base.center[0, 0], 0.1 * scores.mean(0))
    assert "base.center" in method.state_dict()


def test_small_crops_of_photographs_are_smaller_too():
    image = torch.zeros(3, 80, 90, dtype=torch.uint8)
    assert augment.photograph(56)(image).shape == (3, 56, 56)
    assert augment.photograph(56, local=True)(image).shape == (3, 24, 24)
    assert augment.small(local=True)(torch.rand(2, 3, 32, 32)).shape == (2, 3, 16, 16)


def test_captions_say_how_bright_an_image_is_and_on_which_side_and_its_class():
    images = torch.full((3, 3, 4, 4), -1.0)
    images[0, :, :, 3] = 1  # bright, on the right
    images[1, :, 0, 0] = 0  # dark, on the left
    images[2, :, :, 1:3] = 0  # as bright as the first, in the middle
    images[2, :, 0, 0] = -0.9
    method = method_of("clip")
    spoken = [
        [method.text.words[word] for word in caption]
        for caption in clip.captions(images, torch.tensor([7, 0, 3])).tolist()
    ]
    assert [caption[1] for caption in spoken] == ["right", "left", "middle"]
    assert [caption[2] for caption in spoken] == ["seven", "zero", "three"]
    assert spoken[1][0] == "dark" and {spoken[0][0], spoken[2][0]} == {"grey", "bright"}


def test_supcon_takes_all_views_of_a_class_as_positives():
    method = method_of("supcon", "--loss", "base")
    view0, view1, labels = batch(method)
    with torch.no_grad():
        loss = method(view0, view1, labels)
        z = F.normalize(method.projector(method.backbone(torch.cat([view0, view1]))))
    labels = labels.repeat(2)
    other = ~torch.eye(80, dtype=torch.bool)
    positive = other & (labels[:, None] == labels)
    logits = z @ z.T / 0.1
    log_share = logits - torch.where(other, logits, -torch.inf).logsumexp(1, keepdim=True)
    wanted = -((log_share * positive).sum(1) / positive.sum(1)).mean()
    torch.testing.assert_close(loss, wanted)


def test_clip_learns_its_temperature_and_bounds_it():
    method = method_of("clip")
    inputs = batch(method)
    method(*inputs).backward()
    assert method.logit_scale.grad != 0
    losses = []
    for scale in (np.log(100), 9.0):
        method.logit_scale.data.fill_(scale)
        losses.append(method(*inputs).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_classes_have_no_threshold_by_the_positive(few_digits, tmp_path, capsys):
    assert run("supcon", "--threshold", "positive:0.1", "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("supcon.py: error: --threshold: got 'positive:0.1' for classes")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_method_refuses_a_threshold_that_is_no_cosine(script, few_digits, tmp_path, capsys):
    assert run(script, "--threshold", "1.5", "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"{script}.py: error: --threshold: got '1.5', wanted a cosine")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_method_that_diverges_keeps_its_last_good_checkpoint(
    script, few_digits, tmp_path, capsys, monkeypatch
):
    step = training.Method.training_step
    monkeypatch.setattr(
        training.Method,
        "training_step",
        lambda model, *batch: step(model, *batch) * (torch.nan if model.current_epoch else 1),
    )
    assert run(script, "--epochs", 3, "--out", tmp_path) == 1
    errors = capsys.readouterr().err
    assert errors == (
        f"{script}.py: training diverged: the loss of step 1 of epoch 2 is nan; "
        f"{tmp_path / 'last.ckpt'} has the run as it was after 1 whole epochs\n"
    )
    assert all(
        x.isfinite().all() for name, x in state(tmp_path).items()
        if x.is_floating_point() and "threshold" not in name
    )  # fmt: skip
    assert not (tmp_path / "result.json").exists()


def test_a_lightning_module_of_ones_own_logs_the_threshold_and_its_checkpoint_holds_it(
    tmp_path, capsys
):
    lightning_simclr.main(["--epochs", "2", "--out", str(tmp_path)])
    printed, errors = capsys.readouterr()
    assert "hex/eps" in printed and "Warning" not in errors
    (log,) = tmp_path.glob("lightning_simclr/*/metrics.csv")
    lines = list(csv.DictReader(log.read_text().splitlines()))
    assert len(lines) == 2 * 14  # 1797 digits in batches of 128
    assert all(-1 < float(line["hex/eps"]) < 1 and float(line["hex/hard"]) > 0 for line in lines)
    losses = [float(line["loss"]) for line in lines]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    (saved,) = tmp_path.glob("lightning_simclr/*/checkpoints/*.ckpt")
    weights = torch.load(saved, weights_only=True)["state_dict"]
    assert weights["criterion.threshold.state"].isfinite().any()


# ---- the table ----------------------------------------------------------------------------------


def write(folder: Path, script: str, loss: str, knn: float) -> None:
    result = {
        "method": script.upper(), "script": script, "loss": loss, "data": "digits", "seed": 3,
        "objective": "with HEX" if loss == "hex" else "own", "epochs": 7, "batch_size": 16,
        "knn": knn, "linear_1": knn / 2,
    }  # fmt: skip
    (folder / f"{script}-{loss}").mkdir(parents=True)
    (folder / f"{script}-{loss}/result.json").write_text(json.dumps(result))


def rows(printed: str) -> list[list[str]]:
    return [[x.strip() for x in line.split("│")[1:-1]] for line in printed.splitlines()]


def test_the_table_has_a_row_a_method_and_says_by_how_much_hex_is_better_or_worse(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(runs.console, "_width", 160)
    write(tmp_path, "vicreg", "base", 0.95)
    write(tmp_path, "vicreg", "hex", 0.93)
    write(tmp_path, "simclr", "hex", 0.9)
    write(tmp_path, "moco", "base", 0.8)
    write(tmp_path, "moco", "hex", 0.85)
    assert compare.main(["--show", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "digits, 7 epochs, batch size 16, seed 3" in printed
    assert [row for row in rows(printed) if row] == [
        ["SIMCLR", "", "90.0", "", "", "45.0", "", "with HEX"],
        ["MOCO", "80.0", "85.0", "+5.0", "40.0", "42.5", "+2.5", "with HEX"],
        ["VICREG", "95.0", "93.0", "-2.0", "47.5", "46.5", "-1.0", "with HEX"],
    ]


SCRIPT = """
import json, os, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("hello from", arguments["--loss"])
if arguments.get("--epochs") == "13":
    sys.exit("no luck")
result = {"method": "MoCo", "script": "moco", "loss": arguments["--loss"], "data": "digits",
    "epochs": arguments["--epochs"], "batch_size": 1, "seed": 0, "objective": "o", "knn": 0.5,
    "linear_1": 0.5, "seconds": 1, "threads": os.environ["OMP_NUM_THREADS"]}
with open(arguments["--out"] + "/result.json", "w") as file:
    json.dump(result, file)
"""


def test_all_methods_are_run_with_both_losses_and_the_options_given(tmp_path, capsys, monkeypatch):
    (tmp_path / "moco.py").write_text(SCRIPT)
    monkeypatch.setattr(compare, "HERE", tmp_path)
    out = tmp_path / "out"
    arguments = ["--only", "moco", "--jobs", "2", "--out", str(out), "--epochs"]
    assert compare.main([*arguments, "4"]) == 0
    assert {x.name for x in out.iterdir()} == {"moco-base", "moco-hex"}
    assert (out / "moco-hex/log.txt").read_text() == "hello from hex\n"
    result = json.loads((out / "moco-base/result.json").read_text())
    assert (result["loss"], result["epochs"], result["threads"]) == ("base", "4", "1")
    assert "50.0" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # nothing is written over
        compare.main([*arguments, "4"])
    assert "the folder exists already" in capsys.readouterr().err


def test_a_script_that_fails_is_shown_and_no_table_is(tmp_path, capsys, monkeypatch):
    (tmp_path / "moco.py").write_text(SCRIPT)
    monkeypatch.setattr(compare, "HERE", tmp_path)
    arguments = ["--only", "moco", "--jobs", "1", "--out", str(tmp_path / "out"), "--epochs", "13"]
    assert compare.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "moco.py" in printed and "failed" in printed and "no luck" in printed
    assert "k-NN" not in printed


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--only", "moco,mococo"], "got mococo, wanted --only of simclr, moco"),
        (["--show", "{tmp}"], "found no runs there, wanted"),
        (["--show", "{tmp}", "--epochs", "3"], "got --epochs 3 and --show"),
    ],
)
def test_wrong_options_of_the_comparison_are_named(arguments, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main([x.format(tmp=tmp_path) for x in arguments])
    assert stopped.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())
