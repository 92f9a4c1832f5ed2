# SPDX-License-Identifier: MIT
"""What the documents say is true: their code runs, their links and names lead somewhere."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path

import archives
import pytest
import torch

import hex
import hex.plots

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(p for part in ("*", "docs/**/*", "examples/*") for p in ROOT.glob(f"{part}.md"))
README = (ROOT / "README.md").read_text()
# Where a file of this repository is seen, and where an image is.
OURS = (
    "https://github.com/hex-ssl/hex-ssl/blob/main/",
    "https://raw.githubusercontent.com/hex-ssl/hex-ssl/main/",
)
MODULES = sorted(
    m.name for m in pkgutil.iter_modules(hex.__path__) if m.name not in ("_C", "_cuda")
)


def named(path):
    return str(path.relative_to(ROOT))


def blocks(text, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(title, text=README):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def anchors(path):
    """The names GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def targets(path):
    """What a document links to, or shows."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_python_in_the_documents_runs_and_prints_what_is_shown(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # a page may save a picture
    torch.manual_seed(0)
    names = {}
    shown = r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?"
    for source, prints in re.findall(shown, path.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(source, str(path), "exec"), names)
        printed = capsys.readouterr().out
        assert not prints or printed == prints


def test_the_lightning_script_trains_and_logs_what_the_page_names(tmp_path, monkeypatch):
    pytest.importorskip("hex.lightning", exc_type=ImportError)
    page = (ROOT / "docs" / "guides" / "logging.md").read_text()
    (source,) = blocks(page, "py")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of the machine
        exec(compile(source, "logging.md", "exec"), {})
    (log,) = re.findall(r'read_csv\("(.+?)"\)', page)
    named = set(re.findall(r"`hex/(\w+)`", page))
    history = hex.plots.read_csv(log)
    assert set(history) == named | {"step"} and len(history["step"]) == 8


def test_the_script_for_several_devices_runs_on_two_processes(tmp_path):
    (source,) = blocks((ROOT / "docs" / "distributed.md").read_text(), "py")
    script = tmp_path / "train.py"
    script.write_text(source)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = subprocess.check_output([*run, str(script)], text=True, env=environment)
    losses = [float(line.split()[1]) for line in printed.splitlines()]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_the_readme_has_python_to_run():
    assert blocks(README, "python")


def test_the_commands_of_the_readme_are_there_and_what_checks_an_installation_runs():
    commands = re.findall(r"^    ((?:pip|python|make) .+?) +#", README, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["pip", "python", "make", "make"]
    check = sys.executable + commands[1].removeprefix("python")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    printed = subprocess.check_output(check.split(), text=True, env=environment)
    assert hex.__version__ in printed  # that pip installs it is in test_build.py


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run_and_print_what_they_show(name):
    if name == "lightning":  # Lightning is optional
        module = pytest.importorskip("hex.lightning", exc_type=ImportError)
    else:
        module = importlib.import_module(f"hex.{name}")
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__):
        runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize("name", sorted(set(hex.__all__) - {"Statistics"}))
def test_what_is_public_has_an_example(name):
    assert ">>> " in getattr(hex, name).__doc__


def test_the_swap_changes_few_lines_and_trains():
    (diff,) = blocks(README, "diff")
    lines = diff.splitlines()
    assert sum(line.startswith("+") for line in lines) <= 3
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 8)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = [(torch.randn(128, 16), torch.randn(128, 16))]
    exec(after, {"model": model, "optimizer": optimizer, "loader": loader, "epochs": 2})
    assert model.weight.isfinite().all() and not torch.equal(model.weight, before)


def test_the_trackers_of_the_table_can_be_made():
    table = section("Options, and when to set them").split("| `ThresholdTracker` |")[1]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `.")]
    calls = [call for cell in cells for call in re.findall(r"`(\.\w+\(.*?\))`", cell)]
    assert len(calls) >= 7
    for call in calls:
        made = eval(f"ThresholdTracker{call}", {"ThresholdTracker": hex.ThresholdTracker,
                                                "epochs": 10, "t": 0.5})  # fmt: skip
        assert isinstance(made, hex.ThresholdTracker)


def test_the_options_of_the_table_are_those_of_the_loss():
    table = section("Options, and when to set them").split("| `ThresholdTracker` |")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+?)`? \|", table, re.MULTILINE))
    defaults = hex.HEXLoss.__init__.__kwdefaults__ | {"temperature": 0.1}
    assert {k: eval(v) for k, v in shown.items()} == defaults


def test_the_statistics_are_those_the_readme_names():
    assert set(re.findall(r'"(\w+)": ', section("Options, and when to set them"))) == set(
        hex.Statistics._fields
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_between_files_lead_somewhere(path):
    for target in targets(path):
        whole, _, anchor = target.partition("#")
        for url in OURS:
            if whole.startswith(url):
                found = ROOT / whole.removeprefix(url)
                break
        else:
            if re.match(r"\w+:", target):
                continue
            found = path.parent / whole if whole else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_the_readme_has_whole_addresses_for_pypi_shows_it_too():
    page, raw = OURS
    assert page == f"{archives.address()}/blob/main/"
    assert raw == f"{archives.address()}/main/".replace("github.com", "raw.githubusercontent.com")
    found = targets(ROOT / "README.md")
    assert all(target.startswith("https://") for target in found), found
    text = (ROOT / "README.md").read_text()
    images = re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert images and all(image.startswith(raw) for image in images)  # a page is no picture


def test_the_map_names_files_that_exist():
    text = section("A map of the sources", (ROOT / "CONTRIBUTING.md").read_text())
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert len(lines) >= 8
    for line in lines:
        folder = None
        for name in re.split(r"\s{2,}", line)[0].split(", "):
            if "/" in name:
                folder, _, name = name.rpartition("/")
            assert list((ROOT / folder).glob(name)), line


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_make_has_the_targets_that_are_named(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = re.findall(r"(?:^    |`)make ([a-z-]+)", path.read_text(), re.MULTILINE)
    assert set(commands) <= targets


def test_the_readme_can_be_read_at_once():
    assert len(README.splitlines()) <= 150


def test_the_change_log_begins_with_this_version():
    log = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", log, re.MULTILINE)[1] == hex.__version__
