# SPDX-License-Identifier: MIT
"""hex.open_clip: in place of ClipLoss, as open_clip's releases and its main call it."""

import copy
import inspect

import conftest  # noqa: F401 (in a spawned process too: it lets torchvision be imported)
import pytest
import ranks
import torch
from ranks import RANKS
from torch import Tensor, nn
from torch.nn import functional as F

from hex import HEXLoss, ThresholdTracker
from hex.open_clip import HEXClipLoss

B, D = 37, 19
# Of both losses in float64: logits of up to 25 in size, with a bias, and sums of B + D terms.
ROUNDING = 2 * 25 * (B + D) * 2.0**-53


def features(dtype=torch.float64) -> dict[str, Tensor]:
    """What a model of open_clip gives, under the names that it has for it."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, B, D, dtype=dtype, generator=generator)
    return {
        "image_features": F.normalize(image, dim=1).requires_grad_(),
        "text_features": F.normalize(image + text, dim=1).requires_grad_(),
        "logit_scale": torch.tensor(14.3, dtype=dtype, requires_grad=True),
    }


def release():
    return pytest.importorskip("open_clip", exc_type=ImportError)


@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("scale_shape", [(), (1,)])  # (1,): its models for FSDP
def test_without_threshold_it_is_the_releases_clip_loss_and_its_gradients(bias, scale_shape):
    theirs, ours, values = release().ClipLoss(), HEXClipLoss(threshold=None), []
    given = features()
    given["logit_scale"] = given["logit_scale"].detach().reshape(scale_shape).requires_grad_()
    if bias is not None:
        given["logit_bias"] = torch.tensor([bias], dtype=torch.float64, requires_grad=True)
    leaves = list(given.values())
    for name in ("image_features", "text_features"):  # its models normalise
        given[name] = F.normalize(3 * given[name], dim=1)
    for loss in (ours, theirs):
        losses = loss(**given, output_dict=True)
        assert list(losses) == ["contrastive_loss"] and losses["contrastive_loss"].dim() == 0
        assert torch.equal(loss(**given), losses["contrastive_loss"])
        gradients = torch.autograd.grad(sum(losses.values()), leaves, retain_graph=True)
        values.append([losses["contrastive_loss"].detach(), *gradients])
    for a, b in zip(*values, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=ROUNDING)
    if bias is not None:
        assert values[0][-1] == 0


def test_it_is_called_as_the_releases_clip_loss_is():
    def arguments(loss):
        return [(p.name, p.default) for p in inspect.signature(loss.forward).parameters.values()]

    assert arguments(HEXClipLoss()) == arguments(release().ClipLoss())


class Task(nn.Module):
    """How open_clip's main (CLIPTask) takes a loss and calls it."""

    def __init__(self, model: nn.Module, *, loss: nn.Module) -> None:
        super().__init__()
        self.trainable_module = model
        self.loss = loss

    def training_forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model_out = self.trainable_module(image=batch["image"], text=batch["text"])
        losses = self.loss(**model_out, output_dict=True)
        losses["loss"] = sum(v for k, v in losses.items() if k.endswith("_loss"))
        return losses


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(12, D), nn.Linear(9, D)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if bias else None

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        out = {
            "image_features": F.normalize(self.image(image), dim=-1),
            "text_features": F.normalize(self.text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }
        return out if self.logit_bias is None else out | {"logit_bias": self.logit_bias}


@pytest.mark.parametrize("bias", [False, True])
def test_a_task_of_open_clips_main_trains_with_it_and_every_parameter_has_a_gradient(bias):
    torch.manual_seed(0)
    tracker = ThresholdTracker.adaptive(0.9, over="negatives", momentum=0.5)
    task = Task(Model(bias), loss=HEXClipLoss(threshold=tracker))
    optimizer = torch.optim.SGD(task.parameters(), 0.05)
    batch = {"image": torch.randn(B, 12), "text": torch.randn(B, 9)}
    values = []
    for epoch in range(8):
        task.loss.set_epoch(epoch)
        losses = task.training_forward(batch)
        assert losses["loss"] == losses["contrastive_loss"]
        optimizer.zero_grad()
        losses["loss"].backward()
        assert all(p.grad is not None for p in task.parameters())
        optimizer.step()
        values.append(float(losses["loss"].detach()))
    assert values[-1] < values[0]
    assert task.loss.statistics()["hard"] > 0
    assert int(tracker.updates) == 8
    assert "loss.threshold.state" in task.state_dict()
    twin = Task(Model(bias), loss=HEXClipLoss(threshold=copy.deepcopy(tracker)))
    twin.load_state_dict(task.state_dict())
    assert twin.training_forward(batch)["loss"] == task.training_forward(batch)["loss"]


def steps(rank: int):
    """The value of each loss on a rank's part of the pairs, and the gradients that DDP averages."""
    clip = release().ClipLoss(gather_with_grad=True, rank=rank, world_size=RANKS)
    found = []
    for loss in (HEXClipLoss(threshold=None), clip):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(Model(bias=True).double())
        image = torch.randn(RANKS, B, 12, dtype=torch.float64)[rank]
        text = torch.randn(RANKS, B, 9, dtype=torch.float64)[rank]
        value = loss(**model(image=image, text=text))
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters())])
    return found


def test_two_ranks_have_the_value_and_gradients_of_clip_loss_that_gathers(tmp_path):
    release()
    for ours, theirs in ranks.run(steps, tmp_path):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=RANKS * ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_hex_in_mode_cross_with_its_options_passed_on(dtype):
    given = features(dtype)
    options = {"threshold": 0.3, "beta": 0.5, "tau_plus": 0.2, "variant": "paper"}
    scale = given["logit_scale"]
    wide = scale.float() if scale.dtype == torch.bfloat16 else scale  # rounded once, not twice
    wanted = HEXLoss(mode="cross", **options)(
        given["image_features"], given["text_features"], temperature=1 / wide
    )
    assert torch.equal(HEXClipLoss(**options)(**given), wanted)
    released = HEXClipLoss(threshold=0.3, variant="released")(**given)
    assert not torch.isclose(released, wanted)


def test_a_scale_may_be_a_number():
    given = features()
    value = HEXClipLoss(threshold=None)(**given)
    given["logit_scale"] = 14.3
    torch.testing.assert_close(HEXClipLoss(threshold=None)(**given), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name, value, error, text",
    [
        ("image_features", "cat", TypeError, "image_features: got str"),
        ("image_features", torch.zeros(4), ValueError, r"image_features: got shape \(4,\)"),
        ("text_features", torch.zeros(B, D).int(), TypeError, "text_features: got torch.int32"),
        ("text_features", torch.zeros(B, 3), ValueError, r"text_features: got shape \(37, 3\), wa"),
        (
            "logit_scale",
            torch.ones(2),
            ValueError,
            r"logit_scale: got shape \(2,\), wanted a s",
        ),
        ("logit_scale", torch.ones((), dtype=torch.int64), TypeError, "logit_scale: got torch.int"),
        ("logit_scale", 0, ValueError, "logit_scale: got 0, wanted a finite number > 0"),
        ("logit_scale", None, TypeError, "logit_scale: got NoneType, wanted a number"),
    ],
)
def test_wrong_arguments_are_named_as_open_clip_names_them(name, value, error, text):
    with pytest.raises(error, match=text):
        HEXClipLoss()(**features() | {name: value})


def test_options_that_clip_has_no_use_for_are_refused():
    with pytest.raises(TypeError, match="mode"):
        HEXClipLoss(mode="ntxent")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_in_half_precision_is_inverted_in_more(dtype):
    """open_clip's pure_bf16 and fp16: 1 / 100 in bfloat16 is the inverse of 99.9."""
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(64, 16, generator=generator), dim=1)
    text = torch.nn.functional.normalize(image + 0.1 * image.flip(1), dim=1)
    scale = torch.tensor(100.0, dtype=dtype)
    logits = 100 * image.double() @ text.double().T
    target = torch.arange(64)
    entropy = torch.nn.functional.cross_entropy
    wanted = (entropy(logits, target) + entropy(logits.T, target)) / 2
    got = HEXClipLoss(threshold=None)(image, text, scale)
    # 100 cosines of float32 are off by 4 of its ulp, and the loss with them
    assert abs(float(got) - float(wanted)) < 100 * 4 * torch.finfo(torch.float32).eps


def test_a_wide_loss_does_not_round_the_temperature_of_a_narrow_scale():
    images, texts = torch.eye(6, 5, dtype=torch.float64), torch.ones(6, 5, dtype=torch.float64)
    scale = torch.tensor(14.3)
    narrow, wide = (HEXClipLoss()(images, texts, s) for s in (scale, scale.double()))
    assert torch.equal(narrow, wide)


def test_a_scale_that_is_a_number_and_changes_stays_in_one_graph():
    criterion = HEXClipLoss()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    z = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    for scale in (10.0, 11.0, 12.5):
        torch.testing.assert_close(compiled(*z, scale), criterion(*z, scale))
