# SPDX-License-Identifier: MIT
"""hex.lightning: a short training with Lightning, and what is said where there is none."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from hex import HEXLoss, HEXSupConLoss, InfoNCELoss, ThresholdTracker

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, on import
        try:
            import lightning.pytorch as pl
        except ModuleNotFoundError:
            import pytorch_lightning as pl
except ModuleNotFoundError as error:
    pl, MISSING = None, f"no Lightning is installed: {error}"
else:
    MISSING = ""

needs_lightning = pytest.mark.skipif(pl is None, reason=MISSING)

WITHOUT = """
import sys
for name in ("lightning", "pytorch_lightning"):
    sys.modules[name] = None
    sys.modules[name + ".pytorch"] = None
try:
    import hex.lightning
except ImportError as error:
    print(error)
"""


def test_without_lightning_the_import_says_what_is_missing():
    result = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert result.stdout.startswith("hex.lightning needs Lightning, and neither"), result


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
def test_a_bad_prefix_is_named():
    from hex.lightning import HEXCallback

    with pytest.raises(TypeError, match="prefix: got int, wanted a str"):
        HEXCallback(3)
