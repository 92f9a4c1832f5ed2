# SPDX-License-Identifier: MIT
"""What a public host, an index and a citation manager read: workflows, forms, CITATION.cff, and the
texts that .ci/release.py keeps in line with the version and the address."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import archives
import pytest
import yaml

import hex

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()
RELEASE = ".ci/release.py"
# What .ci/release.py reads and writes.
TEXTS = ["pyproject.toml", "hex/__init__.py", "CHANGELOG.md", "CITATION.cff", "README.md"]
TEXTS += ["docs/first_run.ipynb"]

# Which of the schemas that check-jsonschema brings is for which files.
SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "custom.github-workflows-require-timeout": WORKFLOWS,
    "vendor.github-issue-forms": sorted(
        path for path in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if path.stem != "config"
    ),
    "vendor.github-issue-config": [ROOT / ".github/ISSUE_TEMPLATE/config.yml"],
    "vendor.dependabot": [ROOT / ".github/dependabot.yml"],
    "vendor.citation-file-format": [ROOT / "CITATION.cff"],
    "vendor.readthedocs": [ROOT / ".readthedocs.yaml"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_for_others_fit_the_schemas_of_those_who_read_them(schema):
    pytest.importorskip("check_jsonschema")
    assert SCHEMAS[schema]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema]
    done = subprocess.run([*command, *SCHEMAS[schema]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def steps():
    """Every step of every job, with its job."""
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for step in job["steps"]:
                yield job, step


def test_workflows_call_the_targets_of_the_makefile():
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set()
    for job, step in steps():
        for target in re.findall(r"\bmake (\S+|\$\{\{.*?\}\})", step.get("run", "")):
            if target.startswith("${{"):
                called |= {text.split()[0] for text in job["strategy"]["matrix"]["target"]}
            else:
                called.add(target)
    assert called <= there
    # What .ci/run runs, and what only a host can.
    assert {"test", "thorough", "cuda", "coverage", "sanitize", "demo", "wheel"} <= called
    assert {"check-wheel", "docs", "links"} <= called


def test_actions_are_held_to_commits():
    used = [step["uses"] for _, step in steps() if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used), used


def test_every_python_that_is_promised_is_tested():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == promised


def test_the_citation_names_this_version_and_the_paper_as_the_readme_does():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hex.__version__
    (bibtex,) = re.findall(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    paper = citation["preferred-citation"]
    authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    assert f"author={{{authors}}}" in bibtex
    assert f"title={{{paper['title']}}}" in bibtex.replace("{{HEX}", "{HEX")
    assert f"year={{{paper['year']}}}" in bibtex and "WACV" in paper["collection-title"]


# ---- .ci/release.py ------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A repository with the texts alone, before its first release, of 0.1.0."""
    for name in (RELEASE, *TEXTS):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changes = tmp_path / "CHANGELOG.md"
    dated = r"^## \S+ \(\d{4}-.+\)$"  # of releases that there have been since
    changes.write_text(re.sub(dated, "## An older one", changes.read_text(), flags=re.MULTILINE))
    if "(not released yet)" not in changes.read_text():
        first = "## 0.1.0 (not released yet)"
        changes.write_text(changes.read_text().replace("## An older one", first, 1))
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    assert release(tmp_path, "--next", "0.1.0")[0] == 0
    return tmp_path


def release(tree, *arguments):
    """The exit status of .ci/release.py, and what it printed."""
    command = [sys.executable, tree / RELEASE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_texts_are_in_line():
    assert release(ROOT) == (0, "")


def test_a_release_dates_the_changes_and_installs_from_the_index(tree):
    status, said = release(tree, "--version", "0.1.0")
    assert status == 0 and "CHANGELOG.md" in said
    assert re.search(r"^## 0\.1\.0 \(\d{4}-\d\d-\d\d\)$", (tree / "CHANGELOG.md").read_text(), re.M)
    assert re.search(r"^    pip install hex-ssl +#", (tree / "README.md").read_text(), re.M)
    assert "hex-ssl[plots] @ git" not in (tree / "docs/first_run.ipynb").read_text()
    citation = yaml.safe_load((tree / "CITATION.cff").read_text())
    assert citation["version"] == "0.1.0" and citation["date-released"]
    assert release(tree, "--tag", "v0.1.0") == (0, "")
    assert release(tree, "--version", "0.1.1")[0] == 1  # nothing new is there to be released
    assert "which was released on 2" in release(tree, "--next", "0.1.0")[1]


@pytest.mark.parametrize("option", ["--version", "--next"])
@pytest.mark.parametrize("version", ["v0.1.0", "0.1", "0.1.0rc1"])
def test_a_version_of_another_form_is_refused(tree, option, version):
    status, said = release(tree, option, version)
    assert status == 1 and f"{option}: got '{version}', wanted three numbers" in said


def test_work_that_gets_another_number_leaves_no_section_behind(tree):
    release(tree, "--next", "0.2.0")
    release(tree, "--version", "0.3.0")
    changes = (tree / "CHANGELOG.md").read_text()
    assert re.search(r"^## 0\.3\.0 \(2", changes, re.MULTILINE)
    assert "not released yet" not in changes and "## 0.2.0" not in changes


def test_after_a_release_the_next_version_has_a_section_of_its_own(tree):
    release(tree, "--version", "0.1.0")
    release(tree, "--next", "0.2.0")
    headings = re.findall(r"^## (.+)$", (tree / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "0.2.0 (not released yet)" and headings[1].startswith("0.1.0 (2")
    assert '__version__ = "0.2.0"' in (tree / "hex/__init__.py").read_text()
    citation = yaml.safe_load((tree / "CITATION.cff").read_text())
    assert citation["version"] == "0.2.0" and "date-released" not in citation
    assert "pip install hex-ssl" in (tree / "README.md").read_text()
    assert release(tree) == (0, "")
    assert release(tree, "--tag", "v0.2.0")[0] == 1


def test_a_tag_before_the_release_is_refused():
    status, said = release(ROOT, "--tag", "v9.9.9")
    assert status == 1 and "v9.9.9" in said


def test_the_repository_moves_in_all_texts_at_once(tree):
    old = archives.address().removeprefix("https://github.com/")
    assert release(tree, "--address", "https://github.com/someone/else")[0] == 0
    for name in TEXTS:
        assert old not in (tree / name).read_text(), name
    assert "raw.githubusercontent.com/someone/else/main/" in (tree / "README.md").read_text()
    assert release(tree) == (0, "")


def test_an_address_of_another_kind_is_refused(tree):
    for address in ("example.org", "https://github.com/someone/else.git"):
        status, said = release(tree, "--address", address)
        assert status == 1 and "wanted https://github.com/OWNER/NAME" in said


def test_what_is_out_of_line_is_named_and_mended(tree):
    citation = tree / "CITATION.cff"
    right = citation.read_text()
    citation.write_text(right.replace("version: 0.1.0", "version: 0.0.9"))
    status, said = release(tree)
    assert status == 1 and "CITATION.cff" in said
    assert release(tree, "--mend")[0] == 0 and citation.read_text() == right
