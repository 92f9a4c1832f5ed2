# SPDX-License-Identifier: MIT
"""docs/first_run.ipynb: it runs from top to bottom on the CPU, and its stored outputs are those of
a run.

How the site shows it is tested in test_site.py.
"""

import base64
import math
import re
import subprocess
import sys
from pathlib import Path

import archives
import pytest

nbformat = pytest.importorskip("nbformat", reason="running a notebook needs nbclient")
pytest.importorskip("ipykernel", reason="running a notebook needs ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "first_run.ipynb"
REPOSITORY = archives.address()
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module", params=["stored", "run anew"])
def notebook(request, tmp_path_factory):
    """As it is in the repository, and as it is after a run of all of its cells."""
    path = NOTEBOOK
    if request.param == "run anew":
        path = tmp_path_factory.mktemp("notebook") / "run.ipynb"
        program = ROOT / "docs" / "run_notebook.py"
        subprocess.run([sys.executable, str(program), str(path)], check=True, cwd=path.parent)
    return nbformat.read(path, as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def test_every_cell_has_run_once_in_order_and_without_a_word_on_stderr(notebook):
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text


def test_it_draws_the_views_the_threshold_the_cosines_and_the_neighbours(notebook):
    drawn = [output.data["image/png"] for output in outputs(notebook) if "data" in output]
    assert len(drawn) == 4
    assert all(base64.b64decode(png).startswith(PNG) for png in drawn)
    assert sum(map(len, drawn)) < 600_000


def test_both_losses_learn(notebook):
    text = printed(notebook)
    for name in ("InfoNCE", "HEX"):
        run = re.search(rf"^{name}\n((?:epoch .*\n)+)", text, re.M)[1]
        losses = [float(loss) for loss in re.findall(r"loss (\S+)", run)]
        assert len(losses) == 4 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def test_infonce_has_no_h_and_that_of_hex_is_mostly_of_the_anchors_class(notebook):
    rows = re.findall(r"eps (\S+)  hard (\S+)  share (\S+)  class_share (\S+)", printed(notebook))
    infonce, hex_rows = rows[:4], rows[4:]
    assert set(infonce) == {("inf", "0.000", "0.000", "nan")} and len(hex_rows) == 4
    eps, hard, share, own = map(float, hex_rows[-1])
    # The text says so: about 1 % of 510, "rises far above chance", which is a tenth.
    assert 0 < eps < 1 and 4 < hard < 12 and 0 < share < 1 and own > 0.5


def test_the_encoders_tell_digits_apart(notebook):
    table = re.findall(r"^(\w+) +([\d.]+)% +([\d.]+)% +([\d.]+)%$", printed(notebook), re.M)
    accuracies = {name: [float(x) for x in row] for name, *row in table}
    assert set(accuracies) == {"pixels", "InfoNCE", "HEX"}
    for name in ("InfoNCE", "HEX"):  # chance is 10
        knn, probe, one = accuracies[name]
        assert knn > 90 and probe > 90 and one > 30


def test_the_stored_notebook_says_nothing_of_the_machine_it_ran_on():
    text = NOTEBOOK.read_text()
    assert not re.findall(
        r"/(?:home|root|tmp|usr|opt|work|Users|content)/|[A-Z]:\\\\|site-packages", text
    )
    assert nbformat.read(NOTEBOOK, as_version=4).metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_its_links_are_whole_addresses_for_colab_shows_it_too():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    text = "\n".join(cell.source for cell in cells)
    page = f"{REPOSITORY}/blob/main/"
    colab = page.replace("https://github.com", "https://colab.research.google.com/github")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert f"{colab}docs/{NOTEBOOK.name}" in links
    assert re.search(rf'"hex-ssl\[plots\]( @ git\+{REPOSITORY})?"', cells[1].source)
    for link in links:
        assert link.startswith("https://"), link
        if link.startswith(page):
            assert (ROOT / link.removeprefix(page)).exists(), link
    assert text.count(page) >= 4
