# SPDX-License-Identifier: MIT
"""docs/paper_runs.md is what examples/paper/table.py makes of the settings and the results."""

import importlib.util
import json
import re
from collections import Counter

import pytest

for name in ("torchvision", "lightly", "yaml"):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the examples need {name}, which is not installed", allow_module_level=True)


from paper import settings as of  # noqa: E402
from paper import table  # noqa: E402


def test_the_page_is_what_its_results_make():
    page = table.PAGE.read_text()
    assert table.written(page) == page


def test_a_result_is_taken_over_once_and_stands_in_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(table, "PAGE", tmp_path / "page.md")
    places = "".join(f"<!-- paper {name} -->\n\nold\n\n<!-- end -->\n" for name in table.TABLES)
    (tmp_path / "page.md").write_text(places)
    (tmp_path / "results.json").write_text(
        '{"paper": {"imagenet_simclr imagenet resnet50": 1.5}, "ours": {}}'
    )
    result = {
        "run": "imagenet_simclr", "data": "imagenet", "backbone": "resnet50", "tiny": False,
        "variant": "released", "seed": 5, "devices": 8,
        "linear": {"1": [0.25, 0.5], "0.1": [0.125, 1]},
    }  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    for _ in range(2):
        assert table.main([str(tmp_path)]) == 0
    page = (tmp_path / "page.md").read_text()
    row = "| `imagenet_simclr` | ImageNet | ResNet-50 | 1.50 | 25.00 (100%), 12.50 (10%) |  |"
    assert row in page.splitlines()
    counts = Counter(re.findall("not run|not found by us", page))
    assert counts["not found by us"] == len(of.combinations()) - 1 == 37
    hexes = sum(x[3]["loss"] == "hex" for x in of.combinations())
    assert counts["not run"] == len(of.combinations()) + hexes - 1
    for wrong, text in (
        (result | {"tiny": True}, "got a run of --tiny"),
        (None, "wanted the result"),
    ):
        (tmp_path / "result.json").unlink()
        if wrong:
            (tmp_path / "result.json").write_text(json.dumps(wrong))
        assert table.main([str(tmp_path)]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("form", ("released", "paper"))
def test_a_run_of_the_method_alone_stands_in_the_table_whatever_form_it_names(form, monkeypatch):
    row = {"variant": form, "seed": 5, "devices": 1, "linear": {"1": [0.25, 0.5]}}
    known = {"paper": {}, "ours": {"cifar_simclr cifar100 resnet18": [row]}}
    monkeypatch.setattr(table, "results", lambda: known)
    assert table.results_table().count("25.00 (100%)") == 1


def test_the_cost_of_imagenet_is_that_of_two_views_of_each_image():
    settings = of.read(of.FOLDER / "imagenet_simclr.yaml")
    training, probes = table.cost("imagenet", "resnet50", settings)
    assert training == pytest.approx(2 * 1.281167 * 100)
    assert probes == pytest.approx(1.281167 * 100 * 1.11 / 3)
    assert 0.1 < table.work("cifar10", "resnet18") < table.work("cifar10", "resnet50") < 1
