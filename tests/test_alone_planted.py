# SPDX-License-Identifier: MIT
"""Whether the program of alone/ finds what is wrong: each entry of PLANTED is such a fault, planted
in the sources of the extension, of which it has to complain. Part of `make thorough`.
"""

import shutil
from pathlib import Path

import pytest
import test_alone
from standalone import ADDRESS, ROOT, build, compile_extension, run, sources

pytestmark = test_alone.pytestmark

BAD = "AddressSanitizer"
SOLVE, FAIL, FUZZ, THREADS = (
    ("solve", 0, 96),
    ("fail", 0, 24),
    ("fuzz", 0, 400),
    ("threads", 48, 72),
)
FAIL_IN_LOOPS = ("fail", 24, 36)  # problems of so many rows that they are several threads'
# The file, what it has, the text that takes its place, the command, and what is said.
PLANTED = {
    "outputs are not freed after an error":
        ("call.c", "i < c->n_out; i++)\n            aoti",
         "i + 1 < c->n_out; i++)\n            aoti",
         FAIL, "tensors and 0 blocks of memory are left"),
    "an argument is not freed after an error":
        ("call.c", "    for (int i = 0; i < c->n_in; i++)",
         "    for (int i = c->error[0] != 0; i < c->n_in; i++)",
         FAIL, "1 tensors and 0 blocks of memory are left"),
    "an allocation is not looked at":
        ("problem.h", "if (!columns)", "if (0)", FAIL, "nothing was said"),
    "a call of torch is not looked at":
        ("call.c", "return torch_get_mutable_data_ptr(t, data) ?",
         "return torch_get_mutable_data_ptr(t, data) && 0 ?", FAIL, "store to null pointer"),
    "memory of the core is not freed":
        ("cpu/entry.h", "    release(k);", "", SOLVE, "blocks of memory are left"),
    "a loop that could not run is not looked at":
        ("parallel.c", "grain, run_chunk, &l) == 0", "grain, run_chunk, &l) <= 1",
         FAIL_IN_LOOPS, "nothing was said"),
    "the storage is taken to be as large as the shape":
        ("call.c", "return last < bytes / element;", "return true;", FUZZ, BAD),
    "an id is taken to be a column":
        ("problem.h", "if (column < 0 || column >= p->D)", "if (column < 0)", FUZZ, BAD),
    "a result depends on the number of threads":
        ("parallel.c", "    l->body(begin, end, l->context);",
         "    l->body(begin, end - (begin > 0), l->context);", THREADS, "other bits"),
}  # fmt: skip


def options(source: Path) -> list[str]:
    """The level that runs has the sanitizers."""
    other = "levels" in source.parts and not source.stem.startswith("base_")
    return ["-O0", "-w"] if other else ["-O1", "-w", *ADDRESS]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(tmp_path_factory.mktemp("alone"), *ADDRESS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the extension's objects."""
    folder = tmp_path_factory.mktemp("extension")
    compile_extension(folder, options, *ADDRESS)
    return folder


def test_nothing_is_said_where_nothing_is_planted(program, built):
    for command in (SOLVE, FAIL, FAIL_IN_LOOPS, FUZZ, THREADS):
        run(program, built / "_C.abi3.so", "base", 1, *command)


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found(program, built, name, tmp_path):
    file, old, new, command, said = PLANTED[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / file).read_text()
    assert text.count(old) == 1
    (csrc / file).write_text(text.replace(old, new))
    for source in built.iterdir():
        shutil.copy(source, tmp_path)
    changed = [
        source
        for source in sources(csrc)
        if (source.stem in ("base_f32", "base_f64") if "/" in file else source.parent == csrc)
    ]
    compile_extension(tmp_path, options, *ADDRESS, csrc=csrc, only=changed)
    with pytest.raises(AssertionError) as found:
        run(program, tmp_path / "_C.abi3.so", "base", 1, *command)
    assert said in str(found.value), found.value
