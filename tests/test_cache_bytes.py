# SPDX-License-Identifier: MIT
"""`cache_bytes` and HEX_CACHE_BYTES: how much of the cosines a forward keeps for its backward. That
it changes no bit is in test_tiles.py and test_block.py too, the memory in test_threads.py.
"""

import os
import subprocess
import sys

import pytest
import torch
from data import batch

from hex import HEXLoss, HEXSupConLoss, InfoNCELoss, hex_loss, hex_sup_con, info_nce


def test_the_bytes_that_are_kept_are_an_option_and_change_no_bit():
    views = [z.float() for z in batch("cluster", 200, 20, "ntxent", 0, 0)[:2]]

    def step(criterion):
        """What a step leaves for the backward, and its gradients."""
        leaves = [z.clone().requires_grad_() for z in views]
        loss = criterion(*leaves)
        kept = max(t.nelement() for t in loss.grad_fn.saved_tensors if t.dim() == 1)
        return kept, (loss.detach(), *torch.autograd.grad(loss, leaves))

    room = 6 * 192 * 208 + 2496  # tiles of 400 rows, of the largest blocks
    results = {}
    for most, kept in ((None, room), (4 * room, room), (4 * room - 1, 2), (0, 0)):
        for name, criterion in {
            "HEXLoss": HEXLoss(cache_bytes=most),
            "InfoNCELoss": InfoNCELoss(cache_bytes=most),
            "hex_loss": lambda *z, most=most: hex_loss(*z, eps=0.3, cache_bytes=most),
            "info_nce": lambda *z, most=most: info_nce(*z, cache_bytes=most),
        }.items():
            found, result = step(criterion)
            assert found == kept, (name, most)
            first = results.setdefault(name, result)
            assert all(map(torch.equal, first, result)), (name, most)


@pytest.mark.parametrize("bad", (-1, 1.5, True, "1", 2**53))
def test_a_bad_number_of_bytes_is_refused(bad):
    for refused in (
        lambda: HEXLoss(cache_bytes=bad),
        lambda: HEXSupConLoss(cache_bytes=bad),
        lambda: info_nce(torch.ones(2, 3), torch.ones(2, 3), cache_bytes=bad),
        lambda: hex_sup_con(torch.ones(2, 2, 3), eps=0.0, cache_bytes=bad),
    ):
        with pytest.raises((TypeError, ValueError), match="cache_bytes: got .*, wanted an integer"):
            refused()


def test_the_environment_says_how_many_bytes_are_kept():
    code = "from hex import ops; print(ops.bytes_to_keep(None), ops.bytes_to_keep(7))"
    for value, said in (("", f"{1 << 30} 7"), ("0", "0 7"), ("5000", "5000 7")):
        environment = {**os.environ, "HEX_CACHE_BYTES": value}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == said, done.stderr
    for value in ("1GiB", "-1", "1e9", str(2**53)):
        environment = {**os.environ, "HEX_CACHE_BYTES": value}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert (
            f"ValueError: HEX_CACHE_BYTES: got {value!r}, wanted a number of bytes" in done.stderr
        )
