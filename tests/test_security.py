# SPDX-License-Identifier: MIT
"""What SECURITY.md promises of the sources: what the package does not use, which variables it
reads, and that a file is never loaded in a way in which it could run code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "hex").glob("*.py"))
FOLDERS = ("hex", "examples", "benchmarks", "tests", "docs")
SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
TEXTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
# Modules by which a package could run code or commands, or talk to others; torch has more of them.
FORBIDDEN = """pickle marshal shelve dill cloudpickle joblib runpy code subprocess multiprocessing
    pty socket ssl http urllib ftplib smtplib requests httpx aiohttp webbrowser ctypes tempfile
    """.split()
CALLS = "eval exec compile open __import__ system popen fork spawn load".split()
OPENED = {
    "__main__.py": {"os.open(os.devnull, os.O_WRONLY)"},  # `python -m hex | head` ends quietly
    "plots.py": {'open(path, newline="")'},  # read_csv, with the path that its caller gives
}


def trees(paths):
    return [(path, ast.parse(path.read_text())) for path in paths]


def imported(tree):
    """The first name of every module that is imported, anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def called(tree):
    """(the last name, the whole call as text, its node) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            yield name, ast.unparse(node), node


def unsafe_loads(tree):
    """Calls that may unpickle: torch.load, and Lightning with a checkpoint, unless told not to;
    numpy's load, if told to."""
    for name, text, call in called(tree):
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        whole = ast.unparse(call.func)
        if (
            (whole == "torch.load" or name == "load_from_checkpoint" or "ckpt_path" in given)
            and given.get("weights_only") != "True"
        ) or given.get("allow_pickle", "False") != "False":
            yield text


def test_the_package_imports_nothing_that_runs_code_or_talks_to_others():
    assert len(PACKAGE) > 15
    for path, tree in trees(PACKAGE):
        assert not set(imported(tree)) & set(FORBIDDEN), path
        found = {text for name, text, _ in called(tree) if name in CALLS}
        assert found == OPENED.get(path.name, set()), path
    found = ast.parse("import os.path, pickle\ndef f():\n    from urllib.request import urlopen")
    assert set(imported(found)) & set(FORBIDDEN) == {"pickle", "urllib"}
    found = [name for name, *_ in called(ast.parse("os.system('x'); f(eval('1'))"))]
    assert set(found) & set(CALLS) == {"system", "eval"}


def test_no_file_is_loaded_in_a_way_in_which_it_could_run_code():
    assert len(SOURCES) > 100
    for path, tree in trees(SOURCES):
        assert not list(unsafe_loads(tree)), path


@pytest.mark.parametrize(
    ("code", "unsafe"),
    [
        ("torch.load(f)", True),
        ("torch.load(f, weights_only=False)", True),
        ("torch.load(f, weights_only=True)", False),
        ("trainer.fit(m, ckpt_path=f)", True),
        ("trainer.fit(m, ckpt_path=f, weights_only=True)", False),
        ("Module.load_from_checkpoint(f)", True),
        ("np.load(f, allow_pickle=True)", True),
        ("np.load(f)", False),
    ],
)
def test_a_load_that_could_run_code_is_seen(code, unsafe):
    assert bool(list(unsafe_loads(ast.parse(code)))) == unsafe


def test_nor_do_the_documents_tell_anybody_to():
    calls = [
        (path, call)
        for path in TEXTS
        for call in re.findall(
            r"torch\.load\([^)]+\)?|load_from_checkpoint\([^)]+", path.read_text()
        )
    ]
    assert (ROOT / "SECURITY.md", "torch.load(file, weights_only=True)") in calls
    for path, call in calls:
        assert "weights_only=True" in call, path


def test_the_variables_that_are_read_are_those_that_are_named():
    read = set()
    for path, tree in trees(PACKAGE):
        for name, text, call in called(tree):
            if "environ" in text.partition("(")[0] or name == "getenv":
                read.add(ast.literal_eval(call.args[0]))
        assert "environ[" not in path.read_text()
    for path in [*ROOT.glob("csrc/**/*.[ch]"), *ROOT.glob("csrc/**/*.cu*")]:
        read |= set(re.findall(r'\bgetenv\("(\w+)"\)', path.read_text()))
    (told,) = re.findall(
        r"read from the environment: (.*?)\.", (ROOT / "SECURITY.md").read_text(), re.S
    )
    assert read == set(re.findall(r"`(\w+)`", told))
