# SPDX-License-Identifier: MIT
"""requirements/ci.txt, what CI installs: it serves what pyproject.toml asks for, on every Python,
and every file is held to a hash. `make lock` makes it."""

import re
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
EXTRAS = ("examples", "test", "benchmarks", "dev", "docs")  # those of the Makefile
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)


def named(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def listed(file):
    """The lines of a list of names."""
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    return {named(line) for line in lines if not line.startswith("#")}


def locked():
    """[(requirement, its hashes)]"""
    text = (ROOT / "requirements/ci.txt").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return [(Requirement(line.partition(" --hash=")[0]), line.split()) for line in lines]


LOCKED = locked()


def asked_for():
    """What the extras of pyproject.toml name, as a Python before 3.11 can read it."""
    for extra in EXTRAS:
        (block,) = re.findall(rf"^{extra} = \[(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
        block = re.sub(r"#.*", "", block)
        yield from (Requirement(a or b) for a, b in re.findall(r"\"([^\"]+)\"|'([^']+)'", block))


def test_every_requirement_is_one_version_with_the_hashes_of_its_files():
    assert len(LOCKED) > 80
    for requirement, words in LOCKED:
        assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), requirement
        assert requirement.url is None
        hashes = [word for word in words if word.startswith("--hash")]
        assert hashes, requirement
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", found) for found in hashes)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_what_is_asked_for_is_there_once_in_a_version_that_will_do(python, machine):
    environment = default_environment() | {
        "python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux",
        "platform_machine": machine,
    }  # fmt: skip
    given = {}
    for requirement, _ in LOCKED:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert named(requirement.name) not in given, requirement
            given[named(requirement.name)] = str(requirement.specifier).removeprefix("==")
    for requirement in asked_for():
        name = named(requirement.name)
        if name not in listed("not.in"):
            assert requirement.specifier.contains(given[name]), requirement
    assert listed("ci.in") <= set(given)


def test_what_differs_from_index_to_index_is_left_out():
    left_out = listed("not.in")
    assert left_out == {"torch", "torchvision"}
    names = {named(requirement.name) for requirement, _ in LOCKED}
    assert not left_out & names
    assert not [name for name in names if re.match("triton|nvidia-(?!cuda-(cuobj|nvdis))", name)]


def test_ci_installs_it_and_a_missing_one_is_an_error():
    assert "\nexport LOCK=requirements/ci.txt" in (ROOT / ".ci/run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert "$(if $(LOCK),--no-deps --require-hashes -r $(LOCK)," in makefile
    assert "$(if $(LOCK),--no-index)" in makefile


def test_what_builds_the_package_is_bounded_and_the_locked_one_is_within():
    (named_there,) = re.findall(r'^requires = \["(.+)"\]', PYPROJECT, re.MULTILINE)
    needed = Requirement(named_there)
    assert needed.name == "setuptools"
    assert {s.operator for s in needed.specifier} == {">=", "<"}
    (version,) = {str(r.specifier)[2:] for r, _ in LOCKED if r.name == "setuptools"}
    assert needed.specifier.contains(version)
