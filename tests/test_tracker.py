# SPDX-License-Identifier: MIT
"""ThresholdTracker: the state machine step by step, saved states, warnings, errors.

Schedules are in test_schedules.py.
"""

import copy
import io
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from data import INF, NAN, f64
from torch import nn

from hex import ThresholdTracker
from hex import state as states

CANDIDATES = [0.9, 0.8, NAN, 0.85, -INF, 0.3, 0.30000000000000004, 0.7, INF, 0.1, 0.65, -0.2]
OPTIONS = [
    {},
    {"momentum": 0.9},
    {"monotonic": True},
    {"lagged": True},
    {"momentum": 0.7, "monotonic": True},
    {"momentum": 0.7, "monotonic": True, "lagged": True, "warmup_epochs": 1},
    {"momentum": 0.5, "warmup_epochs": 2, "warmup_threshold": 0.9},
]


def state(tracker) -> list[float]:
    return tracker.state.tolist()


def counts(tracker) -> list[int]:
    return [int(n) for n in (tracker.epoch, tracker.updates, tracker.skipped, tracker.short)]


def run(tracker, start=0, stop=None) -> list[float]:
    """The eps of some steps, three steps an epoch."""
    eps = []
    for step, candidate in list(enumerate(CANDIDATES))[start:stop]:
        if step % 3 == 0:
            tracker.set_epoch(step // 3)
        eps.append(tracker.update(f64(candidate), store=True).item())
    return eps


def same(a: list[float], b: list[float]) -> bool:
    return [x.hex() for x in a] == [x.hex() for x in b]  # bit for bit, NaN included


# ---- the state machine --------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_step_goes_finite_then_momentum_then_minimum_then_stored(options):
    tracker = ThresholdTracker.adaptive(**options)
    momentum = options.get("momentum", 0.0)
    value, updates, skipped = INF, 0, 0
    for step, candidate in enumerate(CANDIDATES):
        epoch = step // 3
        if step % 3 == 0:
            tracker.set_epoch(epoch)
        before = value
        if epoch < options.get("warmup_epochs", 0):
            wanted = options.get("warmup_threshold", INF)
        else:
            if not math.isfinite(candidate):
                skipped += 1
            else:
                if updates == 0:
                    value = candidate
                else:
                    value = candidate + momentum * (before - candidate)
                if options.get("monotonic"):
                    value = min(value, before)
                updates += 1
            wanted = before if options.get("lagged") else value
        eps = tracker.update(f64(candidate), store=True)
        assert eps.dtype == torch.float64 and eps.shape == ()
        assert same([eps.item()], [wanted])
        assert same([states.stored(tracker.state).item()], [value])
        assert counts(tracker) == [epoch, updates, skipped, 0]


def test_the_minimum_is_taken_after_the_momentum():
    tracker = ThresholdTracker.adaptive(momentum=0.5, monotonic=True)
    eps = [tracker.update(f64(c), store=True).item() for c in (0.5, 1.0, 0.25, 0.5)]
    assert eps == [0.5, 0.5, 0.375, 0.375]  # initialised; 0.75 is not lower; lower; 0.4375 is not


def test_momentum_leaves_a_constant_threshold_exactly_constant():
    tracker = ThresholdTracker.adaptive(momentum=0.99)
    assert {tracker.update(f64(0.1), store=True).item() for _ in range(50)} == {0.1}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_candidate_that_is_not_finite_is_counted_and_changes_no_bit(bad):
    tracker = ThresholdTracker.adaptive(momentum=0.9)
    assert tracker.update(f64(bad), store=True).item() == INF  # before the first update
    tracker.update(f64(0.1), store=True)
    before = state(tracker)
    assert tracker.update(f64(bad), store=True).item() == 0.1
    before[states.SKIPPED], before[states.CANDIDATE] = 2, 2
    assert state(tracker) == before


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_evaluation_computes_the_same_threshold_and_stores_nothing(options):
    tracker = ThresholdTracker.adaptive(**options)
    for step, candidate in enumerate(CANDIDATES):
        if step % 3 == 0:
            tracker.set_epoch(step // 3)
        before = state(tracker)
        seen = tracker.update(f64(candidate), store=False)
        assert state(tracker) == before
        assert same([seen.item()], [tracker.update(f64(candidate), store=True).item()])


def test_warm_up_lasts_its_epochs_and_changes_nothing():
    """The authors' `epoch <= 10` is 11 epochs."""
    tracker = ThresholdTracker.adaptive(warmup_epochs=11, warmup_threshold=0.9)
    for epoch in range(11):
        tracker.set_epoch(epoch)
        before = state(tracker)
        assert tracker.update(f64(0.5), store=True).item() == 0.9
        assert tracker.update(f64(NAN), store=True).item() == 0.9
        assert state(tracker) == before
        assert tracker.value.item() == 0.9
    tracker.set_epoch(11)
    assert tracker.update(f64(0.5), store=True).item() == 0.5


def test_an_eps_handed_out_never_changes():
    tracker = ThresholdTracker.adaptive()
    schedule = ThresholdTracker.step(0.9, 0.1, 1)
    schedule.set_epoch(0)
    kept = [tracker.update(f64(0.5), store=True), tracker.value, schedule.current()]
    tracker.update(f64(0.25), store=True)
    schedule.set_epoch(3)
    tracker.reset()
    assert [eps.item() for eps in kept] == [0.5, 0.5, 0.9]
    first = tracker.update(f64(0.5), store=True)
    first.fill_(7.0)
    tracker.value.fill_(7.0)
    assert tracker.value.item() == 0.5


def test_the_threshold_carries_no_gradient_and_float32_candidates_are_kept_exactly():
    tracker = ThresholdTracker.adaptive()
    candidate = torch.tensor(0.1, requires_grad=True)
    eps = tracker.update(candidate, store=True)
    assert not eps.requires_grad and eps.dtype == torch.float64
    assert eps.item() == candidate.item()


def test_reset_forgets_everything_but_the_options():
    tracker = ThresholdTracker.adaptive(momentum=0.9, warmup_epochs=1)
    fresh = state(tracker)
    run(tracker)
    assert state(tracker) != fresh and tracker.history
    tracker.reset()
    assert state(tracker) == fresh and tracker.history == []
    for _ in range(2):
        with pytest.warns(UserWarning, match="set_epoch was never called"):
            assert tracker.update(f64(0.5), store=True).item() == INF
        tracker.reset()


def test_history_has_the_value_at_the_end_of_each_epoch():
    tracker = ThresholdTracker.adaptive(warmup_epochs=1)
    tracker.set_epoch(0)
    tracker.set_epoch(0)  # naming the running epoch again changes nothing
    tracker.update(f64(0.5), store=True)
    tracker.set_epoch(1)
    tracker.update(f64(0.4), store=True)
    tracker.update(f64(0.3), store=True)
    assert tracker.history == [(0, INF)]
    tracker.set_epoch(2)
    tracker.set_epoch(5)
    assert tracker.history == [(0, INF), (1, 0.3), (2, 0.3)]
    tracker.history.clear()  # a copy
    assert len(tracker.history) == 3


def test_history_begins_with_what_was_used():
    resumed_without_state = ThresholdTracker.adaptive()
    resumed_without_state.set_epoch(7)
    assert resumed_without_state.history == []
    used_before = ThresholdTracker.adaptive()
    used_before.update(f64(0.5), store=True)
    used_before.set_epoch(1)
    assert used_before.history == [(0, 0.5)]


def test_the_loss_can_see_what_a_tracker_needs():
    adaptive = ThresholdTracker.adaptive(quantile=0.5, over="negatives")
    fixed = ThresholdTracker.fixed(0.5, normalize_rows=True)
    assert (adaptive.adaptive_rule, adaptive.quantile, adaptive.over) == (True, 0.5, "negatives")
    assert not adaptive.normalize_rows
    assert not fixed.adaptive_rule and fixed.normalize_rows
    with pytest.raises(RuntimeError, match="current: got the rule 'adaptive', wanted 'fixed'"):
        adaptive.current()
    with pytest.raises(RuntimeError, match="update: got the rule 'fixed', wanted 'adaptive'"):
        fixed.update(f64(0.5), store=True)


# ---- saved states -------------------------------------------------------------------------------


def through_file(tracker):
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    fresh = ThresholdTracker.adaptive(**tracker.options)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


WAYS = (
    through_file,
    copy.deepcopy,
    lambda tracker: pickle.loads(pickle.dumps(tracker)),
    lambda tracker: tracker.half(),
    lambda tracker: tracker.to(torch.bfloat16),
    lambda tracker: through_file(tracker.half()),
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_stopped_and_resumed_at_any_step_the_trajectory_is_the_same_bit_for_bit(options):
    whole = ThresholdTracker.adaptive(**options)
    wanted = run(whole)
    for stop, (k, way) in itertools.product(range(len(CANDIDATES) + 1), enumerate(WAYS)):
        if k > 0 and (stop + k) % 3:  # the file at every step, the others at every third
            continue
        tracker = ThresholdTracker.adaptive(**options)
        eps = run(tracker, 0, stop)
        tracker = way(tracker)
        assert same(eps + run(tracker, stop), wanted)
        assert state(tracker) == state(whole)
        assert repr(tracker.history) == repr(whole.history)  # 1 and not 1.0


def test_a_state_dict_holds_tensors_only_and_a_loaded_one_is_a_copy():
    tracker = ThresholdTracker.adaptive()
    run(tracker)
    saved = tracker.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    other = ThresholdTracker.adaptive()
    other.load_state_dict(saved)
    other.update(f64(-0.5), store=True)
    assert tracker.value.item() == -0.2


def model(tracker) -> nn.Module:
    return nn.ModuleDict({"head": nn.Linear(2, 2), "threshold": tracker})


def test_a_strict_load_accepts_a_state_without_a_tracker():
    target = model(ThresholdTracker.adaptive())
    run(target["threshold"])
    before = state(target["threshold"])
    without = nn.ModuleDict({"head": nn.Linear(2, 2)})
    target.load_state_dict(without.state_dict(), strict=True)
    assert torch.equal(target["head"].weight, without["head"].weight)
    assert state(target["threshold"]) == before


def test_a_strict_load_still_refuses_half_a_tracker():
    target = model(ThresholdTracker.adaptive())
    saved = target.state_dict()
    del saved["threshold.state"]
    with pytest.raises(RuntimeError, match="threshold.state"):
        target.load_state_dict(saved, strict=True)


# ---- compiled and transformed -------------------------------------------------------------------


@pytest.mark.parametrize("options", (OPTIONS[0], *OPTIONS[-2:]), ids=str)
def test_compiles_once_for_all_steps_and_epochs_and_equals_eager(options):
    torch._dynamo.reset()
    eager, compiled = ThresholdTracker.adaptive(**options), ThresholdTracker.adaptive(**options)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(cosines):  # in a loss the candidate is made inside the graph
        return compiled.update(cosines.mean(), store=True)

    kept = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in range(3 * len(CANDIDATES)):
            if k % 3 == 0:
                eager.set_epoch(k // 3)
                compiled.set_epoch(k // 3)
            candidate = f64(CANDIDATES[k % len(CANDIDATES)])
            wanted = eager.update(candidate, store=True).item()
            kept.append((step(candidate[None]), wanted))
            assert state(compiled) == state(eager)
    assert same([eps.item() for eps, _ in kept], [wanted for _, wanted in kept])


def test_under_func_transforms_nothing_is_stored():
    tracker = ThresholdTracker.adaptive(momentum=0.5)
    tracker.update(f64(0.5), store=True)
    before = state(tracker)
    candidates = f64([0.1, 0.3, NAN])
    eps = torch.func.vmap(lambda c: tracker.update(c, store=True))(candidates)
    assert eps.tolist() == pytest.approx([0.3, 0.4, 0.5])
    torch.func.grad(lambda z: (z * tracker.update(z.sum(), store=True)).sum())(f64([0.1, 0.2]))
    assert state(tracker) == before


# ---- warnings -----------------------------------------------------------------------------------


def test_a_warm_up_without_epochs_warns_once_and_says_what_to_do():
    tracker = ThresholdTracker.adaptive(warmup_epochs=3)
    with pytest.warns(UserWarning, match="the warm-up never ends; call set_epoch") as caught:
        for _ in range(3):
            assert tracker.update(f64(0.5), store=True).item() == INF
    assert len(caught) == 1


def test_a_schedule_without_epochs_warns_once_in_training():
    for tracker in (ThresholdTracker.step(0.9, 0.1, 25), ThresholdTracker.cosine(0.9, 0.3, 10)):
        with pytest.warns(UserWarning, match="stays at its start; call set_epoch") as caught:
            for _ in range(3):
                tracker.current()
        assert len(caught) == 1


def test_nothing_warns_where_epochs_are_set_or_not_needed_or_nothing_is_learnt():
    ThresholdTracker.adaptive().update(f64(0.5), store=True)
    ThresholdTracker.fixed(0.5).current()
    ThresholdTracker.adaptive(warmup_epochs=1).update(f64(0.5), store=False)
    tracker = ThresholdTracker.adaptive(warmup_epochs=1)
    tracker.set_epoch(0)
    tracker.update(f64(0.5), store=True)
    through_file(tracker).update(f64(0.5), store=True)  # resumed: the epoch is known
    silent = ThresholdTracker.adaptive(warmup_epochs=1)
    torch._dynamo.reset()
    torch.compile(silent.update, backend="aot_eager", fullgraph=True)(f64(0.5), store=True)


@pytest.mark.parametrize(
    "quantile, n_row, has_self, text",
    [
        (0.99, 2, True, "similarity with itself"),
        (0.99, 51, True, "similarity with itself"),
        (0.99, 52, True, "usually the cosine of the positive"),
        (0.99, 150, True, "usually the cosine of the positive"),
        (0.99, 151, True, None),
        (0.99, 51, False, "usually the cosine of the positive"),
        (0.99, 52, False, None),
        (0.99, 1 + 4096, False, None),
        (0.5, 8, True, None),
        (1.0, 5000, True, "similarity with itself"),
    ],
)
def test_too_few_rows_for_the_quantile_warn_once_and_say_what_to_do(
    quantile, n_row, has_self, text
):
    tracker = ThresholdTracker.adaptive(quantile=quantile, over="all")
    negatives = ThresholdTracker.adaptive(quantile=quantile)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            tracker.warn_if_too_small(n_row, has_self)
            negatives.warn_if_too_small(n_row, has_self)
    assert len(caught) == (text is not None)
    if text is not None:
        message = str(caught[0].message)
        assert text in message and f"of {n_row} cosines" in message
        assert "over='negatives'" in message


def test_a_short_last_batch_alone_is_not_warned_of_but_a_short_first_one_is():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = ThresholdTracker.adaptive(over="all")
        tracker.warn_if_too_small(512, True)
        tracker.warn_if_too_small(4, True)
    with pytest.warns(UserWarning, match="of 4 cosines"):
        ThresholdTracker.adaptive(over="all").warn_if_too_small(4, True)


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda t: t.adaptive(quantile=1.5), ValueError, "quantile: got 1.5, wanted a number in"),
        (lambda t: t.adaptive(quantile=NAN), ValueError, "quantile: got nan"),
        (lambda t: t.adaptive(quantile="high"), TypeError, "quantile: got str, wanted a number"),
        (lambda t: t.adaptive(over="rows"), ValueError, "over: got 'rows', wanted one of 'all'"),
        (lambda t: t.adaptive(warmup_epochs=-1), ValueError, "warmup_epochs: got -1, wanted"),
        (lambda t: t.adaptive(warmup_epochs=1.0), TypeError, "warmup_epochs: got float, wanted"),
        (lambda t: t.adaptive(momentum=1.0), ValueError, r"momentum: got 1.0.*\[0.*1.*\)"),
        (lambda t: t.adaptive(momentum=-0.1), ValueError, "momentum: got -0.1"),
        (lambda t: t.adaptive(monotonic=1), TypeError, "monotonic: got int, wanted a bool"),
        (lambda t: t.adaptive(lagged="no"), TypeError, "lagged: got str, wanted a bool"),
        (lambda t: t.adaptive(warmup_threshold=NAN), ValueError, "warmup_threshold: got nan"),
        (lambda t: t.fixed(NAN), ValueError, "t: got nan"),
        (lambda t: t.fixed(True), TypeError, "t: got bool, wanted a number"),
        (lambda t: t.fixed(INF, normalize_rows=True), ValueError, "t: got inf, wanted a finite"),
        (lambda t: t.step(INF, 0.1, 25), ValueError, "start: got inf, wanted a finite number"),
        (lambda t: t.step(0.9, -0.1, 25), ValueError, "drop: got -0.1, wanted"),
        (lambda t: t.step(0.9, 0.1, 0), ValueError, "every: got 0, wanted an integer >= 1"),
        (lambda t: t.cosine(0.9, NAN, 10), ValueError, "end: got nan, wanted a finite"),
        (lambda t: t.step(0.9, NAN, 25), ValueError, "drop: got nan, wanted a finite number"),
        (lambda t: t.cosine(0.9, 0.3, 0), ValueError, "epochs: got 0, wanted an integer >= 1"),
        (lambda t: t.cosine(0.9, 0.3, 9, compounded=0), TypeError, "compounded: got int"),
        (lambda t: t.cosine(0.9, 0.3, 9, normalize_rows=None), TypeError, "normalize_rows: got"),
        (lambda t: t("linear"), ValueError, "rule: got 'linear', wanted one of 'adaptive'"),
        (
            lambda t: t("adaptive"),
            TypeError,
            r"ThresholdTracker: got 'adaptive' with no options, "
            r"wanted ThresholdTracker.adaptive\(...\)",
        ),
        (
            lambda t: t("fixed", t=0.5, beta=1),
            TypeError,
            "ThresholdTracker: got 'fixed' with t, beta",
        ),
        (lambda t: t.adaptive(over=np.array(["all"])), ValueError, "over: got ndarray"),
        (lambda t: t("fixed", t=NAN, normalize_rows=False), ValueError, "t: got nan"),
        (lambda t: t("fixed", t="x", normalize_rows=False), TypeError, "t: got str"),
        (
            lambda t: t("step", start=0.9, drop=0.1, every=0, normalize_rows=True),
            ValueError,
            "every: got 0, wanted an integer >= 1",
        ),
        (
            lambda t: t("adaptive", **{**t.adaptive().options, "quantile": 5}),
            ValueError,
            "quantile: got 5, wanted a number in",
        ),
        (lambda t: t.adaptive().set_epoch(-1), ValueError, "epoch: got -1, wanted an integer >= 0"),
        (lambda t: t.adaptive().set_epoch(1.5), TypeError, "epoch: got float, wanted an integer"),
    ],
)
def test_bad_arguments_are_refused_by_name_with_what_came_and_what_was_wanted(make, error, text):
    with pytest.raises(error, match=f"^{text}"):
        make(ThresholdTracker)


def test_numpys_scalars_become_pythons():
    tracker = ThresholdTracker.adaptive(
        np.float64(0.9), over=np.str_("all"), monotonic=np.bool_(True), lagged=np.bool_(False)
    )
    kept = tracker.quantile, tracker.over, *tracker.options.values()
    assert all(type(value) in (float, str, bool, int) for value in kept)
    assert tracker.options["monotonic"] is True and tracker.options["lagged"] is False
    assert ThresholdTracker.fixed(0.3, normalize_rows=np.bool_(True)).normalize_rows is True


def test_a_refused_epoch_changes_nothing():
    tracker = ThresholdTracker.adaptive()
    run(tracker)
    before = state(tracker), tracker.history
    with pytest.raises(TypeError):
        tracker.set_epoch("next")
    assert (state(tracker), tracker.history) == before


def test_repr_names_the_rule_and_its_options():
    shown = repr(ThresholdTracker.adaptive(quantile=0.9, over="negatives", momentum=0.5))
    assert shown.startswith("ThresholdTracker(adaptive, quantile=0.9, over='negatives', ")
    assert "momentum=0.5" in shown
    assert repr(ThresholdTracker.step(0.9, 0.1, 25)) == (
        "ThresholdTracker(step, start=0.9, drop=0.1, every=25, normalize_rows=False)"
    )
