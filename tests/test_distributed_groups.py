# SPDX-License-Identifier: MIT
"""`process_group`: of four ranks two are a group, whose batches count as one."""

import copy
import pickle

import pytest
import ranks
import torch
import torch.distributed as dist
from gathered import CASES, Batch, Encoder, assert_close, criterion, gradients
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hex import HEXLoss
from hex.open_clip import HEXClipLoss

CUT = (23, 18)


def in_pairs(rank: int):
    """Ranks 0 and 2 are a group, 1 and 3 another; DDP averages over a group or over all."""
    groups = [dist.new_group([k, k + 2]) for k in range(2)]
    own, place = groups[rank % 2], rank // 2
    found = {}
    for way, seed in (("replicas", 0), ("apart", rank % 2), ("group", rank % 2)):
        model = DistributedDataParallel(Encoder(), process_group=own if way == "group" else None)
        loss = criterion(process_group=own)
        batch = Batch(CUT, seed)
        e = batch.part(place).encoded(model)
        value = loss(e.z0, e.z1, temperature=e.tau, **batch.rows())
        value.backward()
        found[way] = [value.detach(), loss.threshold.state.clone(), *gradients(model)]

    twin, shallow = copy.deepcopy(loss), copy.copy(loss)
    assert twin.process_group is own is shallow.process_group is loss.process_group
    assert "gather_distributed=True" in repr(twin) and criterion().process_group is None
    e = batch.part(place).encoded(Encoder())
    found["deepcopy"] = [x(e.z0, e.z1, **batch.rows()).detach() for x in (loss, twin)]
    e = Batch((21, 21)).part(place).encoded(Encoder())
    found["clip"] = [
        HEXClipLoss(threshold=0.3, process_group=own)(e.z0, e.z1, 1 / e.tau),
        HEXLoss(mode="cross", threshold=0.3, gather_distributed=True, process_group=own)(
            e.z0, e.z1, temperature=e.tau
        ),
    ]
    given = torch.stack((e.z0, e.z1), 1).detach(), e.labels
    labelled = [CASES["labels"].make(gather_distributed=True, process_group=own) for _ in range(2)]
    run = torch.compile(labelled[0], backend="aot_eager", fullgraph=True)
    found["compiled"] = [run(*given), labelled[1](*given)]
    found["errors"] = [
        ranks.outcome(attempt)
        for attempt in (
            lambda: pickle.dumps(loss),
            lambda: HEXLoss(process_group=own),
            lambda: criterion(process_group=groups[1 - rank % 2]),
            lambda: criterion(process_group="world"),
        )
    ]
    found["states"] = trained(rank, own)
    return found


class Model(nn.Module):
    """With the loss in it, so that DDP knows the threshold."""

    def __init__(self, group) -> None:
        super().__init__()
        self.encoder, self.loss = Encoder(), criterion(process_group=group)

    def forward(self, part, rows) -> Tensor:
        e = part.encoded(self.encoder)
        return self.loss(e.z0, e.z1, temperature=e.tau, **rows)


def trained(rank: int, group) -> list[Tensor]:
    """The states after each step of DDP over all ranks; the weights stay."""
    model, states = DistributedDataParallel(Model(group)), []
    for step in range(3):
        batch = Batch(CUT, 2 * step + rank % 2)
        model(batch.part(rank // 2), batch.rows()).backward()
        states.append(model.module.loss.threshold.state.clone())
    return states


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return ranks.run(in_pairs, tmp_path_factory.mktemp("ranks"), ranks=4)


def of_one(seed: int) -> list[Tensor]:
    model, loss = Encoder(), criterion()
    e = Batch(CUT, seed).whole().encoded(model)
    value = loss(e.z0, e.z1, temperature=e.tau)
    value.backward()
    return [value, loss.threshold.state, *gradients(model)]


def test_a_process_group_has_the_loss_of_its_ranks_alone(pairs):
    first, second = of_one(0), of_one(1)
    assert abs(first[0] - second[0]) > 1e-3
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    for rank, found in enumerate(pairs):
        own = first if rank % 2 == 0 else second
        assert_close(found["replicas"], first)
        assert_close(found["group"], own)
        # The gradient is right under what averages over more ranks than the group has.
        assert_close(found["apart"], own[:2] + mean[2:])


def test_under_ddp_every_step_of_a_group_begins_with_rank_0s_threshold(pairs):
    """As DDP's broadcast of buffers has it, over more ranks than the group's."""
    tracker = criterion().threshold
    for step in range(3):
        following = []
        for group in range(2):
            own = HEXLoss(threshold=copy.deepcopy(tracker))
            e = Batch(CUT, 2 * step + group).whole().encoded(Encoder())
            own(e.z0, e.z1)
            first, second = (pairs[rank]["states"][step] for rank in (group, group + 2))
            assert torch.equal(first, second)
            assert_close([first], [own.threshold.state])
            following.append(own.threshold)
        assert abs(following[0].value - following[1].value) > 1e-4
        tracker = following[0]


def test_a_compiled_graph_keeps_the_process_group(pairs):
    for found in pairs:
        torch.testing.assert_close(*found["compiled"], rtol=1e-11, atol=0)


def test_the_loss_for_open_clip_has_a_process_group_too(pairs):
    for found in pairs:
        ours, cross = found["clip"]
        torch.testing.assert_close(ours, cross, rtol=1e-12, atol=0)


def test_a_copy_keeps_the_process_group_and_a_pickle_is_refused(pairs):
    for found in pairs:
        assert torch.equal(*found["deepcopy"])
        of_pickle, of_local, of_others, of_name = found["errors"]
        assert of_pickle.startswith("TypeError: process_group: ")
        assert of_local.startswith("ValueError: process_group: ")
        assert of_others.startswith("TypeError: process_group: got ")
        assert of_name.startswith("TypeError: process_group: got str, wanted ")
    assert "gather_distributed=True" in repr(pickle.loads(pickle.dumps(criterion())))
