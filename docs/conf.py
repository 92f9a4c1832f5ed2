# SPDX-License-Identifier: MIT
"""Sphinx's configuration of the documentation site, which `make docs` builds in build/site.

The pages are the Markdown files of docs/ as they are on the repository's host. Two things differ
between the two, and are turned into what Sphinx expects here: where a link between files leads, and
how a docstring is written. The version and the address of the repository are read from where the
package has them.
"""

import contextlib
import os
import re
import sys
from pathlib import Path

import hex

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.append(str(ROOT / "examples"))
with contextlib.suppress(ModuleNotFoundError):
    import common.vision  # noqa: F401  Lightning imports torchvision; see there
REPOSITORY = re.search(r'^Source = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
OURS = (  # where the host shows a file, and where an image is
    f"{REPOSITORY}/blob/main/",
    f"{REPOSITORY}/main/".replace("github.com", "raw.githubusercontent.com"),
)

project = "hex-ssl"
author = "The hex-ssl authors"
version = release = hex.__version__
extensions = [
    "myst_nb",  # Markdown, and the notebook
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
highlight_language = "none"  # of blocks that name none: equations and commands
smartquotes = False  # in "all" or pip install 'hex-ssl[plots]' they would be wrong when copied

html_theme = "furo"
html_title = f"hex-ssl {version}"
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

myst_heading_anchors = 6
nb_execution_mode = "off"  # the notebook is stored with its outputs

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
default_role = "py:obj"  # of `name` in a docstring
napoleon_use_ivar = True
napoleon_custom_sections = [("Shape", "params_style")]

# Own links are held to the tree by tests/test_site.py. The host draws its anchors by a script.
linkcheck_ignore = [re.escape(REPOSITORY)]
linkcheck_anchors_ignore_for_url = ["https://github.com/"]
linkcheck_timeout = 20


def pages() -> dict[Path, str]:
    """The page on which each Markdown file of the repository is, as a path from docs/.

    A file outside docs/ is on the page that includes it.
    """
    found = {}
    for page in [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]:
        at = f"/{page.relative_to(DOCS)}"
        found[page] = at
        for included in re.findall(r"^```{include} (\S+)$", page.read_text(), re.M):
            found[(page.parent / included).resolve()] = at
    return found


PAGES = pages()


def local(target: str, folder: Path) -> str:
    """Where a link or an image of a file in `folder` leads from the site."""
    whole, sharp, anchor = target.partition("#")
    path = Path(os.path.normpath(folder / whole))
    for address in OURS:
        if whole.startswith(address):
            path = ROOT / whole.removeprefix(address)
    if path in PAGES:
        return PAGES[path] + sharp + anchor
    if not whole or not path.exists():
        return target  # Sphinx says so, if it leads nowhere
    if path.suffix == ".png" and path.is_relative_to(DOCS):
        return f"/{path.relative_to(DOCS)}"
    kind = "tree" if path.is_dir() else "blob"
    return f"{REPOSITORY}/{kind}/main/{path.relative_to(ROOT)}{sharp}{anchor}"


def relink(text: str, folder: Path) -> str:
    """The Markdown of a file in `folder` with its links as they have to be on the site."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # code has no links
    for k in range(0, len(parts), 2):
        parts[k] = re.sub(r"(?<=\]\()[^)\s]+(?=\))", lambda link: local(link[0], folder), parts[k])
    return "".join(parts)


def relink_page(app: object, name: str, content: list[str]) -> None:
    page = next(p for p in PAGES if p.is_relative_to(DOCS) and p.with_suffix("") == DOCS / name)
    content[0] = relink(content[0], page.parent)


def relink_included(app: object, path: Path, name: str, content: list[str]) -> None:
    content[0] = relink(content[0], (DOCS / path).resolve().parent)


def to_rst(
    app: object, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Turns what a docstring of the package has of Markdown into reStructuredText, in place.

    That is: indented equations, tables, bars as in |H|, and files of docs/ that are named.
    """
    out: list[str] = []
    literal: int | None = None  # inside a literal block the indentation of what introduces it
    for line in lines:
        indent, last = depth(line), next(filter(None, reversed(out)), "")
        if literal is not None and line and indent <= literal:
            literal = None
        if literal is None and line and out and not out[-1] and indent > depth(last):
            literal = depth(last)
            if not last.endswith("::"):
                out += [" " * literal + "::", ""]
        if literal is not None:
            out.append(line)
        elif re.match(r" *\|.*\|$", line):
            margin = " " * indent
            if not last.startswith(margin + "   "):  # the first row
                out += [f"{margin}.. list-table::", f"{margin}   :header-rows: 1", ""]
            for k, cell in enumerate(re.findall(r"[^|]+(?=\|)", line)):
                if cell.strip("-"):
                    out.append(f"{margin}   {' ' if k else '*'} - {cell.strip()}")
        else:
            line = re.sub(r"docs/([\w/]+)\.md", r":doc:`/\1`", line.replace("|", r"\|"))
            out.append(re.sub(rf"`({'|'.join(hex.__all__)})`", r"`~hex.\1`", line))
    lines[:] = out


def depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def setup(app: object) -> None:
    app.connect("source-read", relink_page)
    app.connect("include-read", relink_included)
    app.connect("autodoc-process-docstring", to_rst, priority=100)  # before napoleon
