# SPDX-License-Identifier: MIT
"""The errors of docs/numbers.md, on a slice of their grid: temperatures from 0.001 to 1000, up to
10,007 features and 1030 rows, every dtype.

The tolerance is twice the error of plain PyTorch in the type that ours computes in, and what
rounding alone explains, which benchmarks/accuracy.py derives (`rounding`). The truth is not
PyTorch's: closed forms in NumPy, in a wider type (benchmarks/exact.py). What is measured of the
whole grid is in benchmarks/accuracy.jsonl; the accuracy that is promised without a comparison is in
test_promised_accuracy.py.
"""

import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import problem
from data import MODES

from hex import reference

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import accuracy  # noqa: E402
import exact  # noqa: E402
from accuracy import DTYPES, ERRORS, LOSSES, PLACES, WRONG, Case  # noqa: E402

# Another slice: HEX_SEED=1 pytest tests/test_numbers.py
SEED = int(os.environ.get("HEX_SEED", "0"))
CASES = 9  # of each loss and dtype
MOST = {"rows": 1030, "features": 10_007}  # so many take seconds


def drawn(loss, dtype):
    """The coldest and the warmest temperature, and others of the whole grid."""
    parts = (accuracy.over_temperature, accuracy.over_features, accuracy.over_rows)
    grid = [
        case for part in parts for case in part()
        if (case.loss, case.dtype) == (loss, dtype)
        and all(getattr(case, name) <= most for name, most in MOST.items())
    ]  # fmt: skip
    ends = [case for case in grid if case.tau in (min(accuracy.TAUS), max(accuracy.TAUS))]
    draw = random.Random(f"{SEED} {loss} {dtype}")
    return [*draw.sample(ends, 2), *draw.sample(grid, CASES - 2)]


def shares(case, ours=accuracy.ours):
    """The errors of ours, each as a share of what is allowed; and those of plain PyTorch."""
    p = accuracy.problem(case)
    right = accuracy.truth(p)
    mine, plain = (
        accuracy.errors(p, accuracy.result(p, way, right.power), right)
        for way in (ours, accuracy.plain)
    )
    rounding = accuracy.rounding(p, right)
    assert p.gap > 8 * torch.finfo(p.computed_in).eps  # no rounding decides what is in H
    allowed = {
        of: rounding[of] + 2 * (plain[of] if math.isfinite(plain[of]) else 0) for of in ERRORS
    }
    return {of: mine[of] / allowed[of] for of in ERRORS}, plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_nowhere_is_the_error_more_than_twice_torchs_and_rounding(loss, dtype):
    for case in drawn(loss, dtype):
        found, plain = shares(case)
        assert max(found.values()) <= 1, (f"HEX_SEED={SEED}", case, found, plain)


@pytest.mark.parametrize("name", PLACES)
def test_where_plain_torch_is_wrong_ours_is_right(name):
    place = PLACES[name]
    p = accuracy.problem(Case(place.loss, place.dtype, place.tau, 0, 0, name))
    right = accuracy.truth(p)
    mine, *others = (
        accuracy.errors(p, accuracy.result(p, way, right.power), right)
        for way in (accuracy.ours, accuracy.plain, accuracy.formula)
    )
    rounding = accuracy.rounding(p, right)
    assert all(mine[of] <= rounding[of] for of in ERRORS), (place, mine, rounding)
    assert any(not error[of] <= WRONG for error in others for of in ERRORS), (place, others)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_another_temperature_by_one_in_ten_thousand_is_refused(dtype):
    def other(p, x):
        return accuracy.ours(p._replace(case=p.case._replace(tau=1.0001 * p.case.tau)), x)

    for loss in ("InfoNCE", "HEX", "HEX, labels"):
        case = Case(loss, dtype, 0.1, 134)
        assert max(shares(case)[0].values()) <= 1
        assert min(shares(case, other)[0].values()) > 1


@pytest.mark.parametrize("mode", MODES)
def test_the_closed_forms_are_the_definition(mode):
    """At temperatures for which PyTorch's own float64 has digits enough; H empty and not."""
    assert np.finfo(np.longdouble).eps < 1e-18
    for options in (
        {"tau": 0.5, "beta": 1.0, "tau_plus": 0.1},
        {"tau": 0.1, "beta": 0.5, "tau_plus": 0.9},
        {"tau": 0.2, "beta": 2.0, "tau_plus": 0.0, "eps": torch.tensor(2.0, dtype=torch.float64)},
    ):
        p = problem("cluster", 13, 7, mode, **options)
        c, _, negative = reference.cosines(*(*p.inputs, None)[:3], mode)
        positive = reference._table_of_views(*(*p.inputs, None)[:3], mode).positive
        c = c.requires_grad_()
        table = reference.Table(c, positive, negative, positive | negative)
        tau = torch.tensor(p.tau, dtype=torch.float64)
        options = p.beta, p.tau_plus, "paper"
        loss = reference.decided_loss(table, c, p.eps, tau, *options)[0]
        (slopes,) = torch.autograd.grad(loss.sum(), c)
        sets = [mask.numpy() for mask in (positive, negative, negative & (c > p.eps))]
        values = c.detach().numpy().astype(np.longdouble)
        rows = exact.rows(values, *sets, p.tau, p.beta, p.tau_plus)
        # float64 at a condition of at most some thousand
        np.testing.assert_allclose(loss.detach(), rows.loss.astype(float), rtol=1e-12)
        size = abs(slopes).max().item()
        np.testing.assert_allclose(slopes, rows.slopes.astype(float), rtol=1e-10, atol=1e-13 * size)
        assert rows.of_loss.min() >= 1 and rows.of_slopes.max() < 1000
