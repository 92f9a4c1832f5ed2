# SPDX-License-Identifier: MIT
"""The authors' runs of examples/paper: one of each method is trained by two processes for a few
steps, stopped, resumed and evaluated, and one of them by one process too. Then what a file of
settings may be, how a step is shared out, LARS, the learning rate and the probe.

All files, data sets and networks are in test_paper_every_run.py, which takes long, and the page of
the runs is in test_paper_page.py.
"""

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

for name in (
    "torchvision",
    "sklearn",
    "rich",
    "tensorboard",
    "lightning",
    "lightly",
    "timm",
    "yaml",
):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the examples need {name}, which is not installed", allow_module_level=True)

import paper_ranks  # noqa: E402
from common import training  # noqa: E402
from common.options import LAST  # noqa: E402
from paper import images, methods, probe, run  # noqa: E402
from paper import settings as of  # noqa: E402
from paper_ranks import arguments_of, digest  # noqa: E402
from test_examples import bits, photographs  # noqa: E402
from test_examples_distributed import RANKS, printed, torchrun  # noqa: E402

# One of each method, with HEX. The last has several batches in a step.
SOME = [
    "cifar_simclr_hex,cifar10,resnet18",
    "cifar_nnclr_hex,cifar100,resnet18",
    "cifar_barlow_hex,cifar100,resnet18",
    "imagenet_simclr_hex,imagenet,resnet50",
]
FIRST = SOME[0]
CLASSES, TESTED = 3, 21  # images to test with, for two ranks an odd number
HEX = Path(of.FOLDER / "cifar_simclr_hex.yaml")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    parts = {"train": 12, "val": TESTED // CLASSES}
    return photographs(tmp_path_factory.mktemp("images"), parts, CLASSES, size=40)


def check_result(folder: Path, what: str, devices: int) -> dict:
    """What a tiny run has written at its end."""
    result = json.loads((folder / "result.json").read_text())
    name, data, backbone = what.split(",")
    assert (result["run"], result["data"], result["backbone"]) == (name, data, backbone)
    assert result["tiny"] is True and result["devices"] == devices
    settings = of.read(of.FOLDER / f"{name}.yaml")
    assert list(result["linear"]) == [f"{x:g}" for x in settings["probe"]["fractions"]]
    for first, fifth in result["linear"].values():
        right = first * TESTED
        assert right == pytest.approx(round(right)) and 0 <= first <= 1
        assert fifth == 1  # of three classes
    return result


def check_parts(what: str, root: Path, folder: Path, said: Callable[[], str]) -> None:
    """A run that is stopped and resumed ends with the bits and the result of one without a break.

    Args:
        said: returns what was printed.
    """
    whole, parts = folder / "whole", folder / "parts"
    assert run.main(arguments_of(root, what, whole)) == 0
    if "_hex," in what:
        assert float(re.search(r"^epoch   2 .* mean \|H\| (\S+)", said(), re.M)[1]) > 0
    assert run.main([*arguments_of(root, what, parts), "--stop-after", "1"]) == 0
    assert not (parts / "result.json").exists()
    torch.manual_seed(9)
    assert run.main([*arguments_of(root, what, parts), "--resume", str(parts)]) == 0
    assert digest(whole) == digest(parts)
    one, two = (check_result(folder, what, 1) for folder in (whole, parts))
    assert one["linear"] == two["linear"]
    assert one["seconds"] > 0 and two["seconds"] is None


def test_a_run_stopped_and_resumed_ends_with_the_same_bits_and_result(root, tmp_path, capsys):
    check_parts(FIRST, root, tmp_path, lambda: capsys.readouterr().out)


def test_a_finished_run_that_is_resumed_is_evaluated_again(root, ranks, tmp_path, capsys):
    arguments = arguments_of(root, FIRST, tmp_path)
    shutil.copytree(ranks / f"{FIRST} whole", tmp_path, dirs_exist_ok=True)
    before = digest(tmp_path)
    (tmp_path / "result.json").unlink()
    assert run.main([*arguments, "--resume", str(tmp_path)]) == 0  # in one process, a run of two
    assert digest(tmp_path) == before
    two = check_result(ranks / f"{FIRST} whole", FIRST, RANKS)
    assert check_result(tmp_path, FIRST, 1)["linear"] == two["linear"]


# ---- two processes ------------------------------------------------------------------------------


def two_processes(root: Path, folder: Path, runs: list[str]) -> None:
    """Trains runs by paper_ranks.py."""
    logs = "--log-dir", folder / "logs", "--redirects", "3"
    done = torchrun(*logs, paper_ranks.__file__, root, folder, *runs)
    assert done.returncode == 0, done.stderr


def seen_by_ranks(folder: Path) -> list[dict]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def ranks(root, tmp_path_factory) -> Path:
    """Where the runs of two processes are, and what each rank has printed."""
    folder = tmp_path_factory.mktemp("ranks")
    two_processes(root, folder, [f"+{FIRST}", *SOME[1:]])
    return folder


@pytest.fixture(scope="module")
def seen(ranks) -> list[dict]:
    return seen_by_ranks(ranks)


def test_two_processes_stopped_and_resumed_end_with_the_bits_of_a_run_without_a_break(ranks, seen):
    one, two = (f"{FIRST} {part}" for part in ("whole", "parts"))
    assert seen[0]["digests"][one] == seen[0]["digests"][two]
    assert all(torch.equal(rank["losses"][one], rank["losses"][two]) for rank in seen)
    results = [check_result(ranks / name, FIRST, RANKS) for name in (one, two)]
    assert results[0]["linear"] == results[1]["linear"]


@pytest.mark.parametrize("what", SOME)
def test_two_processes_train_resume_and_evaluate(what, ranks, seen):
    assert all(set(rank["statuses"]) == {0} for rank in seen)
    check_result(ranks / f"{what} parts", what, RANKS)


@pytest.mark.parametrize("what", SOME)
def test_two_processes_split_a_batch_or_have_batches_of_their_own(what, seen):
    one, two = (rank["losses"][f"{what} parts"] for rank in seen)
    if what.startswith("imagenet_simclr"):
        assert len(one) == 2 and not torch.isclose(one, two).any()
    else:  # a batch that is gathered has one loss
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
        assert len(one) == 4


def test_only_rank_0_prints_and_neither_is_warned(ranks):
    said = printed(ranks, 0, "stdout")
    assert len(re.findall("^epoch   2 ", said, re.M)) == len(SOME) + 1
    assert len(re.findall("result: .*result.json", said)) == len(SOME) + 1
    for rank, stream in ((0, "stderr"), (1, "stdout"), (1, "stderr")):
        assert printed(ranks, rank, stream) == ""


# ---- the settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", of.RUNS)
def test_every_file_is_complete_and_its_step_is_the_same_on_any_number_of_devices(name):
    settings = of.read(of.FOLDER / f"{name}.yaml")
    images = settings["batch"] * settings["accumulate"]
    for devices in (1, 2, 4, 8):
        size, times, split = of.shared_out(settings, devices)
        assert size * times == images
        assert size // devices == settings["batch"] // (devices if split else 1)
    assert of.learning_rate(settings) == settings["lr"] * images / 256


def test_a_step_that_cannot_be_shared_out_is_refused(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run.main(arguments_of(root, FIRST, tmp_path / "out")) == 2
    wanted = "wanted a number that divides 16, the images of a step\n"
    assert capsys.readouterr().err == f"run.py: error: got 3 processes, {wanted}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, devices, step",
    [
        ("imagenet_simclr_hex", 1, "4096 images, 16 batches of 256, in turn"),
        ("imagenet_simclr_hex", 8, "4096 images, 16 batches of 256, 2 on each of 8 processes"),
        ("imagenet_nnclr_hex", 1, "256 images, one batch"),
        ("imagenet_nnclr_hex", 8, "256 images, one batch, gathered from 8 processes"),
    ],
)
def test_the_first_lines_say_what_a_step_is(name, devices, step):
    settings = of.read(of.FOLDER / f"{name}.yaml")
    settings |= {"data": "imagenet", "backbone": "resnet50"}
    said = of.described(settings, devices).splitlines()
    assert said[1] == f"a step: {step}"
    rate = "4.8 = 0.3 * 256 * 16" if "simclr" in name else "0.3 = 0.3 * 256 * 1"
    assert said[2].startswith(f"LARS: learning rate {rate} / 256, ")
    assert said[3].startswith("HEX: variant released, threshold adaptive, ")


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("lr: 1e-6", "lr: got '1e-6', wanted a number, 0 or more"),  # which YAML takes for a text
        ("batch: 0", "batch: got 0, wanted a whole number, 1 or more"),
        ("epochs: true", "epochs: got True, wanted a whole number, 1 or more"),
        ("temperature: .inf", "temperature: got inf, wanted a number, 0 or more"),
        ("data: [mnist]", "data: got mnist, wanted imagenet, cifar10, cifar100"),
        ("backbone: resnet50", "backbone: got 'resnet50', wanted a list of texts"),
        ("views: weak", "views: got 'weak', wanted one of symmetric, "),
        ("method: moco", "method: got 'moco', wanted one of simclr, nnclr, barlow"),
        ("loss: dcl", "loss: got 'dcl', wanted base or hex"),
        ("loss: base", "threshold: is not known for this run"),
        ("queue: 5", "queue: is not known for this run"),
        ("precision: bf16", "precision: got 'bf16', wanted 32-true or 16-mixed"),
        ("threshold: step", "threshold: every: got None, wanted a number of epochs"),
        ("threshold: {rule: lowest}", "threshold: rule: got 'lowest', wanted one of adaptive, "),
        ("threshold: {rule: fixed}", "threshold: "),
        ("probe: {fractions: [2.0]}", "probe: fractions: got [2.0], wanted a list of shares"),
        ("probe: {labels: 3}", "probe: labels: is not known for this run"),
        ("method: nnclr", "predictor: is missing, wanted a whole number, 1 or more"),
        ("method: [", "while parsing"),
    ],
)
def test_a_file_with_a_wrong_setting_is_refused_in_a_line(text, wanted, root, tmp_path, capsys):
    for file in of.FOLDER.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text(f"extends: cifar_simclr_hex\n{text}\n")
    assert run.main([str(file), "--root", str(root), "--tiny"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"run.py: error: {file}: {wanted}")
    assert errors.count("\n") == 1


def test_a_file_that_is_missing_or_no_settings_is_refused(root, tmp_path, capsys):
    (tmp_path / "text.yaml").write_text("simclr")
    (tmp_path / "alone.yaml").write_text("extends: nothing")
    for name, wanted in (
        ("none", "none.yaml: [Errno 2] No such file"),
        ("text", "text.yaml: got no settings, wanted lines such as method: simclr"),
        ("alone", "nothing.yaml: [Errno 2] No such file"),
    ):
        assert run.main([str(tmp_path / f"{name}.yaml"), "--root", str(root)]) == 2
        assert f"run.py: error: {tmp_path}/{wanted}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, wanted",
    [
        (["--data", "imagenet"], "--data: got 'imagenet', wanted one of cifar100, cifar10 for"),
        (["--backbone", "vit"], "--backbone: got 'vit', wanted one of resnet50, resnet18 for this"),
        (["--root", "nowhere"], "--root nowhere: there is no such folder"),
        (["--resume", "nowhere"], "nowhere/last.ckpt: there is no such checkpoint"),
        ([], "there are 36 training images, wanted 256 for a batch"),
    ],
)
def test_what_a_run_cannot_have_is_refused_in_a_line(more, wanted, root, tmp_path, capsys):
    out = tmp_path / "out"
    whole = [str(HEX), "--root", str(root), "--out", str(out), "--device", "cpu", *more]
    assert run.main(whole) == 2
    errors = capsys.readouterr().err
    assert wanted in errors and errors.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_run_of_the_method_alone_has_no_form_of_hex(variant, root, tmp_path, capsys):
    arguments = arguments_of(root, "cifar_simclr,cifar100,resnet18", tmp_path / "out")
    assert run.main([*arguments, "--variant", variant]) == 2
    wanted = f"--variant: got {variant!r}, wanted none for a run of the method alone"
    assert capsys.readouterr().err == f"run.py: error: {wanted}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, wanted",
    [
        (["--variant", "paper"], "variant: got 'paper' with --resume, of a run with 'released'"),
        (["--seed", "6"], "seed: got 6 with --resume, of a run with 5"),
        (["--data", "cifar100"], "data: got 'cifar100' with --resume, of a run with 'cifar10'"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(more, wanted, root, ranks, capsys):
    folder = ranks / f"{FIRST} whole"
    arguments = arguments_of(root, FIRST, folder)
    assert run.main([*arguments, *more, "--resume", str(folder)]) == 2
    assert capsys.readouterr().err == f"run.py: error: {wanted}\n"


def test_a_run_of_another_file_or_script_is_not_resumed(root, ranks, tmp_path, capsys):
    folder = ranks / f"{FIRST} whole"
    other = arguments_of(root, "cifar_simclr_step,cifar10,resnet18", folder)
    assert run.main([*other, "--resume", str(folder)]) == 2
    assert "with --resume, of a run with" in capsys.readouterr().err
    state = {"epoch": 0, "hyper_parameters": {"script": "simclr"}}
    torch.save(state, tmp_path / LAST)
    assert run.main([*arguments_of(root, FIRST, tmp_path), "--resume", str(tmp_path)]) == 2
    assert "wanted a run of examples/paper/run.py" in capsys.readouterr().err


def test_a_run_is_not_written_over(root, ranks, capsys):
    assert run.main(arguments_of(root, FIRST, ranks / f"{FIRST} whole")) == 2
    assert "already holds a run" in capsys.readouterr().err


# ---- what a run is made of ----------------------------------------------------------------------


@pytest.fixture
def model(root, tmp_path, monkeypatch) -> methods.Run:
    """A tiny run that is not trained."""
    parsed = run.parser().parse_args(arguments_of(root, FIRST, tmp_path))
    options = run.options_of(parsed, run.settings_of(parsed))
    train, _ = methods.SimCLR.load(options)
    model = methods.SimCLR(options, train)
    monkeypatch.setattr(model, "train_dataloader", lambda: range(7))  # batches in an epoch
    return model


def test_lars_is_that_of_the_authors(model):
    """p <- p - lr v, v <- 0.9 v + min(0.02 |p| / (|g| + wd |p| + 1e-8) / lr, 1) (g + wd p), and for
    vectors v <- 0.9 v + g."""
    model.settings |= {"lr": 0.3, "batch": 256, "weight_decay": 0.01}
    optimizer = model.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 0.3
    weight, bias = model.projector.layers[0].weight, model.projector.layers[0].bias
    generator = torch.Generator().manual_seed(0)
    p, b = weight.detach().double(), bias.detach().double()
    v, u = torch.zeros_like(p), torch.zeros_like(b)
    shares = []
    for size in (1e-3, 10.0):  # one gradient for which the ratio is clipped, and one for which not
        weight.grad = size * torch.randn(weight.shape, generator=generator)
        bias.grad = size * torch.randn(bias.shape, generator=generator)
        g = weight.grad.double()
        ratio = 0.02 * p.norm() / (g.norm() + 0.01 * p.norm() + 1e-8) / 0.3
        shares.append(ratio.item())
        v = 0.9 * v + ratio.clamp(max=1) * (g + 0.01 * p)
        u = 0.9 * u + bias.grad.double()
        p, b = p - 0.3 * v, b - 0.3 * u
        optimizer.step()
        torch.testing.assert_close(weight.detach().double(), p, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias.detach().double(), b, rtol=1e-5, atol=1e-6)
    assert shares[0] > 1 > shares[1]


def test_the_learning_rate_rises_and_falls_by_the_steps_of_the_optimizer(model):
    model.settings |= {"lr": 0.3, "batch": 256, "accumulate": 2, "epochs": 10, "warmup_epochs": 3}
    model.accumulate = 2
    rule = model.configure_optimizers()["lr_scheduler"]["scheduler"]
    steps = 4 * 10  # 7 batches are four steps
    assert model.steps == steps
    rates = []
    for _ in range(steps):
        rates.append(rule.get_last_lr()[0])
        rule.optimizer.step()
        rule.step()
    assert rates[11] == pytest.approx(0.6) == max(rates)
    assert rates[0] == pytest.approx(6e-5 + (0.6 - 6e-5) / 12)
    assert rates[:12] == sorted(rates[:12])
    falling = [0.3 * (1 + math.cos(math.pi * (step - 12) / 28)) for step in range(12, steps)]
    assert rates[12:] == pytest.approx(falling)


def test_the_networks_are_those_of_the_whole_run(root, tmp_path):
    for what, kernel, pool in ((FIRST, (3, 3), nn.Identity), (SOME[3], (7, 7), nn.MaxPool2d)):
        parsed = run.parser().parse_args(arguments_of(root, what, tmp_path))
        options = run.options_of(parsed, run.settings_of(parsed))
        model = methods.SimCLR(options, methods.SimCLR.load(options)[0])
        assert model.backbone.conv1.kernel_size == kernel
        assert isinstance(model.backbone.maxpool, pool)
        assert not any(isinstance(x, nn.BatchNorm1d) for x in model.projector.modules())


def test_views_are_those_of_the_file():
    picture = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    options = of.read(of.FOLDER / "imagenet_nnclr.yaml")["views"]
    assert [x["blur"] for x in options] == [1.0, 0.1]
    for x in options:
        assert images.view(32, **x)(picture).shape == (3, 32, 32)
    plain = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "blur": 0.0}
    grey = torch.full((3, 40, 50), 200, dtype=torch.uint8)
    for solarize, value in ((0.0, 200), (1.0, 55)):
        seen = images.view(32, **plain, solarize=solarize)(grey)
        assert (seen.int() - value).abs().max() <= 1  # turning grey may round down


def test_a_share_of_the_labels_has_its_share_of_each_class_and_no_class_is_left_out(model):
    pictures = model.images
    assert pictures.labels.bincount().tolist() == [11, 11, 10]
    half, least = pictures.some(0.5), pictures.some(0.01)
    assert pictures.labels[half].bincount().tolist() == [6, 6, 5]
    assert pictures.labels[least].bincount().tolist() == [1, 1, 1]
    assert pictures.some(1.0).tolist() == list(range(32))
    assert torch.equal(half, pictures.some(0.5))


def test_a_probe_that_was_stopped_goes_on_with_the_same_bits(model, tmp_path, monkeypatch):
    model.settings["probe"] |= {"epochs": 3, "drops": [1, 2], "lr": 3.0}
    start = probe.Probe.on_train_epoch_start
    seen = []
    training.quiet()

    def heads(epochs: int) -> list[torch.Tensor]:
        """The classifier at the start of so many epochs. Then the probe is stopped."""
        seen.clear()

        def watch(trained: probe.Probe) -> None:
            seen.append(trained.classification_head.weight.detach().clone())
            if len(seen) == epochs:
                raise InterruptedError
            start(trained)

        monkeypatch.setattr(probe.Probe, "on_train_epoch_start", watch)
        with pytest.raises(InterruptedError):
            probe.probed(model, model.images, 0.5)
        return list(seen)

    model.options.out = str(tmp_path / "whole")
    whole = heads(3)
    model.options.out = str(tmp_path / "parts")
    heads(2)
    rest = heads(2)
    assert [bits(x) for x in rest] == [bits(x) for x in whole[1:]]
    moves = [(b - a).norm().item() for a, b in zip(whole, whole[1:], strict=False)]
    assert moves[0] > 3 * moves[1] > 0  # the learning rate has dropped


class Fake:
    """What torchvision's CIFAR is, with a few images."""

    classes = ["cat", "dog"]

    def __init__(self, root: str, train: bool) -> None:
        count = 40 if train else 10
        generator = torch.Generator().manual_seed(0)
        shape = count, 32, 32, 3
        self.data = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy()
        self.targets = [i % 2 for i in range(count)]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        return images.v2.functional.to_pil_image(self.data[index]), self.targets[index]


def test_a_download_of_cifar_is_read_as_torchvision_has_it(tmp_path, monkeypatch):
    monkeypatch.setitem(images.CIFAR, "cifar100", (Fake, "cifar-100-python"))
    settings = of.chosen(of.read(HEX), "data", "cifar100") | {"crop": 32}
    with pytest.raises(images.data.DataError, match="wanted train/ and test/"):
        images.load(tmp_path, settings, 0, torch.device("cpu"))
    (tmp_path / "cifar-100-python").mkdir()
    train, test = images.load(tmp_path, settings, 0, torch.device("cpu"))
    assert (len(train), len(test), train.classes) == (40, 10, ["cat", "dog"])
    (whole,) = test.images()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in images.SCALES["cifar100"])
    unchanged = torch.from_numpy(Fake("", False).data).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(whole, (unchanged - mean) / std)
