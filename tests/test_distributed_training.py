# SPDX-License-Identifier: MIT
"""`gather_distributed` in training loops as they are found.

Each loop runs on the ranks, on their parts of a batch, and in one process on the whole: the results
are the same, and those of the ranks equal to the bit.
"""

import contextlib
import copy
import itertools

import pytest
import ranks
import torch
import torch.distributed as dist
from gathered import (
    CALLS,
    CASES,
    Batch,
    Encoder,
    adaptive,
    assert_close,
    criterion,
    gradients,
    plain_pytorch,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hex import HEXLoss

CUT = (23, 18)


def parts(rank: int | None, steps: int = 3):
    """Of some batches a rank's part, or all, and the argument that tells the cut."""
    for seed in range(steps):
        batch = Batch(CUT, seed)
        if rank is None:
            yield batch.whole(), {}
        else:
            yield batch.part(rank), batch.rows()


def wrapped(model: nn.Module, rank: int | None) -> nn.Module:
    return model if rank is None else DistributedDataParallel(model)


# ---- loops --------------------------------------------------------------------------------------


def accumulated(rank: int | None) -> list[Tensor]:
    """Three batches before one step, of which DDP averages the gradients once."""
    model, loss, values = wrapped(Encoder(), rank), criterion(), []
    for step, (part, rows) in enumerate(parts(rank)):
        silent = model.no_sync() if rank is not None and step < 2 else contextlib.nullcontext()
        with silent:
            e = part.encoded(model)
            values.append(loss(e.z0, e.z1, temperature=e.tau, **rows))
            values[-1].backward()
    return [*values, loss.threshold.state, *gradients(model)]


def evaluated(rank: int | None) -> list[Tensor]:
    """Without gradients, and in evaluation with them, after a step of training."""
    model, loss, values = wrapped(Encoder(), rank), criterion(), []
    for step, (part, rows) in enumerate(parts(rank)):
        loss.train(step < 2)
        with torch.set_grad_enabled(step != 1):
            e = part.encoded(model)
            values.append(loss(e.z0, e.z1, temperature=e.tau, **rows))
        if step != 1:
            values[-1].backward()
    assert loss.threshold.updates == 1
    return [*values, loss.threshold.state, *gradients(model)]


def one_view_twice(rank: int | None) -> list[Tensor]:
    model, loss = wrapped(Encoder(), rank), criterion()
    ((part, rows),) = parts(rank, 1)
    z, *_, tau = model(*part.inputs)
    value = loss(z, z, temperature=tau, **rows)
    value.backward()
    return [value, loss.threshold.state, *gradients(model)]


def one_side_frozen(rank: int | None) -> list[Tensor]:
    found = []
    for mode in ("ntxent", "cross", "query"):
        for frozen in (0, 1):
            model, loss = wrapped(Encoder(), rank), criterion(mode=mode)
            ((part, rows),) = parts(rank, 1)
            z0, z1, *_, tau = model(*part.inputs)
            views = (z0.detach(), z1) if frozen == 0 else (z0, z1.detach())
            value = loss(*views, temperature=tau, **rows)
            value.backward()
            found += [value.detach(), *gradients(model)]
    return found


class Whole(nn.Module):
    """A model with the loss in it, all in an activation checkpoint."""

    def __init__(self, way: str, loss: nn.Module) -> None:
        super().__init__()
        self.encoder, self.loss, self.way = Encoder(), loss, way

    def value(self, rows, *inputs: Tensor) -> Tensor:
        z0, z1, *_, tau = self.encoder(*inputs)
        return self.loss(z0, z1, temperature=tau, **rows)

    def forward(self, rows, *inputs: Tensor) -> Tensor:
        if self.way == "plain":
            return self.value(rows, *inputs)
        return checkpoint(self.value, rows, *inputs, use_reentrant=self.way == "reentrant")


def in_a_checkpoint(rank: int | None, way: str) -> list[Tensor]:
    model, found = wrapped(Whole("plain" if rank is None else way, criterion()), rank), []
    loss = model.loss if rank is None else model.module.loss
    for part, rows in parts(rank, 2):
        # A reentrant checkpoint wants an input with a gradient.
        value = model(rows, *(x.requires_grad_() for x in part.inputs))
        value.backward()
        found += [value.detach(), loss.threshold.state.clone()]
    return found + gradients(model)


def reentrant(rank: int | None) -> list[Tensor]:
    return in_a_checkpoint(rank, "reentrant")


def not_reentrant(rank: int | None) -> list[Tensor]:
    return in_a_checkpoint(rank, "not reentrant")


class Head(nn.Module):
    """FSDP takes no parameter without dimensions, so the temperature is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.loss = Encoder().body, criterion()

    def forward(self, rows, x0: Tensor, x1: Tensor) -> Tensor:
        return self.loss(self.body(x0), self.body(x1), **rows)


def fully_sharded(rank: int | None) -> list[Tensor]:
    model, found = Head(), []
    if rank is not None:
        fully_shard(model.body[0])
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for part, rows in parts(rank):
        optimizer.zero_grad()
        value = model(rows, *part.inputs[:2])
        value.backward()
        optimizer.step()
        found += [value.detach(), model.loss.threshold.state.clone()]
    return [*found, *(p if rank is None else p.full_tensor() for p in model.parameters())]


LOOPS = {
    function.__name__: function
    for function in (
        accumulated, evaluated, one_view_twice, one_side_frozen, reentrant, not_reentrant,
        fully_sharded
    )
}  # fmt: skip


# ---- what one process does not tell -------------------------------------------------------------


def autocast(rank: int) -> dict[str, Tensor]:
    """The value in mixed precision, and the rows that the loss was given."""
    model, loss = wrapped(Encoder().float(), rank), criterion()
    ((part, rows),) = parts(rank, 1)
    with torch.autocast("cpu", torch.bfloat16):
        z0, z1, *_ = model(*(x.float() for x in part.inputs))
        value = loss(z0, z1, **rows)
    value.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in model.module.body.parameters()
    )
    return {"value": value.detach(), "z0": z0.detach(), "z1": z1.detach()}


COMPILED = ("ntxent", "queue")


def compiled(rank: int) -> dict[str, list[Tensor]]:
    """Values, states and gradients of three compiled steps and of three plain ones, and graphs."""
    found = {}
    for name in COMPILED:
        case = CASES[name]
        for way in ("plain", "compiled"):
            encoder = Encoder()
            loss = case.make(gather_distributed=True)

            def step(part, rows, case=case, loss=loss, encoder=encoder):
                e = part.encoded(encoder)
                return CALLS[case.call](loss, e, temperature=e.tau, **rows)

            counter = CompileCounterWithBackend("aot_eager")
            run = step
            if way == "compiled":
                run = torch.compile(step, backend=counter, fullgraph=True)
            found[name, way] = []
            with torch._dynamo.config.patch(error_on_recompile=True):
                for part, rows in parts(rank):
                    value = run(part, rows)
                    value.backward()
                    state = [] if loss.threshold is None else [loss.threshold.state.clone()]
                    found[name, way] += [value.detach(), *state]
            found[name, way] += gradients(encoder)
            found[name, way, "graphs"] = counter.frame_count
        if name == "ntxent":
            found["uneven"] = ranks.outcome(run, part, {})  # the sizes are not told
        torch._dynamo.reset()
    return found


def under_ddp_compiled(rank: int) -> dict[tuple[bool, str], list[Tensor]]:
    """The same with DDP inside, which cuts the graph at its buckets; with gathering or without."""
    found = {}
    for gathers, way in itertools.product((False, True), ("plain", "compiled")):
        model = wrapped(Encoder(), rank)
        loss = HEXLoss(threshold=adaptive(momentum=0.5), gather_distributed=gathers)

        def step(part, rows, loss=loss, model=model):
            e = part.encoded(model)
            return loss(e.z0, e.z1, temperature=e.tau, **rows)

        run = torch.compile(step, backend="eager") if way == "compiled" else step
        values = []
        for part, rows in parts(rank, 2):
            values.append(run(part, rows if gathers else {}))
            values[-1].backward()
        found[gathers, way] = [*values, loss.threshold.state, *gradients(model)]
    torch._dynamo.reset()
    return found


class Alone(nn.Module):
    """DDP without gathering."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.loss = HEXLoss(threshold=adaptive(momentum=0.5))

    def forward(self, *inputs: Tensor) -> Tensor:
        z0, z1, *_, tau = self.encoder(*inputs)
        return self.loss(z0, z1, temperature=tau)


def without_gathering(rank: int) -> list[Tensor]:
    """The states after each step; the weights stay."""
    model, states = wrapped(Alone(), rank), []
    for part, _ in parts(rank):
        model(*part.inputs).backward()
        states.append(model.module.loss.threshold.state.clone())
    return states


def a_group_of_one(rank: int) -> list[Tensor]:
    alone = [dist.new_group([k]) for k in range(2)][rank]
    ((part, _),) = parts(rank, 1)
    e = part.encoded(Encoder())
    return [criterion(process_group=alone)(e.z0, e.z1), HEXLoss(threshold=adaptive())(e.z0, e.z1)]


OTHERS = (autocast, compiled, under_ddp_compiled, without_gathering, a_group_of_one)


def pair(rank: int):
    every = LOOPS | {function.__name__: function for function in OTHERS}
    return {name: ranks.outcome(function, rank) for name, function in every.items()}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return ranks.run(pair, tmp_path_factory.mktemp("ranks"))


def assert_same(ours, wanted) -> None:
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_on_ranks_does_what_it_does_in_one_process(loop, seen):
    one, two = (rank[loop] for rank in seen)
    assert not isinstance(one, str), one
    assert_close(one, LOOPS[loop](None))
    assert_same(one, two)


def test_under_autocast_the_loss_of_rounded_rows_is_that_of_one_process(seen):
    from conftest import assert_as_good_as_torch  # every rank imports this file: not all of that

    given = [rank["autocast"] for rank in seen]
    z0, z1 = (torch.cat([rank[name] for rank in given]) for name in ("z0", "z1"))
    assert z0.dtype == torch.bfloat16
    with plain_pytorch():
        same = HEXLoss(threshold=adaptive())(z0.float(), z1.float())
        truth = HEXLoss(threshold=adaptive())(z0.double(), z1.double())
    for rank in given:
        assert rank["value"].dtype == torch.float32
        assert_as_good_as_torch(rank["value"], same, truth, tau=0.1, condition=1.1 / 0.9)
    assert torch.equal(given[0]["value"], given[1]["value"])


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_is_one_graph_for_all_steps_and_gives_the_same(name, seen):
    for rank in seen:
        found = rank["compiled"]
        assert found[name, "compiled", "graphs"] == 1
        assert_close(found[name, "compiled"], found[name, "plain"])
        assert all(x.abs().max() > 0 for x in found[name, "plain"][-4:])


def test_compiled_it_still_compares_the_sizes(seen):
    for rank in seen:
        assert "got 23 and 18 rows on ranks 0 and 1, wanted the" in rank["compiled"]["uneven"]


@pytest.mark.parametrize("gathers", (False, True), ids=("local", "gathered"))
def test_compiled_together_with_ddp_it_gives_the_same(gathers, seen):
    for rank in seen:
        found = rank["under_ddp_compiled"]
        assert_close(found[gathers, "compiled"], found[gathers, "plain"])


def test_without_gathering_every_step_begins_with_rank_0s_threshold(seen):
    """As DDP's broadcast of buffers has it; the step itself is that of the rank's own images."""
    tracker = adaptive(momentum=0.5)
    for step in range(3):
        following = []
        for rank in range(2):
            own = HEXLoss(threshold=copy.deepcopy(tracker))
            e = list(parts(rank))[step][0].encoded(Encoder())
            own(e.z0, e.z1)
            assert torch.equal(seen[rank]["without_gathering"][step], own.threshold.state)
            following.append(own.threshold)
        assert not torch.equal(following[0].state, following[1].state)
        tracker = following[0]


def test_a_group_of_one_rank_changes_nothing(seen):
    for rank in seen:
        ours, alone = rank["a_group_of_one"]
        assert torch.equal(ours, alone)
