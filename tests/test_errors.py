# SPDX-License-Identifier: MIT
"""What a person reads who passes a wrong argument: the exact text of every error that the functions
and the modules raise, and that a refused call changes nothing.

More of the tracker's are in test_tracker.py, of labels, groups, guides and logits beside their
tests.
"""

import ast
import fractions
import inspect
import math
import traceback

import numpy as np
import pytest
import refused_arguments
import torch
from conftest import problem
from torch import nn

from hex import (
    HEXCrossEntropyLoss,
    HEXLoss,
    HEXSupConLoss,
    InfoNCELoss,
    ThresholdTracker,
    batch_threshold,
    checks,
    contrastive,
    hex_cross_entropy,
    hex_loss,
    hex_sup_con,
    info_nce,
)

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

Z, X, ONES = torch.ones(4, 3), torch.ones(4, 2, 3), torch.ones(4, dtype=torch.int64)
SQUARE = torch.ones(4, 4, dtype=torch.bool)


class Sharded(torch.Tensor):
    """Like a DTensor, which only a process group has."""

    def to_local(self):
        raise AssertionError


ERRORS = (
    # (call, type, text)
    (lambda: hex_loss([1], Z, eps=0), TypeError, "z0: got list, wanted a torch.Tensor"),
    (lambda: hex_loss(Z, None, eps=0), TypeError, "z1: got NoneType, wanted a torch.Tensor"),
    (lambda: hex_loss(Z, Z, 3, eps=0), TypeError, "negatives: got int, wanted a torch.Tensor"),
    (
        lambda: info_nce(Z.long(), Z),
        TypeError,
        "z0: got torch.int64, wanted torch.float64, float32, bfloat16 or float16",
    ),
    (
        lambda: info_nce(Z, Z.to_sparse()),
        TypeError,
        "z1: got layout torch.sparse_coo, wanted a dense tensor",
    ),
    *(
        (
            call,
            TypeError,
            f"{name}: got torch.int64, wanted torch.float64, float32, bfloat16 or float16; labels "
            "go to HEXSupConLoss, logits and a target to HEXCrossEntropyLoss",
        )
        for name, call in (
            ("z1", lambda: HEXLoss()(Z, torch.arange(4))),
            ("z1", lambda: HEXLoss()(Z[:, None], torch.arange(4))),
            ("negatives", lambda: InfoNCELoss()(Z, Z, torch.arange(4))),
        )
    ),
    *(
        (
            lambda make=make: torch.fx.symbolic_trace(make()),
            TypeError,
            f"{name}: got a Proxy of torch.fx, wanted a torch.Tensor; symbolic_trace cannot follow "
            "the checks of a loss: make the loss a leaf module of the Tracer, or use torch.export "
            "or torch.compile",
        )
        for name, make in (("z0", HEXLoss), ("z0", InfoNCELoss), ("features", HEXSupConLoss))
    ),
    (
        lambda: torch.jit.script(nn.Sequential(InfoNCELoss())),
        NotImplementedError,
        "torch.jit.script cannot compile InfoNCELoss; use torch.compile or torch.export",
    ),
    (lambda: InfoNCELoss()(Z[0], Z[0]), ValueError, "z0: got shape (3,), wanted (B, D)"),
    (
        lambda: InfoNCELoss()(Z, Z[1:]),
        ValueError,
        "z1: got shape (3, 3), wanted that of z0, (4, 3)",
    ),
    (
        lambda: HEXLoss()(Z, Z.to("meta")),
        ValueError,
        "z1: got device meta, wanted that of z0, cpu",
    ),
    (
        lambda: HEXLoss()(Z, Z, Z.T),
        ValueError,
        "negatives: got shape (3, 4), wanted (K, 3) or (4, K, 3)",
    ),
    (
        lambda: HEXLoss()(Z, Z, Z.expand(5, 4, 3)),
        ValueError,
        "negatives: got shape (5, 4, 3), wanted (K, 3) or (4, K, 3)",
    ),
    (
        lambda: HEXLoss()(Z.as_subclass(Sharded), Z),
        TypeError,
        "z0: got a DTensor, wanted a plain tensor; call .to_local()",
    ),
    # ranks
    (
        lambda: HEXLoss(gather_distributed=True, process_group="dp"),
        TypeError,
        "process_group: got str, wanted a torch.distributed.ProcessGroup that this rank belongs "
        "to, or None",
    ),
    (
        lambda: HEXLoss()(Z, Z, rows=(4,)),
        ValueError,
        "rows: got (4,), wanted gather_distributed=True with it",
    ),
    (
        lambda: checks.check_rows((2, 3.0)),
        TypeError,
        "rows: got (2, 3.0), wanted a tuple of ints, the number of images of each rank",
    ),
    (
        lambda: checks.check_rows_are((2, 3), 2, 2, 1),
        ValueError,
        "rows: got (2, 3), wanted the number of images of each of 2 ranks, and 2 for rank 1",
    ),
    (
        lambda: HEXLoss()(Z, Z, Z[0]),
        ValueError,
        "negatives: got shape (3,), wanted (K, 3) or (4, K, 3)",
    ),
    (
        lambda: HEXLoss()(Z, Z, Z.to("meta")),
        ValueError,
        "negatives: got device meta, wanted that of z0, cpu",
    ),
    (
        lambda: HEXLoss(mode="simclr"),
        ValueError,
        "mode: got 'simclr', wanted one of 'ntxent', 'query', 'cross'",
    ),
    (
        lambda: HEXLoss(variant="author"),
        ValueError,
        "variant: got 'author', wanted one of 'paper', 'released', 'excluded'",
    ),
    (
        lambda: InfoNCELoss(reduction=None),
        ValueError,
        "reduction: got None, wanted one of 'none', 'mean', 'sum'",
    ),
    (
        lambda: batch_threshold(Z, Z, over="rows"),
        ValueError,
        "over: got 'rows', wanted one of 'all', 'negatives'",
    ),
    (lambda: HEXLoss(beta="1"), TypeError, "beta: got str, wanted a number"),
    (lambda: HEXLoss(beta=-1), ValueError, "beta: got -1, wanted a number in [0, inf)"),
    (lambda: HEXLoss(beta=math.inf), ValueError, "beta: got inf, wanted a number in [0, inf)"),
    (lambda: HEXLoss(tau_plus=1), ValueError, "tau_plus: got 1, wanted a number in [0, 1)"),
    (lambda: HEXLoss(tau_plus=True), TypeError, "tau_plus: got bool, wanted a number"),
    (
        lambda: batch_threshold(Z, Z, quantile=math.nan),
        ValueError,
        "quantile: got nan, wanted a number in [0, 1]",
    ),
    (
        lambda: HEXLoss(torch.tensor(1)),
        TypeError,
        "temperature: got torch.int64, wanted a floating dtype",
    ),
    (
        lambda: InfoNCELoss(torch.ones(2)),
        ValueError,
        "temperature: got shape (2,), wanted a single element",
    ),
    (
        lambda: InfoNCELoss("0.1"),
        TypeError,
        "temperature: got str, wanted a number or a tensor",
    ),
    (lambda: HEXLoss(0), ValueError, "temperature: got 0, wanted a finite number > 0"),
    (
        lambda: InfoNCELoss()(Z, Z, temperature=math.inf),
        ValueError,
        "temperature: got inf, wanted a finite number > 0",
    ),
    (lambda: hex_loss(Z, Z, eps="0"), TypeError, "eps: got str, wanted a number or a tensor"),
    (lambda: hex_loss(Z, Z, eps=math.nan), ValueError, "eps: got nan, wanted a cosine"),
    (
        lambda: hex_loss(Z, Z, eps=torch.ones(8, dtype=torch.bool)),
        TypeError,
        "eps: got torch.bool, wanted a floating dtype",
    ),
    (
        lambda: hex_loss(Z, Z, eps=torch.ones(4)),
        ValueError,
        "eps: got shape (4,), wanted () or (8,)",
    ),
    (
        lambda: HEXLoss(threshold="adaptve"),
        ValueError,
        "threshold: got 'adaptve', wanted 'adaptive', a number, a ThresholdTracker or None",
    ),
    (
        lambda: HEXLoss(threshold=torch.tensor(0.3)),
        TypeError,
        "threshold: got Tensor, wanted 'adaptive', a number, a ThresholdTracker or None",
    ),
    (
        lambda: HEXLoss(threshold=math.nan),
        ValueError,
        "threshold: got nan, wanted a cosine",
    ),
    (
        lambda: HEXLoss(threshold=True),
        TypeError,
        "threshold: got bool, wanted 'adaptive', a number, a ThresholdTracker or None",
    ),
    (
        lambda: HEXLoss()(Z, Z, groups=torch.ones(4, dtype=torch.int64), guide=(Z, Z)),
        ValueError,
        "groups, guide: got both, wanted at most one of them",
    ),
    (
        lambda: HEXLoss().statistics(),
        RuntimeError,
        "statistics: there has been no batch yet; call the loss first",
    ),
    # labels, groups, guides, masks and logits
    (
        lambda: hex_sup_con(X, [1, 2, 3, 4], eps=0),
        TypeError,
        "labels: got list, wanted a torch.Tensor",
    ),
    (
        lambda: hex_cross_entropy(Z, Z[:, 0], eps=0, temperature=1),
        TypeError,
        "target: got torch.float32, wanted an integer dtype",
    ),
    (
        lambda: HEXLoss()(Z, Z, groups=ONES[:3]),
        ValueError,
        "groups: got shape (3,), wanted (4,)",
    ),
    (
        lambda: HEXLoss()(Z, Z, Z, groups=ONES),
        ValueError,
        "groups: got Tensor, wanted (groups, negative_groups) with negatives",
    ),
    (
        lambda: HEXLoss()(Z, Z, guide=(Z,)),
        ValueError,
        "guide: got (Tensor,), wanted a tuple (g0, g1)",
    ),
    (
        lambda: HEXLoss()(Z, Z, guide=(Z, Z[:3])),
        ValueError,
        "guide: g1: got shape (3, 3), wanted that of g0, (4, 3)",
    ),
    (
        lambda: HEXLoss()(Z, Z, guide=(Z[:3], Z[:3])),
        ValueError,
        "guide: got [(3, 3), (3, 3)], wanted, except for the last axis, [(4, 3), (4, 3)]",
    ),
    (
        lambda: HEXSupConLoss()(X, guide=X[:, :1]),
        ValueError,
        "guide: got shape (4, 1, 3), wanted that of features, (4, 2, 3), except for the last axis",
    ),
    (
        lambda: HEXSupConLoss()(Z[0]),
        ValueError,
        "features: got shape (3,), wanted (B, V, D) or (N, D)",
    ),
    (
        lambda: HEXSupConLoss()(X, ONES, torch.eye(4)),
        ValueError,
        "labels, mask: got both, wanted at most one of them",
    ),
    (
        lambda: HEXSupConLoss()(Z, Z),
        TypeError,
        "labels: got a second batch of embeddings, wanted (B,) integers; two views z0 and z1 are "
        "features of shape (B, 2, D), torch.stack([z0, z1], dim=1)",
    ),
    (
        lambda: HEXSupConLoss()(Z),
        ValueError,
        "labels, mask: got neither, wanted one of them, for features are (N, D), not (B, V, D)",
    ),
    (
        lambda: hex_sup_con(X, mask=[[1]], eps=0),
        TypeError,
        "mask: got list, wanted a torch.Tensor",
    ),
    (
        lambda: hex_sup_con(X, mask=torch.eye(4).to_sparse(), eps=0),
        TypeError,
        "mask: got layout torch.sparse_coo, wanted a dense tensor",
    ),
    (
        lambda: hex_sup_con(X, mask=torch.eye(4).to(torch.complex64), eps=0),
        TypeError,
        "mask: got torch.complex64, wanted bool or a real dtype",
    ),
    (
        lambda: hex_sup_con(X, mask=Z, eps=0),
        ValueError,
        "mask: got shape (4, 3), wanted (4, 4)",
    ),
    (
        lambda: hex_sup_con(X, mask=torch.eye(4) / 2, eps=0),
        ValueError,
        "mask: got values other than 0 and 1, wanted 1 for positives and 0 for the others. Weights "
        "are not supported; to make a mask of them, compare them with a number: weights > t",
    ),
    (
        lambda: hex_loss(Z, Z, eps=0, ignored=[[True]]),
        TypeError,
        "ignored: got list, wanted a torch.Tensor",
    ),
    (
        lambda: info_nce(Z, Z, ignored=torch.eye(4)),
        TypeError,
        "ignored: got torch.float32, wanted torch.bool, True for a negative that does not count",
    ),
    (
        lambda: hex_sup_con(X, eps=0, ignored=torch.eye(4, dtype=torch.bool).to_sparse()),
        TypeError,
        "ignored: got layout torch.sparse_coo, wanted a dense tensor",
    ),
    (
        lambda: HEXLoss()(Z, Z, ignored=Z.bool()),
        ValueError,
        "ignored: got shape (4, 3), wanted (4, 4) or (8, 8)",
    ),
    (
        lambda: batch_threshold(Z, Z, Z[:3], ignored=Z.bool().T, mode="query"),
        ValueError,
        "ignored: got shape (3, 4), wanted (4, 3) or (3,)",
    ),
    (
        lambda: InfoNCELoss(mode="cross")(Z, Z, ignored=ONES.bool()),
        ValueError,
        "ignored: got shape (4,), wanted (4, 4) or (8, 4)",
    ),
    (
        lambda: InfoNCELoss()(Z, Z, X, ignored=torch.ones(2, dtype=torch.bool)),
        ValueError,
        "ignored: got shape (2,), wanted (4, 2)",
    ),
    (
        lambda: HEXSupConLoss()(X, ignored=torch.ones(8, 8, dtype=torch.bool)),
        ValueError,
        "ignored: got shape (8, 8), wanted (4, 4)",
    ),
    (
        lambda: hex_cross_entropy(Z[0], ONES, eps=0, temperature=1),
        ValueError,
        "logits: got shape (3,), wanted (N, C)",
    ),
    (
        lambda: HEXSupConLoss(base_temperature=0),
        ValueError,
        "base_temperature: got 0, wanted a number > 0",
    ),
    (
        lambda: hex_sup_con(X),
        ValueError,
        "eps, groups: got neither, wanted one of them",
    ),
    (
        lambda: hex_sup_con(X, eps=0, groups=ONES),
        ValueError,
        "eps, groups: got both, wanted one of them",
    ),
    (
        lambda: HEXSupConLoss(gather_distributed=True)(X, mask=torch.eye(4)),
        ValueError,
        "gather_distributed: got True with a mask, wanted labels instead, because a mask says "
        "nothing about the rows of other ranks",
    ),
    *(
        (
            call,
            ValueError,
            "gather_distributed: got True with ignored, wanted it with negatives only, because "
            "it says nothing about the rows of other ranks",
        )
        for call in (
            lambda: HEXLoss(gather_distributed=True)(Z, Z, ignored=SQUARE),
            lambda: InfoNCELoss(gather_distributed=True)(Z, Z, ignored=SQUARE),
            lambda: HEXSupConLoss(gather_distributed=True)(X, ignored=SQUARE),
        )
    ),
    (
        lambda: HEXCrossEntropyLoss(0.1, self_column=1),
        TypeError,
        "self_column: got int, wanted a bool",
    ),
    # counts of a tracker
    (
        lambda: ThresholdTracker.adaptive(warmup_epochs=1.0),
        TypeError,
        "warmup_epochs: got float, wanted an integer",
    ),
    (
        lambda: ThresholdTracker.step(0.9, 0.1, 0),
        ValueError,
        "every: got 0, wanted an integer >= 1",
    ),
    *refused_arguments.ERRORS,
)


@pytest.mark.parametrize("call, error, text", ERRORS, ids=[text for *_, text in ERRORS])
def test_an_error_says_which_argument_what_came_and_what_was_wanted(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == text


def test_the_table_of_errors_holds_every_raise():
    raised = set()
    for call, error, _ in ERRORS:
        with pytest.raises(error) as caught:
            call()
        innermost = traceback.extract_tb(caught.value.__traceback__)[-1]
        raised.add((innermost.filename, innermost.lineno))
    for source in (checks, contrastive):
        for node in ast.walk(ast.parse(inspect.getsource(source))):
            if isinstance(node, ast.Raise):
                lines = range(node.lineno, node.end_lineno + 1)
                assert any((source.__file__, line) in raised for line in lines), ast.unparse(node)


def test_a_refused_call_changes_nothing():
    module = HEXLoss()
    z0, z1 = (z.requires_grad_() for z in problem("cluster", 83, 7).inputs)
    module(z0, z1)
    before, last = str(module.state_dict()), module.last
    for bad in ((z0, z1[1:]), (z0, z1, z1[:, 1:]), (z0, z1.int())):
        with pytest.raises((TypeError, ValueError)):
            module(*bad)
    with pytest.raises(ValueError):
        module(z0, z1, temperature=-1)
    assert (str(module.state_dict()), module.last) == (before, last)


LABELS = torch.arange(4)
MODULES = {
    "HEXLoss": lambda module: module(Z, Z),
    "InfoNCELoss": lambda module: module(Z, Z),
    "groups": lambda module: module(Z, Z, groups=LABELS),
    "HEXSupConLoss": lambda module: module(Z, LABELS),
    "HEXCrossEntropyLoss": lambda module: module(torch.eye(4), LABELS),
}


def made(name: str, temperature) -> nn.Module:
    kinds = {c.__name__: c for c in (InfoNCELoss, HEXSupConLoss, HEXCrossEntropyLoss)}
    return kinds.get(name, HEXLoss)(temperature)


@pytest.mark.filterwarnings("ignore:ThresholdTracker")
@pytest.mark.parametrize("name", MODULES)
def test_a_temperature_that_is_set_later_is_checked_at_the_next_call(name):
    module = made(name, 0.1)
    for value in (0, -1.0, math.nan, math.inf):
        module.temperature = value
        with pytest.raises(ValueError, match=f"^temperature: got {value}, wanted a finite number"):
            MODULES[name](module)
    module.temperature = "0.1"
    with pytest.raises(TypeError, match="^temperature: got str, wanted a number or a tensor"):
        MODULES[name](module)
    module.temperature = 0.2
    assert torch.equal(MODULES[name](module), MODULES[name](made(name, 0.2)))


def test_an_option_that_is_set_later_is_checked_when_it_is_set():
    module, other = HEXSupConLoss(), HEXCrossEntropyLoss(0.1)
    for name, bad, good in (
        ("reduction", "avg", "none"), ("variant", None, "released"), ("positives", 1, "inside"),
        ("beta", -1, np.float32(2)), ("tau_plus", math.nan, 0), ("base_temperature", 0, 0.07),
        ("cache_bytes", 1.5, 0), ("gather_distributed", 1, True), ("threshold", "x", None),
    ):  # fmt: skip
        before = getattr(module, name)
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
            setattr(module, name, bad)
        assert getattr(module, name) is before
        setattr(module, name, good)
        assert getattr(module, name) == good
    with pytest.raises(TypeError, match="^self_column: got int"):
        other.self_column = 1
    module.threshold = 0.3
    assert module.threshold.rule == "fixed"
    assert module(X, ONES).shape == (8,)


@pytest.mark.filterwarnings("ignore:ThresholdTracker")
@pytest.mark.parametrize("name", MODULES)
def test_a_temperature_may_be_any_tensor_of_one_element_whose_gradient_has_its_shape(name):
    scalar = nn.Parameter(torch.tensor(0.3))
    expected = MODULES[name](made(name, scalar))
    expected.backward()
    for shape in ((1,), (1, 1)):
        tau = nn.Parameter(torch.full(shape, 0.3))
        value = MODULES[name](made(name, tau))
        value.backward()
        assert torch.equal(value, expected)
        assert torch.equal(tau.grad, scalar.grad.reshape(shape))


@pytest.mark.filterwarnings("ignore:ThresholdTracker")
@pytest.mark.parametrize("kind", (np.float32, np.float64, np.float16, np.int64, fractions.Fraction))
def test_a_number_may_be_any_real_one(kind):
    one, zero = kind(1), kind(0)
    z0, z1 = (z.float() for z in problem("cluster", 83, 7).inputs)
    ours = HEXLoss(one, threshold=zero, beta=one, tau_plus=zero)(z0, z1)
    assert torch.equal(ours, HEXLoss(1.0, threshold=0.0, tau_plus=0.0)(z0, z1))
    function = hex_loss(z0, z1, eps=zero, temperature=one, beta=one, tau_plus=zero)
    assert torch.equal(ours, function)
    assert torch.equal(InfoNCELoss()(z0, z1, temperature=one), info_nce(z0, z1, temperature=1.0))
    assert torch.equal(batch_threshold(z0, z1, quantile=one), batch_threshold(z0, z1, quantile=1))
    based = HEXSupConLoss(one, threshold=zero, base_temperature=one)
    labels = torch.arange(83) % 7
    assert torch.equal(based(z0, labels), HEXSupConLoss(1.0, threshold=0.0)(z0, labels))
    for tracker in (ThresholdTracker.adaptive(one, momentum=zero), ThresholdTracker.fixed(one)):
        assert HEXLoss(threshold=tracker)(z0, z1).isfinite()


@pytest.mark.parametrize("value", (True, np.bool_(True), "0.1", None, 1j))
def test_what_is_no_real_number_is_none(value):
    for call in (
        lambda: HEXLoss(beta=value),
        lambda: HEXLoss(value),
        lambda: hex_loss(Z, Z, eps=value),
        lambda: batch_threshold(Z, Z, quantile=value),
        lambda: HEXLoss(threshold=[value]),
        lambda: HEXSupConLoss(base_temperature=[value]),
    ):
        with pytest.raises(TypeError, match="^[a-z_]+: got "):
            call()
