# SPDX-License-Identifier: MIT
"""Records in values.json what the losses of other code bases are on a few numbers.

    git clone https://github.com/HobbitLong/SupContrast clone
    git -C clone checkout COMMIT            # that of the recipe, in docs/recipes
    python tests/recorded/record.py supcontrast clone

Their code runs as it is, in float64, on the CPU, as one process of gloo. The networks around a loss
are identities where it has any. Needs what the code base imports, and where the loss does not use
it, says so here: those modules are stand-ins. tests/test_recipe_values.py compares our lines.
"""

import importlib
import json
import math
import subprocess
import sys
import types
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILE = HERE / "values.json"
RECIPES = ROOT / "docs" / "recipes"
B, D, K = 5, 6, 10  # images, features, and entries of a queue; a multiple of B, as MoCo wants

sys.path.insert(0, str(RECIPES))

import make  # noqa: E402

# What a code base's loss was given, by the names that our lines have for it, and its value.
Case = tuple[dict[str, Tensor | float], Tensor]
RECORDERS: dict[str, tuple[str, str, Callable[[], Iterator[Case]]]] = {}


def numbers(*shape: int, seed: int) -> Tensor:
    """float64 in [-1, 1), multiples of 2^-7: the same everywhere, and short in decimals."""
    x = torch.arange(math.prod(shape)) + 7919 * seed + 1
    for _ in range(2):  # an integer hash, of 32 bits
        x = (x ^ (x >> 16)) * 0x45D9F3B % 2**32
    x = (x ^ (x >> 16)) % 256 - 128
    return x.double().div(128).view(shape)


def recipe(name: str, page: str | None = None):
    """Names a recorder; `page`: the recipe that has the repository and the commit."""
    repository, commit, _ = make.read((RECIPES / f"{page or name}.diff").read_text())
    return recorder(name, repository, commit)


def recorder(name: str, repository: str, commit: str):
    def register(function):
        RECORDERS[name] = repository, commit, function
        return function

    return register


def bare(clone_of: str) -> None:
    """A package without what its __init__ imports: its modules can be imported by themselves."""
    module = types.ModuleType(clone_of)
    module.__path__ = [str(Path(sys.path[0], *clone_of.split(".")))]
    sys.modules[clone_of] = module


def stand_in(*names: str) -> None:
    for name in names:
        sys.modules[name] = mock.MagicMock()


def without_init(kind: type[nn.Module], **attributes) -> nn.Module:
    """A module of theirs without its networks."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@recipe("simclr")
def simclr() -> Iterator[Case]:
    stand_in("tqdm", "yaml")
    theirs = importlib.import_module("simclr").SimCLR
    features = numbers(2 * B, D, seed=1)
    for t in (0.07, 0.5):
        args = Namespace(batch_size=B, n_views=2, temperature=t, device="cpu")
        logits, labels = theirs.info_nce_loss(Namespace(args=args), features)
        value = nn.CrossEntropyLoss()(logits, labels)  # their criterion
        z0, z1 = features.chunk(2)
        yield {"logits": logits, "labels": labels, "T": t, "z0": z0, "z1": z1}, value


@recipe("moco")
def moco() -> Iterator[Case]:
    kind = importlib.import_module("moco.builder").MoCo
    q, k = numbers(2, B, D, seed=2)
    model = kind(lambda num_classes: nn.Identity(), D, K, T=0.2)
    model.queue = F.normalize(numbers(D, K, seed=3), dim=0)
    queue = model.queue.clone()
    logits, labels = model(q, k)
    value = F.cross_entropy(logits, labels)  # their criterion
    yield {"logits": logits, "labels": labels, "T": 0.2, "q": q, "k": k, "queue": queue}, value


@recorder("moco-v3", "facebookresearch/moco-v3", "c349e6e24f40d3fedb22d973f92defa4cedf37a7")
def moco_v3() -> Iterator[Case]:
    kind = importlib.import_module("moco.builder").MoCo
    q, k = numbers(2, B, D, seed=4)
    yield {"q": q, "k": k, "T": 0.2}, without_init(kind, T=0.2).contrastive_loss(q, k)


@recipe("mmpretrain")
def mmpretrain() -> Iterator[Case]:
    """SimCLR's: pairs are neighbours in its rows."""
    stand_in("mat4py")  # a data set's
    importlib.import_module("mmpretrain.models")
    models = importlib.import_module("mmpretrain.registry").MODELS
    head = dict(type="ContrastiveHead", loss=dict(type="CrossEntropyLoss"), temperature=0.1)
    head = models.build(head)
    seen = []
    head.loss_module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    views = list(numbers(2, B, D, 1, 1, seed=5))
    model = without_init(
        models.get("SimCLR"), backbone=nn.Flatten(), head=head, neck=lambda x: (x,)
    )
    value = model.loss(views, [])["loss"]
    ((logits, labels),) = seen
    z0, z1 = (view.flatten(1) for view in views)
    yield {"logits": logits, "labels": labels, "T": 0.1, "z0": z0, "z1": z1}, value


@recipe("solo-learn")
def solo_simclr() -> Iterator[Case]:
    loss = solo("simclr").simclr_loss_func
    for crops in (2, 3, 4):
        z, indexes = numbers(crops * B, D, seed=5 + crops), torch.arange(B).repeat(crops)
        yield {"z": z, "indexes": indexes, "T": 0.2}, loss(z, indexes, 0.2)
    targets = torch.tensor([0, 1, 0, 2, 1])  # its SupCon: the same function
    indexes = targets.repeat(2)
    z = numbers(2 * B, D, seed=10)
    yield {"z": z, "indexes": indexes, "T": 0.2}, loss(z, indexes, 0.2)


@recipe("solo-learn-nnclr", "solo-learn")
def solo_nnclr() -> Iterator[Case]:
    loss = solo("nnclr").nnclr_loss_func
    nn1, nn2, p1, p2 = numbers(4, B, D, seed=11)
    value = (loss(nn1, p2, 0.2) + loss(nn2, p1, 0.2)) / 2
    yield {"nn1": nn1, "nn2": nn2, "p1": p1, "p2": p2, "T": 0.2}, value


@recipe("solo-learn-all4one", "solo-learn")
def solo_all4one() -> Iterator[Case]:
    """The whole loss, with identities for the projector and the transformer."""
    solo("nnclr")
    z, k = numbers(2, 2 * B, D, seed=26)
    k = F.normalize(k)

    class Base(nn.Module):
        def training_step(self, batch, index):
            return {"loss": 0, "feats": z.chunk(2), "momentum_z": k.chunk(2)}

        def log_dict(self, *_, **__):
            pass

    bare("solo.methods")
    sys.modules["solo.methods.base"] = Namespace(BaseMomentumMethod=Base)
    theirs = importlib.import_module("solo.methods.all4one")
    to_neighbour, to_centroid = (nn.Linear(D, D, bias=False).double() for _ in range(2))
    with torch.no_grad():
        to_neighbour.weight.copy_(numbers(D, D, seed=27))
        to_centroid.weight.copy_(numbers(D, D, seed=28))
    queue = F.normalize(numbers(K, D, seed=29))
    encoding = theirs.Summer(theirs.PositionalEncodingPermute1D(5)).double()
    given = {"z": z, "k": k, "p": to_neighbour(z), "q": to_centroid(z), "queue": queue, "T": 0.2}
    given["place"] = encoding.penc(torch.zeros(1, 5, D).double())[0]
    model = without_init(
        theirs.All4One, projector=nn.Identity(), predictor=to_neighbour, predictor2=to_centroid,
        transformer_encoder=nn.Identity(), pos_enc=encoding, temperature=0.2, queue_size=K,
        queue=queue.clone(), queue_y=-torch.ones(K), queue_index=-torch.ones(K),
        queue_ptr=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    yield given, model.training_step([torch.arange(B), None, torch.zeros(B)], 0)


@recipe("solo-learn-moco", "solo-learn")
def solo_moco() -> Iterator[Case]:
    q, k = (F.normalize(x) for x in numbers(2, B, D, seed=12))
    queue = F.normalize(numbers(D, K, seed=13), dim=0)
    value = solo("mocov2plus").mocov2plus_loss_func(q, k, queue, 0.2)
    yield {"q": q, "k": k, "queue": queue, "T": 0.2}, value


def solo(name: str) -> types.ModuleType:
    stand_in("omegaconf", "timm", "timm.models", "timm.models.helpers", "timm.optim")
    stand_in("timm.optim.optim_factory", "solo.data.h5_dataset")
    for package in ("solo", "solo.utils", "solo.losses"):
        bare(package)
    return importlib.import_module(f"solo.losses.{name}")


@recipe("supcontrast")
def supcontrast() -> Iterator[Case]:
    loss = importlib.import_module("losses").SupConLoss(0.1)
    for views in (2, 3, 4):
        features = F.normalize(numbers(B, views, D, seed=14 + views), dim=2)
        yield {"features": features, "T": 0.1}, loss(features)
        labels = torch.tensor([0, 1, 0, 2, 0])
        yield {"features": features, "labels": labels, "T": 0.1}, loss(features, labels)


@recipe("stable-pretraining")
def stable_pretraining() -> Iterator[Case]:
    for package in ("stable_pretraining", "stable_pretraining.losses", "stable_pretraining.utils"):
        bare(package)
    stand_in("loguru", "stable_pretraining.losses.utils")
    distributed = importlib.import_module("stable_pretraining.utils.distributed")
    vars(sys.modules["stable_pretraining.utils"]).update(vars(distributed))
    losses = importlib.import_module("stable_pretraining.losses.joint_embedding")
    z1, z2 = numbers(2, B, D, seed=19)
    for t in (0.1, 0.5):
        yield {"z1": z1, "z2": z2, "T": t}, losses.NTXEntLoss(t)(z1, z2)


@recipe("inf-cl")
def inf_cl() -> Iterator[Case]:
    """By ClipLoss, for InfClipLoss, which computes the same, needs a GPU."""
    stand_in("inf_cl")
    for package in ("inf_clip", "inf_clip.models"):
        bare(package)
    loss = importlib.import_module("inf_clip.models.loss").ClipLoss()
    q, k = (F.normalize(x) for x in numbers(2, B, D, seed=20))
    for scale in (torch.tensor(14.3, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64)):
        found = loss(q, k, scale)
        yield {"q": q, "k": k, "l": scale}, found["contrastive_loss"]


# The next are not InfoNCE: the value is that of their own loss, to which HEX is added.


@recipe("dino")
def dino() -> Iterator[Case]:
    kind = importlib.import_module("main_dino").DINOLoss
    for crops in (2, 3, 4):
        student, teacher = numbers(crops * B, D, seed=21), numbers(2 * B, D, seed=22)
        loss = kind(D, crops, 0.04, 0.07, 2, 4).double()(student, teacher, 1)
        yield {"student_output": student, "ncrops": crops}, loss


@recipe("barlowtwins")
def barlowtwins() -> Iterator[Case]:
    z1, z2 = numbers(2, B, D, seed=23)
    model = without_init(
        importlib.import_module("main").BarlowTwins, args=Namespace(batch_size=B, lambd=0.0051),
        backbone=nn.Identity(), projector=nn.Identity(), bn=nn.BatchNorm1d(D, affine=False),
    )  # fmt: skip
    yield {"z1": z1, "z2": z2}, model.double()(z1, z2)


@recipe("vicreg")
def vicreg() -> Iterator[Case]:
    x, y = numbers(2, B, D, seed=24)
    args = Namespace(batch_size=B, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0)
    model = without_init(
        importlib.import_module("main_vicreg").VICReg, args=args, num_features=D,
        backbone=nn.Identity(), projector=nn.Identity(),
    )  # fmt: skip
    yield {"x": x, "y": y}, model(x, y)


@recipe("byol")
def byol() -> Iterator[Case]:
    bare("byol_pytorch")
    theirs = importlib.import_module("byol_pytorch.byol_pytorch")
    torch.set_default_dtype(torch.float64)  # it makes its projector itself
    model = theirs.BYOL(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 8)), 2, hidden_layer=-1, projection_size=D,
        projection_hidden_size=8, augment_fn=nn.Identity(), augment_fn2=FlipColours(),
        sem_num_simplices=2, sem_simplex_dim=4,
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(numbers(*p.shape, seed=30 + i))
    projections = []
    hook = model.online_encoder.register_forward_hook(lambda *x: projections.append(x[2][0]))
    value = model(numbers(B, 3, 2, 2, seed=25))
    hook.remove()
    yield {"online_projections": projections[0]}, value


class FlipColours(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flip(1)


def commit_of(clone: str) -> str:
    """The clone's commit; nothing in it may differ from that."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", clone, *arguments], check=True, stdout=subprocess.PIPE, text=True
        ).stdout.strip()

    if changed := git("status", "--porcelain", "--", "*.py"):
        raise SystemExit(f"{clone}: wanted a checkout without changes, got\n{changed}")
    return git("rev-parse", "HEAD")


def main(name: str, clone: str) -> None:
    repository, commit, function = RECORDERS[name]
    if (found := commit_of(clone)) != commit:
        raise SystemExit(f"{clone}: got {found}, wanted {commit} of {repository}")
    sys.path.insert(0, str(ROOT / "examples"))
    importlib.import_module("common.vision")  # torchvision, beside a torch for the CPU too
    sys.path[0] = str(Path(clone).resolve())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)  # fmt: skip
    Tensor.cuda = lambda self, *_, **__: self
    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        cases = [
            {
                "given": {k: x.tolist() if isinstance(x, Tensor) else x for k, x in given.items()},
                "value": value.item(),
            }
            for given, value in function()
        ]
    recorded[name] = {
        "repository": repository,
        "commit": commit,
        "torch": torch.__version__,
        "cases": cases,
    }
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(recorded.items())]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
