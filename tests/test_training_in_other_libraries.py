# SPDX-License-Identifier: MIT
"""In the training loops of other libraries the loss falls with the local term on.

lightly with pytorch-lightning: SimCLR, NNCLR and MoCo, with lightly's heads and memory bank.
pytorch-metric-learning: its trainer, on labels.
Equal values with the local term off are in test_other_libraries.py.
"""

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hex import HEXLoss, HEXSupConLoss, ThresholdTracker

EPOCHS, BATCH, IMAGES = 6, 64, 192

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


class Views(torch.utils.data.Dataset):
    """Handwritten digits in [0, 1], two views of each: with noise."""

    def __init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        self.images = torch.from_numpy(pixels[:IMAGES] / 16).float()
        self.labels = torch.from_numpy(labels[:IMAGES])

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, i: int):
        image = self.images[i]
        return [image + 0.3 * torch.randn_like(image) for _ in range(2)], self.labels[i]


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Views(), BATCH, shuffle=True, drop_last=True)


def trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())


def tracker() -> ThresholdTracker:
    return ThresholdTracker.adaptive(over="negatives", warmup_epochs=1)


def assert_falls(losses: list[float], criterion: HEXLoss | HEXSupConLoss) -> None:
    assert len(losses) == EPOCHS * (IMAGES // BATCH)
    assert all(map(math.isfinite, losses))
    third = len(losses) // 3
    assert sum(losses[-third:]) < sum(losses[third : 2 * third])  # warm-up is in the first third
    statistics = criterion.statistics()
    assert -1 < statistics["eps"] < 1
    assert statistics["hard"] > 0 and 0 < statistics["share"] < 1
    assert len(criterion.threshold.history) >= EPOCHS - 1  # each is written as the next begins


# ---- lightly and pytorch-lightning --------------------------------------------------------------


@pytest.fixture
def fit():
    lightning = pytest.importorskip("pytorch_lightning", exc_type=ImportError)

    class Module(lightning.LightningModule):
        """What a method of lightly looks like in its examples; `step` is the method's own."""

        def __init__(self, step, **modules: nn.Module) -> None:
            super().__init__()
            self.backbone = trunk()
            self.criterion = HEXLoss(0.1, threshold=tracker())
            for name, module in modules.items():
                setattr(self, name, module)
            self.step, self.losses = step, []

        def on_train_epoch_start(self) -> None:
            self.criterion.set_epoch(self.current_epoch)

        def training_step(self, batch, _) -> Tensor:
            views, _ = batch
            loss = self.step(self, *views)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=3e-3)

    def fit(step, **modules: nn.Module) -> Module:
        module = Module(step, **modules)
        lightning.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, loader())
        return module

    torch.manual_seed(0)
    return fit


@pytest.fixture
def lightly():
    return pytest.importorskip("lightly.models.modules", exc_type=ImportError)


def test_simclr_with_the_head_of_lightly(fit, lightly):
    def step(self, x0, x1):
        return self.criterion(*(self.head(self.backbone(x)) for x in (x0, x1)))

    module = fit(step, head=lightly.SimCLRProjectionHead(64, 64, 32))
    assert_falls(module.losses, module.criterion)
    assert any(name.startswith("criterion.threshold.") for name in module.state_dict())


def test_nnclr_with_the_neighbours_of_lightly(fit, lightly):
    def step(self, x0, x1):
        z = [self.head(self.backbone(x)) for x in (x0, x1)]
        p = [self.prediction(x) for x in z]
        nn0 = self.neighbours(z[0].detach(), update=False)
        nn1 = self.neighbours(z[1].detach(), update=True)
        return (self.criterion(nn0, p[1]) + self.criterion(nn1, p[0])) / 2

    module = fit(
        step,
        head=lightly.NNCLRProjectionHead(64, 64, 32),
        prediction=lightly.NNCLRPredictionHead(32, 64, 32),
        neighbours=lightly.NNMemoryBankModule(size=(128, 32)),
    )
    assert_falls(module.losses, module.criterion)


def test_moco_with_the_memory_bank_of_lightly_as_the_negatives(fit, lightly):
    banks = pytest.importorskip("lightly.models.modules.memory_bank", exc_type=ImportError)
    utils = pytest.importorskip("lightly.models.utils", exc_type=ImportError)

    def step(self, x0, x1):
        utils.update_momentum(self.backbone, self.slow_backbone, m=0.95)
        utils.update_momentum(self.head, self.slow_head, m=0.95)
        query = self.head(self.backbone(x0))
        with torch.no_grad():
            keys = nn.functional.normalize(self.slow_head(self.slow_backbone(x1)))
        keys, queue = self.bank(keys, update=True)
        return self.criterion(query, keys, queue.T)

    backbone, head = trunk(), lightly.MoCoProjectionHead(64, 64, 32)
    slow = [copy.deepcopy(network).requires_grad_(False) for network in (backbone, head)]
    module = fit(
        step,
        backbone=backbone,
        head=head,
        slow_backbone=slow[0],
        slow_head=slow[1],
        bank=banks.MemoryBankModule(size=(256, 32)),
    )
    assert_falls(module.losses, module.criterion)


# ---- pytorch-metric-learning ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # theirs
def test_sup_con_in_the_trainer_of_pytorch_metric_learning():
    trainers = pytest.importorskip("pytorch_metric_learning.trainers", exc_type=ImportError)
    torch.manual_seed(0)
    criterion = HEXSupConLoss(0.1, threshold=tracker())
    model = nn.Sequential(trunk(), nn.Linear(64, 32))
    losses = []
    criterion.register_forward_hook(lambda module, inputs, value: losses.append(value.item()))

    class Flat(Views):
        def __getitem__(self, i: int):
            views, label = super().__getitem__(i)
            return views[0], label

    trainer = trainers.MetricLossOnly(
        models={"trunk": model},
        optimizers={"trunk_optimizer": torch.optim.Adam(model.parameters(), lr=3e-3)},
        batch_size=BATCH,
        loss_funcs={"metric_loss": criterion},
        dataset=Flat(),
        data_device="cpu",
        dtype=torch.float32,
        dataloader_num_workers=0,
        end_of_epoch_hook=lambda trainer: criterion.set_epoch(trainer.epoch),
    )
    criterion.set_epoch(0)  # its own epochs count from 1
    trainer.train(num_epochs=EPOCHS)
    assert_falls(losses, criterion)
