# SPDX-License-Identifier: MIT
"""The raw operators, given what no caller of the package gives them: all that the kernels refuse,
tensors of several devices, of shapes that nothing can hold, bytes that are no booleans, and targets
that another thread writes to.

A kernel checks for memory safety whatever it is called with and answers with a RuntimeError; the
friendlier errors of the Python functions are in test_modules.py.
"""

import os
import threading
import warnings

import operators
import pytest
import torch
from data import f64

from hex import hex_cross_entropy, hex_loss, ops

HEX = torch.ops.hex

# ---- what the kernels refuse --------------------------------------------------------------------

Z, EMPTY, QUEUE = torch.arange(15.0).reshape(5, 3), torch.empty(0, 3), torch.eye(4, 3)
NO_LABELS, NO_MASK, NO_GROUPS, NO_GUIDE = operators.nothing(Z)
EPS, TAU, STATE = f64(0.3), f64(0.1), torch.zeros(11, dtype=torch.float64)
ROWS, STATS, KEPT = torch.ones(10), torch.zeros(9, 10), torch.zeros(0)
LABELS, MASK = torch.arange(10) % 3, torch.ones(5, 5, dtype=torch.bool)
CODES = MASK.to(torch.uint8)
FLOATING = "expected a dense CPU tensor of float64, float32, bfloat16 or float16"
INTEGERS = "expected a dense CPU tensor of int64"
BYTES = "expected a dense CPU tensor of bool or uint8"
NUMBERS = "expected float32 or float64 of shape"
BETA, TAU_PLUS = "beta: expected a number from 0 on", "tau_plus: expected a number in [0, 1)"
MODE = "mode: expected 0 to 5"
DAMAGED = "its storage is smaller than its shape says (freed or resized?)"
OF_FORWARD = "expected the contiguous (statistics, rows) tensor of the forward"
NO_NEGATIVES = "negatives: expected none (0, D) in this mode"
PART = "mask: expected parts of {} anchors and {} candidates"
ONE_DECIDER = "groups, guide: expected one of them at most, and none with logits"
FOR_SEVERAL = "mode: 5 is for anchors with several positives"

OPERATORS = ("forward", "adaptive", "backward", "quantile")
VIEWS = (
    dict(z0=Z, z1=Z, negatives=EMPTY, ids=NO_LABELS, mask=NO_MASK, groups=NO_GROUPS)
    | dict(guide=NO_GUIDE, eps=EPS, tau=TAU, mode=0, reduction=0, variant=0, positives=0, beta=1.0)
    | dict(tau_plus=0.1, decoupled=False, keep=True, allow_tf32=False, self_column=False)
    | dict(state=STATE, quantile=0.9, over_negatives=False, momentum=0.0, monotonic=False)
    | dict(lagged=False, warmup_epochs=0, warmup_threshold=1.0)
    | dict(grad=ROWS, stats=STATS, kept=KEPT, needs=15, several=False, bounds=False)
    | dict(first=0, count=-1)
)
SEVERAL = dict(positives=1, several=True, stats=torch.zeros(12, 10), ids=LABELS)
FIVE = dict(grad=ROWS[:5], stats=torch.zeros(12, 5))  # rows
PAIRS = SEVERAL | FIVE | dict(mode=1, z1=QUEUE, ids=LABELS[:9])
LOGITS = SEVERAL | FIVE | dict(mode=5, z1=EMPTY, ids=LABELS[:5])


def call(op, **changes):
    """An operator on two views but for the changes."""
    arguments = VIEWS | changes
    names = [argument.name for argument in getattr(HEX, op).default._schema.arguments]
    return getattr(HEX, op)(*(arguments[name] for name in names))


def freed(z):
    z = z.clone()
    z.untyped_storage().resize_(0)
    return z


def shrunk(z):
    z = z.clone()
    z.untyped_storage().resize_(z.numel() * z.element_size() - 1)
    return z


def repeated(*shape):
    """A tensor of any size whose elements are all one number in memory."""
    return torch.ones(()).expand(shape)


REFUSED = [
    # op, changed arguments, text after "hex::<op>: "
    ("forward", dict(z0=Z.int()), f"z0: {FLOATING}"),
    ("forward", dict(z1=Z.to(torch.complex64)), f"z1: {FLOATING}"),
    ("forward", dict(negatives=EMPTY.bool()), f"negatives: {FLOATING}"),
    ("forward", dict(z0=Z.to(torch.float8_e4m3fn)), f"z0: {FLOATING}"),
    ("forward", dict(eps=torch.tensor(1)), f"eps: {FLOATING}"),
    ("forward", dict(tau=torch.tensor(True)), f"tau: {FLOATING}"),
    ("forward", dict(z0=Z[0]), "z0: expected 2 dimensions, got 1"),
    ("forward", dict(z1=Z[None]), "z1: expected 2 dimensions, got 3"),
    ("forward", dict(negatives=EMPTY[None]), "negatives: expected 2 dimensions, got 3"),
    ("forward", dict(mode=4), "negatives: expected 3 dimensions, got 2"),
    ("forward", dict(z1=Z[:, :2]), "z1: expected D = 3 features, got 2"),
    ("forward", dict(negatives=EMPTY[:, :1]), "negatives: expected D = 3 features, got 1"),
    ("forward", dict(mode=4, negatives=Z[:, None, 1:]),
     "negatives: expected D = 3 features, got 2"),
    ("forward", dict(z1=Z[:4]), "z1: expected as many rows as z0, 5, got 4"),
    ("forward", dict(mode=4, negatives=QUEUE[:, None]),
     "negatives: expected (B, K, D) with the B of z0"),
    ("forward", dict(negatives=QUEUE), NO_NEGATIVES),
    ("forward", dict(mode=1, negatives=QUEUE), NO_NEGATIVES),
    ("forward", dict(mode=2, negatives=QUEUE), NO_NEGATIVES),
    ("forward", dict(mode=6), MODE),
    ("forward", dict(mode=-1), MODE),
    ("forward", dict(mode=2**32), MODE),
    ("forward", dict(reduction=3), "reduction: expected 0, 1 or 2"),
    ("forward", dict(reduction=-1), "reduction: expected 0, 1 or 2"),
    ("forward", dict(variant=3), "variant: expected 0, 1 or 2"),
    ("forward", dict(variant=-1), "variant: expected 0, 1 or 2"),
    ("forward", dict(beta=-0.5), BETA),
    ("forward", dict(beta=float("nan")), BETA),
    ("forward", dict(tau_plus=-0.1), TAU_PLUS),
    ("forward", dict(tau_plus=1.0), TAU_PLUS),
    ("forward", dict(tau_plus=float("nan")), TAU_PLUS),
    ("forward", dict(eps=EPS.half()), f"eps: {NUMBERS} () or (rows,)"),
    ("forward", dict(eps=torch.ones(5)), f"eps: {NUMBERS} () or (rows,)"),
    ("forward", dict(eps=torch.ones(10, 1)), f"eps: {NUMBERS} () or (rows,)"),
    ("forward", dict(tau=torch.ones(10)), f"tau: {NUMBERS} ()"),
    ("forward", dict(tau=TAU.bfloat16()), f"tau: {NUMBERS} ()"),
    ("backward", dict(grad=torch.ones(())), f"grad: {NUMBERS} (rows,)"),
    ("backward", dict(grad=torch.ones(9)), f"grad: {NUMBERS} (rows,)"),
    ("backward", dict(reduction=1), f"grad: {NUMBERS} ()"),
    ("backward", dict(grad=ROWS.half()), f"grad: {NUMBERS} (rows,)"),
    ("backward", dict(tau=torch.ones(1)), f"tau: {NUMBERS} ()"),
    ("backward", dict(reduction=9), "reduction: expected 0, 1 or 2"),
    ("backward", dict(beta=-1.0), BETA),
    ("backward", dict(mode=7), MODE),
    ("backward", dict(z0=Z[:4]), "z1: expected as many rows as z0, 4, got 5"),
    *(
        ("backward", dict(stats=stats), f"stats: {OF_FORWARD}")
        for stats in (STATS.double(), STATS[0], STATS[:8], STATS[:, :9], STATS.T.contiguous().T,
                      torch.zeros(9, 20)[:, ::2], torch.zeros(18, 10)[::2], STATS.bfloat16())
    ),
    *(
        ("backward", dict(kept=kept), "kept: expected the contiguous tensor of the forward")
        for kept in (KEPT.double(), torch.zeros(1), torch.zeros(0, 3))
    ),
    ("quantile", dict(quantile=-0.01), "quantile: expected a number in [0, 1]"),
    ("quantile", dict(quantile=1.01), "quantile: expected a number in [0, 1]"),
    ("quantile", dict(quantile=float("nan")), "quantile: expected a number in [0, 1]"),
    ("quantile", dict(z0=Z.long()), f"z0: {FLOATING}"),
    ("adaptive", dict(quantile=1.01), "quantile: expected a number in [0, 1]"),
    ("adaptive", dict(tau=torch.ones(10)), f"tau: {NUMBERS} ()"),
    ("adaptive", dict(variant=3), "variant: expected 0, 1 or 2"),
    *(
        ("adaptive", dict(state=state), f"state: {text}")
        for state, text in (
            (STATE.float(), "expected float64 of shape (11,)"),
            (STATE[:10], "expected float64 of shape (11,)"),
            (STATE[None], "expected float64 of shape (11,)"),
            (STATE.long(), FLOATING),
        )
    ),
    # who is a positive of whom
    ("forward", SEVERAL | dict(positives=3), "positives: expected 0, 1 or 2"),
    ("backward", SEVERAL | dict(positives=-1), "positives: expected 0, 1 or 2"),
    *(
        (op, SEVERAL | dict(mode=mode, z1=z1, negatives=negatives),
         f"mode: {mode} is for anchors with one positive")
        for op in OPERATORS
        for mode, z1, negatives in ((2, Z, EMPTY), (2, QUEUE, EMPTY), (4, Z, Z[:, None]))
    ),
    ("forward", SEVERAL | dict(mode=3, z1=QUEUE), "z1: expected as many rows as z0, 5, got 4"),
    ("forward", LOGITS | dict(positives=0), FOR_SEVERAL),
    ("quantile", LOGITS | dict(several=False), FOR_SEVERAL),
    ("forward", SEVERAL | dict(ids=LABELS.int()), f"ids: {INTEGERS}"),
    ("forward", SEVERAL | dict(ids=LABELS[1:]), "ids: expected 10 labels in one dimension"),
    ("quantile", SEVERAL | dict(ids=LABELS[None]), "ids: expected 10 labels in one dimension"),
    ("backward", PAIRS | dict(ids=LABELS), "ids: expected 9 labels in one dimension"),
    ("adaptive", SEVERAL | dict(ids=NO_LABELS), "ids: expected labels, or a mask"),
    ("quantile", PAIRS | dict(ids=NO_LABELS), "ids: expected labels, or a mask"),
    *((op, dict(ids=LABELS), "ids: expected none") for op in OPERATORS),
    ("forward", SEVERAL | dict(mask=MASK.int()), f"mask: {BYTES}"),
    ("backward", dict(mask=CODES.to(torch.int8)), f"mask: {BYTES}"),
    ("forward", SEVERAL | dict(mask=MASK[0]), "mask: expected a matrix"),
    ("quantile", dict(mask=CODES[None]), "mask: expected a matrix"),
    ("quantile", SEVERAL | dict(mask=MASK[:4]), PART.format(10, 10)),
    ("backward", SEVERAL | dict(mask=MASK[:, :4]), PART.format(10, 10)),
    ("quantile", PAIRS | dict(mask=MASK[:, :3]), PART.format(5, 4)),
    ("adaptive", LOGITS | dict(mask=MASK), "mask: expected none with logits"),
    ("quantile", LOGITS | dict(mask=CODES), "mask: expected none with logits"),
    *(
        (op, dict(mask=MASK), "mask: expected uint8, for anchors with one positive")
        for op in OPERATORS
    ),
    # candidates of: two views, one view, both ways, a queue and its own negatives
    ("forward", dict(mask=CODES[:, :4]), PART.format(10, 10)),
    ("adaptive", dict(mode=1, mask=torch.cat([CODES, CODES])), PART.format(5, 5)),
    ("quantile", dict(mode=2, mask=torch.cat([CODES, CODES], 1)), PART.format(10, 5)),
    ("forward", dict(mode=3, negatives=QUEUE, mask=CODES), PART.format(5, 4)),
    ("forward", dict(mode=4, negatives=Z[:, None], mask=CODES), PART.format(5, 1)),
    ("forward", SEVERAL | dict(mode=3, negatives=QUEUE, ids=torch.zeros(14).long(), mask=CODES),
     PART.format(5, 9)),
    # the targets of logits
    ("forward", LOGITS | dict(ids=LABELS), "ids: expected 5 targets in one dimension"),
    ("quantile", LOGITS | dict(ids=NO_LABELS), "ids: expected 5 targets in one dimension"),
    ("forward", LOGITS | dict(ids=torch.ones(5)), f"ids: {INTEGERS}"),
    ("backward", LOGITS | dict(ids=LABELS[:5] + 1), "target: got 3, wanted a column in [0, 3)"),
    ("adaptive", LOGITS | dict(ids=LABELS[:5] - 1), "target: got -1, wanted a column in [0, 3)"),
    ("forward", LOGITS | dict(z1=Z), "z1: expected none (0, D) in this mode"),
    ("forward", LOGITS | dict(negatives=QUEUE), NO_NEGATIVES),
    # who decides H
    ("forward", dict(groups=LABELS[1:]), "groups: expected 10 labels in one dimension"),
    ("backward", dict(groups=LABELS.double()), f"groups: {INTEGERS}"),
    ("forward", PAIRS | dict(groups=LABELS), "groups: expected 9 labels in one dimension"),
    ("forward", dict(mode=4, negatives=Z[:, None], groups=LABELS),
     "groups: expected 15 labels in one dimension"),
    ("forward", dict(guide=torch.ones(9, 2)), "guide: expected a row for each of 10"),
    ("backward", dict(guide=torch.ones(10)), "guide: expected a row for each of 10"),
    ("forward", PAIRS | dict(guide=torch.ones(10, 2)), "guide: expected a row for each of 9"),
    ("backward", dict(guide=torch.ones(10, 2).int()), f"guide: {FLOATING}"),
    *(
        (op, changes, ONE_DECIDER)
        for op in ("forward", "backward")
        for changes in (
            dict(groups=LABELS, guide=torch.ones(10, 2)),
            SEVERAL | dict(groups=LABELS, guide=torch.ones(10, 2)),
            LOGITS | dict(groups=LABELS[:5]),
            LOGITS | dict(guide=torch.ones(5, 2)),
        )
    ),
    *(
        ("adaptive", changes, "expected no groups and no guide")
        for changes in (dict(groups=LABELS), dict(guide=torch.ones(10, 2)))
    ),
    *(
        ("backward", changes | dict(stats=changes["stats"][:9]), f"stats: {OF_FORWARD}")
        for changes in (SEVERAL, PAIRS, LOGITS)
    ),
    ("quantile", dict(mode=6), MODE),
    *(
        (op, {name: damaged(value)}, f"{name}: {DAMAGED}")
        for damaged in (freed, shrunk)
        for op, name, value in (
            ("forward", "z0", Z), ("forward", "z1", Z), ("forward", "eps", EPS),
            ("forward", "eps", ROWS), ("forward", "tau", TAU), ("backward", "grad", ROWS),
            ("backward", "stats", STATS), ("backward", "kept", torch.zeros(9)),
            ("quantile", "z1", Z), ("adaptive", "z0", Z),
            ("adaptive", "state", STATE), ("forward", "guide", torch.ones(10, 2)),
        )
    ),
    ("forward", dict(mode=3, negatives=freed(QUEUE)), f"negatives: {DAMAGED}"),
    ("forward", SEVERAL | dict(ids=freed(LABELS)), f"ids: {DAMAGED}"),
    ("quantile", LOGITS | dict(ids=shrunk(LABELS[:5])), f"ids: {DAMAGED}"),
    ("backward", SEVERAL | dict(mask=shrunk(MASK)), f"mask: {DAMAGED}"),
    ("forward", dict(mask=freed(CODES)), f"mask: {DAMAGED}"),
    ("forward", dict(groups=freed(LABELS)), f"groups: {DAMAGED}"),
    # the most rows and features there may be, or a few of them, but more than there is memory
    ("quantile", dict(z0=repeated(2**27, 2**27), z1=repeated(2**27, 2**27),
                       negatives=repeated(0, 2**27)), "out of memory"),
    ("forward", dict(mode=3, z0=repeated(5, 2**20), z1=repeated(5, 2**20),
                     negatives=repeated(2**27, 2**20)), "out of memory"),
    ("forward", dict(mode=4, z0=repeated(5, 2**20), z1=repeated(5, 2**20),
                     negatives=repeated(5, 2**27, 2**20)), "out of memory"),
    ("backward", dict(mode=4, z0=repeated(5, 2**20), z1=repeated(5, 2**20), grad=torch.ones(5),
                      negatives=repeated(5, 2**27, 2**20), stats=torch.zeros(9, 5), needs=4),
     "cannot allocate an output"),
]  # fmt: skip


@pytest.mark.parametrize(
    "op, changes, text",
    REFUSED,
    ids=[f"{i}-{op}-{text[:30]}" for i, (op, _, text) in enumerate(REFUSED)],
)
def test_a_kernel_refuses_what_it_cannot_read_safely(op, changes, text):
    with pytest.raises(RuntimeError) as error:
        call(op, **changes)
    assert str(error.value) == f"hex::{op}: {text}"
    assert call("forward")[0].shape == (10,)  # and works after


@pytest.mark.parametrize(
    "changes", ({}, SEVERAL, PAIRS, LOGITS), ids=("views", "several", "pairs", "logits")
)
@pytest.mark.parametrize("op", OPERATORS)
def test_what_the_refused_calls_are_changed_from_is_not_refused(op, changes):
    assert isinstance(call(op, **changes), tuple)


def other_layouts():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about beta layouts and deprecated ones
        yield Z.to_sparse()
        yield Z.to_sparse_csr()
        yield Z.to_sparse_csc()
        yield Z.to_mkldnn()
        yield torch.nested.nested_tensor([Z, Z])
        yield torch.nested.nested_tensor([Z, Z], layout=torch.jagged)
        yield torch.quantize_per_tensor(Z, 0.1, 0, torch.qint8)


@pytest.mark.parametrize("op", OPERATORS)
def test_tensors_without_plain_memory_are_refused(op):
    for z in other_layouts():
        with pytest.raises((NotImplementedError, RuntimeError)):
            call(op, z0=z)
        with pytest.raises((NotImplementedError, RuntimeError)):
            call(op, z0=z, z1=z)
        with pytest.raises((TypeError, NotImplementedError, RuntimeError)):
            hex_loss(z, z, eps=0.3)


@pytest.mark.parametrize("op", OPERATORS)
def test_arguments_that_are_no_tensors_are_refused(op):
    for wrong in (None, 1.0, "z", [Z], object()):
        with pytest.raises((RuntimeError, TypeError)):
            call(op, z0=wrong)


def test_an_error_keeps_no_tensor_alive():
    """A kernel owns its handles: thrown past, they would keep 500 MiB here. AddressSanitizer holds
    back up to 256 MiB of what is freed."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def failing_calls(n):
        for _ in range(n):
            z = torch.ones(1 << 10, 1 << 8)
            with pytest.raises(RuntimeError):
                call("forward", z0=z, z1=z[:5], negatives=z)
            with pytest.raises(RuntimeError):
                call("forward", z0=z, z1=z, negatives=z[:0], mode=4)

    failing_calls(10)
    before = resident()
    failing_calls(500)
    assert resident() - before < 320 << 20


# ---- several devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_one_meta_tensor_among_others_is_refused(name):
    parameters = [a.name for a in getattr(HEX, name).default._schema.arguments]
    tensors = [a for a in parameters if isinstance(VIEWS[a], torch.Tensor)]
    assert len(tensors) >= 6
    for one in tensors:
        named = tensors[1] if one == tensors[0] else one
        with pytest.raises(RuntimeError, match=rf"{named}: got device \w+, wanted that of"):
            call(name, **{one: VIEWS[one].to("meta")})


# ---- sizes --------------------------------------------------------------------------------------

MOST = 1 << 27


@pytest.mark.parametrize("size", [MOST + 1, 1 << 31, 1 << 60])
def test_tensors_that_claim_more_than_there_can_be_are_refused_by_name(size):
    many = torch.zeros(1).long().expand(size)
    z, labels = repeated(4, 1), LABELS[:4]

    def refused(op, name, **changes):
        text = rf"{name}: expected at most {MOST} rows and columns, got {size}"
        with pytest.raises(RuntimeError, match=text):
            call(op, **changes)

    for op in OPERATORS:
        for x in (repeated(size, 1), repeated(1, size)):
            for mode in range(3):
                refused(op, "z0", z0=x, z1=x, negatives=x[:0], mode=mode)
            several = dict(z0=x, z1=x[:0], negatives=x[:0], ids=many[: len(x)])
            refused(op, "z0", **SEVERAL | several)
            refused(op, "z0", **LOGITS | several)
        refused(op, "negatives", z0=z, z1=z, negatives=repeated(size, 1), mode=3)
        refused(op, "negatives", z0=z, z1=z, negatives=repeated(4, size, 1), mode=4)
        pairs = dict(z0=z, z1=repeated(size, 1), negatives=z[:0], ids=labels)
        refused(op, "z1", **PAIRS | pairs)
        if op != "quantile":
            refused(op, "guide", guide=repeated(1, size))
            refused(op, "guide", **SEVERAL | dict(guide=repeated(1, size)))


# ---- values -------------------------------------------------------------------------------------


def test_a_mask_is_true_where_its_byte_is_not_zero():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 5, generator=generator, requires_grad=True)
    truth = torch.rand(6, 6, generator=generator) < 0.4
    truth = truth | truth.T
    bytes_ = torch.where(truth, 2 + 50 * torch.arange(6, dtype=torch.int64)[:, None], 0)
    mask = bytes_.to(torch.uint8).view(torch.bool)
    none = torch.empty(0, 5)
    ids, _, groups, guide = operators.nothing(none)

    def run(mask):
        inputs = z, none, none.clone(), ids, mask, groups, guide
        value, seen = ops.loss(inputs, f64(0.1), f64(0.1), (0, 0, 1, 1.0, 0, 0.1, False))
        return value.detach(), *seen, *torch.autograd.grad(value.sum(), z)

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
            assert "target: got " in str(error)
            refused += 1
    running = False
    writer.join()
    assert refused  # or the test has shown nothing
