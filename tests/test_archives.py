# SPDX-License-Identifier: MIT
"""archives.py, which says what is wrong with the files of a release: here of archives with one
fault each. test_build.py has it look at those that a build makes.
"""

import base64
import hashlib
import io
import tarfile
import zipfile

import archives
import pytest

VERSION = archives.version()
FILES = archives.sources("--cached", "--others", "--exclude-standard")
PACKAGE = {n for n in FILES if n.startswith("hex/")}


def metadata(version=VERSION):
    extras = "".join(f"Provides-Extra: {extra}\n" for extra in archives.extras())
    return (
        f"Name: hex-ssl\nVersion: {version}\nRequires-Python: >=3.10\nRequires-Dist: torch>=2.10\n"
        "Requires-Dist: rich; extra == 'examples'\nLicense-Expression: MIT\nLicense-File: LICENSE\n"
        f"Description-Content-Type: text/markdown\n{extras}\n"
    ).encode()


def wrong_in_wheel(folder, change=None, version=VERSION, platform=archives.OLDEST, **options):
    """What is said of a good wheel after `change`, a function of {name: content}."""
    tag, info = f"cp310-abi3-{platform}", f"hex_ssl-{version}.dist-info"
    files = {name: name.encode() for name in [*PACKAGE, "hex/_C.abi3.so"]}
    files |= {"hex/_cuda.so": b"kernels"} if "+" in version else {}
    files |= {f"{info}/{name}": b"" for name in archives.DIST_INFO}
    files[f"{info}/METADATA"] = metadata(version)
    files[f"{info}/WHEEL"] = f"Root-Is-Purelib: false\nTag: {tag}\n".encode()
    lines = [f"{info}/RECORD,,"]
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        lines += [f"{name},sha256={digest},{len(content)}"] * (not name.endswith("RECORD"))
    files[f"{info}/RECORD"] = "".join(line + "\n" for line in lines).encode()
    files = change(files) if change else files
    path = folder / f"hex_ssl-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return archives.wrong_in_wheel(path, FILES, **options)


def test_nothing_is_wrong_with_good_wheels(tmp_path):
    assert wrong_in_wheel(tmp_path) == []
    assert wrong_in_wheel(tmp_path, version=VERSION + "+cu130", platform="manylinux_2_34_x") == []
    assert wrong_in_wheel(tmp_path, platform="linux_x", published=False) == []


@pytest.mark.parametrize("name", ["hex/_cuda.so", "tests/bits.py", "hex_ssl.libs/libm.so"])
def test_what_does_not_belong_into_a_wheel_is_named(tmp_path, name):
    assert wrong_in_wheel(tmp_path, lambda files: {**files, name: b""}) == [
        f"{name} does not belong there"
    ]


@pytest.mark.parametrize("name", ["hex/py.typed", "hex/_C.abi3.so", "hex/loss.py", "LICENSE"])
def test_what_a_wheel_lacks_is_named(tmp_path, name):
    (said,) = wrong_in_wheel(
        tmp_path, lambda files: {k: v for k, v in files.items() if not k.endswith(name)}
    )
    assert said.endswith(f"{name} is missing")


def test_a_wheel_with_a_local_version_has_the_cuda_kernels(tmp_path):
    (said,) = wrong_in_wheel(
        tmp_path,
        lambda files: {k: v for k, v in files.items() if k != "hex/_cuda.so"},
        version=VERSION + "+cu130",
    )
    assert said == "hex/_cuda.so is missing"


def test_a_wheel_of_another_version_or_platform_is_refused(tmp_path):
    assert wrong_in_wheel(tmp_path, version="99.0") == [f"version: got 99.0, wanted {VERSION}"]
    said = wrong_in_wheel(tmp_path, platform="linux_x86_64")
    assert said[0] == "platform: got {'linux_x86_64'}, wanted a manylinux"
    newer = f"platform: got {{'manylinux_2_34_x'}}, wanted {archives.OLDEST}"
    said = wrong_in_wheel(tmp_path, platform="manylinux_2_34_x")
    assert said == ([newer] if archives.has_oldest() else [])


def test_what_a_wheel_says_of_itself_wrongly_is_found(tmp_path):
    def changed(file, old, new):
        def change(files):
            (name,) = [n for n in files if n.endswith(file)]
            assert old in files[name]
            return files | {name: files[name].replace(old, new)}

        return wrong_in_wheel(tmp_path, change)

    record = "RECORD: its files, hashes and sizes are not those of the wheel"
    assert changed("hex/loss.py", b"loss", b"boss") == [record]
    assert changed("RECORD", b"hex/loss.py", b"hex/boss.py") == [record]
    assert changed("/WHEEL", b"Tag: cp310", b"Tag: cp311")[0].startswith("WHEEL: its tags ")
    assert "WHEEL: Root-Is-Purelib is not false" in changed("/WHEEL", b"false", b"true")
    needs = changed("/METADATA", b"torch>=2.10\n", b"torch>=2.10\nRequires-Dist: numpy\n")
    assert "Requires-Dist: got ['torch>=2.10', 'numpy'], wanted ['torch>=2.10']" in needs
    assert changed("/METADATA", b"3.10", b"3.9")[0].startswith("Requires-Python: got '>=3.9'")


def wrong_in_sdist(folder, names, text=None, name=f"hex_ssl-{VERSION}"):
    with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as archive:
        for member, content in [(n, b"") for n in names] + [("PKG-INFO", text or metadata())]:
            entry = tarfile.TarInfo(f"{name}/{member}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return archives.wrong_in_sdist(folder / f"{name}.tar.gz", FILES)


def test_a_source_archive_holds_the_tracked_files_and_what_setuptools_adds(tmp_path):
    assert {"csrc/module.c", "tests/bits.py", "LICENSE", "hex/py.typed", "setup.py"} <= FILES
    assert not any(name.endswith((".so", ".pyc")) for name in FILES)
    added = {"setup.cfg", "hex_ssl.egg-info/SOURCES.txt"}
    assert wrong_in_sdist(tmp_path, FILES | added) == []
    assert wrong_in_sdist(tmp_path, FILES - {"csrc/module.c"} | {"hex/_C.abi3.so"}) == [
        "csrc/module.c is missing",
        "hex/_C.abi3.so does not belong there",
    ]
    (said,) = wrong_in_sdist(tmp_path, FILES, metadata("99.0"))
    assert said == f"Version: got '99.0', wanted '{VERSION}'"
    assert wrong_in_sdist(tmp_path, FILES, name="hex-ssl-1") == [
        f"its name is not hex_ssl-{VERSION}.tar.gz"
    ]


def test_the_exit_status_tells_of_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(archives, "sources", lambda: FILES)
    name = f"hex_ssl-{VERSION}.tar.gz"
    for files, status, said in (
        (FILES - {"LICENSE"}, 1, "LICENSE is missing"),
        (FILES, 0, "holds what it has to hold, and nothing else"),
    ):
        wrong_in_sdist(tmp_path, files)
        assert archives.main([str(tmp_path / name), "--into", str(tmp_path / "dist")]) == status
        assert capsys.readouterr().out == f"{tmp_path}/dist/{name}: {said}\n"
    assert (tmp_path / "dist" / name).read_bytes() == (tmp_path / name).read_bytes()
