# SPDX-License-Identifier: MIT
"""The extension under ThreadSanitizer, without torch, whose own runtime of threads it would not see
(alone/): each call has the same bits with 1, 2, 3 and 8 threads; with four callers at once; and in
children that are forked before, during and after. A race ends the process. Part of `make thorough`.

A level of instructions is compiled anew for it, a minute: one that HEX_SEED draws, or with
HEX_ROUNDS=n all that the CPU has, n times.
"""

import shutil
import subprocess

import pytest
import test_alone
from standalone import ROOT, build, compile_extension, run
from test_alone import ROUNDS, SEED
from test_isa import BUILT, FLAGS, cpu_flags

RACES = ["-fsanitize=thread"]
LEVELS = [level for level in BUILT if FLAGS[level] <= cpu_flags()]

pytestmark = test_alone.pytestmark


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    program = build(tmp_path_factory.mktemp("alone"), *RACES)
    said = subprocess.run([program], capture_output=True, text=True).stderr
    if "unexpected memory mapping" in said:  # of gcc before 14, where addresses are more random
        pytest.skip(f"sysctl vm.mmap_rnd_bits=28 lets it run: {said.splitlines()[0]}")
    return program


@pytest.mark.parametrize("level", LEVELS if ROUNDS else [LEVELS[SEED % len(LEVELS)]])
def test_no_race_and_the_same_bits_for_any_number_of_threads(program, level, tmp_path):
    runs = {f"{level}_f32", f"{level.partition('_')[0]}_f64"}

    def options(source):
        other = "levels" in source.parts and source.stem not in runs
        return ["-O0"] if other else ["-O1", "-g", *RACES]

    extension = compile_extension(tmp_path, options, *RACES)
    for seed, first, last in test_alone.problems():
        assert (
            run(program, extension, level, seed, "threads", first, last, timeout=3000).calls > 500
        )


def test_a_race_that_is_planted_is_found(program, tmp_path):
    """Tiles that do not wait for the earlier ones of their rows."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    file = csrc / "cpu" / "schedule.h"
    text = file.read_text()
    waits = "memory_order_acquire) < tiles)"
    assert text.count(waits) == 1
    file.write_text(text.replace(waits, "memory_order_acquire) < 0)"))

    def options(source):
        other = "levels" in source.parts and source.stem != "base_f32"
        return ["-O0"] if other else ["-O0", "-g", *RACES]

    extension = compile_extension(tmp_path, options, *RACES, csrc=csrc)
    with pytest.raises(AssertionError, match="ThreadSanitizer: data race|other bits"):
        run(program, extension, "base", 1, "threads", 48, 72)  # problems of many tiles
