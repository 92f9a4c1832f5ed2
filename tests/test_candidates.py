# SPDX-License-Identifier: MIT
"""HEXSupConLoss and hex_sup_con with candidates that have labels of their own.

The kernels' values and derivatives in this layout are in test_labels.py ("pair"). Here is the
Python layer, by formulas and by pytorch-metric-learning, which is skipped where it is not
installed. Ranks are in test_distributed_candidates.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import without_kernels
from data import f64, views
from torch import Tensor, nn

from hex import HEXLoss, HEXSupConLoss, ThresholdTracker, hex_sup_con, reference
from hex.problem import of_features

# pytorch-metric-learning imports what scripts a function, at its first use
SCRIPTS = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
N, M, D = 19, 31, 9
LABELS, OTHERS = torch.arange(N) % 5, torch.arange(M) * 3 % 5
FORMS = (("paper", "outside"), ("paper", "inside"), ("released", "outside"), ("released", "inside"))


def batch(rows: int = N, others: int = M, kind: str = "cluster") -> tuple[Tensor, Tensor]:
    """Features and candidates, float64."""
    x, c = views(kind, max(rows, others), D)
    return x[:rows], c[:others]


def values(function, *inputs: Tensor) -> list[Tensor]:
    """The loss and its gradients; of rows, of their weighted sum."""
    z = [x.clone().requires_grad_() for x in inputs]
    rows = function(*z)
    weights = torch.linspace(1, 2, rows.numel(), dtype=rows.dtype).reshape(rows.shape)
    return [rows.detach(), *torch.autograd.grad((rows * weights).sum(), z)]


def agree(ours, peer, *inputs: Tensor, part: float = 1e-10) -> None:
    """Values and gradients, to a part of the largest: both are of float64, and some hundred
    operations of it are far below that."""
    for a, b in zip(values(ours, *inputs), values(peer, *inputs), strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=part * b.abs().max().item())


# ---- the formula --------------------------------------------------------------------------------


def by_letter(
    x: Tensor, c: Tensor, labels: Tensor, others: Tensor, eps: float, tau: float, variant: str,
    positives: str, beta: float = 1.0, tau_plus: float = 0.1,
) -> Tensor:  # fmt: skip
    """Each row by loops over its cosines, as the docstring of `hex_sup_con` has it."""
    losses = []
    cosines = F.normalize(x) @ F.normalize(c).T
    for row, label in zip(cosines, labels, strict=True):
        near = row[others == label] / tau
        negative = row[others != label]
        hard, rest = negative[negative > eps] / tau, negative[negative <= eps] / tau
        if not len(near):
            losses.append(0 * row.sum())
            continue
        total, far = near.exp().sum(), rest.exp().sum()
        numerator = near.mean() if positives == "outside" else total.log()
        if variant == "released":
            form = far.log() + len(negative) * math.exp(-1 / tau) - numerator
            losses.append(form if len(rest) else 0 * row.sum())
            continue
        q = 0 * total
        if len(hard):
            weights = (beta * hard).exp()
            weighted = (weights / weights.mean() * hard.exp()).sum()
            q = (weighted - tau_plus * len(hard) * total / len(near)) / (1 - tau_plus)
            q = q.clamp(min=len(hard) * math.exp(-1 / tau))
        losses.append((total + q + far).log() - numerator)
    return torch.stack(losses)


@pytest.mark.parametrize("variant, positives", FORMS)
@pytest.mark.parametrize("rows, others", ((N, M), (M, N), (N, N), (5, M), (N, 5)))
def test_it_is_the_formula_letter_by_letter(rows, others, variant, positives):
    x, c = batch(rows, others)
    labels, of_candidates = torch.arange(rows) % 5, torch.arange(others) * 3 % 5
    labels[rows // 2] = 99  # without a positive
    given = dict(candidates=c, candidate_labels=of_candidates)
    options = dict(variant=variant, positives=positives)
    # The released form is 0 where all negatives are in H, and the paper's where eps is infinite.
    for eps in (0.3, 0.1) if variant == "released" else (0.3, -2.0, math.inf):

        def ours(x, c, eps=eps):
            named = given | {"candidates": c, "temperature": 0.3, "reduction": "none"}
            return hex_sup_con(x, labels, eps=eps, **named, **options)

        def letter(x, c, eps=eps):
            return by_letter(x, c, labels, of_candidates, eps, 0.3, **options)

        agree(ours, letter, x, c)


@pytest.mark.parametrize("decider", ("eps", "groups", "guide"))
def test_with_one_positive_each_it_is_hex_in_mode_query(decider):
    x, c = batch(N, N)
    ids, groups = torch.arange(N), torch.arange(N) % 3
    guide = batch(N, N, "gauss")
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for variant in ("paper", "released", "excluded"):
        given, in_query = {}, {}
        if decider == "groups":
            given, in_query = {"groups": (groups, groups[order])}, {"groups": groups}
        elif decider == "guide":
            given, in_query = {"guide": (guide[0], guide[1][order])}, {"guide": guide}
        options = dict(temperature=0.2, threshold=0.3, variant=variant, reduction="none")

        def ours(x, c, given=given, options=options):
            module = HEXSupConLoss(**options)
            return module(x, ids, candidates=c[order], candidate_labels=ids[order], **given)

        def query(x, c, given=in_query, options=options):
            return HEXLoss(mode="query", **options)(x, c, **given)

        agree(ours, query, x, c)


def test_features_of_several_views_are_rows_of_the_same_label():
    x = torch.stack([*views("cluster", N, D), views("cluster", N, D, 3)[0]], 1)
    c, guide = batch()[1], torch.stack([*views("gauss", N, D), views("gauss", N, D, 3)[0]], 1)
    flat, rows = x.transpose(0, 1).flatten(0, 1), LABELS.repeat(3)
    deep = x.reshape(N, 3, 3, 3)
    options = dict(candidates=c, candidate_labels=OTHERS, temperature=0.2, reduction="none")
    wanted = hex_sup_con(flat, rows, eps=0.3, **options)
    assert wanted.shape == (3 * N,)
    for given in (x, deep):
        assert torch.equal(hex_sup_con(given, LABELS, eps=0.3, **options), wanted)
    grouped = hex_sup_con(flat, rows, groups=(rows % 2, OTHERS % 2), **options)
    assert torch.equal(hex_sup_con(x, LABELS, groups=(LABELS % 2, OTHERS % 2), **options), grouped)
    guides = guide.transpose(0, 1).flatten(0, 1), batch(kind="gauss")[1]
    guided = hex_sup_con(flat, rows, eps=0.1, guide=guides, **options)
    both = guide.reshape(N, 3, 3, 3), guides[1]
    assert torch.equal(hex_sup_con(deep, LABELS, eps=0.1, guide=both, **options), guided)
    assert not torch.equal(guided, hex_sup_con(flat, rows, eps=0.1, **options))


@pytest.mark.parametrize("over", ("negatives", "all"))
def test_the_threshold_is_a_quantile_of_each_row_of_candidates(over):
    x, c = batch()
    module = HEXSupConLoss(0.2, threshold=ThresholdTracker.adaptive(0.8, over=over))
    value = module(x.requires_grad_(), LABELS, candidates=c, candidate_labels=OTHERS)
    cosines = reference.problem_cosines(x.detach(), c, x[:0].detach(), 1, True)
    quantiles = []
    for row, label in zip(cosines, LABELS, strict=True):
        kept = (row[OTHERS != label] if over == "negatives" else row).sort().values
        quantiles.append(kept[round(0.8 * (len(kept) - 1))])
    eps = torch.stack(quantiles).mean()
    torch.testing.assert_close(module.last.eps, eps, rtol=0, atol=1e-12)
    wanted = hex_sup_con(x, LABELS, candidates=c, candidate_labels=OTHERS, eps=eps, temperature=0.2)
    torch.testing.assert_close(value, wanted)
    negative = LABELS[:, None] != OTHERS
    hard = ((cosines > eps) & negative).sum(1).double().mean()
    assert module.last.hard == hard > 0
    assert int(module.threshold.updates) == 1


def test_without_candidates_every_row_is_without_a_positive():
    x, c = batch()
    x, c = x.requires_grad_(), c[:0].requires_grad_()
    module = HEXSupConLoss(reduction="none")
    rows = module(x, LABELS, candidates=c, candidate_labels=OTHERS[:0])
    assert torch.equal(rows, torch.zeros(N, dtype=torch.float64))
    rows.sum().backward()
    assert not x.grad.any()
    assert module.last.hard == 0
    none = HEXSupConLoss()(x[:0], LABELS[:0], candidates=batch()[1], candidate_labels=OTHERS)
    assert none == 0


def test_a_loss_that_is_0_for_want_of_positives_is_no_reason_to_warn():
    """Of the released form, whose loss is also 0 where all negatives are in H."""
    x, c = batch()
    module = HEXSupConLoss(threshold=-0.99, variant="released")
    for labels, unmatched in ((LABELS, False), (LABELS + 9, True)):
        p = of_features(x, labels, None, 0.1, candidates=c, candidate_labels=OTHERS)
        assert p.may_lack_positives()
        assert bool(p.is_without_positives()) == unmatched
    for epoch in range(2):
        module.set_epoch(epoch)
        module(x.requires_grad_(), LABELS + 9, candidates=c, candidate_labels=OTHERS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it traces
def test_func_vmap_a_compiled_graph_and_plain_formulas(monkeypatch):
    x, c = batch()
    both = torch.stack([c, batch(kind="gauss")[1]])

    def loss(x, c):
        return hex_sup_con(
            x, LABELS, candidates=c, candidate_labels=OTHERS, eps=0.3, temperature=0.2
        )

    each = torch.stack([loss(x, one) for one in both])
    torch.testing.assert_close(torch.vmap(loss, (None, 0))(x, both), each, rtol=0, atol=0)
    eager = values(loss, x, c)
    for a, b in zip(torch.func.grad(loss, (0, 1))(x, c), eager[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    module = HEXSupConLoss(0.2, threshold=ThresholdTracker.adaptive(0.8))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    given = dict(labels=LABELS, candidate_labels=OTHERS)
    wanted = values(lambda x, c: module(x, candidates=c, **given), x, c)
    for a, b in zip(values(lambda x, c: compiled(x, candidates=c, **given), x, c), wanted,
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    without_kernels(monkeypatch)
    for a, b in zip(values(loss, x, c), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_to_the_second():
    x, c = (z.clone().requires_grad_() for z in batch(5, 7))
    labels, others = LABELS[:5] % 2, OTHERS[:7] % 2

    def loss(x, c):
        return hex_sup_con(x, labels, candidates=c, candidate_labels=others, eps=0.3)

    assert torch.autograd.gradcheck(loss, (x, c))
    assert torch.autograd.gradgradcheck(loss, (x, c))


def test_candidates_may_be_of_another_dtype():
    x, c = (z.float() for z in batch())
    options = dict(candidate_labels=OTHERS, eps=0.3)
    half = c.bfloat16()
    assert torch.equal(
        hex_sup_con(x, LABELS, candidates=half, **options),
        hex_sup_con(x, LABELS, candidates=half.float(), **options),
    )


# ---- pytorch-metric-learning --------------------------------------------------------------------


def peer(tau: float, rows: bool = False):
    losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
    if not rows:
        return losses.SupConLoss(tau)
    reducers = pytest.importorskip("pytorch_metric_learning.reducers", exc_type=ImportError)
    found = losses.SupConLoss(tau, reducer=reducers.DoNothingReducer())
    return lambda *args, **named: found(*args, **named)["loss"]["losses"]


@SCRIPTS
@pytest.mark.parametrize("tau", (0.07, 0.5))
@pytest.mark.parametrize("rows, others", ((N, M), (M, N), (N, N)))
def test_pytorch_metric_learnings_sup_con_with_ref_emb_row_by_row(rows, others, tau):
    labels, of_candidates = torch.arange(rows) % 5, torch.arange(others) * 3 % 5
    labels[::4] += 100  # without a positive
    agree(
        lambda x, c: HEXSupConLoss(tau, threshold=None, reduction="none")(
            x, labels, candidates=c, candidate_labels=of_candidates
        ),
        lambda x, c: peer(tau, rows=True)(x, labels, ref_emb=c, ref_labels=of_candidates),
        *batch(rows, others),
    )


@SCRIPTS
def test_the_mean_is_that_of_pytorch_metric_learning_over_rows_that_have_a_positive():
    x, c = batch()
    agree(
        lambda x, c: HEXSupConLoss(threshold=None)(
            x, LABELS, candidates=c, candidate_labels=OTHERS
        ),
        lambda x, c: peer(0.1)(x, LABELS, ref_emb=c, ref_labels=OTHERS),
        x, c,
    )  # fmt: skip
    labels = torch.where(torch.arange(N) % 4 == 0, 100, LABELS)

    def over_those_with_a_positive(x, c):  # the lines of docs/guides/labels.md
        criterion = HEXSupConLoss(threshold=None, reduction="none")
        rows = criterion(x, labels, candidates=c, candidate_labels=OTHERS)
        return rows[torch.isin(labels, OTHERS)].mean()

    agree(
        over_those_with_a_positive,
        lambda x, c: peer(0.1)(x, labels, ref_emb=c, ref_labels=OTHERS),
        x, c,
    )  # fmt: skip


@SCRIPTS
def test_cross_batch_memory_over_several_steps_in_which_its_ring_is_filled_and_goes_round():
    """Queries are compared with a memory of keys, into which those of this step went before."""
    losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
    generator = torch.Generator().manual_seed(0)
    encoders = [nn.Linear(6, D).double() for _ in range(2)]
    encoders[1].load_state_dict(encoders[0].state_dict())
    steppers = [torch.optim.SGD(e.parameters(), lr=0.3) for e in encoders]
    theirs = losses.CrossBatchMemory(losses.SupConLoss(0.2), D, memory_size=30)
    ours = HEXSupConLoss(0.2, threshold=None)
    memory, memory_labels = f64([]).reshape(0, D), torch.empty(0, dtype=torch.int64)
    start = [p.clone() for p in encoders[0].parameters()]
    for _ in range(6):  # 48 keys in a memory of 30
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        labels = torch.arange(16) % 4
        is_key = torch.arange(16) >= 8
        z = [encoder(x) for encoder in encoders]
        wanted = theirs(z[1], labels, enqueue_mask=is_key)
        memory = torch.cat([memory, z[0][is_key].detach()])[-30:]
        memory_labels = torch.cat([memory_labels, labels[is_key]])[-30:]
        found = ours(
            z[0][~is_key], labels[~is_key], candidates=memory, candidate_labels=memory_labels
        )
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
        for stepper, loss in zip(steppers, (found, wanted), strict=True):
            stepper.zero_grad()
            loss.backward()
            stepper.step()
    for a, b, first in zip(*(e.parameters() for e in encoders), start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        assert not torch.equal(a, first)


@SCRIPTS
def test_cross_batch_memory_that_holds_the_batch_itself_with_each_rows_own_ignored():
    losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
    theirs = losses.CrossBatchMemory(losses.SupConLoss(0.2), D, memory_size=3 * N)
    ours = HEXSupConLoss(0.2, threshold=None)
    for step in range(3):
        x = views("cluster", N, D, step)[0]

        def of_memory(x, step=step):
            memory = theirs.embedding_memory[: (step + 1) * N].clone()
            own = torch.zeros(N, len(memory), dtype=torch.bool)
            own[:, step * N :].fill_diagonal_(True)
            labels = theirs.label_memory[: (step + 1) * N]
            return ours(x, LABELS, candidates=memory, candidate_labels=labels, ignored=own)

        wanted = values(lambda x: theirs(x, LABELS), x)
        for a, b in zip(values(of_memory, x), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * b.abs().max().item())


@pytest.mark.parametrize("variant, positives", FORMS)
def test_what_is_ignored_is_in_no_set_even_if_it_is_a_positive(variant, positives):
    x, c = batch()
    out = torch.rand(N, M, generator=torch.Generator().manual_seed(0)) < 0.3
    options = dict(eps=0.3, temperature=0.3, variant=variant, positives=positives)

    def ours(x, c):
        return hex_sup_con(
            x, LABELS, candidates=c, candidate_labels=OTHERS, ignored=out, reduction="none",
            **options,
        )  # fmt: skip

    def row_by_row(x, c):
        rows = [
            hex_sup_con(x[k : k + 1], LABELS[k : k + 1], candidates=c[~out[k]],
                        candidate_labels=OTHERS[~out[k]], **options)
            for k in range(N)
        ]  # fmt: skip
        return torch.stack(rows)

    agree(ours, row_by_row, x, c)
    three = torch.stack([x, x.flip(0), 2 * x.roll(1, 0)], 1)
    both = hex_sup_con(
        three, LABELS, candidates=c, candidate_labels=OTHERS, ignored=out, reduction="none",
        **options,
    )  # fmt: skip
    assert torch.equal(both[:N], ours(x, c))
    module = HEXSupConLoss(threshold=ThresholdTracker.adaptive(0.8))
    module(x, LABELS, candidates=c, candidate_labels=OTHERS, ignored=out)
    eps = [HEXSupConLoss(threshold=ThresholdTracker.adaptive(0.8)) for _ in range(N)]
    for k, one in enumerate(eps):
        one(x[k : k + 1], LABELS[k : k + 1], candidates=c[~out[k]],
            candidate_labels=OTHERS[~out[k]])  # fmt: skip
    mean = torch.stack([one.last.eps for one in eps]).mean()
    torch.testing.assert_close(module.last.eps, mean, rtol=0, atol=1e-12)


@SCRIPTS
def test_a_copy_of_a_row_among_the_candidates_is_a_positive_here_and_with_a_cloned_ref_emb():
    """pytorch-metric-learning leaves the row's own out only where ref_labels is labels itself."""
    x = batch()[0]
    agree(
        lambda x: HEXSupConLoss(threshold=None)(
            x, LABELS, candidates=x, candidate_labels=LABELS
        ),
        lambda x: peer(0.1)(x, LABELS, ref_emb=x, ref_labels=LABELS.clone()),
        x,
    )  # fmt: skip
    agree(
        lambda x: HEXSupConLoss(threshold=None)(x, LABELS),
        lambda x: peer(0.1)(x, LABELS, ref_emb=x, ref_labels=LABELS),
        x,
    )
