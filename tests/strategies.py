# SPDX-License-Identifier: MIT
"""What hypothesis draws: tensors of any dtype, layout and value; problems of two views; the batches
of every loss; numbers in every form; and, for each kind of argument, what must be refused.

test_properties.py and test_fuzz.py say what holds of them.
"""

import fractions
import math
import warnings

import numpy as np
import torch
from conftest import DTYPES, Problem
from data import FORMS, MODES, f64
from hypothesis import strategies as st

from hex import ThresholdTracker

SIZES = st.integers(0, 9)
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, 1e-23, 1e20, 6e4, 3e38)


# ---- tensors ------------------------------------------------------------------------------------


def _transposed(z):
    return z.mT.contiguous().mT


def _sliced(z):
    return torch.cat([z, z, z], -1)[..., z.shape[-1] : 2 * z.shape[-1]]


def _strided(z):
    return torch.stack([z, -z], -1).flatten(-2)[..., ::2]


def _negative(z):
    return torch._neg_view(-z)


def _expanded(z):
    return z[:1].expand_as(z) if z.shape[0] else z


def _column(z):
    return z[..., :1].expand_as(z) if z.shape[-1] else z


LAYOUTS = (torch.clone, _transposed, _sliced, _strided, _negative, _expanded, _column)


@st.composite
def embeddings(draw, *shape, special=True):
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    z = torch.randn(shape, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        z = z + 3  # cosines near 1
    z = z.to(dtype)
    for _ in range(draw(st.integers(0, 3)) if special and z.numel() else 0):
        place = draw(st.integers(0, z.numel() - 1))
        z.view(-1)[place] = draw(st.sampled_from(SPECIAL))
    return draw(st.sampled_from(LAYOUTS))(z)


@st.composite
def problems(draw, special=True, minimum=0):
    mode = draw(st.sampled_from(MODES))
    B, D, K = draw(st.integers(minimum, 9)), draw(st.integers(minimum, 40)), draw(SIZES)
    shapes = [(B, D), (B, D)]
    if mode in ("unpaired", "paired"):
        shapes.append((K, D) if mode == "unpaired" else (B, K, D))
    inputs = tuple(draw(embeddings(*shape, special=special)) for shape in shapes)
    p = Problem(
        inputs,
        mode,
        eps=f64(draw(st.sampled_from((-1.5, -0.2, 0.0, 0.3, 0.9, 1.0, math.inf)))),
        tau=draw(st.sampled_from((1e-3, 0.02, 0.1, 0.5, 10.0))),
        beta=draw(st.sampled_from((0.0, 0.5, 1.0, 2.0))),
        tau_plus=draw(st.sampled_from((0.0, 0.1, 0.9))),
        variant=draw(st.sampled_from(FORMS)),
    )
    if draw(st.booleans()):
        p = p.with_(eps=torch.linspace(-1, 1, p.rows, dtype=torch.float64))
    return p


# ---- batches ------------------------------------------------------------------------------------

FEATURES = st.integers(0, 24) | st.sampled_from((1, 2, 33, 64, 130))
FEW, MANY = st.integers(0, 19), st.sampled_from((96, 100, 131))


@st.composite
def rows(draw, *shape, special):
    """`embeddings` that are also scaled, have rows of zeros and require a gradient."""
    z = draw(embeddings(*shape, special=special))
    if draw(st.integers(0, 3)) == 0:
        z = z * 2.0 ** draw(st.integers(-9, 9))
    if z.numel() and draw(st.integers(0, 5)) == 0:
        z = z.index_fill(0, torch.tensor([draw(st.integers(0, len(z) - 1))]), 0)
    return z.detach().requires_grad_(draw(st.booleans()))


@st.composite
def labels(draw, *shape):
    dtype = draw(st.sampled_from((torch.int64, torch.int32, torch.uint8, torch.int16, torch.bool,
                                  torch.uint16, torch.uint32, torch.uint64)))  # fmt: skip
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    of = draw(st.sampled_from((1, 2, 5, 100)))
    values = torch.randint(0, of, shape, generator=generator)
    layout = draw(st.sampled_from((torch.clone, lambda x: torch.stack([x, x], -1)[..., 1])))
    return layout(values).to(dtype)


@st.composite
def views(draw, special):
    """z0, z1, negatives or None."""
    D, kind = draw(FEATURES), draw(st.sampled_from(("none", "none", "shared", "paired")))
    B = draw(FEW | MANY) if kind == "none" else draw(FEW)
    K = draw(FEW | st.sampled_from((192, 200))) if kind == "shared" else draw(FEW)
    negatives = {"none": None, "shared": (K, D), "paired": (B, K, D)}[kind]
    shapes = [(B, D), (B, D), *([negatives] if negatives else ())]
    z = [draw(rows(*shape, special=special)) for shape in shapes]
    return dict(zip(("z0", "z1", "negatives"), (*z, None)[:3], strict=True))


@st.composite
def guide_of(draw, batch):
    """Of two views, with as many rows."""
    G = draw(FEATURES)
    of = [z for z in batch.values() if z is not None]
    return tuple(draw(rows(*z.shape[:-1], G, special=False)) for z in of)


@st.composite
def groups_of(draw, batch):
    own = draw(labels(len(batch["z0"])))
    others = batch["negatives"]
    return own if others is None else (own, draw(labels(*others.shape[:-1])))


@st.composite
def ignored(draw, batch, mode):
    """Of two views or of features: negatives that do not count."""
    B = len(batch["features"] if "features" in batch else batch["z0"])
    shapes = [(B, B)]
    if (negatives := batch.get("negatives")) is not None:
        K = negatives.shape[-2]
        shapes = [(B, K), (K,)] if negatives.dim() == 2 else [(B, K)]
    elif batch.get("candidates") is not None:
        shapes = [(B, len(batch["candidates"]))]
    elif "features" not in batch and mode != "query":
        shapes.append((2 * B, 2 * B if mode == "ntxent" else B))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    shape, share = draw(st.sampled_from(shapes)), draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    return torch.rand(shape, generator=generator) < share


@st.composite
def features(draw, special):
    """features, and labels, with candidates or without, a mask or neither."""
    B, D = draw(FEW | st.sampled_from((64, 200))), draw(FEATURES)
    V = draw(st.sampled_from((None, 1, 2, 3)))
    more = draw(st.sampled_from(((), (), (2,)))) if V else ()
    who = draw(st.sampled_from(("labels", "mask", *(("none",) if V else ()))))
    batch = {"features": draw(rows(B, *((V,) if V else ()), D, *more, special=special)),
             "labels": None, "mask": None, "candidates": None,
             "candidate_labels": None}  # fmt: skip
    if who == "labels":
        batch["labels"] = draw(labels(B))
        if draw(st.booleans()):
            M, width = draw(FEW | st.sampled_from((200,))), math.prod((D, *more))
            batch["candidates"] = draw(rows(M, width, special=special))
            batch["candidate_labels"] = draw(labels(M))
    elif who == "mask":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        mask = torch.rand(B, B, generator=generator) < draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
        batch["mask"] = mask.to(draw(st.sampled_from((torch.bool, torch.float32, torch.int64))))
    return batch


@st.composite
def logits(draw, special, tau):
    """Cosines over tau, or numbers of any size, with a target."""
    N, C = draw(FEW | st.sampled_from((40,))), 1 + draw(FEW | st.sampled_from((200, 257)))
    x = draw(rows(N, C, special=special))
    if draw(st.booleans()) and not special:
        x = (torch.tanh(x.detach()) / tau).to(x.dtype)
        if draw(st.booleans()):
            x = x.masked_fill(torch.arange(x.numel()).view(x.shape) % 7 == 3, -math.inf)
        x = x.requires_grad_(draw(st.booleans()))
    target = draw(labels(N)).to(torch.int64).clamp(max=C - 1)
    return {"logits": x, "target": target.to(draw(st.sampled_from((torch.int64, torch.int32))))}


# ---- numbers ------------------------------------------------------------------------------------


@st.composite
def number(draw, *values, tensor=False):
    """One of the values, in any form that a user may have it in."""
    value = draw(st.sampled_from(values))
    forms = [float, float, np.float32, np.float64, np.float16]
    if math.isfinite(value):
        forms.append(fractions.Fraction)
        if value == int(value):
            forms += [int, np.int64]
    if tensor:
        forms += [
            torch.tensor,
            f64,
            lambda v: torch.tensor([v]) if tensor == "one element" else torch.tensor(v),
            lambda v: torch.tensor(v, dtype=torch.bfloat16),
            lambda v: torch.tensor([v, v])[1] if tensor == "one element" else f64(v),
            lambda v: torch.nn.Parameter(torch.tensor(v)),
        ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, where 16 bits are too few
        return draw(st.sampled_from(forms))(value)


NO_NUMBERS = (True, np.bool_(False), "0.1", None, 1j, [0.1], (), {}, object(), np.ones(2), float)
NO_FLAGS = (None, 1, 0, "True", 1.0, torch.tensor(True), [], np.int64(1))
NO_COUNTS = (-1, 1.0, "1", None, True, math.nan, 2**53, 10**400, torch.tensor(1), np.float32(1))
NO_CHOICES = ("x", "", None, 1, b"mean", torch.ones(2), ["mean"], object(), math.nan)
BEYOND = (10**400, -(10**5000), fractions.Fraction(10**400))


def _outside(*values, none=True):
    return st.sampled_from((*values, *BEYOND, *(v for v in NO_NUMBERS if none or v is not None)))


# option: values that are taken; values that are refused
OPTIONS = {
    "beta": (number(0.0, 0.5, 1.0, 2.0), _outside(-0.5, math.nan, math.inf, torch.tensor(1.0))),
    "tau_plus": (number(0.0, 0.1, 0.9), _outside(-0.5, math.nan, 1, 1.5, torch.tensor(0.5))),
    "variant": (st.sampled_from(("paper", "released", "excluded")), st.sampled_from(NO_CHOICES)),
    "decoupled": (st.booleans(), st.sampled_from(NO_FLAGS)),
    "mode": (st.sampled_from(MODES[:3]), st.sampled_from(NO_CHOICES)),
    "reduction": (st.sampled_from(("none", "mean", "sum")), st.sampled_from(NO_CHOICES)),
    "positives": (st.sampled_from(("outside", "inside")), st.sampled_from(NO_CHOICES)),
    "base_temperature": (st.none() | number(0.07, 1.0), _outside(0, -1, math.nan, math.inf,
                                                                 none=False)),
    "cache_bytes": (st.sampled_from((None, 0, 1000, 1 << 30, np.int64(7))),
                    st.sampled_from([v for v in NO_COUNTS if v is not None])),
    "self_column": (st.booleans(), st.sampled_from(NO_FLAGS)),
    "gather_distributed": (st.booleans(), st.sampled_from(NO_FLAGS)),
    "check_sizes": (st.booleans(), st.sampled_from(NO_FLAGS)),
    "quantile": (number(0.0, 0.3, 0.9, 0.99, 1.0), _outside(-0.1, 1.1, math.nan)),
    "over": (st.sampled_from(("all", "negatives")), st.sampled_from(NO_CHOICES)),
    "momentum": (number(0.0, 0.5), _outside(1, -1, math.nan)),
    "monotonic": (st.booleans(), st.sampled_from(NO_FLAGS)),
    "lagged": (st.booleans(), st.sampled_from(NO_FLAGS)),
    "warmup_epochs": (st.sampled_from((0, 1, np.int32(3))), st.sampled_from(NO_COUNTS)),
    "warmup_threshold": (number(0.9, math.inf, -1.0), _outside(math.nan)),
    "margin": (number(0.0, 0.1, -0.2, 3.0), _outside(math.nan, math.inf, -math.inf)),
    "relative": (st.booleans(), st.sampled_from(NO_FLAGS)),
    "t": (number(0.3, -0.5, 0.9), _outside(math.nan)),
    "start": (number(0.9, 0.2), _outside(math.nan, math.inf)),
    "end": (number(0.3, -1.5), _outside(math.nan, -math.inf)),
    "drop": (number(0.1, 0.0), _outside(math.nan, math.inf, -0.1)),
    "every": (st.sampled_from((1, 3)), st.sampled_from((0, *NO_COUNTS))),
    "epochs": (st.sampled_from((1, 5, 1000)), st.sampled_from((0, *NO_COUNTS))),
    "normalize_rows": (st.booleans(), st.sampled_from(NO_FLAGS)),
    "compounded": (st.booleans(), st.sampled_from(NO_FLAGS)),
}  # fmt: skip
RULES = {
    "adaptive": ("quantile", "over", "warmup_epochs", "momentum", "monotonic", "lagged",
                 "warmup_threshold"),
    "by_positive": ("margin", "relative", "warmup_epochs"),
    "fixed": ("t", "normalize_rows"),
    "step": ("start", "drop", "every", "normalize_rows"),
    "cosine": ("start", "end", "epochs", "normalize_rows", "compounded"),
}  # fmt: skip
NEEDED = {"t", "start", "drop", "every", "end", "epochs"}
TAU = number(0.02, 0.1, 0.5, 10.0, tensor="one element")
NO_TAU = st.sampled_from(
    (0, -1.0, math.nan, math.inf, "0.1", True, [0.1], 1j, torch.tensor(1), torch.ones(2), *BEYOND,
     torch.ones(0), torch.tensor(True), torch.tensor(1j), torch.ones((), device="meta"),
     torch.ones(()).to_sparse())
)  # fmt: skip
EPS = number(-1.5, -0.2, 0.0, 0.3, 0.9, 1.0, math.inf, tensor=True)
NO_EPS = st.sampled_from(
    (math.nan, "0", True, None, [0.1], 1j, torch.tensor(1), torch.ones(1, 1), torch.ones(999),
     torch.tensor(True), torch.ones((), device="meta"), torch.ones(()).to_sparse(), *BEYOND)
)  # fmt: skip


@st.composite
def options(draw, *names, spoilt=None):
    """Some of the options; the one that is spoilt, refused."""
    chosen = {name for name in names if name in NEEDED or draw(st.integers(0, 2)) == 0}
    return {
        name: draw(OPTIONS[name][name == spoilt]) for name in names if name in chosen | {spoilt}
    }


@st.composite
def trackers(draw, rules=tuple(RULES)):
    rule = draw(st.sampled_from(rules))
    return getattr(ThresholdTracker, rule)(**draw(options(*RULES[rule])))


# ---- what is refused ----------------------------------------------------------------------------


def freed(z):
    z = z.detach().clone()
    z.untyped_storage().resize_(0)
    return z


def _nested(z):
    return torch.nested.as_nested_tensor([z, z])


def _sparse(z):
    return z.to_sparse_csr() if z.dim() == 2 and z.numel() else z.to_sparse()


def _made(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about prototypes and what is deprecated
        return make()


OTHERS = (1, 1.0, "z", [1.0], object(), math.nan, torch.float32, np.ones((2, 2)), True)


@st.composite
def no_rows(draw, z, none=True, shapes=True):
    """What is no tensor of floating numbers or, with `shapes`, has no such shape."""
    z = z.detach()
    changed = [
        lambda: draw(st.sampled_from(OTHERS)),
        lambda: _sparse(z),
        lambda: torch.quantize_per_tensor(torch.zeros(z.shape), 0.1, 0, torch.qint8),
        torch.nn.UninitializedParameter,
    ]
    changed += [
        lambda dtype=dtype: z.to(dtype)
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8)
    ]
    if none:
        changed.append(lambda: None)
    if shapes:
        changed.append(lambda: z[None, ..., None])
    if z.numel():
        changed += [lambda: freed(z)]
        changed += [lambda: _nested(z)] if z.dim() else []
        changed += [lambda: z[0, ..., 0]] if shapes and z.dim() > 1 else []
    return _made(draw(st.sampled_from(changed)))


@st.composite
def no_labels(draw, values, none=False):
    """What is no tensor of integers of this shape."""
    values = values.to(torch.int64)
    changed = [
        lambda: draw(st.sampled_from(OTHERS)),
        lambda: values.float(),
        lambda: values.to(torch.complex64),
        lambda: values[None],
    ]
    if none:
        changed.append(lambda: None)
    if values.numel():
        changed += [
            lambda: freed(values),
            lambda: freed(values.to(torch.uint8)),
            lambda: values[1:],
            lambda: values.to("meta"),
            lambda: _nested(values),
        ]
    return _made(draw(st.sampled_from(changed)))


@st.composite
def no_mask(draw, images):
    """What is no mask of so many images."""
    right = torch.ones(images, images)
    changed = [
        lambda: draw(st.sampled_from(OTHERS)),
        lambda: right[None],
        lambda: torch.ones(images + 1, images),
        lambda: right.to(torch.complex64),
        lambda: _sparse(right),
    ]
    if images:
        changed += [
            lambda: freed(right),
            lambda: freed(right.bool()),
            lambda: right / 2,
            lambda: right * math.nan,
            lambda: -right,
            lambda: right.to("meta"),
            lambda: _nested(right),
        ]
    return _made(draw(st.sampled_from(changed)))
