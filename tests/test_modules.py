# SPDX-License-Identifier: MIT
"""HEXLoss and InfoNCELoss as modules: options, threshold, statistics, state, warnings, and the
formulas that stand in on devices without kernels.

A module must give what `hex_loss` gives at the threshold it took, bit for bit; that those values
are right is test_values.py's. The tracker alone is in test_tracker.py, what is refused in
test_errors.py.
"""

import copy
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
from conftest import problem
from data import FORMS, MODES, f64, form
from torch import Tensor, nn

from hex import (
    HEXLoss,
    InfoNCELoss,
    Statistics,
    ThresholdTracker,
    batch_threshold,
    hex_loss,
    info_nce,
    ops,
    reference,
)
from hex.state import CANDIDATE, SKIPPED

B, D = 83, 7  # 166 cosines a row: enough for the default quantile


def inputs(mode: str = "ntxent", seed: int = 0, dtype=torch.float32) -> tuple[Tensor, ...]:
    return problem("cluster", B, D, mode, K=97, seed=seed, dtype=dtype).inputs


def named(mode: str) -> str:
    """The option for a row of data.MODES: with negatives it does not count."""
    return "ntxent" if mode in ("unpaired", "paired") else mode


def a_step(module, *z: Tensor, **options) -> tuple[Tensor, ...]:
    z = [x.clone().requires_grad_() for x in z]
    value = module(*z, **options)
    value.sum().backward()
    return value.detach(), *(x.grad for x in z)


def state(module) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in module.state_dict().items()}


def through_file(module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(ours: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"beta": 0.5, "tau_plus": 0.0, "variant": "paper"},
        {"beta": 2, "tau_plus": 0.3, "variant": "released"},
    ),
    ids=("default", "paper", "released"),
)
def test_every_option_of_the_module_is_that_of_the_function(mode, reduction, options):
    z = inputs(mode)
    common = {"mode": named(mode), "reduction": reduction, **options}
    module = HEXLoss(0.2, threshold=0.4, **common)
    expected = a_step(lambda *x: hex_loss(*x, eps=0.4, temperature=0.2, **common), *z)
    assert same(a_step(module, *z), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_info_nce_is_the_function_and_the_loss_without_threshold_bit_for_bit(mode, reduction):
    z, options = inputs(mode), {"mode": named(mode), "reduction": reduction}
    expected = a_step(lambda *x: info_nce(*x, temperature=0.2, **options), *z)
    assert same(a_step(InfoNCELoss(0.2, **options), *z), expected)
    assert same(a_step(HEXLoss(0.2, threshold=None, **options), *z), expected)
    assert same(a_step(HEXLoss(0.2, threshold=math.inf, **options), *z), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("over", ("all", "negatives"))
def test_the_adaptive_threshold_is_that_of_the_batch(mode, over):
    z, options = inputs(mode), {"mode": named(mode)}
    module = HEXLoss(threshold=ThresholdTracker.adaptive(0.9, over=over), **options)
    eps = batch_threshold(*z, quantile=0.9, over=over, **options)
    assert same(a_step(module, *z), a_step(lambda *x: hex_loss(*x, eps=eps, **options), *z))
    assert torch.equal(module.last.eps, eps)
    assert torch.equal(module.threshold.value, eps)


def test_the_default_threshold_is_the_adaptive_one():
    z = inputs()
    assert same(a_step(HEXLoss(), *z), a_step(HEXLoss(threshold="adaptive"), *z))
    assert str(HEXLoss().threshold) == str(ThresholdTracker.adaptive())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make, t",
    (
        (lambda: ThresholdTracker.fixed(0.7, normalize_rows=True), 0.7),
        (lambda: ThresholdTracker.step(0.9, 0.1, 2, normalize_rows=True), 0.8),
        (lambda: ThresholdTracker.cosine(0.9, 0.3, 6, normalize_rows=True), 0.6),
    ),
    ids=("fixed", "step", "cosine"),
)
def test_a_schedule_over_normalised_rows_is_a_threshold_for_each_row(mode, make, t):
    z, options = inputs(mode, dtype=torch.float64), {"mode": named(mode)}
    module = HEXLoss(threshold=make(), **options)
    module.set_epoch(3)
    cosines = reference.cosines(*(*z, None)[:3], mode)[0]
    low, high = cosines.amin(1), cosines.amax(1)
    eps = low + t * (high - low)
    ours = a_step(module, *z)
    expected = a_step(lambda *x: hex_loss(*x, eps=eps, **options), *z)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * b.abs().max().item())
    torch.testing.assert_close(module.last.eps, eps.mean(), rtol=0, atol=1e-14)
    assert module.last.hard > 0


@pytest.mark.parametrize(
    "make, epoch, eps",
    (
        (lambda: ThresholdTracker.step(0.9, 0.25, 2), 5, 0.9 - 2 * 0.25),
        (lambda: ThresholdTracker.cosine(0.8, 0.4, 10), 10, 0.4),
        (lambda: ThresholdTracker.adaptive(warmup_epochs=2, warmup_threshold=0.9), 1, 0.9),
        (lambda: ThresholdTracker.adaptive(warmup_epochs=2), 1, math.inf),
        (lambda: -0.5, 0, -0.5),
    ),
    ids=("step", "cosine", "warm-up", "InfoNCE", "number"),
)
def test_set_epoch_goes_to_the_threshold(make, epoch, eps):
    z, module = inputs(), HEXLoss(threshold=make())
    module.set_epoch(epoch)
    assert module.threshold.epoch == epoch
    assert same(a_step(module, *z), a_step(lambda *x: hex_loss(*x, eps=eps), *z))
    assert module.statistics()["eps"] == eps


def test_set_epoch_without_a_threshold_is_nothing():
    for module in (InfoNCELoss(), HEXLoss(threshold=None)):
        module.set_epoch(3)
        assert module.threshold is None
        assert state(module) == {}


# ---- temperature ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", (HEXLoss, InfoNCELoss))
def test_a_temperature_can_be_a_number_a_tensor_a_parameter_or_one_for_the_call(mode, make):
    z, mode = inputs(mode), named(mode)
    expected = a_step(make(0.25, mode=mode), *z)
    assert same(a_step(make(torch.tensor(0.25), mode=mode), *z), expected)
    assert same(a_step(make(nn.Parameter(torch.tensor(0.25)), mode=mode), *z), expected)
    assert same(a_step(make(mode=mode), *z, temperature=0.25), expected)
    assert same(a_step(make(mode=mode), *z, temperature=f64(0.25)), expected)
    assert not same(a_step(make(mode=mode), *z), expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_learned_temperature_gets_its_gradient_and_moves(mode):
    z = inputs(mode, dtype=torch.float64)
    tau = nn.Parameter(f64(0.25))
    module = HEXLoss(tau, threshold=0.4, mode=named(mode))
    assert list(module.parameters()) == [tau]
    optimiser = torch.optim.SGD(module.parameters(), lr=1e-3)
    plain = f64(0.25).requires_grad_()
    rows = reference.loss_rows(*(*z, None)[:3], f64(0.4), plain, mode)[0]
    rows.mean().backward()
    before = module(*z)
    before.backward()
    torch.testing.assert_close(tau.grad, plain.grad, rtol=1e-10, atol=0)
    optimiser.step()
    assert tau == 0.25 - 1e-3 * tau.grad
    assert module(*z) < before


def test_a_temperature_of_the_call_gets_its_gradient():
    z, log_scale = inputs("cross"), torch.tensor(2.0, requires_grad=True)
    HEXLoss(mode="cross", threshold=0.4)(*z, temperature=1 / log_scale.exp()).backward()
    tau = (1 / log_scale.exp()).detach().requires_grad_()
    hex_loss(*z, eps=0.4, temperature=tau, mode="cross").backward()
    torch.testing.assert_close(log_scale.grad, -tau.detach() * tau.grad)


@pytest.mark.parametrize("tau", (0.0, -0.1, math.nan))
def test_a_temperature_tensor_that_is_no_temperature_gives_nan(tau):
    assert InfoNCELoss(torch.tensor(tau))(*inputs()).isnan()


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", FORMS)
def test_statistics_are_those_of_the_reference_and_carry_no_gradient(mode, variant):
    z = inputs(mode, dtype=torch.float64)
    module = HEXLoss(0.3, threshold=0.4, mode=named(mode), **form(variant))
    assert module.last is None
    a_step(module, *z)
    given = *(*z, None)[:3], f64(0.4), f64(0.3), mode
    _, hard, share = reference.loss_rows(*given, **form(variant))
    assert isinstance(module.last, Statistics)
    assert all(x.dim() == 0 and not x.requires_grad for x in module.last)
    torch.testing.assert_close(module.last.hard, hard.mean(), rtol=1e-14, atol=0)
    torch.testing.assert_close(module.last.share, share.mean(), rtol=1e-12, atol=0)
    assert module.last.hard > 0
    assert module.statistics() == {"eps": 0.4, "hard": float(hard.mean())} | {
        "share": float(module.last.share)
    }


def test_statistics_without_a_threshold_say_that_nothing_is_hard():
    module = InfoNCELoss()
    module(*inputs())
    assert module.statistics() == {"eps": math.inf, "hard": 0.0, "share": 0.0}


# ---- state ---------------------------------------------------------------------------------------

TRACKER = ["threshold.state", "threshold._extra_state"]


def test_state_dict_is_the_tracker_and_a_learned_temperature():
    assert list(HEXLoss().state_dict()) == TRACKER
    assert list(HEXLoss(threshold=0.3).state_dict()) == TRACKER
    assert list(HEXLoss(torch.tensor(0.1)).state_dict()) == TRACKER
    learned = nn.Parameter(torch.tensor(0.1))
    assert list(HEXLoss(learned).state_dict()) == ["temperature", *TRACKER]
    assert list(InfoNCELoss(learned).state_dict()) == ["temperature"]
    assert list(InfoNCELoss().state_dict()) == []


def test_a_strict_load_takes_a_state_of_a_model_trained_with_info_nce():
    def model(criterion: nn.Module) -> nn.Module:
        return nn.ModuleDict({"encoder": nn.Linear(3, 2), "criterion": criterion})

    old, new = model(InfoNCELoss()), model(HEXLoss())
    a_step(new["criterion"], *inputs())
    before = state(new["criterion"])
    new.load_state_dict(old.state_dict(), strict=True)
    assert torch.equal(new["encoder"].weight, old["encoder"].weight)
    assert state(new["criterion"]) == before


@pytest.mark.parametrize(
    "copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))), ids=("deepcopy", "pickle")
)
@pytest.mark.parametrize("temperature", (0.2, nn.Parameter(torch.tensor(0.2))), ids=type)
def test_a_copy_goes_on_as_the_original_would_and_shares_nothing(copied, temperature):
    module = HEXLoss(temperature, threshold=ThresholdTracker.adaptive(momentum=0.9), beta=0.5)
    a_step(module, *inputs())
    twin = copied(module)
    assert (repr(twin), state(twin), twin.last) == (repr(module), state(module), module.last)
    z = inputs(seed=1)
    assert same(a_step(module, *z), a_step(twin, *z))
    assert state(twin) == state(module)
    a_step(twin, *inputs(seed=2))
    assert state(twin) != state(module)


def test_a_change_of_dtype_leaves_the_threshold_exact():
    module = HEXLoss(nn.Parameter(f64(0.2)), threshold=ThresholdTracker.adaptive(momentum=0.9))
    a_step(module, *inputs(dtype=torch.float64))
    before, value = state(module), module.threshold.value
    assert value != value.float()  # a value that any rounding changes
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double):
        change(module)
        assert {**state(module), "temperature": 0} == {**before, "temperature": 0}
        assert torch.equal(module.threshold.value, value)


class Run:
    """A small training: encoder, loss, optimiser; all of it goes into the checkpoint."""

    def __init__(self, threshold: ThresholdTracker) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict(
            {"encoder": nn.Linear(D, 5), "loss": HEXLoss(f64_parameter(0.3), threshold=threshold)}
        )
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def steps(self, start: int, stop: int) -> list[tuple[float, float]]:
        """(loss, eps) of the steps, three an epoch; one batch of them is not finite."""
        encoder, criterion = self.model["encoder"], self.model["loss"]
        out = []
        for step in range(start, stop):
            if step % 3 == 0:
                criterion.set_epoch(step // 3)
            z0, z1 = (encoder(z) for z in inputs(seed=step))
            if step == 5:
                criterion(z0 * math.inf, z1)  # counted by the tracker, not learnt from
            value = criterion(z0, z1)
            self.optimiser.zero_grad()
            value.backward()
            self.optimiser.step()
            out.append((value.item(), criterion.statistics()["eps"]))
        return out


def f64_parameter(value: float) -> nn.Parameter:
    return nn.Parameter(f64(value))


@pytest.mark.parametrize(
    "make",
    (
        lambda: ThresholdTracker.adaptive(over="negatives"),
        lambda: ThresholdTracker.adaptive(
            0.9, warmup_epochs=1, momentum=0.9, monotonic=True, lagged=True
        ),
        lambda: ThresholdTracker.cosine(0.9, 0.3, 3, normalize_rows=True, compounded=True),
    ),
    ids=("plain", "all options", "schedule"),
)
def test_stopped_and_resumed_at_any_step_losses_and_thresholds_are_the_same_bits(make):
    steps = 9
    whole = Run(make())
    expected = whole.steps(0, steps)
    assert len(set(expected)) == steps
    for stop in range(steps):
        first = Run(make())
        before = first.steps(0, stop)
        second = Run(make())
        for parameter in second.model.parameters():
            nn.init.constant_(parameter, 0.5)
        second.model.load_state_dict(through_file(first.model))
        second.optimiser.load_state_dict(through_file(first.optimiser))
        assert before + second.steps(stop, steps) == expected
        tracker, original = (run.model["loss"].threshold for run in (second, whole))
        assert tracker.history == original.history
        assert state(tracker) == state(original)


@pytest.mark.parametrize("lagged", (False, True))
def test_two_forwards_before_one_backward_each_use_their_own_threshold(lagged):
    tracker = ThresholdTracker.adaptive(0.9, momentum=0.5, lagged=lagged)
    module, first, second = HEXLoss(threshold=tracker), inputs(seed=1), inputs(seed=2)
    a_step(module, *inputs())
    values, grads, thresholds = [], [], []
    for z in (first, second):
        leaves = [x.clone().requires_grad_() for x in z]
        values.append(module(*leaves))
        thresholds.append(module.last.eps)
        grads.append(leaves)
    sum(values).backward()
    assert thresholds[0] != thresholds[1]
    for z, value, leaves, eps in zip((first, second), values, grads, thresholds, strict=True):
        ours = value.detach(), *(x.grad for x in leaves)
        assert same(ours, a_step(lambda *x, e=eps: hex_loss(*x, eps=e), *z))


def test_a_batch_that_is_not_finite_gives_nan_and_leaves_the_threshold():
    module, (z0, z1) = HEXLoss(), inputs()
    a_step(module, z0, z1)
    before = state(module)
    bad = z0.clone()
    bad[3, 2] = math.nan
    assert a_step(module, bad, z1)[0].isnan()
    before["threshold.state"][SKIPPED] += 1
    before["threshold.state"][CANDIDATE] = 2
    assert state(module) == before


# ---- text: repr and warnings ---------------------------------------------------------------------


def test_repr_names_every_option():
    assert repr(HEXLoss(0.2, beta=2, variant="released", mode="query", reduction="sum")) == (
        "HEXLoss(\n"
        "  temperature=0.2, beta=2.0, tau_plus=0.1, variant='released', mode='query', "
        "reduction='sum'\n"
        "  (threshold): ThresholdTracker(adaptive, quantile=0.99, over='negatives', "
        "warmup_epochs=0, momentum=0.0, monotonic=False, lagged=False, warmup_threshold=inf)\n"
        ")"
    )
    assert HEXLoss(torch.tensor(0.2), threshold=None).extra_repr() == (
        "temperature=<Tensor>, beta=1.0, tau_plus=0.1, variant='paper', mode='ntxent', "
        "reduction='mean'"
    )
    learned = InfoNCELoss(nn.Parameter(torch.tensor(0.2)), mode="cross", reduction="none")
    assert repr(learned) == "InfoNCELoss(temperature=<Parameter>, mode='cross', reduction='none')"
    assert repr(InfoNCELoss(decoupled=True)) == (
        "InfoNCELoss(temperature=0.1, decoupled=True, mode='ntxent', reduction='mean')"
    )


@pytest.mark.parametrize("mode, rows", (("ntxent", 75), ("query", 51), ("unpaired", 50)))
def test_a_batch_too_small_for_the_quantile_warns_once(mode, rows):
    z0, z1, *queue = inputs(mode)
    small = (z0[:rows], z1[:rows], *(q[:rows] for q in queue))
    authors = ThresholdTracker.adaptive
    module = HEXLoss(threshold=authors(over="all"), mode=named(mode))
    with pytest.warns(UserWarning, match="over='negatives'.*larger batch") as caught:
        for _ in range(3):
            module(*small)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HEXLoss()(*small)
        large = z0[:76], z1[:76], *(q[:51] for q in queue)
        HEXLoss(threshold=authors(over="all"), mode=named(mode))(*large)
        HEXLoss(threshold=None)(*small)
        InfoNCELoss()(*small)


def test_a_warm_up_that_no_set_epoch_ends_warns_once_in_training():
    module = HEXLoss(threshold=ThresholdTracker.adaptive(warmup_epochs=2))
    module(*inputs())  # no gradient, no training
    with pytest.warns(UserWarning, match=r"set_epoch was never called.*set_epoch\(epoch\)") as w:
        for _ in range(3):
            a_step(module, *inputs())
    assert len(w) == 1
    assert module.statistics()["eps"] == math.inf


# ---- devices without kernels ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make",
    (
        lambda: ThresholdTracker.adaptive(0.9),
        lambda: ThresholdTracker.adaptive(0.9, over="negatives"),
        lambda: ThresholdTracker.fixed(0.7, normalize_rows=True),
    ),
    ids=("all", "negatives", "rows"),
)
def test_a_device_without_kernels_gets_the_same_by_plain_torch_and_one_warning(
    mode, make, monkeypatch
):
    z = inputs(mode, dtype=torch.float64)

    def run() -> list[Tensor]:
        out = []
        for variant, reduction in itertools.product(FORMS, ops.REDUCTIONS):
            tau = f64_parameter(0.3)
            options = {"reduction": reduction, "mode": named(mode), **form(variant)}
            module = HEXLoss(tau, threshold=make(), **options)
            out += [*a_step(module, *z), tau.grad, *module.last]
        return out

    expected = run()
    monkeypatch.setattr(ops, "_KERNELS", {"meta"})
    monkeypatch.setattr(ops, "_warned", set())
    with pytest.warns(RuntimeWarning) as caught:
        composed = run()
    assert [str(warning.message) for warning in caught] == [
        "hex-ssl has no kernels for device 'cpu': its formulas run as plain PyTorch operators "
        "there, correct but with N x N memory"
    ]
    for a, b in zip(composed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12 * b.abs().max().item())


def test_an_empty_batch_on_a_device_without_kernels_is_connected(monkeypatch):
    monkeypatch.setattr(ops, "_KERNELS", {"meta"})
    monkeypatch.setattr(ops, "_warned", {"cpu"})
    for reduction, shape in (("none", (0,)), ("mean", ()), ("sum", ())):
        value, grad, _ = a_step(
            HEXLoss(threshold=0.3, reduction=reduction), torch.ones(0, 3), torch.ones(0, 3)
        )
        assert value.shape == shape and value.sum() == 0
        assert grad.shape == (0, 3)
