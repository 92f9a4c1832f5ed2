# SPDX-License-Identifier: MIT
"""The recipes in docs/recipes: each diff is small, as its page shows it, and uses what we export.

That a diff applies to the repository it is for, and what happened then, is told by its page: those
repositories are not here.
"""

import ast
import re
from pathlib import Path

import pytest
import torch

import hex

FOLDER = Path(__file__).parent.parent / "docs" / "recipes"
DIFFS = sorted(FOLDER.glob("*.diff"))
PAGES = sorted(FOLDER.glob("*.md"))
HUNK = re.compile(r"@@ -(\d+),0 \+(\d+) @@")
INDEX = (FOLDER / "README.md").read_text()


def name(path):
    return path.name


def page_of(diff):
    """The page that shows it: solo-learn-nnclr.diff is on the page of solo-learn."""
    (page,) = (p for p in PAGES if f"({diff.name})" in p.read_text() and p.name != "README.md")
    return page.read_text()


def added(diff):
    return [line[1:] for line in diff.read_text().splitlines() if re.match(r"\+(?!\+\+ )", line)]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_there_are_recipes():
    assert len(DIFFS) >= 10 and len(PAGES) >= 10


@pytest.mark.parametrize("diff", DIFFS, ids=name)
def test_a_diff_only_inserts_and_its_line_numbers_agree(diff):
    inserted = None
    for line in diff.read_text().splitlines():
        if line.startswith("--- a/"):
            old = line.removeprefix("--- a/")
        elif line.startswith("+++ b/"):
            assert line.removeprefix("+++ b/") == old and old.endswith(".py")
            inserted, before = 0, 0
        elif hunk := HUNK.fullmatch(line):
            after, here = int(hunk[1]), int(hunk[2])
            assert after > before and here == after + inserted + 1
            before = after
        else:
            assert line.startswith("+"), line  # no line of theirs is in it
            inserted += 1


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
def test_a_page_shows_the_diff_as_it_is_and_names_a_commit(diff):
    page = page_of(diff)
    assert diff.read_text() in blocks(page, "diff")
    assert re.search(r"github\.com/[\w-]+/[\w-]+/tree/[0-9a-f]{40}\b", page)
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
