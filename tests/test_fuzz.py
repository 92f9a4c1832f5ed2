# SPDX-License-Identifier: MIT
"""Every public function and class, with whatever a user may pass: each call gives what the
composed formulas give, or is refused by name and changes nothing.

The draws are others in every run. What fails is printed with its seed, with which
`pytest tests/test_fuzz.py --hypothesis-seed=SEED` repeats it. HEX_FUZZ_SECONDS in the environment
is how long the tests of this file go on together, in seconds: 3600 is an hour. Before each call its
seed and its arguments are written to hex-fuzz-PID.txt in the folder for temporary files (TMPDIR),
which is removed at the end: where the process dies, the last line says of what.

Every call is made with warnings recorded, of which those of ThresholdTracker alone are documented.
The tolerances are those of conftest.py; where a cosine is within rounding of the threshold, so that
two right implementations differ by a whole term, only NaNs are compared. The draws themselves are
in strategies.py, the comparison with the formulas is in fuzzed.py.
"""

import contextlib
import copy
import io
import os
import pickle
import re
import tempfile
import time
import warnings
import zlib
from pathlib import Path

import fuzzed
import hypothesis
import pytest
import strategies as draws
import torch
import torch.distributed as dist
from conftest import default_dtype
from fuzzed import Case, described
from hypothesis import strategies as st

import hex
from hex import ThresholdTracker
from hex.checks import is_number
from hex.distributed import Ranks
from hex.open_clip import HEXClipLoss
from hex.presets import authors_mix, authors_threshold

SECONDS = float(os.environ.get("HEX_FUZZ_SECONDS") or 30)
TESTS = 5  # of this file, which share them
EXAMPLES = 50  # of one seed
pytestmark = pytest.mark.timeout(SECONDS + 900)  # to shrink what fails takes minutes
REFUSED = re.compile(r"[\w\[\]., ]+: (\w+: )?got [\s\S]+, wanted [\s\S]+")
OUTSIDE = re.compile(r"hex::\w+: target: got -?\d+, wanted a column in \[0, \d+\)")
SETTINGS = hypothesis.settings(
    hypothesis.settings.get_profile("fixed"),
    derandomize=False, max_examples=EXAMPLES, print_blob=True, report_multiple_bugs=False,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
)  # fmt: skip


class Fuzzer:
    """Runs a function of hypothesis's draw and of `tell`, which writes to the log, with one seed
    after another, for its share of the time."""

    def __init__(self, option):
        self.wanted = None if option in (None, "random") else int(option)
        self.count = 0
        self.log = Path(tempfile.gettempdir()) / f"hex-fuzz-{os.getpid()}.txt"

    def __call__(self, test):
        end = time.monotonic() + SECONDS / TESTS
        seed = self.wanted
        if seed is None:
            seed = zlib.crc32(f"{os.environ['HEX_SEED']} {test.__name__}".encode())
        self._one_seed(test, seed)
        while self.wanted is None and time.monotonic() < end:
            seed += 1
            self._one_seed(test, seed)

    def _one_seed(self, test, seed):
        print(f"--hypothesis-seed={seed}")
        with self.log.open("w") as file:

            @hypothesis.seed(seed)
            @SETTINGS
            @hypothesis.given(st.data())
            def example(data):
                self.count += 1
                test(data.draw, tell)

            def tell(*about):
                print(f"seed {seed}:", *map(described, about), file=file, flush=True)

            example()


@pytest.fixture
def fuzz(request):
    fuzzer = Fuzzer(request.config.getoption("--hypothesis-seed", None))
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # not the first time alone
    yield fuzzer
    torch.set_warn_always(before)
    print(f"{fuzzer.count} examples")
    fuzzer.log.unlink(missing_ok=True)


# ---- one call -----------------------------------------------------------------------------------


CONTEXTS = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
}
CONTEXT = st.sampled_from(("plain", "plain", *CONTEXTS))


def outcome(call, *arguments, context="plain"):
    """What the call returns, or the error by which it is refused. Nothing that it was given has
    changed, nor the state of the random numbers, and it warned of nothing but the threshold."""
    before, random_state = fuzzed.bits(arguments), torch.random.get_rng_state()
    with warnings.catch_warnings(record=True) as warned, CONTEXTS[context]():
        warnings.simplefilter("always")
        try:
            result = call()
        except (TypeError, ValueError) as error:
            assert REFUSED.fullmatch(str(error)), error
            result = error
        except RuntimeError as error:
            assert OUTSIDE.fullmatch(str(error)), error
            result = error
    for warning in warned:
        assert str(warning.message).startswith("ThresholdTracker: "), warning
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert fuzzed.bits(arguments) == before
    return result


def check_call(case: Case, draw, tell, module=None):
    """One call of a function or a module, right or spoilt, and its backward."""
    spoilt = draw(st.integers(0, 2)) == 0
    if spoilt:
        case.spoil(draw)
    context = draw(CONTEXT)
    tell(case.name, context, case.arguments, *([module] if module is not None else ()))
    state, last = fuzzed.bits(module), getattr(module, "_last", None)
    before = None if module is None or module.threshold is None else module.threshold.state.clone()
    result = outcome(lambda: case.call(module), case.arguments, context=context)
    if spoilt:
        assert isinstance(result, Exception), result
        assert fuzzed.bits(module) == state
        assert getattr(module, "_last", None) is last
        return
    assert not isinstance(result, Exception), result
    graph = context not in ("no_grad", "inference_mode")
    eps = None
    if module is not None:
        learns = module.training and graph and case.needs_gradient()
        eps = fuzzed.check_threshold(case, module, before, learns)
        if not learns:
            assert fuzzed.bits(module) == state
    if case.name == "batch_threshold":
        fuzzed.check_batch_threshold(case, result)
    else:
        fuzzed.check_loss(case, result, eps, draw(st.sampled_from(fuzzed.GRADS)), graph)


# ---- the tests ----------------------------------------------------------------------------------


def test_every_function_gives_what_the_formulas_give_or_refuses_by_name(fuzz):
    def example(draw, tell):
        check_call(draw(fuzzed.cases(fuzzed.FUNCTIONS)), draw, tell)

    fuzz(example)


def test_every_loss_gives_what_the_formulas_give_whatever_happens_to_it_in_between(fuzz):
    def example(draw, tell):
        case = draw(fuzzed.cases(fuzzed.LOSSES))
        module = case.module(draw)
        for _ in range(draw(st.integers(1, 5))):
            module = draw(st.sampled_from(EVENTS))(module, draw, tell)
            check_call(case, draw, tell, module)
            case = draw(fuzzed.cases([case.name], like=case))

    fuzz(example)


@pytest.fixture
def alone():
    """A process group of one rank, which a loss takes for several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "are_several", lambda self: True)
        yield
    dist.destroy_process_group()


def test_every_loss_of_a_rank_gives_what_the_formulas_give_or_refuses_by_name(fuzz, alone):
    def example(draw, tell):
        case = draw(fuzzed.cases(fuzzed.LOSSES, gathers=True))
        module = case.module(draw)
        for _ in range(draw(st.integers(1, 3))):
            module = draw(st.sampled_from(EVENTS))(module, draw, tell)
            right = len(next(iter(case.inputs.values())))
            if case.name != "HEXClipLoss" and draw(st.booleans()):
                case.arguments["rows"] = draw(st.sampled_from(((right,), [right])))
            check_call(case, draw, tell, module)
            case = draw(fuzzed.cases([case.name], like=case))

    fuzz(example)


def test_every_option_is_taken_or_refused_by_name_when_a_loss_is_made_and_later(fuzz):
    def example(draw, tell):
        name = draw(st.sampled_from(tuple(fuzzed.LOSS_OPTIONS)))
        names = fuzzed.LOSS_OPTIONS[name]
        spoilt = draw(st.sampled_from(names))
        make = HEXClipLoss if name == "HEXClipLoss" else getattr(hex, name)
        first = (0.1,) if name == "HEXCrossEntropyLoss" else ()
        right, wrong = draw(draws.options(*names)), draw(draws.options(*names, spoilt=spoilt))
        tell(name, right, wrong)
        assert isinstance(outcome(lambda: make(*first, **wrong), wrong), Exception), wrong
        module = outcome(lambda: make(*first, **right), right)
        if spoilt in ("check_sizes", "mode"):
            return  # is kept elsewhere; is checked by each call
        before = str(module), fuzzed.bits(module)
        error = outcome(lambda: setattr(module, spoilt, wrong[spoilt]))
        assert isinstance(error, Exception), (spoilt, wrong)
        assert (str(module), fuzzed.bits(module)) == before

    fuzz(example)


def test_trackers_and_presets_keep_their_state_through_anything_that_is_refused(fuzz):
    def example(draw, tell):
        rule = draw(st.sampled_from(tuple(draws.RULES)))
        make, names = getattr(ThresholdTracker, rule), draws.RULES[rule]
        wrong = draw(draws.options(*names, spoilt=draw(st.sampled_from(names))))
        tell(rule, wrong)
        assert isinstance(outcome(lambda: make(**wrong), wrong), Exception), wrong
        tracker = draw(draws.trackers([rule]))
        for _ in range(draw(st.integers(1, 6))):
            tracker = draw(st.sampled_from(TRACKER_EVENTS))(tracker, draw, tell)
            assert outcome(lambda tracker=tracker: tracker.value).shape == ()
            assert outcome(lambda tracker=tracker: str(tracker)).startswith("ThresholdTracker(")
        preset(draw, tell)

    fuzz(example)


# ---- what happens in between --------------------------------------------------------------------


def nothing(module, draw, tell):
    return module


def mode(module, draw, tell):
    return module.train(draw(st.booleans()))


def epoch(module, draw, tell):
    tracker = module if isinstance(module, ThresholdTracker) else module.threshold
    value = draw(st.integers(0, 4) | st.sampled_from(draws.NO_COUNTS))
    before = fuzzed.bits(module)
    tell("set_epoch", value, module)
    result = outcome(lambda: module.set_epoch(value))
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53:
        assert result is None
        assert tracker is None or tracker.epoch == value
    else:
        assert tracker is None or isinstance(result, Exception)
        assert fuzzed.bits(module) == before
    return module


def copied(module, draw, tell):
    tell("copy", module)
    if draw(st.booleans()):
        other = copy.deepcopy(module)
    else:
        other = pickle.loads(pickle.dumps(module))
    assert fuzzed.bits(other) == fuzzed.bits(module) and str(other) == str(module)
    return other


def loaded(module, draw, tell):
    """A state into another of the same kind, by way of a file; or one that is none."""
    tell("load", module)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module)
    for part in other.modules():
        if isinstance(part, ThresholdTracker):
            part.reset()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert fuzzed.bits(other) == fuzzed.bits(module)
    return other


def cast(module, draw, tell):
    """Modules are cast as a whole; the threshold stays what it is."""
    tell("cast", module)
    tracker = module if isinstance(module, ThresholdTracker) else module.threshold
    before = fuzzed.bits(tracker)
    module = module.to(draw(st.sampled_from((torch.float64, torch.bfloat16, torch.float32))))
    assert fuzzed.bits(tracker) == before
    return module


def read(module, draw, tell):
    tell("statistics", module)
    if module.last is not None:
        assert outcome(module.statistics).keys() == {"eps", "hard", "share"}
    return module


def updated(tracker, draw, tell):
    """A candidate, or what is none."""
    good = st.floats(-1, 1).map(torch.tensor) | st.sampled_from((torch.tensor(torch.nan),))
    candidate = draw(good | draws.no_rows(torch.ones(())) | draws.no_rows(torch.ones(2)))
    store = draw(st.booleans() | st.sampled_from(draws.NO_FLAGS))
    anchors = draw(st.sampled_from((0, 1, 8, 64, 1.5, None, True, "8")))
    tell("update", candidate, store, anchors, tracker)
    before = fuzzed.bits(tracker)
    if not tracker.adaptive_rule:
        with pytest.raises(RuntimeError, match="^update: got the rule '.*', wanted 'adaptive'"):
            tracker.update(candidate, store=store, anchors=anchors)
        return tracker
    arguments = candidate, store, anchors
    result = outcome(lambda: tracker.update(candidate, store=store, anchors=anchors), arguments)
    right = isinstance(candidate, torch.Tensor) and candidate.layout == torch.strided
    right = right and candidate.dtype in fuzzed.DTYPES and not candidate.is_nested
    right = right and type(candidate) is torch.Tensor and candidate.dim() == 0
    right = right and candidate.untyped_storage().nbytes() and type(store) is bool
    if right and type(anchors) is int:
        assert result.shape == () and result.dtype == torch.float64
        assert store or fuzzed.bits(tracker) == before
    else:
        assert isinstance(result, Exception)
        assert fuzzed.bits(tracker) == before
    return tracker


def history(tracker, draw, tell):
    """A history from a file, which may be anything."""
    good = tracker.get_extra_state()
    rows = draw(st.sampled_from((good, good[:, 1:], good.half())) | draws.no_rows(good))
    tell("set_extra_state", rows)
    before = tracker.history
    if isinstance(outcome(lambda: tracker.set_extra_state(rows), rows), Exception):
        assert tracker.history == before
    else:
        assert isinstance(rows, torch.Tensor) and not rows.is_complex()
        tracker.set_extra_state(good)
    return tracker


EVENTS = (nothing, nothing, mode, epoch, copied, loaded, cast, read)
TRACKER_EVENTS = (epoch, copied, loaded, cast, updated, updated, updated, history)


def preset(draw, tell):
    name = draw(st.sampled_from(("simclr", "cosine", "step", "step-cifar", "x", None, 3)))
    epochs, every = (draw(st.sampled_from((None, 1, 30, *draws.NO_COUNTS))) for _ in range(2))
    tell("authors_threshold", name, epochs, every)
    made = outcome(lambda: authors_threshold(name, epochs=epochs, every=every))
    assert isinstance(made, (ThresholdTracker, Exception))
    one = torch.tensor(draw(st.floats(-9, 9)))
    values = [draw(st.sampled_from((one, one.double(), one.half()))) for _ in range(2)]
    alpha = draw(draws.number(0.0, 0.1, 1.0))
    wrong = [draw(draws.no_rows(one)), one]
    tell("authors_mix", values, alpha, wrong)
    assert outcome(lambda: authors_mix("vicreg", *values, alpha), values).shape == ()
    assert isinstance(outcome(lambda: authors_mix("barlow", *wrong)), Exception)
    mixed = outcome(lambda: authors_mix("barlow", *wrong[::-1]))
    if isinstance(mixed, Exception) or not is_number(wrong[0]):
        assert isinstance(mixed, Exception)
    else:  # a number may be the method's own loss
        torch.testing.assert_close(mixed, 0.1 * one + 0.9 * float(wrong[0]), equal_nan=True)
