# SPDX-License-Identifier: MIT
"""The raw operators, given what no caller of the package gives them: tensors of several devices, of
shapes that nothing can hold, bytes that are no booleans, targets that another thread writes to.
"""

import threading

import pytest
import torch
from class_problems import HEX
from data import f64

from hex import hex_cross_entropy, ops


def raw_calls():
    z, n = torch.zeros(4, 3), torch.zeros(0, 3)
    one, ids, none = f64(0.1), torch.arange(4), torch.empty(0).long()
    logits, mask, no = torch.zeros(4, 6), torch.empty(0, 0, dtype=torch.bool), torch.empty(0, 0)
    state = torch.zeros(11, dtype=torch.float64)
    pairs = (z, z[:0], ids, none, mask)
    stats, class_stats = torch.zeros(9, 8), torch.zeros(12, 4)
    return {
        "forward": (z, z.clone(), n, one, one, 0, 1, 0, 1.0, 0.1, False),
        "adaptive": (z, z.clone(), n, state, one, 0, 1, 0, 1.0, 0.1, 0.5, True, 0.0, False, False,
                     0, 1.0, False),
        "backward": (one, z, z.clone(), n, one, stats, z.new_empty(0), 0, 1, 1.0, 15),
        "threshold": (z, z.clone(), n, 0, 0.5, True),
        "row_range": (z, z.clone(), n, 0),
        "labelled_forward": (*pairs, none, none, no, no, one, one, 0, 1, 0, 0, 1.0, 0.1),
        "labelled_backward": (one, *pairs, none, none, no, no, one, class_stats, 0, 1, 1.0, 7),
        "labelled_threshold": (*pairs, 0, 0.5, True),
        "labelled_row_range": (*pairs, 0),
        "logits_forward": (logits, ids, no, one, one, False, 1, 0, 1.0, 0.1),
        "logits_backward": (one, logits, ids, no, one, class_stats, 1, 1.0, 3),
        "logits_threshold": (logits, ids, one, 0.5, True, False),
        "logits_row_range": (logits, ids, one, False),
    }  # fmt: skip


@pytest.mark.parametrize("name", raw_calls())
def test_one_meta_tensor_among_others_is_refused(name):
    args = raw_calls()[name]
    getattr(HEX, name)(*args)
    parameters = [a.name for a in getattr(HEX, name).default._schema.arguments]
    tensors = [k for k, a in enumerate(args) if isinstance(a, torch.Tensor)]
    for k in tensors:
        mixed = [a.to("meta") if i == k else a for i, a in enumerate(args)]
        named = parameters[tensors[1] if k == tensors[0] else k]
        with pytest.raises(RuntimeError, match=rf"{named}: got device \w+, wanted that of"):
            getattr(HEX, name)(*mixed)


MOST = 1 << 27


def claims(rows, columns):
    """A tensor that claims a shape which nothing can hold."""
    return torch.zeros(1, 1).expand(rows, columns)


@pytest.mark.parametrize("size", [MOST + 1, 1 << 31, 1 << 60])
def test_tensors_that_claim_more_than_there_can_be_are_refused_by_name(size):
    one, none, no = f64(0.1), torch.empty(0).long(), torch.empty(0, 0)
    mask = torch.empty(0, 0, dtype=torch.bool)
    z, ids = torch.zeros(4, 1), torch.arange(4)
    many = torch.zeros(1).long().expand(size)

    def refused(name):
        text = rf"{name}: expected at most {MOST} rows and columns, got {size}"
        return pytest.raises(RuntimeError, match=text)

    for x in (claims(size, 1), claims(1, size)):
        for mode in (0, 1, 2):
            with refused("z0"):
                HEX.row_range(x, x, x[:0], mode)
        with refused("x"):
            HEX.labelled_row_range(x, x[:0], many[: len(x)], none, mask, 0)
        with refused("logits"):
            HEX.logits_row_range(x, many[: len(x)], one, False)
    with refused("negatives"):
        HEX.row_range(z, z.clone(), claims(size, 1), 3)
    with refused("negatives"):
        HEX.row_range(z, z.clone(), torch.zeros(1, 1, 1).expand(4, size, 1), 4)
    with refused("y"):
        HEX.labelled_row_range(z, claims(size, 1), ids, many, mask, 1)
    with refused("guide"):
        HEX.labelled_forward(z, z[:0], ids, none, mask, none, none, claims(4, size), no, one, one,
                             0, 1, 0, 0, 1.0, 0.1)  # fmt: skip


def test_a_mask_is_true_where_its_byte_is_not_zero():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 5, generator=generator, requires_grad=True)
    truth = torch.rand(6, 6, generator=generator) < 0.4
    truth = truth | truth.T
    bytes_ = torch.where(truth, 2 + 50 * torch.arange(6, dtype=torch.int64)[:, None], 0)
    mask = bytes_.to(torch.uint8).view(torch.bool)
    none, no = torch.empty(0).long(), torch.empty(0, 0)

    def run(mask):
        args = (z, z[:0], none, none, mask, none, none, no, no, f64(0.1), f64(0.1))
        value, hard, _ = ops.labelled.loss(*args, 0, 0, 0, 0, 1.0, 0.1)
        return value.detach(), hard, *torch.autograd.grad(value.sum(), z)

    assert all(torch.equal(x, y) for x, y in zip(run(mask), run(truth), strict=True))


def test_targets_that_are_written_to_meanwhile_are_no_address():
    """Another thread writes columns that are none, which are refused or not yet there."""
    logits, target = torch.zeros(4096, 8), torch.zeros(4096, dtype=torch.int64)
    running = True

    def write():
        while running:
            target.fill_(1 << 40)
            target.zero_()

    writer = threading.Thread(target=write)
    writer.start()
    refused = 0
    for _ in range(200):
        try:
            hex_cross_entropy(logits, target, eps=2.0, temperature=0.1)
        except RuntimeError as error:
            assert "target: expected columns in" in str(error)
            refused += 1
    running = False
    writer.join()
    assert refused  # or the test has shown nothing
