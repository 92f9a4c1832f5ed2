# SPDX-License-Identifier: MIT
"""What losses of several libraries give under DDP, beside what they give in one process.

Processes of torch.distributed (gloo, on the CPU) train a small encoder on two views, in float64, by
one backward of DDP. The truth is the same library's loss of the whole batch in one process, so what
is compared is not the losses but what becomes of them on ranks:

    value     what each rank has, over the true one
    ratio     <g, g_true> / <g_true, g_true>, of the gradient g of the encoder that DDP has averaged
    residual  |g - ratio g_true| / |g_true|: what no learning rate can mend
    scale     the gradient of the learned temperature or logit scale, over the true one

Beside it, what hex's comparison of the ranks' sizes takes, which it makes at each call.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import peers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers import TAU
from torch import Tensor, nn
from worker import Record

from hex import HEXLoss, InfoNCELoss
from hex.distributed import agree

IMAGES = 24  # a rank's
FEATURES, HIDDEN, EMBEDDED = 12, 16, 8
CLASSES = 7
SEED = 0
COMPARISONS = 500

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of two views and the learned scale


class Method(NamedTuple):
    name: str
    package: str
    build: Callable[[int, int], Loss]
    """From the rank and the number of ranks; of (0, 1), the loss in one process."""
    learns: bool = True
    """Whether the loss takes a learned scale."""


# ---- the methods ---------------------------------------------------------------------------------


def ours(loss: Callable[..., nn.Module]) -> Callable[[int, int], Loss]:
    def build(rank: int, ranks: int) -> Loss:
        criterion = loss(gather_distributed=ranks > 1)
        return lambda z0, z1, scale: criterion(z0, z1, temperature=1 / scale.exp())

    return build


def clip(local_loss: bool, gather_with_grad: bool) -> Callable[[int, int], Loss]:
    def build(rank: int, ranks: int) -> Loss:
        open_clip = peers.imported("open_clip.loss")
        criterion = open_clip.ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=ranks)
        return lambda z0, z1, scale: criterion(unit(z0), unit(z1), scale.exp())

    return build


def siglip(rank: int, ranks: int) -> Loss:
    criterion = peers.imported("open_clip.loss").SigLipLoss(rank=rank, world_size=ranks)
    bias = torch.tensor(-10.0, dtype=torch.float64)  # what SigLIP begins with
    return lambda z0, z1, scale: criterion(unit(z0), unit(z1), scale.exp(), bias)


def nt_xent(rank: int, ranks: int) -> Loss:
    criterion = peers.imported("lightly.loss").NTXentLoss(TAU, gather_distributed=ranks > 1)
    return lambda z0, z1, scale: criterion(z0, z1)


def wrapper(efficient: bool) -> Callable[[int, int], Loss]:
    def build(rank: int, ranks: int) -> Loss:
        criterion = peers.imported("pytorch_metric_learning.losses").NTXentLoss(TAU)
        if ranks > 1:
            tools = peers.imported("pytorch_metric_learning.utils.distributed")
            criterion = tools.DistributedLossWrapper(criterion, efficient=efficient)

        def loss(z0: Tensor, z1: Tensor, scale: Tensor) -> Tensor:
            ids = rank * len(z0) + torch.arange(len(z0))
            return criterion(torch.cat((z0, z1)), ids.repeat(2))

        return loss

    return build


def unit(z: Tensor) -> Tensor:
    return F.normalize(z, dim=-1)


OPEN_CLIP, PML = "open_clip_torch", "pytorch-metric-learning"
METHODS = (
    Method("hex HEXLoss", "hex-ssl", ours(HEXLoss)),
    Method("hex InfoNCELoss", "hex-ssl", ours(InfoNCELoss)),
    *(
        Method(
            f"open_clip ClipLoss, local_loss={local}, gather_with_grad={grad}",
            OPEN_CLIP, clip(local, grad),
        )
        for local in (False, True) for grad in (False, True)
    ),
    Method("open_clip SigLipLoss", OPEN_CLIP, siglip),
    Method("lightly NTXentLoss", "lightly", nt_xent, learns=False),
    *(
        Method(f"{PML} NTXentLoss, efficient={it}", PML, wrapper(it), learns=False)
        for it in (False, True)
    ),
)  # fmt: skip


# ---- one step, on one rank of some and in one process --------------------------------------------


class Model(nn.Module):
    """An encoder and a learned scale, which is a logarithm, as in CLIP."""

    def __init__(self, loss: Loss, learns: bool) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        layers = nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, EMBEDDED)
        self.encoder = nn.Sequential(*layers).double()
        self.scale = nn.Parameter(torch.tensor(1 / TAU, dtype=torch.float64).log(), learns)
        self.loss = loss

    def forward(self, views: Tensor) -> Tensor:
        return self.loss(*self.encoder(views), self.scale)


def images(ranks: int) -> Tensor:
    """Two views of the images of all ranks, (2, B, D)."""
    generator = torch.Generator().manual_seed(SEED)
    centres = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    image = centres[torch.arange(ranks * IMAGES) % CLASSES]
    return image + torch.randn(2, *image.shape, generator=generator, dtype=image.dtype)


def step(method: Method, rank: int, ranks: int, views: Tensor) -> tuple[Tensor, ...]:
    """The value, the gradient of the encoder, and that of the scale."""
    model = Model(method.build(rank, ranks), method.learns)
    run = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    value = run(views)
    value.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.encoder.parameters()])
    return value.detach(), gradient, model.scale.grad if method.learns else torch.tensor(0.0)


CHECK = "check_sizes"


def seconds_of_a_comparison() -> float:
    """The median, of one rank."""
    taken = []
    for _ in range(COMPARISONS):
        begin = time.perf_counter()
        agree(torch.device("cpu"), [IMAGES, 1, 2, 3, 4, 5], None, None, None)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def one(rank: int, ranks: int, folder: str, names: Sequence[str]) -> None:
    """A process: its results, or what kept a method from running, into the folder."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    results: dict[str, Any] = {CHECK: seconds_of_a_comparison()}
    for method in METHODS:
        if method.name in names:
            try:
                own = images(ranks)[:, rank * IMAGES : (rank + 1) * IMAGES]
                results[method.name] = step(method, rank, ranks, own)
            except ImportError as error:  # on all ranks or on none
                results[method.name] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


def compared(method: Method, found: list[tuple[Tensor, ...]], ranks: int) -> dict[str, Any]:
    value, true, true_scale = step(method, 0, 1, images(ranks))
    g, scale = found[0][1:]
    ratio = (g @ true / (true @ true)).item()
    return {
        "method": method.name, "package": f"{method.package} {version(method.package)}",
        "ranks": ranks, "value": [(own[0] / value).item() for own in found], "ratio": ratio,
        "residual": ((g - ratio * true).norm() / true.norm()).item(),
        "scale": (scale / true_scale).item() if method.learns else None,
    }  # fmt: skip


def measured(names: Sequence[str], of_ranks: Sequence[int]) -> Record:
    """A result for each method and number of ranks."""
    notes, results = [], []
    for ranks in of_ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.start_processes(
                one, (ranks, folder, names), nprocs=ranks, start_method="spawn"
            )
            found = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(ranks)]
        results.append({"method": CHECK, "ranks": ranks, "seconds": max(f[CHECK] for f in found)})
        for method in METHODS:
            if method.name in names and isinstance(error := found[0][method.name], str):
                notes.append(f"{method.name} is left out: {error}")
            elif method.name in names:
                results.append(compared(method, [own[method.name] for own in found], ranks))
    return {"notes": notes, "results": results}
