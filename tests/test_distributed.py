# SPDX-License-Identifier: MIT
"""`gather_distributed`: under DDP ranks have the loss and the gradients of one process.

The processes are real (gloo, on the CPU; NCCL is the same code and was not tried). Every loss of
gathered.py is called on 2, 3 and 4 of them, on parts as long as each other and on parts that are
not. What the parameters of an encoder get, which DDP has averaged, is compared with what they get
from one process that has the whole batch. What has to be equal to the bit is in
test_distributed_bits.py.
"""

import contextlib
import itertools
import warnings

import pytest
import ranks
import torch
from gathered import CALLS, CASES, TAU, Batch, Encoder, Part, plain_pytorch, statistics, total
from torch import Tensor, nn

CUTS = {
    2: ((37, 37), (52, 21)),
    3: ((29, 29, 29), (1, 47, 38)),
    4: ((23, 23, 23, 23), (19, 1, 40, 34)),
}
# Of some 400 rows, which go by tiles.
LONG = {2: (101, 101), 3: (1, 130, 71)}
LONG_CASES = ("ntxent", "cross", "query", "groups", "guide", "labels", "three views", "queue")

CONDITION = 1.5  # of the debiasing, at the greatest tau_plus, 0.2
# The size of the terms of a sum: for dtau those are weights, of which a row's sum to 1 / tau, times
# cosines over tau, which are up to 2 apart.
CANCELLING = {"dtau": 2 * CONDITION / TAU**2}
# Of a step: reduction, dtype, and whether there are kernels.
EVEN = (
    ("mean", torch.float64, True),
    ("sum", torch.float64, True),
    ("mean", torch.bfloat16, True),
)
UNEVEN = (
    ("none", torch.float64, True),
    ("mean", torch.float32, True),
)
FORMULAS = ("mean", torch.float64, False)

Found = dict[str, Tensor]


def ways(cut):
    """The (case, way) of the steps on a cut."""
    if cut in LONG.values():
        return [(case, UNEVEN[0]) for case in LONG_CASES]
    its = EVEN if len(set(cut)) == 1 else UNEVEN
    return list(itertools.product(CASES, (*its, FORMULAS) if cut == CUTS[3][1] else its))


def step(
    model: nn.Module, part: Part, case: str, rounded=Tensor.double, rows=None, **options
) -> Found:
    """One of training: value, statistics, and gradients as the parameters have them."""
    _, call, _, _ = CASES[case]
    loss = CASES[case].make(**options)
    model.zero_grad()
    encoded = part.encoded(model, rounded)
    value = CALLS[call](loss, encoded, temperature=encoded.tau, **(rows or {}))
    total(value).backward()
    *body, dtau = (p.grad.flatten() for name, p in sorted(model.named_parameters()))
    return {"value": value.detach(), **statistics(loss), "body": torch.cat(body), "dtau": dtau}


def steps(rank: int, cuts):
    warnings.simplefilter("error", FutureWarning)  # torch's, of names that it will drop
    model = nn.parallel.DistributedDataParallel(Encoder())
    found = {}
    for cut in cuts:
        batch = Batch(cut)
        part, rows = batch.part(rank), batch.rows()
        for case, (reduction, dtype, kernels) in ways(cut):
            with contextlib.nullcontext() if kernels else plain_pytorch():
                found[cut, case, reduction, dtype, kernels] = step(
                    model, part, case, lambda z, to=dtype: z.to(to), rows,
                    reduction=reduction, gather_distributed=True,
                )  # fmt: skip
    return found


@pytest.fixture(scope="module", params=CUTS, ids="W{}".format)
def seen(request, tmp_path_factory):
    """The cuts, and what each rank found."""
    W = request.param
    cuts = CUTS[W] + ((LONG[W],) if W in LONG else ())
    return cuts, ranks.run(steps, tmp_path_factory.mktemp("ranks"), cuts, ranks=W)


def whole(cut, case, rounded=Tensor.double, **options) -> Found:
    return step(Encoder(), Batch(cut).whole(), case, rounded, **options)


def assert_close(ours: Found, wanted: Found, about) -> None:
    """1e-11 of the largest number."""
    assert ours.keys() == wanted.keys()
    for name, truth in wanted.items():
        got = ours[name]
        assert got.shape == truth.shape and got.dtype == truth.dtype, (name, about)
        if case_has_no_eps(name, truth):
            assert got.isnan(), about
            continue
        error = torch.where(got == truth, 0.0, (got - truth).abs())  # an eps may be +inf
        assert error.max() <= 1e-11 * truth.abs().max(), (name, float(error.max()), about)


def case_has_no_eps(name: str, truth: Tensor) -> bool:
    return name == "eps" and bool(truth.isnan())


@pytest.mark.parametrize("case", CASES)
def test_ranks_have_the_loss_and_gradients_of_one_process(case, seen):
    cuts, found = seen
    for cut in cuts:
        for its, (reduction, dtype, kernels) in ways(cut):
            if its != case or dtype != torch.float64:
                continue
            wanted = whole(cut, case, reduction=reduction)
            assert min(wanted[name].abs().max() for name in ("value", "body")) > 1e-3
            for rank in found:
                got = rank[cut, case, reduction, dtype, kernels]
                assert_close(got, wanted, (cut, reduction, kernels))


@pytest.mark.parametrize("case", CASES)
def test_narrow_rows_have_an_error_like_plain_pytorchs(case, seen):
    """The encoder is float64, so that the error is that of the loss, of rows of this dtype."""
    from conftest import assert_as_good_as_torch  # every rank imports this file: not all of that

    cuts, found = seen
    for cut in cuts:
        for its, (_, dtype, _) in ways(cut):
            if its != case or dtype == torch.float64:
                continue
            # Rounding is exact in float64, and the truth's gradient goes through it unrounded.
            exact = whole(cut, case, lambda z, to=dtype: z + (z.to(to).double() - z).detach())
            with plain_pytorch():
                same = whole(cut, case, lambda z, to=dtype: z.to(to))
            for rank in found:
                got = rank[cut, case, "mean", dtype, True]
                assert got["value"].dtype == torch.float32
                names = ["value", "dtau", "hard", "share"]
                if CASES[case].call == "logits":
                    names.remove("dtau")  # it comes through the logits, as the body's gradient
                for name in names:
                    assert_as_good_as_torch(
                        got[name], same[name], exact[name], tau=TAU, dtype=torch.float32,
                        condition=CONDITION, scale=CANCELLING.get(name, 0), about=(name, cut),
                    )  # fmt: skip
                assert_alike(got["body"], same["body"], exact["body"], (case, cut))


def assert_alike(ours: Tensor, same: Tensor, exact: Tensor, about) -> None:
    """The errors' length, for they are sums of the roundings of each row's gradient, and that of
    three ranks is rounded once more, times 3."""
    ulps = 4 * CONDITION * torch.finfo(torch.float32).eps
    assert (ours - exact).norm() <= 2 * (same - exact).norm() + ulps * exact.norm(), about


@pytest.mark.parametrize("case", CASES)
def test_alone_it_changes_nothing(case):
    _, call, _, _ = CASES[case]
    encoded = Batch((37,)).part(0).encoded(Encoder())
    wanted = CALLS[call](CASES[case].make(reduction="none"), encoded)
    for rows in ({}, {"rows": (37,)}):
        loss = CASES[case].make(reduction="none", gather_distributed=True)
        assert torch.equal(CALLS[call](loss, encoded, **rows), wanted)
