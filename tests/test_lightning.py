# SPDX-License-Identifier: MIT
"""hex.lightning: short trainings with Lightning, and what is said where there is none."""

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import MISSING, pl

from hex import HEXLoss, HEXSupConLoss, InfoNCELoss, ThresholdTracker

needs_lightning = pytest.mark.skipif(pl is None, reason=MISSING)


def test_without_lightning_the_import_says_what_is_missing(monkeypatch):
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.pytorch", None)
    monkeypatch.delitem(sys.modules, "hex.lightning", raising=False)
    with pytest.raises(ImportError, match="^hex.lightning needs Lightning, and neither"):
        importlib.import_module("hex.lightning")


@needs_lightning
@pytest.mark.filterwarnings("ignore")  # Lightning's, of the machine and of torch
def test_a_training_tells_the_losses_the_epoch_and_logs_their_statistics(tmp_path):
    from hex.lightning import HEXCallback

    class Model(pl.LightningModule):
        def __init__(self, two: bool) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)
            tracker = ThresholdTracker.adaptive(0.8, over="negatives", warmup_epochs=1)
            self.criterion = HEXLoss(0.2, threshold=tracker)
            self.baseline = InfoNCELoss(0.2)  # has no threshold: not the callback's business
            if two:
                self.labels = HEXSupConLoss(0.2, threshold=ThresholdTracker.step(0.9, 0.1, 1))
            self.two = two

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            z0, z1 = self.layer(batch[0]), self.layer(batch[0] + 0.1)
            loss = self.criterion(z0, z1) + 0 * self.baseline(z0, z1)
            if self.two:
                loss = loss + self.labels(torch.stack([z0, z1], 1))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.TensorDataset(torch.randn(24, 6))
    for two in (False, True):
        model, seen = Model(two), []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, *_, seen=seen):
                seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

        trainer = pl.Trainer(
            max_epochs=3, callbacks=[HEXCallback(), Watch()], logger=False, log_every_n_steps=1,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=12))
        tracker = model.criterion.threshold
        assert int(tracker.epoch) == 2
        assert int(tracker.updates) == 4  # two batches in each of the two epochs after warm-up
        assert [epoch for epoch, _ in tracker.history] == [0, 1]
        of = "criterion/" if two else ""
        names = {f"hex/{of}{k}" for k in ("eps", "hard", "share")}
        if two:
            names |= {f"hex/labels/{k}" for k in ("eps", "hard", "share")}
            assert model.labels.threshold.value.item() == pytest.approx(0.7)
        assert set(seen[-1]) == names
        assert seen[-1][f"hex/{of}eps"] == pytest.approx(tracker.value.item(), rel=1e-6)
        assert seen[-1][f"hex/{of}hard"] == pytest.approx(model.criterion.last.hard.item())


EPOCHS, IMAGES = 4, 24  # by twos of batches of 6


def model() -> nn.Module:
    """Whose every update counts in the next: the threshold is an average."""

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)
            tracker = ThresholdTracker.adaptive(0.8, momentum=0.5, warmup_epochs=1)
            self.criterion = HEXLoss(0.2, threshold=tracker)
            self.seen: list[Tensor] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            z0, z1 = self.layer(batch[0]), self.layer(batch[0].flip(1))
            self.seen.append(z0.detach())
            return self.criterion(z0, z1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    return Model()


def images() -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(IMAGES, 6, generator=generator))
    return torch.utils.data.DataLoader(data, batch_size=6)


def fit(
    folder: Path,
    epochs: int = EPOCHS,
    resume: Path | None = None,
    criterion: nn.Module | None = None,
    **options: Any,
):
    """A model trained by Lightning, with its own or another loss, and its Trainer."""
    from hex.lightning import HEXCallback

    trained = model()
    trained.criterion = criterion or trained.criterion
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=[HEXCallback()], logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(trained, images(), ckpt_path=resume, weights_only=True)
    return trained, trainer


def assert_same_state(ours: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name]), name


@needs_lightning
@pytest.mark.filterwarnings("ignore")  # Lightning's, of the machine and of torch
def test_a_training_resumed_from_a_checkpoint_ends_as_one_without_a_break(tmp_path):
    whole, _ = fit(tmp_path)
    half, trainer = fit(tmp_path, EPOCHS // 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(tmp_path, resume=tmp_path / "half.ckpt")
    assert_same_state(resumed, whole)
    for tracker in (whole.criterion.threshold, resumed.criterion.threshold):
        assert (int(tracker.epoch), int(tracker.updates)) == (EPOCHS - 1, 4 * (EPOCHS - 1))
    assert resumed.criterion.threshold.history == whole.criterion.threshold.history
    assert not torch.equal(half.criterion.threshold.value, whole.criterion.threshold.value)


@needs_lightning
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ("32-true", "bf16-mixed"))
def test_accumulation_and_mixed_precision_train_as_the_plain_loop(precision, tmp_path):
    ours, _ = fit(tmp_path, accumulate_grad_batches=2, precision=precision)
    plain, narrow = model(), precision == "bf16-mixed"
    optimizer = plain.configure_optimizers()
    for epoch in range(EPOCHS):
        plain.criterion.set_epoch(epoch)
        for index, batch in enumerate(images()):
            # Without a cache of the narrow weights, as Lightning has it.
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow, cache_enabled=False):
                loss = plain.training_step(batch, index)
            assert loss.dtype == torch.float32
            (loss / 2).backward()
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert_same_state(ours, plain)
    assert {z.dtype for z in ours.seen} == {torch.bfloat16 if narrow else torch.float32}
    assert all(map(torch.equal, ours.seen, plain.seen))


@needs_lightning
def test_an_epoch_with_nothing_in_h_is_warned_of_at_the_end_of_the_training():
    from hex.lightning import HEXCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = HEXLoss(threshold=0.9999)

    model, callback = Model(), HEXCallback()
    model.criterion.set_epoch(0)
    model.criterion(*torch.randn(2, 9, 4).requires_grad_().unbind())
    with pytest.warns(UserWarning, match="no row of the last epoch had .*: H was empty"):
        callback.on_train_end(None, model)


@needs_lightning
@pytest.mark.parametrize("epochs", (1, 2), ids=("at its end", "between epochs"))
def test_a_warning_in_a_training_is_at_the_line_that_began_it(epochs, tmp_path):
    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter("always")
        fit(tmp_path, epochs, criterion=HEXLoss(0.2, threshold=0.9999))
    (ours,) = (w for w in got if "H was empty" in str(w.message))
    assert ours.filename == __file__


@needs_lightning
def test_a_bad_prefix_is_named():
    from hex.lightning import HEXCallback

    with pytest.raises(TypeError, match="prefix: got int, wanted a str"):
        HEXCallback(3)
