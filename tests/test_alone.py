# SPDX-License-Identifier: MIT
"""The extension as it was built, without torch and without Python, on stand-ins for both (alone/):
each of torch's calls and each allocation fails once, and arguments are changed to any others.

Problems are drawn at random. By default a few are taken, others in each run: HEX_SEED=... in the
environment, which every run prints at its head, takes these again. HEX_ROUNDS=n solves n times all
kinds of problems, and HEX_FUZZ_SECONDS=n goes on for so long (`make reliability`, `make fuzz`).
Under `make sanitize` all of this runs with AddressSanitizer and UndefinedBehaviorSanitizer, which
report what is still allocated at the end.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
from standalone import ADDRESS, build, run, without
from test_import import FUNCTIONS
from test_isa import BUILT, skip_unless_available

import hex

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
SEED = int(os.environ["HEX_SEED"])  # conftest.py draws one
ROUNDS = int(os.environ.get("HEX_ROUNDS", 0))
FUZZ_SECONDS = float(os.environ.get("HEX_FUZZ_SECONDS", 60 if SANITIZED else 10))
# Of a round the mode, the type and the class of sizes are all combinations.
ROUND, PART = 96, 24
EXTENSION = next(Path(hex.__file__).parent.glob("_C.*so"), None)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None or EXTENSION is None,
    reason="the program is for Linux and built by gcc, and wants the extension",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("alone"), *(ADDRESS if SANITIZED else []))


def problems():
    """(seed, from, to) of all rounds; or of a part of one."""
    if ROUNDS:
        return [(SEED + k, 0, ROUND) for k in range(ROUNDS)]
    first = SEED % ROUND
    return [(SEED, first, first + PART)]


@pytest.mark.parametrize("level", BUILT)
@pytest.mark.parametrize("command", ["solve", "fail"])
def test_every_call_of_torch_and_every_allocation_fails_once(program, command, level):
    """An error with a text, nothing left in use, and the next call has the bits of the first."""
    skip_unless_available(level)
    for seed, first, last in problems():
        counts = run(program, EXTENSION, level, seed, command, first, last, timeout=3000)
        assert counts.failures > 1000 if command == "fail" else counts.calls > 100


@pytest.mark.parametrize("level", BUILT)
def test_any_arguments_give_a_result_or_an_error_and_no_more(program, level):
    skip_unless_available(level)
    seconds = max(1, round(FUZZ_SECONDS / len(BUILT)))
    counts = run(program, EXTENSION, level, SEED, "fuzz", seconds, 0, timeout=10 * seconds + 600)
    print(counts)
    assert 0 < counts.refused < counts.calls


def test_every_registration_fails_once_and_levels_that_are_none_are_named(program):
    assert run(program, EXTENSION, "base", SEED, "import").failures == 18


def test_the_same_on_a_cuda_core(program):
    """Of the extension's part of it: no kernel runs."""
    first = SEED % ROUND
    run(program, EXTENSION, "base", SEED, "cuda", first, first + PART, program.parent)


def test_with_torch_2_10_which_lacks_a_function(program, tmp_path):
    older = build(tmp_path, "-DTORCH_2_10", *(ADDRESS if SANITIZED else []))
    run(older, EXTENSION, "base", SEED, "fail", 0, PART)


@pytest.mark.parametrize("missing", FUNCTIONS)
def test_a_function_that_torch_lacks_is_named(program, missing, tmp_path):
    older = without(program, missing, tmp_path)
    with pytest.raises(AssertionError, match=f"no symbol {missing}"):
        run(older, EXTENSION, "base", SEED, "solve", 0, 1)
