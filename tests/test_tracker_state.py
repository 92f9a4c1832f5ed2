# SPDX-License-Identifier: MIT
"""What the threshold's state has to come through: short batches, averages, DDP, meta tensors, other
dtypes, copies, checkpoints of and for other losses. hex/state.py has the reasons.
"""

import copy
import inspect
import io
import pickle

import pytest
import ranks
import torch
from data import INF, NAN, f64
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tracked import STATEFUL, adaptive, counts, same, train, views

from hex import (
    HEXCrossEntropyLoss,
    HEXLoss,
    HEXSupConLoss,
    InfoNCELoss,
    ThresholdTracker,
    batch_threshold,
)
from hex import state as states

# ---- short batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", STATEFUL, ids=str)
def test_a_short_last_batch_is_used_and_neither_moves_the_state_nor_stands_for_the_epoch(options):
    whole, dropped = (HEXLoss(threshold=adaptive(**options)) for _ in range(2))
    for epoch in range(3):
        for loss in (whole, dropped):
            loss.set_epoch(epoch)
            for step in range(3):
                train(loss, *views(64, 10 * epoch + step))
        before = dropped.threshold.value
        train(whole, *views(2, 90 + epoch))
        last = whole.statistics()
        assert last["eps"] == (before if "lagged" in options else pytest.approx(last["eps"]))
        assert torch.equal(whole.threshold.value, before)
    for loss in (whole, dropped):
        loss.set_epoch(3)
    assert whole.threshold.history == dropped.threshold.history
    assert counts(whole.threshold) == [9, 0, 3] and counts(dropped.threshold) == [9, 0, 0]
    assert same(train(whole, *views(64, 70)), train(dropped, *views(64, 70)))


def test_the_eps_of_a_short_batch_is_of_its_own_candidate_and_last_shows_it():
    tracker = adaptive(momentum=0.5)
    tracker.update(f64(0.5), store=True, anchors=64)
    assert tracker.update(f64(0.25), store=True, anchors=31) == 0.375
    assert tracker.value == 0.5 and counts(tracker) == [1, 0, 1]
    assert tracker.update(f64(0.25), store=True, anchors=32) == 0.375  # half is enough
    assert tracker.value == 0.375


def test_after_twenty_short_batches_in_a_row_their_length_is_the_normal_one():
    tracker = adaptive()
    tracker.update(f64(0.5), store=True, anchors=512)
    for _ in range(19):
        tracker.update(f64(0.1), store=True, anchors=64)
        assert tracker.value == 0.5
    tracker.update(f64(0.4), store=True, anchors=512)  # the row is broken
    for _ in range(20):
        tracker.update(f64(0.1), store=True, anchors=64)
        assert tracker.value == 0.4
    tracker.update(f64(0.1), store=True, anchors=64)
    assert tracker.value == 0.1 and counts(tracker) == [3, 0, 39]


def test_the_largest_batch_is_that_of_this_epoch_and_the_last():
    tracker = adaptive()
    tracker.set_epoch(0)
    tracker.update(f64(0.5), store=True, anchors=512)
    for epoch in (1, 2):
        tracker.set_epoch(epoch)
        tracker.update(f64(0.1 * epoch), store=True, anchors=64)
    assert tracker.value == 0.2 and counts(tracker) == [2, 0, 1]  # epoch 1 knew of the 512


def test_without_epochs_the_largest_batch_is_that_of_the_last_fifty_to_a_hundred_calls():
    tracker = adaptive()
    tracker.update(f64(0.9), store=True, anchors=512)
    stored = []
    for _ in range(10):  # short ones, too few in a row to be the normal
        for _ in range(10):
            tracker.update(f64(0.1), store=True, anchors=64)
        tracker.update(f64(0.5), store=True, anchors=300)
        stored.append(counts(tracker)[0])
    tracker.update(f64(NAN), store=True, anchors=1)
    assert counts(tracker) == [11, 1, 100]
    for _ in range(120):
        tracker.update(f64(0.2), store=True, anchors=150)
    assert tracker.value == 0.2 and counts(tracker)[0] == 131  # half of 300 is enough
    tracker.update(f64(0.2), store=True, anchors=76)  # of the 300s nothing is left
    assert counts(tracker) == [132, 1, 100]


def test_a_batch_that_is_not_finite_changes_nothing_but_its_count():
    tracker = adaptive(momentum=0.5)
    tracker.update(f64(0.5), store=True, anchors=64)
    before = tracker.state.tolist()
    for bad in (NAN, INF, -INF):
        tracker.update(f64(bad), store=True, anchors=2)
    before[states.SKIPPED], before[states.CANDIDATE] = 3, 2
    assert tracker.state.tolist() == before


@pytest.mark.parametrize("options", STATEFUL, ids=str)
def test_the_kernels_and_torch_move_the_state_to_the_same_bits(options):
    """One call (torch.ops.hex.adaptive) against the threshold and a step of it."""
    options = {"warmup_epochs": 1, **options}
    one, two = (HEXLoss(threshold=adaptive(**options)) for _ in range(2))
    sizes = [64, 64, 2, 40, 20, *[16] * 25, 64, 0]
    for step, size in enumerate(sizes):
        if step < 2:
            one.set_epoch(step), two.set_epoch(step)
        z0, z1 = views(size, step)
        if step == 7:
            z0[1, 1] = NAN
        train(one, z0, z1)
        candidate = batch_threshold(z0, z1, quantile=0.9)  # measured apart, as on other devices
        two.threshold.update(candidate, store=True, anchors=2 * size)
        assert same([one.threshold.state], [two.threshold.state]), step
    assert one.threshold.short > 5


@pytest.mark.parametrize("make", (
    lambda t: HEXSupConLoss(threshold=t),
    lambda t: HEXCrossEntropyLoss(0.1, threshold=t),
))  # fmt: skip
def test_every_loss_knows_a_short_batch(make):
    loss = make(adaptive(momentum=0.9))
    for size in (64, 64, 4):
        if isinstance(loss, HEXSupConLoss):
            train(lambda z: loss(z, torch.arange(len(z)) // 2), views(size)[0])  # noqa: B023
        else:
            logits = views(size, features=16)[0]
            train(lambda z: loss(z, torch.zeros(len(z), dtype=torch.int64)), logits)  # noqa: B023
    assert counts(loss.threshold) == [2, 0, 1]


# ---- averages of buffers and of state_dicts -----------------------------------------------------


class Model(nn.Module):
    def __init__(self, threshold) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 8, dtype=torch.float64)
        self.criterion = HEXLoss(threshold=threshold)

    def forward(self, z0, z1):
        return self.criterion(self.head(z0), self.head(z1))


class OfStateDict:
    """An average of state_dict().values(), as many training codes write their own."""

    def __init__(self, model) -> None:
        self.module = copy.deepcopy(model).eval()

    @torch.no_grad()
    def update(self, model) -> None:
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        for ours, theirs in pairs:
            ours.copy_(0.9 * ours + 0.1 * theirs)


def averages():
    def of_torch(model):
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        averaged.update = averaged.update_parameters
        return averaged

    def mean_of_torch(model):
        averaged = AveragedModel(model, use_buffers=True)
        averaged.update = averaged.update_parameters
        return averaged

    def of_timm(name):
        def make(model):
            utils = pytest.importorskip("timm.utils", reason="timm is not installed")
            return getattr(utils, name)(model, decay=0.9)

        return make

    return {
        "torch": of_torch, "torch, mean": mean_of_torch, "timm V2": of_timm("ModelEmaV2"),
        "timm V3": of_timm("ModelEmaV3"), "state_dict": OfStateDict,
    }  # fmt: skip


@pytest.mark.parametrize("name", averages())
@pytest.mark.parametrize("options", ({}, {"momentum": 0.9}, {"warmup_epochs": 2}), ids=str)
def test_an_average_of_models_has_a_threshold_between_theirs_over_four_epochs(name, options):
    model = Model(adaptive(**options))
    average = averages()[name](model)
    values = []
    for epoch in range(4):
        model.criterion.set_epoch(epoch)
        for step in range(2):
            model(*views(40, 2 * epoch + step, shift=epoch)).backward()
            if int(model.criterion.threshold.updates):
                values.append(float(states.stored(model.criterion.threshold.state)))
            average.update(model)
        seen = average.module.eval().criterion
        value = float(seen.threshold.value)
        if seen.threshold.state[states.WEIGHT] == 0 or seen.threshold._is_warm_up():
            assert value == INF
        else:
            assert min(values) - 1e-15 <= value <= max(values) + 1e-15
        assert seen.threshold.state.isfinite().all()
        for count in (seen.threshold.epoch, *counts(seen.threshold)):
            assert int(count) == count
        assert average.module(*views(40)).isfinite()
        shapes = [v.shape for v in model.state_dict().values()]
        assert [v.shape for v in average.module.state_dict().values()] == shapes
    assert len(values) > 1 and (value < INF or seen.threshold._is_warm_up())
    resumed = Model(adaptive(**options))
    resumed.load_state_dict(average.module.state_dict(), strict=True)
    resumed.criterion.set_epoch(4)
    assert resumed(*views(40)).isfinite()


def test_an_average_of_two_histories_is_a_history():
    one, two = adaptive(warmup_epochs=1), adaptive(warmup_epochs=1)
    for tracker, value, epochs in ((one, 0.5, 3), (two, 0.25, 4)):
        for epoch in range(epochs):
            tracker.set_epoch(epoch)
            tracker.update(f64(value), store=True)
    mean = {k: (one.state_dict()[k] + two.state_dict()[k]) / 2 for k in one.state_dict()}
    both = adaptive(warmup_epochs=1)
    both.load_state_dict(mean, strict=True)
    assert both.history == [(0, INF), (1, 0.375), (2, 0.25)]
    assert both.value == 0.375


# ---- dtypes, devices, copies, files -------------------------------------------------------------


def test_a_state_is_float64_whatever_the_module_becomes():
    model = Model(adaptive(momentum=0.9))
    train(model, *views(40))
    before = model.criterion.threshold.state.clone()
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double):
        assert torch.equal(change(model).criterion.threshold.state, before)
    moved = model.to("cpu", torch.float16)
    assert torch.equal(moved.criterion.threshold.state, before)


def test_a_state_that_was_cast_in_place_is_float64_again_after_a_step():
    """As FSDP does with MixedPrecision(buffer_dtype=...), before the first step."""
    model = Model(adaptive(momentum=0.9))
    for buffer in model.buffers():
        buffer.data = buffer.data.to(torch.bfloat16)
    other = Model(adaptive(momentum=0.9))
    for step in range(3):
        assert same(train(model, *views(40, step)), train(other, *views(40, step)))
    assert torch.equal(model.criterion.threshold.state, other.criterion.threshold.state)


@pytest.mark.parametrize(
    "threshold",
    (0.5, "adaptive", lambda: ThresholdTracker.cosine(0.9, 0.3, 9)),
    ids=("0.5", "adaptive", "cosine"),
)
def test_a_loss_is_made_on_the_meta_device_and_begins_anew_after_to_empty(threshold):
    def made():
        return HEXLoss(threshold=threshold() if callable(threshold) else threshold)

    with torch.device("meta"):
        loss = nn.Sequential(nn.Linear(8, 8), made())[1]
    assert loss.threshold.state.is_meta
    loss.set_epoch(0)
    loss.to_empty(device="cpu")
    for module in loss.modules():  # as FSDP and others do
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = made()
    for other in (loss, fresh):
        other.set_epoch(0)
    assert same(train(loss, *views(40)), train(fresh, *views(40)))
    assert torch.equal(loss.threshold.state, fresh.threshold.state)


@pytest.mark.parametrize("make", (HEXLoss, HEXSupConLoss))
def test_a_loss_comes_back_from_the_meta_device_as_a_new_one(make):
    loss = make(threshold=adaptive(momentum=0.5))
    inputs = views(40) if make is HEXLoss else (views(40)[0], torch.arange(40) // 2)
    loss(*(z.requires_grad_() if z.is_floating_point() else z for z in inputs)).backward()
    on_meta = [z.detach().to("meta") for z in inputs]
    moved = copy.deepcopy(loss).to("meta")
    for criterion in (loss, moved):  # shapes alone: nothing is kept
        before = criterion.threshold.state.clone()
        leaves = [z.requires_grad_() if z.is_floating_point() else z for z in on_meta]
        assert criterion(*leaves).is_meta
        assert criterion.threshold.state.is_meta or torch.equal(criterion.threshold.state, before)
    assert loss.statistics()["eps"] == float(loss.threshold.value)  # of the batch before
    back = moved.to_empty(device="cpu")
    back.threshold.reset_parameters()
    new = make(threshold=adaptive(momentum=0.5))
    for criterion in (back, new):
        for _ in range(2):
            leaves = [z.detach().requires_grad_() if z.is_floating_point() else z for z in inputs]
            criterion(*leaves).backward()
    assert torch.equal(back.threshold.state, new.threshold.state)
    assert back.statistics() == new.statistics()


@pytest.mark.parametrize("threshold", (0.3, "adaptive"))
def test_a_tracker_that_was_left_on_another_device_serves_every_loss(threshold):
    on_cpu = {"threshold": threshold}
    x, labels = torch.randn(12, 4, device="meta"), torch.arange(12, device="meta") // 2
    assert HEXSupConLoss(**on_cpu)(x, labels).is_meta
    assert HEXCrossEntropyLoss(0.1, **on_cpu)(x, labels % 4).is_meta
    for mode in ("ntxent", "query", "cross"):
        assert HEXLoss(mode=mode, **on_cpu)(x, x).is_meta
        assert HEXLoss(mode=mode, **on_cpu)(x, x, guide=(x, x)).is_meta
    assert HEXLoss(**on_cpu)(x, x, x[:, None], guide=(x, x, x[:, None])).is_meta


def test_a_count_beyond_what_a_float64_has_reads_as_the_largest():
    tracker = adaptive()
    bits = torch.tensor(0.5, dtype=torch.float64).view(torch.int64)
    first_form = torch.tensor([int(bits), 3, 2**63 - 1, 0])
    tracker.load_state_dict({"state": first_form, "_extra_state": tracker.get_extra_state()})
    assert int(tracker.updates) == 2**53 and float(tracker.value) == 0.5


def test_a_copy_in_a_pickle_or_by_deepcopy_is_small_and_has_the_statistics():
    loss = HEXLoss(threshold=adaptive(momentum=0.9))
    bare = len(pickle.dumps(loss))
    train(loss, *views(2048))
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert twin.statistics() == loss.statistics()
        assert same(train(twin, *views(40)), train(copy.deepcopy(loss), *views(40)))
    assert len(pickle.dumps(loss)) < bare + 3000  # three numbers, where it was 18 times 4096


def test_the_state_dict_of_any_run_has_the_same_shapes():
    tracker = adaptive()
    shapes = [v.shape for v in tracker.state_dict().values()]
    for epoch in range(states.HISTORY + 20):
        tracker.set_epoch(epoch)
    assert [v.shape for v in tracker.state_dict().values()] == shapes
    other = adaptive()
    other.load_state_dict(tracker.state_dict())
    assert len(tracker.history) == states.HISTORY + 19  # all of them here, the newest in a file
    assert other.history == tracker.history[-states.HISTORY :]


def test_a_state_of_the_first_form_still_loads():
    """int64: the value's bits, epoch, updates, skipped; and a history that grew."""
    bits = int(f64(0.123456789).view(torch.int64))
    old = {
        "state": torch.tensor([bits, 3, 17, 2]),
        "_extra_state": f64([[0, INF], [1, 0.5], [2, 0.25]]),
    }
    kept = {name: value.clone() for name, value in old.items()}
    tracker = adaptive(momentum=0.9)
    tracker.load_state_dict(old, strict=True)
    assert tracker.value == 0.123456789
    assert [int(tracker.epoch), *counts(tracker)] == [3, 17, 2, 0]
    assert tracker.history == [(0, INF), (1, 0.5), (2, 0.25)]
    assert all(torch.equal(old[name], kept[name]) for name in kept)
    fresh = {"state": torch.tensor([int(f64(INF).view(torch.int64)), -1, 0, 0]),
             "_extra_state": torch.zeros(0, 2, dtype=torch.float64)}  # fmt: skip
    tracker.load_state_dict(fresh, strict=True)
    assert torch.equal(tracker.state, adaptive().state) and tracker.history == []


@pytest.mark.parametrize(
    "baseline", (InfoNCELoss, lambda: HEXLoss(threshold=None)), ids=("InfoNCELoss", "None")
)
def test_a_strict_load_goes_from_hex_to_a_baseline_and_back(baseline):
    """A baseline starts from any checkpoint, as a loss with a threshold does."""
    ours = nn.ModuleDict({"head": nn.Linear(8, 8), "criterion": HEXLoss()})
    theirs = nn.ModuleDict({"head": nn.Linear(8, 8), "criterion": baseline()})
    train(ours["criterion"], *views(40))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(theirs["head"].weight, ours["head"].weight)
    before = ours["criterion"].threshold.state.clone()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours["criterion"].threshold.state, before)
    with pytest.raises(RuntimeError, match="criterion.other"):
        theirs.load_state_dict({**ours.state_dict(), "criterion.other": f64(1.0)}, strict=True)


# ---- vmap over stacked modules ------------------------------------------------------------------


@pytest.mark.parametrize("options", STATEFUL, ids=str)
def test_vmap_over_stacked_modules_uses_the_threshold_of_each(options):
    models = [Model(adaptive(**options)) for _ in range(3)]
    for k, model in enumerate(models):
        train(model, *views(40, k, shift=k))
    wanted = [model.eval()(*views(40, 9)) for model in models]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(parameters, buffers, z0, z1):
        return torch.func.functional_call(base, (parameters, buffers), (z0, z1))

    got = torch.func.vmap(call, (0, 0, None, None))(parameters, buffers, *views(40, 9))
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-13, atol=0)


# ---- several ranks ------------------------------------------------------------------------------


def steps_under_ddp(rank: int):
    return {synced: step_under_ddp(rank, synced) for synced in (True, False)}


def step_under_ddp(rank: int, synced: bool):
    of_ddp = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in of_ddp else "broadcast_buffers"
    model = DistributedDataParallel(Model(adaptive(momentum=0.9)), **{option: synced})
    seen = []
    for step in range(3):
        model(*views(40, 10 * rank + step, shift=rank)).backward()
        loss = model.module.criterion
        candidate = float(loss.threshold.state[states.CANDIDATE])
        seen.append((candidate, loss.statistics()["eps"], float(loss.threshold.value)))
    return seen


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory):
    return ranks.run(steps_under_ddp, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("synced", (True, False), ids=("rank 0's", "each its own"))
def test_under_ddp_every_rank_goes_on_from_rank_0_s_state_or_from_its_own(synced, under_ddp):
    seen = [rank[synced] for rank in under_ddp]
    for number in (0, 1):
        for step in range(1, 3):
            candidate, eps, value = seen[number][step]
            before = seen[0 if synced else number][step - 1][2]
            assert eps == value == candidate + 0.9 * (before - candidate)
    assert seen[0] != seen[1]


def test_a_module_pickled_with_counts_that_were_no_object_goes_on():
    z = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = HEXLoss()
    old = copy.deepcopy(loss)
    state = old.threshold.__getstate__() | {"_tally": (torch.zeros(1),) * 3}
    del state["_recall"]
    old.threshold.__setstate__(state)
    assert torch.equal(old(*z), loss(*z))


def test_replicas_on_other_devices_leave_the_counts_where_they_are():
    threshold = HEXLoss().threshold
    replica = threshold._replicate_for_data_parallel()
    replica.to("meta")
    replica._tally = replica._tally.on(torch.device("meta"))
    assert threshold._tally.device.type == "cpu"
