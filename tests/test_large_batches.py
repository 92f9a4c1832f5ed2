# SPDX-License-Identifier: MIT
"""docs/guides/large_batches.md: a batch that is encoded in chunks trains as the whole batch does.

What is tested is the code of that page. Where an encoder draws random numbers, or normalises by the
rows that it is given, no encoding of the whole batch can be equal. It is then compared with a graph
that keeps the activations of all chunks.
"""

import re
import weakref
from pathlib import Path

import pytest
import ranks
import torch
from gathered import Batch, Encoder, adaptive, assert_close, criterion, gradients
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hex import HEXCrossEntropyLoss, HEXLoss, HEXSupConLoss

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "large_batches.md"
B, WIDTH, SIZE = 45, 12, 7  # the last chunk has 3 rows


def code_of_the_page() -> dict:
    names: dict = {}
    with torch.random.fork_rng():
        for source in re.findall(
            r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
        ):
            exec(compile(source, str(PAGE), "exec"), names)
    return names


NAMES = code_of_the_page()
in_chunks, frozen_statistics, InChunks = (
    NAMES[name] for name in ("in_chunks", "frozen_statistics", "InChunks")
)


def whole(encoder, *inputs, size):
    return encoder(*inputs)


def kept(encoder, *inputs, size):
    """In chunks, in a graph that keeps all their activations."""
    return torch.cat([encoder(*c) for c in zip(*(x.split(size) for x in inputs), strict=True)])


def network(*extra: nn.Module, dtype=torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(WIDTH, 24), *extra, nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 10)
    ).to(dtype)


def views(dtype=torch.float64, seed: int = 0) -> Tensor:
    """(2, B, WIDTH), of images in five groups."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, B, WIDTH, generator=generator, dtype=torch.float64)
    return (noise[0, :5].repeat(B // 5, 1) + 0.7 * noise[1:]).to(dtype)


# ---- losses: the modules that learn, the loss, and a step, which is told how to encode -----------


def one_encoder(dtype, loss, call=lambda loss, z0, z1: loss(z0, z1)):
    encoder, x = network(dtype=dtype), views(dtype)
    return [encoder], loss, lambda way: call(loss, *(way(encoder, v, size=SIZE) for v in x))


def clip(dtype):
    """Two encoders, one of them with two inputs, and a learned temperature."""
    images, texts, x = network(dtype=dtype), network(dtype=dtype), views(dtype)
    scale = nn.Parameter(torch.tensor(1.5, dtype=dtype))
    mask = torch.rand(B, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    loss = HEXLoss(mode="cross", threshold=adaptive(0.9))

    def masked(x, mask):
        return texts(x * (mask > 0.3))

    def step(way):
        z0, z1 = way(images, x[0], size=SIZE), way(masked, x[1], mask, size=SIZE + 4)
        return loss(z0, z1, temperature=1 / scale.exp())

    return [images, texts, nn.ParameterList([scale])], loss, step


def queue(dtype):
    """The keys, by an encoder that does not learn, and negatives from a queue."""
    old = torch.randn(30, 10, generator=torch.Generator().manual_seed(3)).to(dtype)
    encoder, x = network(dtype=dtype), views(dtype)
    loss = HEXLoss(threshold=adaptive(0.9))

    def step(way):
        with torch.no_grad():
            key = way(encoder, x[1], size=SIZE)
        return loss(way(encoder, x[0], size=SIZE), key, old)

    return [encoder], loss, step


def sup_con(dtype):
    return one_encoder(
        dtype,
        HEXSupConLoss(threshold=adaptive(0.9)),
        lambda loss, *z: loss(torch.stack(z, 1), torch.arange(B) % 5),
    )


def logits(dtype):
    def call(loss, *z):
        z0, z1 = (nn.functional.normalize(v) for v in z)
        return loss(z0 @ z1.T / 0.1, torch.arange(B))

    return one_encoder(dtype, HEXCrossEntropyLoss(0.1, threshold=adaptive(0.9)), call)


CASES = {
    "ntxent": lambda dtype: one_encoder(dtype, HEXLoss(threshold=adaptive(0.9, momentum=0.5))),
    "released": lambda dtype: one_encoder(
        dtype, HEXLoss(threshold=adaptive(0.9), variant="released")
    ),
    "clip": clip,
    "queue": queue,
    "sup con": sup_con,
    "logits": logits,
}


def stepped(case: str, way, dtype=torch.float64) -> list[Tensor]:
    """The loss, the threshold and the gradients of a step."""
    modules, loss, step = CASES[case](dtype)
    value = step(way)
    value.backward()
    assert int(loss.threshold.updates) == 1
    found = [
        value.detach(),
        loss.threshold.value,
        *(p.grad for m in modules for p in m.parameters()),
    ]
    return [x.double() for x in found]


def two_passes(encoder, loss, x: Tensor, size: int) -> Tensor:
    """Algorithm of Gao et al. 2021, section 3.2, without the help of a checkpoint."""
    with torch.no_grad():
        z = [kept(encoder, v, size=size) for v in x]
    value = loss(*(v.requires_grad_() for v in z))
    value.backward()
    for v, embeddings in zip(x, z, strict=True):
        pairs = zip(v.split(size), embeddings.grad.split(size), strict=True)
        for chunk, gradient in pairs:
            encoder(chunk).backward(gradient)
    return value.detach()


@pytest.mark.parametrize("case", CASES)
def test_a_batch_in_chunks_has_the_loss_the_threshold_and_the_gradients_of_the_whole(case):
    true, ours = stepped(case, whole), stepped(case, in_chunks)
    rounded = stepped(case, whole, torch.float32)
    for wanted, got, single in zip(true, ours, rounded, strict=True):
        # The same sums in another order. What rounding does to them is seen in float32, whose unit
        # is 2^29 times as large. Both orders round, and a factor of 2 is for chance; and a few ulp.
        largest = wanted.abs().max()
        error = (single - wanted).abs().max()
        assert (got - wanted).abs().max() <= 4 * error * 2**-29 + 4 * 2**-52 * largest
        assert largest > 0


@pytest.mark.parametrize("case", CASES)
def test_in_float32_the_error_of_chunks_is_that_of_the_whole(case):
    true = stepped(case, whole)
    for wanted, one, other in zip(
        true, stepped(case, whole, torch.float32), stepped(case, in_chunks, torch.float32),
        strict=True,
    ):  # fmt: skip
        # Twice the error of the whole, and a few ulp of the largest.
        limit = 2 * (one - wanted).abs().max() + 4 * 2**-23 * wanted.abs().max()
        assert (other - wanted).abs().max() <= limit


def test_the_gradients_are_those_of_the_two_passes_of_grad_cache():
    x, found = views(), []
    for way in ("ours", "theirs"):
        encoder, loss = network(), HEXLoss(threshold=adaptive(0.9))
        if way == "ours":
            value = loss(*(in_chunks(encoder, v, size=SIZE) for v in x))
            value.backward()
        else:
            value = two_passes(encoder, loss, x, SIZE)
        found.append([value.detach(), loss.threshold.state, *gradients(encoder)])
    assert_close(*found)


@pytest.mark.parametrize("size", (1, B - 1, B, 1000))
def test_chunks_of_any_size_give_the_same(size):
    found = []
    for encode in (whole, in_chunks):
        encoder = network()
        HEXLoss(threshold=adaptive(0.9))(
            *(encode(encoder, v, size=size) for v in views())
        ).backward()
        found.append(gradients(encoder))
    assert_close(*found)


# ---- what a chunk sees --------------------------------------------------------------------------


class Augmented(nn.Module):
    """Noise and flips are drawn anew for every call."""

    def forward(self, x: Tensor) -> Tensor:
        flips = torch.rand(len(x), 1) < 0.5
        return torch.where(flips, x.flip(1), x) + 0.1 * torch.randn_like(x)


def drawn(encode, seed: int = 5) -> list[Tensor]:
    """A step of an encoder that draws random numbers, and those that come next."""
    encoder, loss = network(Augmented(), nn.Dropout(0.3)), HEXLoss(threshold=adaptive(0.9))
    torch.manual_seed(seed)
    value = loss(*(encode(encoder, v, size=SIZE) for v in views()))
    value.backward()
    return [value.detach(), loss.threshold.state, *gradients(encoder), torch.rand(5)]


def test_dropout_and_augmentation_draw_the_same_numbers_in_both_passes():
    ours = drawn(in_chunks)
    assert_close(ours, drawn(kept))
    assert not torch.allclose(ours[0], drawn(in_chunks, seed=6)[0])


def normed(encode, kind, momentum, **options) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the last of two steps with BatchNorm, and its running statistics."""
    encoder = network(kind(24, momentum=momentum))
    loss, norm = HEXLoss(threshold=adaptive(0.9)), encoder[1]
    if options:
        options = {"context_fn": lambda: (torch.enable_grad(), frozen_statistics(encoder))}
    for seed in range(2):
        encoder.zero_grad()
        value = loss(*(encode(encoder, v, size=9, **options) for v in views(seed=seed)))
        value.backward()
        assert norm.momentum == momentum
    statistics = [norm.running_mean, norm.running_var, norm.num_batches_tracked]
    assert "1.num_batches_tracked" in encoder.state_dict()
    return [value.detach(), *gradients(encoder)], statistics


@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("kind", (nn.BatchNorm1d, nn.SyncBatchNorm))
def test_batch_norm_uses_the_statistics_of_each_chunk_and_frozen_ones_are_updated_once(
    kind, momentum
):
    norm = kind, momentum
    (kept_step, once), (frozen_step, frozen), (bare_step, twice), (whole_step, _) = (
        normed(kept, *norm), normed(in_chunks, *norm, frozen=True), normed(in_chunks, *norm),
        normed(whole, *norm),
    )  # fmt: skip
    assert_close(frozen_step, kept_step)
    assert_close(bare_step, kept_step)
    assert_close(frozen, once)
    assert int(once[2]) == 20 and int(twice[2]) == 40  # two steps of two views in five chunks
    assert momentum is None or not torch.allclose(twice[0], once[0])
    assert not torch.allclose(whole_step[0], kept_step[0])


def test_batch_norm_without_running_statistics_has_none_to_freeze():
    norm = nn.BatchNorm1d(3, track_running_stats=False)
    with frozen_statistics(norm):
        norm(torch.rand(4, 3))
    assert norm.momentum == 0.1 and norm.running_mean is norm.num_batches_tracked is None


@pytest.mark.parametrize("inside", (False, True), ids=("backward after", "backward inside"))
@pytest.mark.parametrize("scale", (1.0, 2.0**12), ids=("unscaled", "scaled"))
def test_under_autocast_with_a_scaler_the_bits_are_those_of_kept_chunks(inside, scale):
    found = []
    for encode in (kept, in_chunks):
        encoder = network(nn.Dropout(0.2), dtype=torch.float32)
        loss = HEXLoss(threshold=adaptive(0.9))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        optimizer = torch.optim.SGD(encoder.parameters(), 0.1)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            z = [encode(encoder, v, size=SIZE) for v in views(torch.float32)]
            assert z[0].dtype == torch.bfloat16
            value = loss(*z)
            if inside:
                scaler.scale(value).backward()
        if not inside:
            scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append([value.detach(), loss.threshold.state, *encoder.parameters()])
    for ours, wanted in zip(*found, strict=True):
        assert torch.equal(ours, wanted)
    before = network(nn.Dropout(0.2), dtype=torch.float32)
    pairs = zip(before.parameters(), encoder.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)  # every weight has learned


class Checkpointed(nn.Linear):
    """A layer that saves no activations of its own accord."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_an_encoder_that_checkpoints_its_layers_gives_the_same():
    found = []
    for encode in (whole, in_chunks):
        encoder, loss = network(Checkpointed(24, 24)), HEXLoss(threshold=adaptive(0.9))
        loss(*(encode(encoder, v, size=SIZE) for v in views())).backward()
        found.append([loss.threshold.value, *gradients(encoder)])
    assert_close(*found)


def test_a_compiled_encoder_gives_the_same():
    encoder, found = network(), []
    for encode in (encoder, torch.compile(encoder, backend="aot_eager")):
        encoder.zero_grad()
        loss = HEXLoss(threshold=adaptive(0.9))
        loss(*(in_chunks(encode, v, size=9) for v in views())).backward()
        found.append([loss.threshold.state, *gradients(encoder)])
    torch._dynamo.reset()
    assert_close(*found)


class Counted(nn.Module):
    """Counts the activations that are alive when one more is made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: weakref.WeakSet = weakref.WeakSet()
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()  # its input is kept for the backward
        self.alive.add(x.untyped_storage())
        self.most = max(self.most, len(self.alive))
        return y


@pytest.mark.parametrize("encode, most", [(kept, 14), (in_chunks, 1)])
def test_the_activations_of_one_chunk_at_most_are_alive(encode, most):
    counted = Counted()
    encoder = network(counted)
    HEXLoss(threshold=adaptive(0.9))(*(encode(encoder, v, size=SIZE) for v in views())).backward()
    assert counted.most == most


# ---- trainers -----------------------------------------------------------------------------------

CUT = (23, 18)


class Chunked(Encoder):
    """The encoder of the other tests of ranks, with a learned temperature, in chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.chunks = InChunks(self.body, 5)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.chunks(torch.cat(inputs)).chunk(2), self.tau * 1


def trained(rank: int | None) -> list[Tensor]:
    """Steps of a rank by DDP in chunks, or of one process on whole batches."""
    model = Encoder() if rank is None else DistributedDataParallel(Chunked())
    loss, optimizer, found = criterion(), torch.optim.SGD(model.parameters(), 0.1), []
    for seed in range(3):
        batch = Batch(CUT, seed)
        part = batch.whole() if rank is None else batch.part(rank)
        z0, z1, tau = model(*part.inputs[:2])
        value = loss(z0, z1, temperature=tau, **({} if rank is None else batch.rows()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found += [value.detach(), loss.threshold.state.clone(), *gradients(model)]
    return found


def test_under_ddp_a_gathered_batch_in_chunks_trains_as_the_whole_in_one_process(tmp_path):
    one, two = ranks.run(trained, tmp_path)
    assert_close(one, trained(None))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.filterwarnings("ignore")  # Lightning's, of the machine and of torch
def test_lightning_trains_in_chunks_and_accumulates_such_batches(tmp_path):
    from trainers import MISSING, pl  # every rank imports this file: not Lightning

    if pl is None:
        pytest.skip(MISSING)

    class Model(pl.LightningModule):
        def __init__(self, encode) -> None:
            super().__init__()
            self.encoder, self.encode = network(nn.Dropout(0.2)), encode
            self.criterion = HEXLoss(threshold=adaptive(0.9))

        def training_step(self, batch, index):
            z = (self.encode(self.encoder, v, size=SIZE) for v in batch[0].unbind(1))
            return self.criterion(*z)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.cat([views(seed=seed).transpose(0, 1) for seed in range(4)])
    found = []
    for encode in (kept, in_chunks):
        model = Model(encode)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=B)
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, loader)
        assert trainer.global_step == 2 and int(model.criterion.threshold.updates) == 4
        found.append([*model.encoder.parameters(), model.criterion.threshold.state])
    assert_close(*found)
    assert not torch.equal(found[0][0], network(nn.Dropout(0.2))[0].weight)
