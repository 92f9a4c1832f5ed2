# SPDX-License-Identifier: MIT
"""With the local term off, our lines give the values of the code bases that they are for.

Our lines are those of docs/recipes, run as they are, and of the tables in README.md and
docs/swap.md. The code bases on PyPI are called; what the others gave is in recorded/values.json,
with the commit, by recorded/record.py, which runs them. All of it is in float64.
"""

import json
import math
import re
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from gist import gist
from torch import Tensor
from torch.nn import functional as F

import hex
from hex.open_clip import HEXClipLoss

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "recipes"))

import make  # noqa: E402

RECORDED = json.loads((ROOT / "tests" / "recorded" / "values.json").read_text())
MODULES = hex.HEXLoss, hex.HEXSupConLoss, hex.HEXCrossEntropyLoss, HEXClipLoss
FUNCTIONS = {"hex_loss": hex.hex_loss, "ThresholdTracker": hex.ThresholdTracker}
UNIT = 2.0**-53


def tensor(value):
    if not isinstance(value, list):
        return value
    made = torch.tensor(value, dtype=torch.float64)
    return made.long() if all(type(x) is int for x in value) else made


def cases(name: str) -> list[Namespace]:
    """What the loss of a code base was given, and its value."""
    return [
        Namespace(**{k: tensor(v) for k, v in case["given"].items()}, value=case["value"])
        for case in RECORDED[name]["cases"]
    ]


def ours(threshold=None) -> dict:
    """Our names, with that threshold whatever the line says; None: InfoNCE."""

    def made(kind):
        return lambda *args, **options: kind(*args, **options | {"threshold": threshold})

    off = {"batch_threshold": lambda *args, **options: math.inf}
    modules = {kind.__name__: made(kind) for kind in MODULES}
    package = Namespace(open_clip=Namespace(HEXClipLoss=modules["HEXClipLoss"]))
    return FUNCTIONS | off | modules | {"hex": package}


def agree(value, wanted, rows: int, temperature: float, slack: float = 0) -> None:
    """To the rounding of both: of a cosine of few features over T, and of a sum over the rows.

    8 is for the two of them, and for the operations on each of D = 6 terms and on each row.
    """
    value, wanted = float(value), float(wanted)
    rounding = 8 * UNIT * max(1, abs(wanted)) * (8 / temperature + rows)
    assert abs(value - wanted) <= rounding + slack


@pytest.mark.parametrize("name", RECORDED)
def test_what_was_recorded_is_of_the_recipes_commit(name):
    found = [RECORDED[name]["repository"], RECORDED[name]["commit"]]
    for diff in (ROOT / "docs" / "recipes").glob("*.diff"):
        repository, commit, _ = make.read(diff.read_text())
        assert diff.stem in RECORDED and (repository != found[0] or commit == found[1])


# ---- the recipes, as they are -------------------------------------------------------------------


def run(name: str, threshold=None, **names) -> dict:
    """The lines of a recipe but the import, run one after the other; all names after that."""
    _, _, files = make.read((ROOT / "docs" / "recipes" / f"{name}.diff").read_text())
    lines = [line.strip() for added in files.values() for _, line in added]
    names |= ours(threshold)
    for line in lines:
        if line.startswith("return "):  # of a function of theirs
            names["returned"] = eval(line.removeprefix("return "), names)
        elif not line.startswith("from hex import "):
            exec(line, names)
    return names


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self, *_: self)


def the_criterion_on_logits(case, threshold=None):
    args = Namespace(temperature=case.T, device="cpu")
    return run("simclr", threshold, self=Namespace(args=args), epoch_counter=0)["self"].criterion


def the_criterion_on_mocos_logits(case, threshold=None):
    args = Namespace(moco_t=case.T, gpu=None)
    return run("moco", threshold, args=args, epoch=0)["criterion"]


def the_loss_that_mmpretrain_builds(case, threshold=None):
    registered = {}
    registry = Namespace(register_module=lambda module: registered.update(loss=module))
    names = run("mmpretrain", threshold, MODELS=registry, model={"head": {}})
    options = dict(names["model"]["head"]["loss"])
    assert options.pop("type") == "HEXCrossEntropyLoss" and options["temperature"] == case.T
    return registered["loss"](**options)


ON_LOGITS = {
    "simclr": the_criterion_on_logits,
    "moco": the_criterion_on_mocos_logits,
    "mmpretrain": the_loss_that_mmpretrain_builds,
}


def embeddings(case) -> tuple[Tensor, ...]:
    """What the logits were made of."""
    return (case.q, case.k, case.queue.T) if hasattr(case, "queue") else (case.z0, case.z1)


def check_on_logits(case, make_criterion) -> None:
    """The value; and that the threshold is the one that the embeddings have.

    To 2e-10: mmpretrain divides by |z| + 1e-10, where |z| is at least 1 here.
    """
    value = make_criterion(None)(case.logits, case.labels)
    agree(value, case.value, case.logits.shape[1], case.T)
    thresholds = []
    for over in ("all", "negatives"):
        whole, of_logits = (hex.ThresholdTracker.adaptive(0.75, over=over) for _ in range(2))
        on_embeddings = hex.HEXLoss(case.T, threshold=whole)
        on_embeddings(*embeddings(case))
        criterion = make_criterion(of_logits)
        criterion(case.logits, case.labels)
        eps = float(on_embeddings.last.eps)
        agree(criterion.last.eps, eps, case.logits.shape[1], 1, slack=2e-10)
        thresholds.append(eps)
    assert thresholds[0] != thresholds[1]


@pytest.mark.parametrize("name", ON_LOGITS)
def test_the_recipe_on_logits(name):
    for case in cases(name):
        check_on_logits(case, lambda threshold, case=case: ON_LOGITS[name](case, threshold))


def test_the_recipe_of_solo_learn_for_two_three_and_four_crops_and_for_labels():
    found = cases("solo-learn")
    assert {len(case.z) // 5 for case in found} == {2, 3, 4}
    for case in found:
        names = run("solo-learn", self=Namespace(temperature=case.T), z=case.z,
                    indexes=case.indexes)  # fmt: skip
        agree(names["nce_loss"], case.value, len(case.z), case.T)


def test_the_recipe_of_solo_learns_nnclr():
    for case in cases("solo-learn-nnclr"):
        names = run("solo-learn-nnclr", self=Namespace(temperature=case.T), nn1=case.nn1,
                    nn2=case.nn2, p1=case.p1, p2=case.p2)  # fmt: skip
        agree(names["nnclr_loss"], case.value, 5, case.T)


def test_the_recipe_of_supcontrast_for_two_three_and_four_views_with_labels_and_without():
    found = cases("supcontrast")
    assert {case.features.shape[1] for case in found} == {2, 3, 4}
    assert {hasattr(case, "labels") for case in found} == {True, False}
    for case in found:
        criterion = run("supcontrast", opt=Namespace(temp=case.T), epoch=1)["criterion"]
        value = criterion(case.features, getattr(case, "labels", None))
        agree(value, case.value, case.features.shape[:2].numel(), case.T)


def test_the_recipe_of_stable_pretraining():
    for case in cases("stable-pretraining"):
        names = run("stable-pretraining", self=Namespace(), temperature=case.T)
        agree(names["self"].simclr_loss(case.z1, case.z2), case.value, 10, case.T)


def test_the_recipe_of_inf_cl():
    for case in cases("inf-cl"):
        found = run("inf-cl", self=Namespace(), q=case.q, k=case.k, l=case.l)["returned"]
        agree(found["contrastive_loss"], case.value, 5, 1 / case.l)
        assert found["show_loss"] == found["contrastive_loss"]


def info_nce(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """Of two views, all others negatives; written out."""
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    own = torch.eye(len(z), dtype=torch.bool)
    logits = (z @ z.T / temperature).masked_fill(own, -math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z0)))


def the_sum_of_dino(case):
    names = {"student_output": case.student_output, "loss": case.value}
    names = run("dino", dino_loss=Namespace(ncrops=case.ncrops), **names)
    return names["loss"], case.student_output[:5], case.student_output[5:10], 0.1


def the_sum_of_barlow_twins(case):
    names = run("barlowtwins", self=Namespace(), z1=case.z1, z2=case.z2, loss=case.value)
    return names["loss"], case.z1, case.z2, 0.1


def the_sum_of_vicreg(case):
    return run("vicreg", x=case.x, y=case.y, loss=case.value)["loss"], case.x, case.y, 0.5


def the_sum_of_byol(case):
    z, loss = case.online_projections, torch.full((5,), case.value, dtype=torch.float64)
    return run("byol", self=Namespace(), online_projections=z, loss=loss)["loss"], *z.chunk(2), 0.1


@pytest.mark.parametrize(
    "name, total, crops",
    [("dino", the_sum_of_dino, [2, 3, 4]), ("barlowtwins", the_sum_of_barlow_twins, [2]),
     ("vicreg", the_sum_of_vicreg, [2]), ("byol", the_sum_of_byol, [2])],
)  # fmt: skip
def test_the_recipe_that_adds_hex_is_their_loss_and_info_nce_in_these_shares(name, total, crops):
    found = cases(name)
    assert [getattr(case, "ncrops", 2) for case in found] == crops
    for case in found:
        value, z0, z1, share = total(case)
        wanted = share * info_nce(z0, z1, 0.1) + 0.9 * case.value
        agree(value, wanted, 10, 0.1)


# ---- the tables ---------------------------------------------------------------------------------


def rows(file: str, column: int) -> dict[str, list[str]]:
    """{code bases: our lines} of the table of code bases; our lines are in that column."""
    lines = (ROOT / file).read_text().partition("code base |")[2].splitlines()[2:]
    table = {}
    for line in lines[: lines.index("")]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        table[cells[0]] = re.findall(r"`([^`]+)`", cells[column])
    return table


def called(line: str, *inputs, threshold=None, **names):
    """What a line of a table comes to: it may leave out the call, with these inputs then."""
    value = eval(line, ours(threshold) | names)
    return value if isinstance(value, (Tensor, float)) else value(*inputs)


def check_line(line: str, name: str) -> None:
    """A line of a table, on what a code base was given."""
    for case in cases(name):
        if name in ON_LOGITS:
            check_on_logits(case, lambda t, case=case: eval(line, ours(t) | vars(case)))
        elif name == "solo-learn-nnclr":
            both = [(case.nn1, case.p2), (case.nn2, case.p1)]
            value = sum(called(line, nn=nn, p=p, T=case.T) for nn, p in both) / 2
            agree(value, case.value, 5, case.T)
        elif name == "inf-cl":
            value = called(line, case.q, case.k, case.l, image=case.q, text=case.k, scale=case.l)
            agree(value, case.value, 5, 1 / case.l)
        elif name == "supcontrast":
            value = called(line, case.features, getattr(case, "labels", None), T=case.T)
            agree(value, case.value, case.features.shape[:2].numel(), case.T)
        elif name == "stable-pretraining":
            agree(called(line, case.z1, case.z2, T=case.T), case.value, 10, case.T)
        elif name in MIXED:
            z0, z1 = views_of(case)
            value = called(line, z0=z0, z1=z1, base=case.value, alpha=0.1, T=0.1)
            agree(value, 0.1 * info_nce(z0, z1, 0.1) + 0.9 * case.value, 10, 0.1)
        elif name == "vicreg":
            value = called(line, z0=case.x, z1=case.y, base=case.value, alpha=0.1, T=0.1)
            agree(value, 0.5 * info_nce(case.x, case.y, 0.1) + 0.9 * case.value, 10, 0.1)
        else:
            agree(called(line, **vars(case)), case.value, 20, case.T)


def views_of(case) -> tuple[Tensor, Tensor]:
    if hasattr(case, "student_output"):
        return case.student_output[:5], case.student_output[5:10]
    return case.online_projections.chunk(2) if hasattr(case, "online_projections") else (
        case.z1, case.z2
    )  # fmt: skip


def check_peer(line: str, name: str) -> None:
    """A line of a table, against a code base from PyPI."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    z0, z1 = draw(2, 5, 6)
    if name == "lightly":
        peer = pytest.importorskip("lightly.loss", exc_type=ImportError).NTXentLoss(0.2)
        agree(called(line, z0, z1, T=0.2), peer(z0, z1), 10, 0.2)
    elif name == "DCLLoss":
        peer = pytest.importorskip("lightly.loss", exc_type=ImportError).DCLLoss(0.2)
        agree(called(line, z0, z1, T=0.2), peer(z0, z1), 10, 0.2)
    elif name == "lightly's bank":
        losses = pytest.importorskip("lightly.loss", exc_type=ImportError)
        bank, names = F.normalize(draw(10, 6), dim=1), ours() | {"T": 0.2}
        names["criterion"], peer = (
            losses.NTXentLoss(0.2, memory_bank_size=(10, 6)) for _ in range(2)
        )
        for criterion in (names["criterion"], peer):
            criterion.memory_bank.bank = bank.clone()
        exec(line, names)
        z0.requires_grad_()
        agree(names["criterion"](z0, z1).detach(), peer(z0, z1).detach(), 11, 0.2)
    elif name in ("SupConLoss", "NTXentLoss"):
        losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
        for crops in (2, 3, 4) if name == "SupConLoss" else (2,):
            z, labels = draw(5 * crops, 6), torch.arange(5).repeat(crops)
            wanted = getattr(losses, name)(temperature=0.2)(z, labels)
            agree(called(line, z, labels, z=z, labels=labels, T=0.2), wanted, len(z), 0.2)
    elif name == "ref_emb":
        losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
        z, labels, r, r_labels = draw(9, 6), torch.arange(9) % 4, draw(13, 6), torch.arange(13) % 4
        wanted = losses.SupConLoss(0.2)(z, labels, ref_emb=r, ref_labels=r_labels)
        value = called(line, z=z, labels=labels, r=r, r_labels=r_labels, T=0.2)
        agree(value, wanted, len(r), 0.2)
    elif name == "GISTEmbedLoss":
        a, p, g_a, g_p = draw(4, 9, 6)
        wanted = gist("absolute", 0.0, 0.2, contrast_anchors=False, contrast_positives=False)(
            [a, p], [g_a, g_p]
        )
        names = vars(hex) | dict(a=a, p=p, g_a=g_a, g_p=g_p, T=0.2)
        value = eval(line, names)  # with the threshold of the line
        if not isinstance(value, Tensor):
            value = value(a, p, guide=(g_a, g_p))
        agree(value, wanted, len(p), 0.2)
    elif name == "info-nce":
        peers = pytest.importorskip("info_nce")
        for negatives, how in (
            (None, "unpaired"),
            (draw(8, 6), "unpaired"),
            (draw(5, 8, 6), "paired"),
        ):
            wanted = peers.InfoNCE(0.2, negative_mode=how)(z0, z1, negatives)
            agree(called(line, z0, z1, negatives, T=0.2), wanted, 9, 0.2)
    else:
        peer = pytest.importorskip("open_clip", exc_type=ImportError).ClipLoss()
        image, text, scale = (
            F.normalize(z0, dim=1),
            F.normalize(z1, dim=1),
            torch.tensor(5.0).double(),
        )
        value = called(line, image, text, scale, image=image, text=text, scale=scale)
        agree(value, peer(image, text, scale), 5, 1 / scale)


PEERS = ("lightly", "DCLLoss", "lightly's bank", "SupConLoss", "ref_emb", "NTXentLoss",
         "GISTEmbedLoss", "info-nce", "open_clip")  # fmt: skip
MIXED = "dino", "byol", "barlowtwins"
# What each row of the tables is compared with, our lines in their order.
README = {
    "sthalles/SimCLR": [("simclr",)],
    "mmpretrain, SimCLR": [("mmpretrain",)],
    "facebookresearch/moco": [("moco",)],
    "mmpretrain, MoCo": [("moco",)],
    "lightly": [("lightly",)],
    "lightly, DCLLoss": [("DCLLoss",)],
    "stable-pretraining": [("stable-pretraining",)],
    "solo-learn, SimCLR and SupCon": [("solo-learn",)],
    "solo-learn, MoCo v2+": [("solo-learn-moco",)],
    "HobbitLong/SupContrast": [("supcontrast",)],
    "pytorch-metric-learning": [("SupConLoss",)],
    "pytorch-metric-learning, ref_emb": [("ref_emb",)],
    "sentence-transformers, GISTEmbed": [("GISTEmbedLoss",)],
    "info-nce-pytorch": [("info-nce",)],
    "open_clip": [("open_clip",)],
    "Inf-CL": [("inf-cl",)],
    "facebookresearch/dino": [("dino",)],
    "lucidrains/byol-pytorch": [("byol",)],
    "facebookresearch/barlowtwins": [("barlowtwins",)],
    "facebookresearch/vicreg": [("vicreg",)],
}
SWAP = {
    "sthalles/SimCLR; mmpretrain: SimCLR": [("simclr", "mmpretrain")],
    "facebookresearch/moco; mmpretrain: MoCo": [("moco",)],
    "lightly: SimCLR, NNCLR; stable-pretraining": [("lightly", "stable-pretraining")],
    "lightly: DCL": [("DCLLoss",)],
    "lightly: MoCo, its memory bank kept": [("lightly's bank",)],
    "solo-learn: SimCLR, SupCon": [("solo-learn",)],
    "solo-learn: NNCLR, All4One": [("solo-learn-nnclr",)],
    "solo-learn: MoCo v2+": [("solo-learn-moco",)],
    "MoCo v3": [("moco-v3",)],
    "HobbitLong/SupContrast": [("supcontrast",)],
    "pytorch-metric-learning: SupConLoss": [("SupConLoss",)],
    "pytorch-metric-learning: SupConLoss with `ref_emb`": [("ref_emb",)],
    "pytorch-metric-learning: NTXentLoss": [("NTXentLoss",)],
    "sentence-transformers: GISTEmbedLoss": [("GISTEmbedLoss",)],
    "info-nce-pytorch": [("info-nce",)],
    "open_clip, Inf-CL": [("open_clip", "inf-cl")],
    "dino, byol, Barlow Twins": [MIXED],
    "vicreg": [("vicreg",)],
}
TABLES = [("README.md", 1, README), ("docs/swap.md", 2, SWAP)]


@pytest.mark.parametrize("file, column, wanted", TABLES, ids=[table[0] for table in TABLES])
def test_every_row_of_a_table_is_compared(file, column, wanted):
    table = rows(file, column)
    assert list(table) == list(wanted)
    assert [len(lines) for lines in table.values()] == [len(of) for of in wanted.values()]


LINES = [
    pytest.param(line, name, id=f"{file}: {name}")
    for file, column, wanted in TABLES
    for key, lines in rows(file, column).items()
    for line, names in zip(lines, wanted.get(key, []), strict=False)
    for name in names
]


@pytest.mark.parametrize("line, name", LINES)
def test_a_line_of_a_table_gives_the_value_of_the_code_base(line, name):
    (check_peer if name in PEERS else check_line)(line, name)
