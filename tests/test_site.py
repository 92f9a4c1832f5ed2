# SPDX-License-Identifier: MIT
"""The documentation site: it builds without a warning, what it links to and shows is there, and its
API reference has an entry for every public name.

The pages themselves are tested in test_docs.py, and the notebook in test_notebook.py.
"""

import importlib
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import archives
import pytest

import hex

ROOT = Path(__file__).parent.parent
REPOSITORY = archives.address()
MODULES = ("hex", "hex.lightning", "hex.open_clip", "hex.plots", "hex.presets", "hex.watch")

pytest.importorskip("furo", reason="the site needs hex-ssl[docs]")
pytest.importorskip("hex.lightning", exc_type=ImportError)  # which it documents


class Page(HTMLParser):
    """What a page links to or shows, and what in it can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.targets, self.anchors = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.targets.append(value)
            if name == "id":
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it, elsewhere, and what the build said."""
    folder = tmp_path_factory.mktemp("site")
    command = re.search(r"^SPHINX = \S+ (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    command[command.index("build/doctrees")] = str(folder / "doctrees")
    run = [sys.executable, *command, str(folder / "html")]
    return folder / "html", subprocess.run(run, cwd=ROOT, capture_output=True, text=True)


def pages(html):
    return sorted(html.rglob("*.html"))


def test_it_builds_without_a_warning(site):
    html, built = site
    assert built.returncode == 0 and not built.stdout + built.stderr, built.stderr
    assert (html / "index.html").exists()


def test_every_document_has_a_page(site):
    html, _ = site
    folders = ("docs", "docs/guides", "docs/recipes", "docs/api")
    documents = [path for folder in folders for path in (ROOT / folder).glob("*.md")]
    documents.append(ROOT / "docs" / "first_run.ipynb")
    for path in documents:
        assert (html / path.relative_to(ROOT / "docs")).with_suffix(".html").exists(), path
    for path in (*ROOT.glob("*.md"), ROOT / "examples" / "README.md"):
        title = re.search(r"^# (.+)$", path.read_text(), re.M)[1]
        titles = [re.findall(r"<h1>(.+?)<", page.read_text()) for page in pages(html)]
        assert [title] in titles, path


def test_links_and_images_lead_somewhere(site):
    html, _ = site
    read = cache(Page)
    assert len(pages(html)) > 30
    for page in pages(html):
        for target in read(page).targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            found = (page.parent / unquote(url.path)).resolve() if url.path else page
            assert found.is_file(), f"{page.relative_to(html)}: {target}"
            if url.fragment and found.suffix == ".html":
                anchors = read(found).anchors
                assert unquote(url.fragment) in anchors, f"{page.relative_to(html)}: {target}"


def test_links_to_files_of_the_repository_lead_to_files_that_exist(site):
    html, _ = site
    links = {target for page in pages(html) for target in Page(page).targets}
    pattern = re.escape(REPOSITORY) + r"/(blob|tree|edit|raw)/main/([^#?]+)"
    found = [match.groups() for target in links if (match := re.match(pattern, target))]
    assert len(found) > 30
    for kind, name in found:
        path = ROOT / unquote(name)
        assert path.is_dir() if kind == "tree" else path.is_file(), name


def test_links_between_pages_stay_on_the_site(site):
    html, _ = site
    for page in pages(html):
        main = re.search(r"<article .*?</article>", page.read_text(), re.S)
        if main is None:  # the index and the search
            continue
        left = re.findall(re.escape(REPOSITORY) + r"/blob/main/([\w/-]+\.(?:md|ipynb))", main[0])
        left += re.findall(r'href="([^":]+\.md)', main[0])
        assert not left, f"{page.relative_to(html)}: {left}"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_an_entry_in_the_api_reference(name, site):
    html, _ = site
    anchors = set().union(*(Page(page).anchors for page in pages(html / "api")))
    public = importlib.import_module(name).__all__
    assert public
    assert {f"{name}.{public_name}" for public_name in public} <= anchors


def test_methods_that_users_call_have_entries_too(site):
    html, _ = site
    anchors = set().union(*(Page(page).anchors for page in pages(html / "api")))
    methods = {"HEXLoss.forward", "HEXLoss.set_epoch", "HEXLoss.statistics", "Statistics.share"}
    methods |= {f"ThresholdTracker.{rule}" for rule in ("adaptive", "fixed", "step", "cosine")}
    assert {f"hex.{method}" for method in methods} <= anchors


def test_no_markup_of_a_docstring_is_left(site):
    html, _ = site
    for page in pages(html / "api"):
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", page.read_text(), flags=re.S)
        assert "`" not in text and "system-message" not in text, page.name


def test_quotes_are_as_they_are_written_for_they_are_copied(site):
    html, _ = site
    for page in pages(html):
        main = re.search(r"<article .*?</article>", page.read_text(), re.S)
        assert main is None or not re.findall("[\u2018\u2019\u201c\u201d]", main[0]), page.name


def test_constants_are_described_by_a_text_of_their_own(site):
    """Not by that of their type, which is what Sphinx takes where there is none."""
    html, _ = site
    text = (html / "api/plots.html").read_text()
    assert "A colour of Okabe and Ito" in text
    for page in pages(html / "api"):
        assert "Create a new string object" not in page.read_text(), page.name
        assert "new empty dictionary" not in page.read_text(), page.name


def test_the_site_can_be_searched(site):
    html, _ = site
    index = (html / "searchindex.js").read_text()
    assert (html / "search.html").exists() and '"quantil' in index  # words are stored as stems


def test_the_version_is_that_of_the_package(site):
    html, _ = site
    assert f"<title>hex-ssl {hex.__version__}</title>" in (html / "index.html").read_text()
