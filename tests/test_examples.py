# SPDX-License-Identifier: MIT
"""The examples, run: what they print and draw, that a stopped run goes on bit for bit, that wrong
data and options get an error that says so.

They run in this process where they can: importing what they need takes seconds.
"""

import hashlib
import importlib.util
import math
import os
import random
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

for name in ("torchvision", "sklearn", "matplotlib", "rich", "tensorboard", "lightning", "lightly"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the examples need {name}, which is not installed", allow_module_level=True)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import simclr  # noqa: E402
from common import augment, data, encoder, evaluate, options, training  # noqa: E402
from common.vision import v2  # noqa: E402
from PIL import Image  # noqa: E402
from sklearn.decomposition import PCA  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

TINY = ["--batch-size", "512", "--knn-every", "1"]  # two steps an epoch


def run(*arguments: object) -> int:
    return simclr.main([str(argument) for argument in arguments])


def bits(value):
    """A checkpoint as something that == compares bit for bit.

    Tensors by their digests: where two differ pytest shows how, and on megabytes takes for ever.
    """
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    if isinstance(value, torch.Tensor):
        contents = value.contiguous().numpy().tobytes()
        return value.dtype, tuple(value.shape), hashlib.sha256(contents).hexdigest()
    return value


def state(folder: Path) -> dict:
    """Everything in a run's checkpoint but its command line."""
    contents = options.load_checkpoint(folder / options.LAST)
    del contents["hyper_parameters"]
    return bits(contents)


def photographs(root: Path, parts: dict[str, int], classes: int = 2, size: int = 32) -> Path:
    """A folder of so many images a class for each part; a class has a colour."""
    generator = np.random.default_rng(0)
    for part, count in parts.items():
        for c in range(classes):
            folder = root / part / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 56, (size, size, 3)) + 200 * c // classes
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def test_the_minimal_example_prints_a_falling_loss_with_eps_and_neighbours(capsys):
    runpy.run_path(str(EXAMPLES / "minimal.py"))
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r"step +\d+  loss (\S+)  eps (\S+)  mean \|H\| (\S+)", x) for x in lines]
    loss, eps, hard = zip(*([float(x) for x in row.groups()] for row in rows), strict=True)
    assert loss[-1] < loss[0]
    assert all(-1 <= x <= 1 for x in eps)
    assert all(x > 0 for x in hard)


@pytest.mark.parametrize("loss", ["hex", "base"])
def test_a_run_in_two_parts_ends_with_the_bits_of_one_in_one(loss, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["--loss", loss, "--epochs", 2, *TINY]
    assert run(*arguments, "--out", whole) == 0
    assert run(*arguments, "--out", parts, "--stop-after", 1) == 0
    assert state(parts) != state(whole)
    buffer = "criterion.threshold.state"
    assert (buffer in state(parts)["state_dict"]) == (loss == "hex")
    # what a new process would not have either
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)
    assert run("--resume", parts) == 0
    assert state(parts) == state(whole)
    printed = capsys.readouterr().out
    assert "1 of 2 epochs done" in printed
    assert ("mean |H|" in printed) == (loss == "hex")
    assert list(whole.glob("events.out.tfevents.*"))


@contextmanager
def started(*command: object) -> Iterator[subprocess.Popen[str]]:
    """A process with a thread, in a group of its own, which Ctrl-C reaches as in a terminal. Where
    the tests run in the background they have the signal ignored, and processes inherit that."""
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def interrupted(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a training says from its first epoch on, after which comes Ctrl-C."""
    for line in process.stdout:
        if line.startswith("epoch   1"):
            break
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=120)  # until no process has the pipes open


def test_ctrl_c_leaves_the_last_whole_epoch_to_go_on_from(tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    arguments = ["--epochs", "500", *TINY]
    script = EXAMPLES / "simclr.py"
    with started(sys.executable, script, *arguments, "--out", stopped) as process:
        printed, errors = interrupted(process)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    epochs = int(re.search(r"as it was after (\d+) whole epochs", printed)[1])
    assert f"--resume {stopped}" in printed
    assert epochs == options.load_checkpoint(stopped / "last.ckpt")["epoch"] + 1 >= 1

    assert run("--resume", stopped, "--stop-after", 1) == 0
    assert run(*arguments, "--out", whole, "--stop-after", epochs + 1) == 0
    assert state(stopped) == state(whole)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--data", "cifar10"], "needs --root"),
        (["--data", "cifar10", "--root", "{tmp}/none"], "there is no such folder"),
        (["--data", "cifar10", "--root", "{tmp}"], "wanted CIFAR-10 there"),
        (["--data", "cifar10", "--root", "{tmp}/photographs"], r"\(3, 32, 32\) in 2 classes"),
        (["--data", "folder", "--root", "{tmp}"], r"wanted train/ and test/ \(or val/\)"),
        (["--data", "folder", "--root", "{tmp}/unlike"], "train/ has 2 classes and val/ has 1"),
        (["--data", "folder", "--root", "{tmp}/hollow"], "no valid file for the classes"),
        (["--data", "folder", "--root", "{tmp}/broken", "--batch-size", 4], "0.png: cannot ident"),
        (["--batch-size", 5000], "there are 1297 images only"),
        (["--threshold", "steep:1"], "got 'steep:1', wanted adaptive"),
        (["--backbone", "nothing"], "--backbone: got 'nothing'"),
        (["--device", "nowhere"], "--device nowhere: "),
        (["--device", "cpu", "--amp", "fp16"], "--amp fp16: wanted a GPU; on a CPU there is bf16"),
        (["--resume", "{tmp}/none"], "there is no such checkpoint"),
        (["--resume", "{tmp}/photographs/train/class0/0.png"], "not a checkpoint"),
    ],
)
def test_wrong_data_and_options_are_named_and_the_status_is_2(arguments, text, tmp_path, capsys):
    photographs(tmp_path / "photographs", {"train": 1, "test": 1})
    photographs(tmp_path / "unlike", {"train": 1})
    photographs(tmp_path / "unlike", {"val": 1}, classes=1)
    photographs(tmp_path / "hollow", {"train": 0, "test": 1})
    photographs(tmp_path / "broken", {"train": 2, "test": 1})
    for c in (0, 1):
        (tmp_path / f"broken/train/class{c}/0.png").write_text("no image")
    arguments = [str(argument).format(tmp=tmp_path) for argument in arguments]
    assert run(*arguments, "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err
    assert re.search(text, errors), errors
    assert "Traceback" not in errors
    assert errors.count("\n") == 1


THRESHOLDS = [  # in 40 epochs
    (["--threshold", "1.5"], "got '1.5', wanted a cosine, from -1 to 1"),
    (["--threshold", "-1.5"], "got '-1.5', wanted a cosine, from -1 to 1"),
    (["--threshold", "nan"], "got 'nan', wanted adaptive, a cosine"),
    (["--threshold", "1"], "got '1': no cosine is above 1, so HEX would be InfoNCE"),
    (["--threshold", "0.9,0.1"], "got '0.9,0.1', wanted adaptive"),
    (["--threshold", "adaptive:0.9"], "got 'adaptive:0.9', wanted adaptive"),
    (["--threshold", "step:0.9,0.1,2.5"], "got 'step:0.9,0.1,2.5', wanted whole epochs for EVERY"),
    (["--threshold", "step:0.9,0.1,0"], "wanted whole epochs for EVERY, 1 or more"),
    (["--threshold", "step:0.9,0.1"], "got 'step:0.9,0.1', wanted adaptive"),
    (["--threshold", "step:0.9,,0.1,2"], "got 'step:0.9,,0.1,2', wanted adaptive"),
    (["--threshold", "step:0.9,0.5,10"], r"0.5,10', -0.6 to 0.9, wanted a cosine scaled by row"),
    (["--threshold", "step:0.9,0.1,1"], r"0.1,1', -3 to 0.9, wanted a cosine, from -1 to 1"),
    (["--threshold", "step:1,0,5"], "no cosine is above 1"),
    (["--threshold", "cosine:0.9,-2"], r"-2', -2 to 0.9, wanted a cosine, from -1 to 1"),
    (["--threshold", "-0.5"], "got '-0.5', wanted a cosine scaled by row, from 0 to 1"),
    (["--threshold", "-1", "--variant", "released"], "got '-1': all negatives are in H"),
    (["--warmup", "40"], "--warmup: got 40 of 40 epochs, wanted fewer; H would be empty"),
    (
        ["--threshold", "0.7", "--warmup", "5"],
        "--warmup: got 5 with --threshold 0.7",
    ),
    (["--normalize-rows"], "--normalize-rows: got it with an adaptive threshold"),
    (
        ["--threshold", "positive:0.1", "--normalize-rows"],
        "--normalize-rows: got it with one by the positive",
    ),
    (["--threshold", "positive"], "got 'positive', wanted adaptive"),
    (["--threshold", "positive:0.1,0.2"], "got 'positive:0.1,0.2', wanted adaptive"),
    (["--threshold", "positive:0.1", "--warmup", "40"], "--warmup: got 40 of 40 epochs"),
]


@pytest.mark.parametrize("arguments, text", THRESHOLDS)
def test_a_threshold_that_would_train_another_loss_is_refused(arguments, text, tmp_path, capsys):
    rows = ["--normalize-rows"] if "scaled by row" in text else []
    assert run(*arguments, *rows, "--epochs", 40, "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err
    assert re.search(re.escape(text) if "(" in text else text, errors), errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threshold", "-1"],
        ["--threshold", "step:0.9,0.1,25", "--normalize-rows"],
        ["--threshold", "step:1,0.1,25"],
        ["--threshold", "cosine:1,-1"],
        ["--warmup", "39"],
        ["--threshold", "positive:-0.1", "--warmup", "39"],
    ],
)
def test_a_threshold_at_the_end_of_its_range_is_taken(arguments):
    options.check(options.parser_of(simclr.SimCLR, "simclr").parse_args(arguments))


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--lr", "0"], "--lr: got 0.0, wanted a finite number above 0"),
        (["--lr", "-0.1"], "--lr: got -0.1, wanted"),
        (["--lr", "nan"], "--lr: got nan, wanted"),
        (["--lr", "inf"], "--lr: got inf, wanted"),
        (["--temperature", "0"], "--temperature: got 0.0, wanted a finite number above 0"),
        (["--quantile", "2"], "--quantile: got 2.0, wanted a number from 0 to 1"),
        (["--quantile", "nan"], "--quantile: got nan, wanted"),
        (["--warmup", "-1"], "--warmup: got -1, wanted at least 0"),
        (["--workers", "-1"], "--workers: got -1, wanted at least 0"),
        (["--seed", "-1"], "--seed: got -1, wanted at least 0"),
        (["--knn-every", "-1"], "--knn-every: got -1, wanted at least 0"),
        (["--epochs", "0"], "--epochs: got 0, wanted at least 1"),
        (["--epochs", "2.5"], "--epochs: invalid positive value: '2.5'"),
    ],
)
def test_a_wrong_number_is_refused_with_the_options_name(arguments, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, "--out", tmp_path / "out")
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_at_once_says_so_and_leaves_nothing_to_go_on_from(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--epochs", 3, "--lr", "1e30", *TINY, "--out", out) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("simclr.py: training diverged: ") and errors.count("\n") == 1
    assert errors.endswith("; no epoch was saved\n")
    assert not (out / "last.ckpt").exists() and not (out / "result.json").exists()
    assert run("--epochs", 1, *TINY, "--out", out) == 0  # there is nothing to write over


SHORT = ["--epochs", 3, "--batch-size", 512, "--knn-every", 0]


@pytest.fixture(scope="module")
def good_epoch(tmp_path_factory):
    """The state of a run of SHORT after its first epoch."""
    folder = tmp_path_factory.mktemp("good")
    assert run(*SHORT, "--out", folder / "out", "--stop-after", 1) == 0
    return state(folder / "out")


@pytest.mark.parametrize("what", ["loss", "weight", "moment", "features"])
def test_a_run_that_diverges_later_keeps_the_bits_of_its_last_good_epoch(
    what, good_epoch, tmp_path, capsys, monkeypatch
):
    """Each at the last step of the second epoch; the loss was finite but where it is the loss."""
    step, end = training.Method.training_step, training.Method.on_train_batch_end

    def spoiled_step(model, *batch):
        return step(model, *batch) * (torch.nan if what == "loss" and now(model) else 1)

    def spoiled_end(model, *batch):
        end(model, *batch)
        if what == "loss" or not now(model):
            return
        weight = next(model.backbone.parameters())
        if what == "weight":
            weight.data[0].fill_(torch.inf)
        elif what == "moment":
            model.trainer.optimizers[0].state[weight]["exp_avg_sq"][0].fill_(torch.inf)
        else:
            for parameter in model.backbone.parameters():
                parameter.data.fill_(3e38)

    def now(model) -> bool:
        return model.current_epoch == 1 and model.trainer.is_last_batch

    monkeypatch.setattr(training.Method, "training_step", spoiled_step)
    monkeypatch.setattr(training.Method, "on_train_batch_end", spoiled_end)
    assert run(*SHORT, "--out", tmp_path / "out") == 1
    printed, errors = capsys.readouterr()
    said = {
        "loss": "the loss of step 2 of epoch 2 is nan",
        "weight": "after epoch 2 not all weights and moments are finite",
        "moment": "after epoch 2 not all weights and moments are finite",
        "features": "the features of some images are not finite",
    }
    kept = f"{tmp_path / 'out' / 'last.ckpt'} has the run as it was after 1 whole epochs"
    assert errors == f"simclr.py: training diverged: {said[what]}; {kept}\n"
    assert "epoch   1" in printed and "epoch   2" not in printed
    assert not (tmp_path / "out" / "result.json").exists()
    assert state(tmp_path / "out") == good_epoch
    if what == "loss":  # the others have the same checkpoint
        monkeypatch.undo()
        assert run("--resume", tmp_path / "out") == 0


def test_a_step_that_the_scaler_leaves_out_is_no_divergence():
    images, _ = data.load("digits")
    model = simclr.SimCLR(options.parser_of(simclr.SimCLR, "simclr").parse_args([]), images)
    optimizer = torch.optim.AdamW(model.parameters())
    evaluate.check_finite(model, optimizer, 0, [torch.nan, 1.0], images, scaled=True)
    with pytest.raises(evaluate.Diverged, match="the loss of step 2 of epoch 1 is inf"):
        evaluate.check_finite(model, optimizer, 0, [1.0, torch.inf], images)


def test_a_demo_that_diverges_says_so_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo.torch.optim, "AdamW", lambda x, lr, **_: torch.optim.SGD(x, 1e30))
    assert demo.main(["--epochs", "3", "--out", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("demo.py: the training with InfoNCE diverged: ")
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_written_over(tmp_path, capsys):
    assert run("--epochs", 1, *TINY, "--out", tmp_path) == 0
    before = (tmp_path / "last.ckpt").read_bytes()
    assert run("--epochs", 1, *TINY, "--out", tmp_path) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert run("--resume", tmp_path, "--features", 64) == 2
    assert "--features: got 64 with --resume, of a run with 128" in capsys.readouterr().err
    for name, wanted, there in (("lr", "0.1", "0.003"), ("seed", "4", "0")):
        assert (
            run("--resume", tmp_path, f"--{name}", wanted) == 2
        )  # the checkpoint's would be taken
        errors = capsys.readouterr().err
        assert f"--{name}: got {wanted} with --resume, of a run with {there}" in errors
    assert run("--resume", tmp_path, "--epochs", 3, *TINY) == 0  # a run can be made longer
    assert run("--resume", tmp_path, "--epochs", 2) == 2
    assert "--epochs: got 2 with --resume, of a run that has done 3" in capsys.readouterr().err


def test_help_names_every_choice_of_data_and_loss(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for word in (*data.NAMES, "InfoNCE", "released", "step:START,DROP,EVERY", "--resume"):
        assert word in printed


@pytest.mark.parametrize(
    "text, shown",
    [
        ("adaptive", "adaptive, quantile=0.99"),
        ("0.7", "fixed, t=0.7"),
        ("step:0.9,0.1,25", "step, start=0.9, drop=0.1, every=25"),
        ("cosine:0.9,0.3", "cosine, start=0.9, end=0.3, epochs=7"),
        ("positive:0.05", "by_positive, margin=0.05, relative=False"),
    ],
)
def test_the_threshold_option_makes_the_tracker_it_names(text, shown):
    parser = options.parser_of(simclr.SimCLR, "simclr")
    parsed = parser.parse_args(["--threshold", text, "--epochs", "7"])
    assert shown in repr(options.threshold(parsed))


def test_folders_of_photographs_train_and_a_run_in_two_parts_ends_with_the_same_bits(
    tmp_path, capsys
):
    """With a process that reads the images, in which a view of one is random too."""
    root = photographs(tmp_path / "data", {"train": 6, "test": 5}, size=40)
    arguments = ["--data", "folder", "--root", root, "--image-size", 32, "--batch-size", 4]
    arguments += ["--epochs", 2, "--over", "negatives", "--amp", "bf16", "--workers", 1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*arguments, "--out", whole) == 0
    assert "on 12 images, 3 steps an epoch" in capsys.readouterr().out
    assert run(*arguments, "--out", parts, "--stop-after", 1) == 0
    torch.manual_seed(9)
    assert run("--resume", parts) == 0
    assert state(parts) == state(whole)


def test_the_log_has_the_figures_of_every_step_for_tensorboard_and_as_csv(tmp_path, capsys):
    arguments = ["--epochs", 2, *TINY, "--out", tmp_path]
    assert run(*arguments, "--stop-after", 1) == 0
    assert run("--resume", tmp_path) == 0
    names = "train/loss", "lr-AdamW", "hex/eps", "hex/hard", "hex/share", "hex/class_share"
    log = EventAccumulator(str(tmp_path)).Reload()
    for name in names:
        events = log.Scalars(name)
        assert [event.step for event in events] == [0, 1, 2, 3], name
        assert all(math.isfinite(event.value) for event in events)
    assert [event.step for event in log.Scalars("test/knn")] == [1, 3]
    for epoch in (1, 2):
        lines = (tmp_path / f"csv/from-epoch-{epoch}/metrics.csv").read_text().splitlines()
        assert {*names, "step", "epoch", "test/knn"} == set(lines[0].split(","))


def test_the_demo_prints_its_table_and_draws_four_pictures(tmp_path, capsys, monkeypatch):
    """With main components as the map of the images, for t-SNE takes longer than the training."""
    monkeypatch.setattr(demo, "TSNE", lambda **_: PCA(2))
    assert demo.main(["--epochs", "3", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    rows = {row[0]: row[1:] for row in rows if row}
    assert list(rows) == ["pixels", "InfoNCE", "HEX"]
    for name, (loss, *scores, seconds) in rows.items():
        assert len(scores) == 4
        assert all(40 < float(score) <= 100 for score in scores), name
        assert name == "pixels" or (float(loss) > 0 and float(seconds) >= 0)
    assert "One seed" in printed
    # What the threshold's picture means for the loss is said beside it.
    assert re.search(r"In the end \d+% of H, .* tau_plus = 0.1 .*what_h_holds.md", printed, re.S)
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 4
    for picture in pictures:
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert min(pixels.shape) > 400
        assert 0.005 < (pixels < 200).mean() < 0.5, picture  # drawn on, and not all over


def test_every_image_of_a_batch_gets_a_view_of_its_own():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 16, 16)
    for transform in (augment.small(), augment.digits()):
        views = transform(image.expand(5, -1, -1, -1))
        assert views.shape == (5, 3, 16, 16)
        distances = torch.cdist(views.flatten(1), views.flatten(1)) + torch.eye(5)
        assert distances.min() > 0.1


def test_a_warp_of_nothing_is_the_image_and_a_flip_its_mirror():
    images = torch.rand(3, 1, 9, 9)
    for flip, wanted in ((0.0, images), (1.0, images.flip(-1))):
        warp = augment.RandomWarp(area=(1, 1), ratio=1, flip=flip)
        torch.testing.assert_close(warp(images), wanted)


def test_colours_change_as_torchvision_changes_them(monkeypatch):
    torch.manual_seed(0)
    images = torch.rand(1, 3, 8, 8) * 0.2 + 0.4  # so that nothing is clamped on the way
    uniform = iter([[0.2, -0.3, 0.4], [0.0]])  # what the factors are from 1; the turn of hue
    drawn = lambda self, *_: self.copy_(torch.tensor(next(uniform)).view(self.shape))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "uniform_", drawn)
    monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, 0.5))  # jitter, not grey
    wanted = v2.functional.adjust_brightness(images, 1.2)
    wanted = v2.functional.adjust_contrast(wanted, 0.7)
    wanted = v2.functional.adjust_saturation(wanted, 1.4)
    torch.testing.assert_close(augment.RandomColour()(images), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["small", "resnet18", "mobilenet_v3_small"])
def test_an_encoder_ends_in_features_of_the_size_asked(name):
    backbone, width = encoder.backbone(name, image_size=32)
    model = torch.nn.Sequential(backbone, encoder.projector(width, features=24))
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 24)
