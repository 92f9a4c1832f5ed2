# SPDX-License-Identifier: MIT
"""The recipes in docs/recipes: each patch is small, as its page shows it, uses what we export,
holds no line of anybody else's, and is put in the right place or visibly nowhere.

What happened when it was tried in the repository it is for is told by its page: those repositories
are not here.
"""

import ast
import base64
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import hex

FOLDER = Path(__file__).parent.parent / "docs" / "recipes"
sys.path.insert(0, str(FOLDER))

import make  # noqa: E402

DIFFS = sorted(FOLDER.glob("*.diff"))
PAGES = sorted(FOLDER.glob("*.md"))
INDEX = (FOLDER / "README.md").read_text()


def name(path):
    return path.name


def page_of(diff):
    """The page that shows it: solo-learn-nnclr.diff is on the page of solo-learn."""
    (page,) = (p for p in PAGES if f"({diff.name})" in p.read_text() and p.name != "README.md")
    return page.read_text()


def added(diff):
    _, _, files = make.read(diff.read_text())
    return [line for lines in files.values() for _, line in lines]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def delta(text):
    """(old size, new size, [(offset, size) copied, or the bytes inserted, ...]) of a hunk."""
    packed = b""
    for line in text.splitlines()[1:]:
        length = ord(line[0]) - (ord("A") - 1 if line[0] <= "Z" else ord("a") - 27)
        packed += base64.b85decode(line[1:])[:length]
    data = zlib.decompress(packed)
    assert text.splitlines()[0] == f"delta {len(data)}"
    at = 0

    def number():
        nonlocal at
        found = shift = 0
        while True:
            byte, at = data[at], at + 1
            found |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return found

    sizes, instructions = (number(), number()), []
    while at < len(data):
        op, at = data[at], at + 1
        if op < 0x80:
            instructions.append(data[at : at + op])
            at += op
            continue
        offset_size = [0, 0]
        for bit in range(7):
            if op >> bit & 1:
                offset_size[bit >= 4] |= data[at] << 8 * (bit % 4)
                at += 1
        instructions.append(tuple(offset_size))
    return *sizes, instructions


def test_there_are_recipes():
    assert len(DIFFS) >= 10 and len(PAGES) >= 10


@pytest.mark.parametrize("diff", DIFFS, ids=name)
def test_a_diff_names_its_old_file_by_hash_keeps_all_of_it_and_inserts_the_lines_shown(diff):
    _, _, files = make.read(diff.read_text())
    text = diff.read_text().removeprefix(make.head(diff.read_text()))
    patches = re.findall(
        r"diff --git a/(\S+) b/(\S+)\nindex [0-9a-f]{40}\.\.[0-9a-f]{40} 100644\n"
        r"GIT binary patch\n(delta .*?)\n\n(delta .*?)\n\n",
        text,
        re.DOTALL,
    )
    assert [(old, new) for old, new, *_ in patches] == [(path, path) for path in files]
    for path, _, forwards, back in patches:
        old, new, instructions = delta(forwards)
        at, lines = 0, b""  # how far in the old file; what is inserted so far
        kept = []  # the old file's pieces, as they lie in the new
        for part in instructions:
            if isinstance(part, bytes):
                lines += part
            else:
                assert part[0] == at and part[1] > 0  # nothing left out, nothing twice
                kept.append((at + len(lines), part[1]))
                at += part[1]
        assert at == old and new == old + len(lines)
        assert lines.decode() == "".join(f"{line}\n" for _, line in files[path])
        assert delta(back) == (new, old, kept)


@pytest.mark.parametrize("diff", DIFFS, ids=name)
def test_the_places_of_a_diff_are_in_order(diff):
    _, _, files = make.read(diff.read_text())
    for lines in files.values():
        numbers = [number for number, _ in lines]
        assert numbers == sorted(numbers) and numbers[0] > 0


@pytest.mark.parametrize("diff", DIFFS, ids=name)
def test_a_diff_changes_at_most_three_lines(diff):
    assert 0 < sum(bool(line.strip()) for line in added(diff)) <= 3


@pytest.mark.parametrize("diff", DIFFS, ids=name)
def test_the_lines_of_a_diff_compile_and_take_from_hex_what_it_exports(diff):
    source = "\n".join(line.strip() for line in added(diff))
    # return is for functions, and any line may be in one
    body = "\n".join(f"    {line}" for line in source.splitlines())
    tree = ast.parse(f"def patched():\n{body}\n")
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    (imported,) = (node for node in imports if node.module == "hex")
    names = {alias.name for alias in imported.names}
    assert names <= set(hex.__all__)
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert names <= loaded  # nothing is imported in vain
    assert {n for n in loaded if n in hex.__all__} == names  # nor used without


@pytest.mark.parametrize("diff", DIFFS, ids=name)
def test_the_options_a_diff_gives_are_those_of_hex(diff):
    """Each call of a name of ours with the keywords it has there can be bound."""
    import inspect

    calls = 0
    for line in added(diff):
        for node in ast.walk(ast.parse(f"def patched():\n    {line.strip()}\n")):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in hex.__all__:
                    given = {keyword.arg: None for keyword in node.keywords}
                    inspect.signature(getattr(hex, node.func.id)).bind(*node.args, **given)
                    calls += 1
    registered = "type='HEXCrossEntropyLoss'" in diff.read_text()  # a configuration names it
    assert calls or registered


@pytest.mark.parametrize("diff", DIFFS, ids=name)
def test_a_page_shows_the_lines_as_they_are_and_links_the_commit(diff):
    page = page_of(diff)
    repository, commit, _ = make.read(diff.read_text())
    assert make.head(diff.read_text()) in blocks(page, "diff")
    assert f"https://github.com/{repository}/tree/{commit})" in page
    assert "## Expect" in page and "## Tried" in page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_python_of_a_page_runs(page):
    torch.manual_seed(0)
    names = {}
    for source in blocks(page.read_text(), "python"):
        modules = {n.module.split(".")[0] for n in ast.walk(ast.parse(source))
                   if isinstance(n, ast.ImportFrom)}  # fmt: skip
        for module in modules:
            pytest.importorskip(module, exc_type=ImportError)
        exec(compile(source, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere_and_the_index_has_the_page(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)\)", text):
        assert re.match(r"https://", target) or (page.parent / target).exists(), target
    assert page.name == "README.md" or f"({page.name})" in INDEX


# ---- where git puts them ------------------------------------------------------------------------

# What a recipe's file may look like.
THEIRS = [f"import m{i}" for i in range(7)] + ["", "", "def train():", "    for x in range(3):"]
THEIRS += [f"        step({i})" for i in range(20)] + ["", "def other():", "    step(3)", ""]
OURS = [(7, "from hex import HEXLoss"), (14, "        criterion(x)")]
FOLLOWS = {"from hex import HEXLoss": "import m6", "        criterion(x)": "        step(2)"}


@pytest.fixture
def git(tmp_path):
    """git in a repository of its own that has one commit of THEIRS as train.py, and the recipe."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    names = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER")
             for what in ("NAME", "EMAIL")}  # fmt: skip
    nowhere = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def run(*arguments, folder="theirs"):
        return subprocess.run(
            ["git", *arguments], cwd=tmp_path / folder, env=environment | names | nowhere,
            capture_output=True, text=True,
        )  # fmt: skip

    (tmp_path / "theirs").mkdir()
    assert run("init", "--quiet").returncode == 0
    commit(git=run, lines=THEIRS, file=tmp_path / "theirs/train.py")
    head = f"github.com/a/b at {run('rev-parse', 'HEAD').stdout}"
    head += "".join(f"train.py, after line {number}:\n+{line}\n" for number, line in OURS)
    (tmp_path / "a.diff").write_text(head)
    make.main(str(tmp_path / "a.diff"), str(tmp_path / "theirs"))
    assert make.head((tmp_path / "a.diff").read_text()) == head
    return run


def commit(git, lines, file):
    file.write_text("\n".join(lines))
    assert git("add", file.name, folder=file.parent).returncode == 0
    assert git("commit", "--quiet", "-m", "x", folder=file.parent).returncode == 0


def in_their_places(lines, theirs):
    """Ours follow the lines that they should, and nothing else has changed."""
    without = [line for line in lines if line not in FOLLOWS]
    places = {line: lines[i - 1] for i, line in enumerate(lines) if line in FOLLOWS}
    return without == theirs and places == FOLLOWS


@pytest.mark.parametrize("options", [(), ("--3way",)])
def test_a_recipe_applies_to_its_commit_and_can_be_taken_back(options, git, tmp_path):
    file = tmp_path / "theirs/train.py"
    assert git("apply", *options, "../a.diff").returncode == 0
    assert in_their_places(file.read_text().split("\n"), THEIRS)
    assert git("apply", "-R", "../a.diff").returncode == 0
    assert file.read_text().split("\n") == THEIRS


MOVED = ["# new", "import m", *THEIRS[:3], "import n", *THEIRS[3:], "# end"]
REWRITTEN = [*THEIRS[:13], "        steps(2, 3)", *THEIRS[15:]]


def test_a_recipe_follows_the_lines_to_another_version_and_twice_is_once(git, tmp_path):
    file = tmp_path / "theirs/train.py"
    commit(git, MOVED, file)
    for _ in range(2):
        assert git("apply", "--3way", "../a.diff").returncode == 0
        assert in_their_places(file.read_text().split("\n"), MOVED)


def test_a_recipe_whose_place_was_rewritten_ends_in_a_conflict_that_is_seen(git, tmp_path):
    file = tmp_path / "theirs/train.py"
    commit(git, REWRITTEN, file)
    assert git("apply", "--3way", "../a.diff").returncode != 0
    assert "<<<<<<<" in file.read_text()


@pytest.mark.parametrize("lines", [MOVED, REWRITTEN, [*THEIRS[1:], "x"]])
@pytest.mark.parametrize(
    "options", [(), ("--3way",), ("--unidiff-zero",), ("--3way", "--unidiff-zero"), ("-C0",)]
)
def test_a_recipe_is_refused_where_another_version_is_all_there_is(options, lines, git, tmp_path):
    """A shallow clone, an archive: without the old file there is nothing to merge with."""
    (tmp_path / "shallow").mkdir()
    git("init", "--quiet", folder="shallow")
    file = tmp_path / "shallow/train.py"
    commit(git, lines, file)
    assert git("apply", *options, "../a.diff", folder="shallow").returncode != 0
    assert file.read_text().split("\n") == lines


def test_a_recipe_is_refused_by_patch(git, tmp_path):
    if shutil.which("patch") is None:
        pytest.skip("patch is not installed")
    file = tmp_path / "theirs/train.py"
    file.write_text("\n".join(MOVED))
    result = subprocess.run(
        ["patch", "-p1", "--force", "-i", "../a.diff"], cwd=file.parent, capture_output=True
    )
    assert result.returncode != 0 and file.read_text().split("\n") == MOVED
