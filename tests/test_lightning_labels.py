# SPDX-License-Identifier: MIT
"""hex.lightning.HEXCallback with labels: what it logs to the loggers of Lightning, and that nothing
of the watch over the losses is left after a step.
"""

import contextlib
import copy
import gc
import importlib.util
import json
import math
import pickle
import warnings
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from trainers import MISSING, pl

from hex import HEXLoss, HEXSupConLoss, InfoNCELoss, ThresholdTracker, plots
from hex.open_clip import HEXClipLoss
from hex.watch import class_share

if pl is None:
    pytest.skip(MISSING, allow_module_level=True)

import hex.lightning  # noqa: E402
from hex.lightning import HEXCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, of the machine and of torch

IMAGES, BATCH = 48, 12
loggers = pl.loggers


class Model(pl.LightningModule):
    """It calls a HEX loss, and keeps what the figures of each step have to be."""

    def __init__(self, criterion: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.criterion = criterion or HEXLoss(0.2, threshold=ThresholdTracker.adaptive(0.8))
        self.wanted: list[float] = []

    def views(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer(x + 0.3 * x.roll(1, 1))

    def training_step(self, batch: Any, index: int) -> Tensor:
        z0, z1 = self.views(batch[0])
        loss = self.criterion(z0, z1)
        self.wanted.append(float(class_share(z0, z1, batch[1], self.criterion.last.eps)))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Recorder(loggers.logger.Logger):
    """Of another tool: what is sent to it."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *_: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.sent.append((step, dict(metrics)))

    def of(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.sent if name in metrics}


def data(keyed: bool = False) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (IMAGES,), generator=generator)
    x = torch.eye(3, 6)[labels] + 0.5 * torch.randn(IMAGES, 6, generator=generator)
    if keyed:
        pairs = [{"image": a, "target": b} for a, b in zip(x, labels, strict=True)]
        return DataLoader(pairs, BATCH)
    return DataLoader(TensorDataset(x, labels), BATCH)


def fit(model, *callbacks, logger=False, epochs=2, loader=None, labels=1, **options):
    """The Trainer after a training."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        **{"log_every_n_steps": 1, "accelerator": "cpu", "devices": 1} | options,
        max_epochs=epochs, callbacks=[HEXCallback(labels=labels), *callbacks], logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader or data())
    return trainer


def watched(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


# ---- what is logged -----------------------------------------------------------------------------


def test_it_is_in_the_csv_log_at_the_steps_that_are_logged_and_computed_at_no_other(
    tmp_path, monkeypatch
):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return class_share(*args, **options)

    monkeypatch.setattr(hex.lightning, "class_share", counted)
    model, logger = Model(), loggers.CSVLogger(tmp_path)
    fit(model, logger=logger, log_every_n_steps=3, epochs=3)
    logger.save()
    history = plots.read_csv(f"{logger.log_dir}/metrics.csv")
    assert history["step"] == [2, 5, 8, 11]
    assert len(calls) == 4
    assert history["class_share"] == pytest.approx([model.wanted[k] for k in (2, 5, 8, 11)])
    assert all(0 < share <= 1 for share in history["class_share"])
    assert set(history) == {"step", "eps", "hard", "share", "class_share"}


def test_it_is_in_the_log_of_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, logger = Model(), loggers.TensorBoardLogger(tmp_path)
    fit(model, logger=logger)
    log = events.EventAccumulator(logger.log_dir).Reload()
    assert {x for x in log.Tags()["scalars"] if x.startswith("hex/")} == {
        f"hex/{name}" for name in ("eps", "hard", "share", "class_share")
    }
    logged = log.Scalars("hex/class_share")
    assert [event.step for event in logged] == list(range(8))
    assert [event.value for event in logged] == pytest.approx(model.wanted)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_it_is_sent_to_weights_and_biases(tmp_path):
    model, logger = Model(), loggers.WandbLogger(save_dir=tmp_path, offline=True)
    fit(model, logger=logger)
    assert logger.experiment.summary["hex/class_share"] == pytest.approx(model.wanted[-1])
    logger.experiment.finish()


@pytest.mark.parametrize(
    "labels",
    (1, -1, lambda batch: batch[1], lambda batch: (batch[1], None)),
    ids=("place", "place from the end", "function", "function of both"),
)
def test_labels_are_found_by_their_place_or_by_a_function(labels):
    model, logger = Model(), Recorder()
    fit(model, logger=logger, labels=labels)
    assert list(logger.of("hex/class_share").values()) == pytest.approx(model.wanted)


def test_labels_are_found_by_their_key():
    class Keyed(Model):
        def training_step(self, batch, index):
            return super().training_step((batch["image"], batch["target"]), index)

    model, logger = Keyed(), Recorder()
    fit(model, logger=logger, labels="target", loader=data(keyed=True))
    assert list(logger.of("hex/class_share").values()) == pytest.approx(model.wanted)


@pytest.mark.parametrize("labels, kind", ((7, IndexError), ("target", TypeError)))
def test_a_place_that_a_batch_lacks_is_named(labels, kind):
    with pytest.raises(kind, match=f"labels: got {labels!r}, wanted an index or a key of a batch"):
        fit(Model(), logger=Recorder(), labels=labels)


def test_a_module_without_a_loss_of_hex_is_warned_of_once():
    class Without(Model):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.criterion = [self.criterion], None

        def training_step(self, batch, index):
            return self.hidden[0](*self.views(batch[0]))

    with warnings.catch_warnings(record=True) as got:
        warnings.simplefilter("always")
        fit(Without(), logger=Recorder())
    (ours,) = (w for w in got if "HEXCallback" in str(w.message))
    assert "Without has no loss of hex among its submodules" in str(ours.message)
    assert ours.filename == __file__


def test_without_labels_nothing_is_watched_and_no_share_logged():
    class Unwatched(Model):
        def training_step(self, batch, index):
            assert watched(self) == 0
            return super().training_step(batch, index)

    logger = Recorder()
    fit(Unwatched(), logger=logger, labels=None)
    assert logger.of("hex/eps") and not logger.of("hex/class_share")


def test_each_of_several_losses_of_two_views_has_its_own():
    class Several(Model):
        def __init__(self) -> None:
            super().__init__()
            self.clip = HEXClipLoss(threshold=0.1, gather_distributed=False)
            self.classes = HEXSupConLoss(0.2)  # takes no two views
            self.baseline = InfoNCELoss(0.2)  # has no H
            self.unused = HEXLoss()
            self.of_clip: list[float] = []

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            z0, z1 = self.views(batch[0].flip(1))
            self.criterion(z1[:4], z0[:4])  # of the calls in a step the last counts
            self.wanted[-1] = float("nan")
            z0, z1 = self.views(batch[0])
            loss = loss + self.criterion(z1=z1, z0=z0)
            self.wanted[-1] = float(class_share(z0, z1, batch[1], self.criterion.last.eps))
            loss = loss + self.clip(z0, text_features=z1, logit_scale=5.0)
            self.of_clip.append(float(class_share(z0, z1, batch[1], 0.1, mode="cross")))
            loss = loss + self.classes(torch.stack([z0, z1], 1), batch[1])
            return loss + self.baseline(z0, z1)

    model, logger = Several(), Recorder()
    fit(model, logger=logger)
    assert list(logger.of("hex/criterion/class_share").values()) == pytest.approx(model.wanted)
    assert list(logger.of("hex/clip/class_share").values()) == pytest.approx(model.of_clip)
    assert logger.of("hex/classes/eps")
    for name in ("classes", "baseline", "unused"):
        assert not logger.of(f"hex/{name}/class_share")


def test_negatives_a_guide_and_thresholds_of_each_row_give_the_h_that_is_counted():
    class Queue(Model):
        def __init__(self, kind: str) -> None:
            scaled = ThresholdTracker.fixed(0.7, normalize_rows=True)
            trackers = {"rows": scaled, "by the positive": ThresholdTracker.by_positive(0.1)}
            super().__init__(HEXLoss(0.2, threshold=trackers.get(kind, 0.2)))
            self.kind, self.sizes = kind, []
            generator = torch.Generator().manual_seed(3)
            self.queue = torch.randn(20, 4, generator=generator)
            self.of_queue = torch.arange(20) % 3

        def training_step(self, batch, index):
            x, y = batch
            (z0, z1), guide = self.views(x), (x, x.flip(1))
            if self.kind == "groups":
                return self.criterion(z0, z1, groups=y)
            if self.kind == "guide":
                loss = self.criterion(z0, z1, guide=guide)
                share = class_share(*guide, y, 0.2)
            elif self.kind == "queue":
                loss = self.criterion(z0, z1, self.queue)
                share = class_share(
                    z0, z1, y, 0.2, negatives=self.queue, negative_labels=self.of_queue
                )
            elif self.kind == "ignored":
                ignored = torch.ones(len(y), len(y), dtype=torch.bool).triu(3)
                loss = self.criterion(z0, z1, ignored=ignored)
                share = class_share(z0, z1, y, 0.2, ignored=ignored)
                self.sizes.append(float(class_share(z0, z1, y, 0.2) - share))
            elif self.kind == "guided queue":
                negatives = self.queue.repeat(1, 2)[:, :6]
                loss = self.criterion(z0, z1, negatives=self.queue, guide=(*guide, negatives))
                share = class_share(
                    *guide, y, 0.2, negatives=negatives, negative_labels=self.of_queue
                )
            else:
                loss = self.criterion(z0, z1)
                share = class_share(z0, z1, y, self.criterion._last[0])
                mean = class_share(z0, z1, y, self.criterion.last.eps)
                self.sizes.append(float(mean - share))
            self.wanted.append(float(share))
            return loss

    for kind in (
        "queue", "guide", "guided queue", "ignored", "rows", "by the positive", "groups"
    ):  # fmt: skip
        model, logger = Queue(kind), Recorder()
        fit(model, logger=logger, labels=lambda batch, m=model: (batch[1], m.of_queue))
        logged = list(logger.of("hex/class_share").values())
        assert logged == pytest.approx(model.wanted), kind
        assert len(logged) == (0 if kind == "groups" else 8)
        if model.sizes:  # or the mean of the thresholds, or all negatives, would do
            assert any(abs(size) > 1e-3 for size in model.sizes)


def test_gradient_accumulation_and_mixed_precision_log_the_last_batch_of_a_step():
    model, logger = Model(), Recorder()
    fit(model, logger=logger, accumulate_grad_batches=2, precision="bf16-mixed")
    logged = logger.of("hex/class_share")
    assert sorted(logged) == [0, 1, 2, 3] and len(model.wanted) == 8
    for step, value in logged.items():
        assert value == pytest.approx(model.wanted[2 * step + 1])


def test_a_loss_in_a_compiled_graph_is_left_out():
    class Compiled(Model):
        def __init__(self) -> None:
            super().__init__()
            self.whole = [torch.compile(self.loss_of, backend="eager")]

        def loss_of(self, x):
            return self.criterion(*self.views(x))

        def training_step(self, batch, index):
            return self.whole[0](batch[0])

    logger = Recorder()
    fit(Compiled(), logger=logger, epochs=1)
    assert len(logger.of("hex/eps")) == 4 and not logger.of("hex/class_share")


@pytest.mark.parametrize("reentrant", (False, True))
def test_what_a_checkpoint_computes_again_is_not_counted(reentrant):
    class Checkpointed(Model):
        def training_step(self, batch, index):
            (z0, z1), y = self.views(batch[0]), batch[1]
            again = partial(checkpoint, self.criterion, use_reentrant=reentrant)
            first = again(z0, z1.flip(1))
            loss = first + again(z0, z1)
            self.wanted.append(float(class_share(z0, z1, y, self.criterion.last.eps)))
            return loss

    model, logger = Checkpointed(), Recorder()
    fit(model, logger=logger)
    assert list(logger.of("hex/class_share").values()) == pytest.approx(model.wanted)


def test_what_changes_after_the_call_does_not_change_the_share():
    class Queue(Model):
        def training_step(self, batch, index):
            z0, z1 = self.views(batch[0])
            self.queue = z1.detach().clone()
            loss = self.criterion(z0, z1, self.queue)
            eps = self.criterion.last.eps
            share = class_share(
                z0, z1, batch[1], eps, negatives=self.queue, negative_labels=batch[1]
            )
            self.wanted.append(float(share))
            return loss

        def on_after_backward(self):
            self.queue.neg_()

    model, logger = Queue(), Recorder()
    fit(model, logger=logger, labels=lambda batch: (batch[1], batch[1]))
    assert list(logger.of("hex/class_share").values()) == pytest.approx(model.wanted)


def test_a_step_without_a_figure_logs_nan_and_not_the_last_value():
    class Alternating(Model):
        def training_step(self, batch, index):
            x, y = batch
            if index % 4 == 1:
                return self.criterion(*self.views(x), groups=y)
            if index % 4 == 2:  # not called
                return self.layer(x).square().mean()
            return super().training_step(batch, index)

    logger = Recorder()
    fit(Alternating(), logger=logger)
    share = list(logger.of("hex/class_share").values())
    hard = list(logger.of("hex/hard").values())
    assert [math.isnan(x) for x in share] == [False, True, True, False] * 2
    assert [math.isnan(x) for x in hard] == [False, False, True, False] * 2


def test_between_logged_steps_the_last_figure_stays_for_other_callbacks():
    seen = []

    class Monitor(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["hex/class_share"]))

    model = Model()
    fit(model, Monitor(), logger=Recorder(), log_every_n_steps=3)
    assert seen == pytest.approx([model.wanted[2], model.wanted[5]])


def test_a_loss_in_one_of_the_accumulated_batches_is_logged_for_the_step():
    class Every(Model):
        def training_step(self, batch, index):
            if index % 2:
                return self.layer(batch[0]).square().mean()
            return super().training_step(batch, index)

    model, logger = Every(), Recorder()
    fit(model, logger=logger, accumulate_grad_batches=2)
    assert list(logger.of("hex/class_share").values()) == pytest.approx(model.wanted)
    assert not any(map(math.isnan, logger.of("hex/eps").values()))


def test_labels_are_asked_for_only_where_a_loss_of_two_views_is_called():
    class Classes(Model):
        def training_step(self, batch, index):
            return self.criterion(torch.stack(self.views(batch[0]), 1), batch[1])

    logger = Recorder()
    fit(Classes(HEXSupConLoss(0.2)), logger=logger, labels="nowhere")
    assert logger.of("hex/eps") and not logger.of("hex/class_share")


def test_a_loss_that_is_replaced_in_a_step_has_no_figures_yet():
    class Replaced(Model):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.criterion = HEXLoss(0.2)
            return loss

    fit(Replaced(), logger=Recorder())


@pytest.mark.parametrize("labels", ((), (1,), (1, 2, 3)))
def test_labels_that_are_no_pair_are_named(labels):
    with pytest.raises(ValueError, match=f"labels: got {len(labels)} of them in a tuple"):
        fit(Model(), logger=Recorder(), labels=lambda batch: labels)


# ---- nothing is left ----------------------------------------------------------------------------


def test_after_a_step_no_hook_and_no_reference_to_an_embedding_is_left():
    class Watched(Model):
        seen: list[weakref.ref] = []

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            assert watched(self) == 1
            assert list(self.state_dict()) == ["layer.weight", "layer.bias",
                                               "criterion.threshold.state",
                                               "criterion.threshold._extra_state"]  # fmt: skip
            return loss

        def views(self, x):
            self.seen.clear()
            z = super().views(x)
            self.seen += map(weakref.ref, z)
            return z

    class After(pl.Callback):
        steps = 0

        def on_train_batch_end(self, trainer, pl_module, *_):
            gc.collect()
            assert len(pl_module.seen) == 2 and watched(pl_module) == 0
            assert not any(ref() is not None for ref in pl_module.seen)
            self.steps += 1

    after = After()
    fit(Watched(), after)
    assert after.steps == 8


def test_a_copy_of_the_model_in_the_middle_of_a_step_keeps_no_embedding():
    class Copied(Model):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
                again = copied(self.criterion)
                z = torch.randn(2, 5, 4).unbind()
                references = [weakref.ref(x) for x in z]
                again(*z)
                again._last = None
                del z
                gc.collect()
                assert [ref() for ref in references] == [None, None]
            callbacks = self.trainer.callbacks
            (ours,) = (c for c in callbacks if isinstance(c, HEXCallback))
            assert ours._watches and not copy.deepcopy(ours)._watches
            return loss

    fit(Copied())


@pytest.mark.parametrize("how", ("an error", "the end of the epoch"))
def test_a_step_that_does_not_end_leaves_no_hook(how):
    class Broken(Model):
        def on_train_batch_start(self, batch, index):
            return -1 if how == "the end of the epoch" and index == 1 else None

        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            if how == "an error" and index == 1:
                raise RuntimeError("stopped by the test")
            return loss

        def on_train_epoch_end(self):
            self.ended = watched(self)

    model = Broken()
    expected = pytest.raises(RuntimeError, match="stopped by the test")
    with expected if how == "an error" else contextlib.nullcontext():
        fit(model, epochs=1)
    assert watched(model) == 0
    assert how == "an error" or model.ended == 0


# ---- ranks --------------------------------------------------------------------------------------


class Ranked(Model):
    """Writes what its rank would log."""

    def __init__(self, path, tracker) -> None:
        super().__init__(HEXLoss(0.2, threshold=tracker, gather_distributed=True))
        self.path = path

    def on_train_end(self):
        (self.path / f"{self.global_rank}.json").write_text(json.dumps(self.wanted))


def test_with_two_ranks_the_number_of_the_first_is_logged(tmp_path):
    logger = loggers.CSVLogger(tmp_path)
    tracker = ThresholdTracker.adaptive(0.8)
    fit(Ranked(tmp_path, tracker), logger=logger, devices=2, strategy="ddp_fork")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    (path,) = tmp_path.glob("**/metrics.csv")
    history = plots.read_csv(path)
    assert history["class_share"] == pytest.approx(first) and len(first) == 4
    assert first != pytest.approx(second)


@pytest.mark.parametrize(
    "tracker",
    (ThresholdTracker.by_positive(0.1), ThresholdTracker.fixed(0.7, normalize_rows=True)),
    ids=("by_positive", "normalize_rows"),
)
def test_with_two_ranks_the_share_at_thresholds_of_each_row_is_left_out(tmp_path, tracker):
    logger = loggers.CSVLogger(tmp_path)
    fit(Ranked(tmp_path, tracker), logger=logger, epochs=1, devices=2, strategy="ddp_fork")
    (path,) = tmp_path.glob("**/metrics.csv")
    assert set(plots.read_csv(path)) == {"step", "eps", "hard", "share"}


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("labels, got", ((1.5, "float"), (True, "bool"), ([1], "list")))
def test_labels_that_are_no_place_and_no_function_are_named(labels, got):
    text = f"^labels: got {got}, wanted an index, a key or a function of a batch$"
    with pytest.raises(TypeError, match=text):
        HEXCallback(labels=labels)


def test_labels_that_do_not_fit_are_named():
    for labels, kind, text in (
        (0, TypeError, "labels: got torch.float32, wanted an integer dtype"),
        (lambda batch: batch[1][:5], ValueError, r"labels: got shape \(5,\), wanted \(12,\)"),
        (lambda batch: None, TypeError, "labels: got NoneType, wanted a torch.Tensor"),
    ):
        with pytest.raises(kind, match=text):
            fit(Model(), labels=labels)
