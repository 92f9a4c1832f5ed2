# SPDX-License-Identifier: MIT
"""examples/all4one.py: its loss is that of the method's equations and of the authors' code, HEX is
in both contrastive terms, and impossible options are refused. Also the recipe for their code.

What it shares with the other examples is in test_method_examples.py.
"""

import math
from argparse import Namespace
from functools import partial

import pytest
import torch
from test_method_examples import batch, few_digits, method_of, run
from test_recipe_values import agree, cases
from test_recipe_values import run as recipe
from torch import Tensor
from torch.nn import functional as F

import all4one  # isort: skip  # in examples/, which test_method_examples.py puts on the path
from lightly.models.modules.memory_bank import MemoryBankModule

from hex import HEXLoss, InfoNCELoss
from hex.lightning import HEXCallback

assert few_digits  # a fixture
B, D = 40, 128  # of batch() and of the projections
OPTIONS = "--bank", "64", "--temperature", "0.2", "--centroid-temperature", "0.3"


def exact(*arguments: str):
    """The method in float64 and without dropout, and the views of a batch."""
    method = method_of("all4one", *OPTIONS, *arguments).double()
    method.transformer.eval()
    with torch.no_grad():  # as after some steps, in which the encoders have grown apart
        for p in method.slow.parameters():
            p.mul_(1 + 0.2 * torch.rand_like(p))
    return method, [view.double() for view in batch(method)]


def info_nce(anchors: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(anchors) @ F.normalize(candidates).T / temperature
    return F.cross_entropy(logits, torch.arange(len(anchors)))


def terms_in_plain(method, views: list[Tensor], bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of the neighbours, the centroids and the features, from the equations."""
    z = method.online(torch.cat(views))
    k = F.normalize(method.slow(torch.cat(views))).detach()
    nearest = bank[(k @ bank.T).argsort(dim=1, descending=True)[:, :5]]
    shifted = nearest.roll(1, dims=1)
    shifted[:, 0] = method.to_centroid(z)
    wave = torch.arange(5.0).double()[:, None] / 10000 ** (torch.arange(D // 2).double() * 2 / D)
    place = torch.cat([wave.sin(), wave.cos()], dim=1)
    whole, partly = (method.transformer(x + place)[:, 0] for x in (nearest, shifted))
    p = method.to_neighbour(z)

    one, two = slice(0, B), slice(B, 2 * B)
    neighbours = centroids = on = off = 0
    for here, there in ((one, two), (two, one)):
        neighbours += info_nce(nearest[here, 0], p[there], 0.2) / 2
        centroids += info_nce(whole[here], partly[there], 0.3) / 2
        a, b = k[here], z[there]
        c = (a.T @ b) / a.norm(dim=0)[:, None] / b.norm(dim=0)
        diagonal = c.diagonal()
        on += ((diagonal - 1) ** 2).mean() / 2
        off += (c.square().sum() - diagonal.square().sum()) / (D * D - D) / 2
    return neighbours, centroids, 10 * (0.5 * on.sqrt() + 0.5 * off.sqrt())


def test_the_base_loss_and_its_gradients_are_those_of_the_equations():
    method, views = exact("--loss", "base")
    bank = method.bank.bank.clone()
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    terms = terms_in_plain(method, views, bank)
    assert all(1 < term < 10 for term in terms)
    wanted = sum(0.5 * term for term in terms)
    gradients = torch.autograd.grad(wanted, trained.values())

    loss = method(*views)
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)
    loss.backward()
    for (name, p), gradient in zip(trained.items(), gradients, strict=True):
        close = torch.allclose(p.grad, gradient, rtol=1e-6, atol=1e-9)
        assert close and gradient.isfinite().all(), name
    assert sum(float(g.abs().max()) > 1e-4 for g in gradients) > 0.5 * len(gradients)


def test_the_bank_takes_the_slow_projections_of_the_first_view():
    method, (view0, view1) = exact("--loss", "base")
    before = method.bank.bank.clone()
    with torch.no_grad():
        method(view0, view1)
        k = F.normalize(method.slow(torch.cat([view0, view1])))
    torch.testing.assert_close(method.bank.bank[:B], k[:B])
    assert torch.equal(method.bank.bank[B:], before[B:])
    assert {"bank.bank", "bank.bank_ptr"} <= method.state_dict().keys()


def test_hex_is_in_both_contrastive_terms_each_with_a_threshold_of_its_own():
    method, views = exact()
    bank = method.bank.bank.clone()
    assert set(HEXCallback.losses(method)) == {"criterion", "criterion_of_centroids"}
    criteria = method.criterion, method.criterion_of_centroids
    assert criteria[0].threshold is not criteria[1].threshold
    assert [criterion.temperature for criterion in criteria] == [0.2, 0.3]
    seen = []
    for criterion in criteria:
        criterion.register_forward_hook(lambda module, z, value: seen.append((module, *z, value)))
    with torch.no_grad():
        loss = method(*views)
        _, _, features = terms_in_plain(method, views, bank)
    assert [module for module, *_ in seen] == [x for x in criteria for _ in range(2)]
    values = [HEXLoss(own.temperature, mode="query")(a, b) for own, a, b, _ in seen]
    torch.testing.assert_close(torch.stack(values), torch.stack([value for *_, value in seen]))
    torch.testing.assert_close(loss, sum(values) / 4 + features / 2)
    base, _ = exact("--loss", "base")
    assert all(criterion.last.hard > 0 for criterion in criteria)
    assert abs(loss - base(*views)) > 1e-3
    assert HEXCallback.losses(base) == {}


def test_the_slow_encoder_s_momentum_rises_to_one_over_a_training():
    method, _ = exact("--momentum", "0.75")
    moved = []
    for step in (1, 50, 100):
        before = [p.clone() for p in method.slow.parameters()]
        method.after_step(step, 100)
        pairs = zip(before, method.slow.parameters(), strict=True)
        moved.append(max(float((p - q).abs().max()) for p, q in pairs))
    assert moved[0] > moved[1] > moved[2] == 0


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--features", 100], "--features: got 100, wanted a multiple of 8"),
        (["--bank", 4], "--bank: got 4, wanted at least 5"),
    ],
)
def test_an_option_that_the_method_cannot_have_is_named(
    arguments, text, few_digits, tmp_path, capsys
):
    assert run("all4one", *arguments, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"all4one.py: error: {text}\n"
    assert not (tmp_path / "out").exists()


def test_the_loss_falls_in_training(few_digits, tmp_path, capsys):
    assert run("all4one", "--epochs", 8, "--out", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if "epoch  " in line]
    assert len(losses) == 8 and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.5


# ---- solo-learn's All4One, which is the authors' ------------------------------------------------


def on_what_was_recorded(case, criterion, criterion_of_centroids) -> Tensor:
    """The method's loss, without networks, on what solo-learn's was given."""
    method = all4one.All4One.__new__(all4one.All4One)
    torch.nn.Module.__init__(method)
    method.online, method.slow = (lambda views, x=x: x for x in (case.z, case.k))
    method.to_neighbour, method.to_centroid = (lambda z, x=x: x for x in (case.p, case.q))
    method.transformer = torch.nn.Identity()
    method.place = case.place
    method.bank = MemoryBankModule(tuple(case.queue.shape), feature_dim_first=False)
    method.bank.bank = case.queue.clone()
    method.criterion, method.criterion_of_centroids = criterion, criterion_of_centroids
    return method(*torch.zeros(2, len(case.z) // 2))


def test_the_base_loss_is_that_of_the_authors():
    for case in cases("solo-learn-all4one"):
        criteria = InfoNCELoss(case.T, mode="query"), InfoNCELoss(0.1, mode="query")
        agree(on_what_was_recorded(case, *criteria), case.value, 10, 0.1)


def test_the_recipe_of_solo_learns_all4one():
    for case in cases("solo-learn-all4one"):
        ours = recipe("solo-learn-all4one", self=Namespace())["nnclr_loss_func"]
        value = on_what_was_recorded(case, partial(ours, temperature=case.T), ours)
        agree(value, case.value, 10, 0.1)
