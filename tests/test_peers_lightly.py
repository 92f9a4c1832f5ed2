# SPDX-License-Identifier: MIT
"""lightly's NTXentLoss on inputs of the kinds that its own tests use, with the local term off.

Other batches, temperatures and peers are in test_peers.py; training with its modules is in
test_peers_training.py.
"""

import pytest
import torch
from torch import Tensor

from hex import HEXLoss, InfoNCELoss

lightly = pytest.importorskip("lightly.loss", exc_type=ImportError)

KINDS = {
    "uniform": lambda n, d: torch.rand(n, d),  # one orthant: all cosines are positive
    "normal": lambda n, d: torch.randn(n, d),
    "one-hot": lambda n, d: torch.eye(n, max(n, d)),
    "all one": lambda n, d: torch.ones(n, d),
    "a view and its negative": lambda n, d: torch.randn(n, d).cumsum(0) * (-1) ** torch.arange(d),
}


def value_and_gradients(loss, *z: Tensor) -> tuple[Tensor, ...]:
    z = [x.clone().requires_grad_() for x in z]
    value = loss(*z)
    return value.detach(), *torch.autograd.grad(value, z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", (0.1, 0.5, 7.0))
@pytest.mark.parametrize("n", (1, 2, 7, 20))
@pytest.mark.parametrize("d", (2, 63))
def test_values_and_gradients_are_those_of_lightly(kind, tau, n, d):
    torch.manual_seed(n * d)
    z0, z1 = KINDS[kind](n, d), KINDS[kind](n, d)
    if kind == "a view and its negative":
        z1 = -z0
    peer = value_and_gradients(lightly.NTXentLoss(tau), z0, z1)
    truth = value_and_gradients(lightly.NTXentLoss(tau), z0.double(), z1.double())
    for loss in (InfoNCELoss(tau), HEXLoss(tau, threshold=None)):
        for ours, same, true in zip(value_and_gradients(loss, z0, z1), peer, truth, strict=True):
            # Where all terms of a gradient cancel (all one) theirs is rounding; 1e-6 is that of
            # terms of size 1 / tau over the length of a row.
            largest = max(same.abs().max().item(), 0.1 / tau)
            torch.testing.assert_close(ours, same, rtol=0, atol=1e-5 * largest)
            torch.testing.assert_close(ours.double(), true, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("tau", (0.1, 0.5, 1.0))
def test_the_views_can_change_places_as_in_lightly(tau):
    z0, z1 = torch.rand(2, 9, 16)
    loss = InfoNCELoss(tau)
    torch.testing.assert_close(loss(z0, z1), loss(z1, z0))
    torch.testing.assert_close(loss(z0, z1), lightly.NTXentLoss(tau)(z1, z0))


def test_a_row_of_zeros_has_the_value_of_lightly_and_no_gradient_where_its_own_explodes():
    z0, z1 = torch.eye(6, 5), torch.eye(6, 5)  # the last row is 0
    ours, theirs = (
        value_and_gradients(loss, z0, z1) for loss in (InfoNCELoss(), lightly.NTXentLoss(0.1))
    )
    torch.testing.assert_close(ours[0], theirs[0])
    assert theirs[1][-1].abs().max() > 1e9
    assert not ours[1][-1].any()
    torch.testing.assert_close(ours[1][:-1], theirs[1][:-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tau", (0.0, -1.0))
def test_a_temperature_that_lightly_refuses_or_misreads_is_refused(tau):
    with pytest.raises(ValueError, match="temperature"):
        InfoNCELoss(tau)
