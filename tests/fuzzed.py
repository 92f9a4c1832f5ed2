# SPDX-License-Identifier: MIT
"""One call of test_fuzz.py: its drawn arguments, one of them spoilt on demand, and what the
formulas of hex/reference.py give for it, within the tolerances of conftest.py.

The formulas get the problem as problem.py lays it out, once in the dtype of the kernels and once in
float64; the threshold is that which the call had, and is compared by itself.
"""

import dataclasses
import functools
import math
import warnings
from typing import Any

import strategies as draws
import torch
from conftest import BY_DOTS, DTYPES, assert_as_good_as_torch, condition_of
from hypothesis import strategies as st

import hex
from hex import ops, positive, problem, reference
from hex import state as states
from hex.open_clip import HEXClipLoss

FUNCTIONS = ("hex_loss", "info_nce", "batch_threshold", "hex_sup_con", "hex_cross_entropy")
COMMON = ("beta", "tau_plus", "variant", "decoupled", "reduction", "gather_distributed",
          "check_sizes")  # fmt: skip
LOSS_OPTIONS = {
    "HEXLoss": (*COMMON, "mode", "cache_bytes"),
    "InfoNCELoss": ("decoupled", "mode", "reduction", "cache_bytes", "gather_distributed",
                    "check_sizes"),
    "HEXSupConLoss": (*COMMON, "positives", "base_temperature", "cache_bytes"),
    "HEXCrossEntropyLoss": (*COMMON, "self_column"),
    "HEXClipLoss": (
        "beta", "tau_plus", "variant", "decoupled", "cache_bytes", "gather_distributed",
        "check_sizes",
    ),
}  # fmt: skip
LOSSES = tuple(LOSS_OPTIONS)
FUNCTION_OPTIONS = {
    "hex_loss": ("beta", "tau_plus", "variant", "decoupled", "mode", "reduction", "cache_bytes"),
    "info_nce": ("decoupled", "mode", "reduction", "cache_bytes"),
    "batch_threshold": ("mode", "quantile", "over"),
    "hex_sup_con": ("beta", "tau_plus", "variant", "decoupled", "positives", "base_temperature",
                    "reduction", "cache_bytes"),
    "hex_cross_entropy": ("beta", "tau_plus", "variant", "decoupled", "reduction"),
}  # fmt: skip
DEFAULTS = dict(beta=1.0, tau_plus=0.1, variant="paper", decoupled=False, mode="ntxent",
                reduction="mean", positives="outside", base_temperature=None, self_column=False,
                quantile=0.99, over="negatives")  # fmt: skip
LABELS = "labels", "groups", "target", "candidate_labels"
GRADS = ("ones", "randn", "zero", "expanded", "negative", "strided")  # layouts of grad_output
DIFFERENTIABLE = ("z0", "z1", "negatives", "features", "candidates", "logits")


def described(x: Any) -> str:
    """For the log, without a number of a tensor, for its memory may be gone."""
    if isinstance(x, torch.Tensor):
        shape = "" if x.is_nested or torch.nn.parameter.is_lazy(x) else tuple(x.shape)
        return f"{type(x).__name__}({x.dtype}, {shape}, grad={x.requires_grad})"
    if isinstance(x, dict):
        return ", ".join(f"{k}={described(v)}" for k, v in x.items())
    if isinstance(x, (tuple, list)):
        return f"[{', '.join(map(described, x))}]"
    if isinstance(x, int) and abs(x) > 2**64:
        return "a huge int"
    return str(x).replace("\n", " ")[:300]


def bits(x: Any) -> Any:
    """All numbers of the tensors in it, and their versions, so that they compare exactly."""
    if isinstance(x, torch.nn.Module):
        return {name: bits(value)[0] for name, value in x.state_dict().items()}
    if isinstance(x, torch.Tensor):
        strange = x.layout != torch.strided or x.is_nested or torch.nn.parameter.is_lazy(x)
        if strange or x.is_quantized or x.is_meta:
            return id(x)
        if x.numel() and not x.untyped_storage().nbytes():
            return id(x)
        plain = x.detach().resolve_neg().resolve_conj().flatten()
        plain = plain.clone(memory_format=torch.contiguous_format)
        return bytes(plain.view(torch.uint8).numpy()), x._version
    if isinstance(x, dict):
        return {name: bits(value) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        return [bits(value) for value in x]
    return id(x)


@dataclasses.dataclass
class Case:
    name: str
    # z0, z1, negatives; features, labels, mask, candidates and their labels; logits, target
    batch: dict[str, Any]
    arguments: dict[str, Any]  # what is passed
    options: dict[str, Any]

    @property
    def seen(self) -> dict[str, Any]:
        """The options in effect."""
        fixed = {"info_nce": dict(tau_plus=0.0), "HEXClipLoss": dict(mode="cross")}
        chosen = {k: v for k, v in self.options.items() if k in DEFAULTS}
        wide = DEFAULTS | fixed.get(self.name, {}) | chosen
        return {k: v if v is None or isinstance(v, (str, bool)) else float(v)
                for k, v in wide.items()}  # fmt: skip

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors that may have a gradient, but the temperature."""
        return {k: v for k, v in self.batch.items() if k in DIFFERENTIABLE and v is not None}

    @property
    def given_tau(self) -> Any:
        """The temperature, or its inverse for CLIP."""
        return self.arguments["logit_scale" if self.name == "HEXClipLoss" else "temperature"]

    @property
    def tau(self) -> float:
        given = self.given_tau
        value = float(given.detach() if isinstance(given, torch.Tensor) else given)
        return 1 / value if self.name == "HEXClipLoss" else value

    @property
    def leaves(self) -> list[torch.Tensor]:
        named = [*self.inputs.values(), self.arguments.get("temperature"),
                 self.arguments.get("logit_scale")]  # fmt: skip
        return [t for t in named if isinstance(t, torch.Tensor) and t.requires_grad]

    def needs_gradient(self) -> bool:
        return bool(self.leaves)

    def call(self, module=None):
        if module is None:
            return getattr(hex, self.name)(**self.arguments, **self.options)
        return module(**self.arguments)

    def module(self, draw):
        """A new loss of the options; its temperature is given with each call."""
        options = dict(self.options)
        if self.name != "InfoNCELoss":
            # Several positives have no threshold by the positive.
            rules = [r for r in draws.RULES if r != "by_positive" or "SupCon" not in self.name]
            options["threshold"] = draw(
                draws.trackers(rules) | draws.trackers(["adaptive"])
                | st.sampled_from(("adaptive", None, 0.3, -1.5))
            )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ThresholdTracker: decoupled=True changes nothing")
            if self.name == "HEXClipLoss":
                return HEXClipLoss(**options)
            return getattr(hex, self.name)(0.1, **options)

    # ---- spoilt ----

    def spoil(self, draw) -> None:
        """Makes one of the arguments one that must be refused."""
        a = self.arguments
        name = draw(st.sampled_from([k for k in a if k != "output_dict"]))
        value = a[name]
        if name in ("z0", "z1", "image_features", "text_features", "negatives", "logits"):
            wrong = draws.no_rows(self.batch.get(name, value) if value is not None
                                  else torch.ones(1, 1), none=name != "negatives")  # fmt: skip
            if value is None:  # no negatives
                wrong = st.sampled_from((1, "z", [0.5], torch.ones(1), torch.tensor(2)))
        elif name == "features":
            wrong = draws.no_rows(value, shapes=False)
        elif name == "candidates" and value is not None:
            wrong = draws.no_rows(value)
        elif name in LABELS and isinstance(value, torch.Tensor):
            wrong = draws.no_labels(value, none=name in ("target", "candidate_labels"))
        elif name == "mask" and value is not None:
            wrong = draws.no_mask(len(value))
        elif name == "mask" and self.options.get("gather_distributed"):
            wrong = st.sampled_from((torch.eye(3), 3))
        elif name in ("temperature", "logit_scale"):
            wrong = draws.NO_TAU
        elif name == "eps" and value is not None:
            wrong = draws.NO_EPS
        elif name == "guide" and isinstance(value, tuple):
            at = draw(st.integers(0, len(value) - 1))
            bad = draw(draws.no_rows(value[at]))
            changed = (*value[:at], bad, *value[at + 1 :])
            wrong = st.sampled_from((changed, value[:1], [], value[0], 3))
        elif name == "guide" and value is not None:
            wrong = draws.no_rows(value, none=False)
        elif name == "groups" and isinstance(value, tuple):
            bad = draw(draws.no_labels(value[1], none=True))
            wrong = st.sampled_from(((value[0], bad), value[:1], value[0], list(value), 5))
        elif name == "rows":
            wrong = st.sampled_from(
                (len(value), "1", (1.0,), (True,), (value[0] + 1,), (-1, 1), ())
            )
        elif name == "logit_bias":
            wrong = st.sampled_from(("0", [1], torch.ones(2), torch.tensor(1j), 1j, True))
        else:  # None, which stands for nothing, or what goes with others
            wrong = st.sampled_from((3, "x", 1j, object(), True))
        a[name] = draw(wrong)

    # ---- by the formulas ----

    def problem(self, inputs: dict[str, torch.Tensor], tau) -> problem.Problem:
        b, a = self.batch | inputs, self.arguments
        if "features" in b:
            return problem.of_features(
                b["features"], b["labels"], b["mask"], tau, a.get("groups"), a.get("guide"),
                candidates=b["candidates"], candidate_labels=b["candidate_labels"],
                ignored=a.get("ignored"),
            )  # fmt: skip
        if "logits" in b:
            return problem.of_logits(b["logits"], b["target"], tau, self.seen["self_column"])
        return problem.of_views(
            b["z0"], b["z1"], b["negatives"], self.seen["mode"], tau, a.get("groups"),
            a.get("guide"), ignored=a.get("ignored"),
        )  # fmt: skip

    def plain(self, dtype: torch.dtype, eps, grad=None):
        """Rows, the reduced value, its gradients in the inputs and tau; and the problem."""
        inputs = {k: z.detach().to(dtype).requires_grad_() for k, z in self.inputs.items()}
        tau = torch.tensor(self.tau, dtype=torch.float64, requires_grad=True)
        p, o = self.problem(inputs, tau), self.seen
        positives = ops.POSITIVES[o["positives"]] if p.several else 0
        eps = eps(p) if callable(eps) else eps
        eps = problem.unknown_eps(p.inputs[0]) if p.h_is_given else eps
        rows = reference.problem_rows(
            *p.inputs, eps, p.tau, p.mode, positives, o["beta"], ops.VARIANTS[o["variant"]],
            o["tau_plus"], o["decoupled"],
        )[0]  # fmt: skip
        value = reference.reduce(rows, ops.REDUCTIONS[o["reduction"]])
        if o["base_temperature"] is not None:
            value = value * (tau / o["base_temperature"]).to(value)
        grads = None
        if grad is not None:
            grads = torch.autograd.grad(value, [*inputs.values(), tau], grad.to(value),
                                        allow_unused=True)  # fmt: skip
        return rows.detach(), value.detach(), grads, p, eps

    @property
    def dtype(self) -> torch.dtype:
        wide = any(z.dtype == torch.float64 for z in self.inputs.values())
        return torch.float64 if wide else torch.float32

    def is_tame(self) -> bool:
        """Whether all numbers are finite and, but for those of zero rows, of moderate size."""
        of_all = [*self.inputs.values(), *_tensors(self.arguments.get("guide"))]
        for z in of_all:
            x = z.detach().double().abs()
            if "logits" in self.batch:
                x = torch.where(x == math.inf, 1.0, x)  # columns that are left out
                if (z.detach() == math.inf).any() or (x > 2000).any():
                    return False
            if not x.isfinite().all() or ((x > 0) & (x < 1e-7)).any() or (x > 1e4).any():
                return False
        return True

    def slack(self) -> float:
        """Of a cosine: a rounding for each product and sum, twice."""
        guide = _tensors(self.arguments.get("guide"))
        decides = [*self.inputs.values(), *guide]
        longest = max(math.prod(z.shape[1:]) for z in decides)
        narrow = any(z.dtype != torch.float64 for z in guide)  # of it in its own dtype
        size = 8 if "logits" not in self.batch else 8 * max(1.0, self.tau * 2000)
        return size * (8 + longest) * torch.finfo(torch.float32 if narrow else self.dtype).eps


def _tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, (tuple, list)):
        return [z for z in x if isinstance(z, torch.Tensor)]
    return [x] if isinstance(x, torch.Tensor) else []


@st.composite
def cases(draw, names, like: Case | None = None, gathers: bool = False) -> Case:
    """A right call; `like`: with its options."""
    name = draw(st.sampled_from(names))
    special = draw(st.integers(0, 3)) == 0
    names = (FUNCTION_OPTIONS | LOSS_OPTIONS)[name]
    options = like.options if like is not None else draw(draws.options(*names))
    options |= {"gather_distributed": True} if gathers else {}
    tau = draw(draws.TAU)
    if isinstance(tau, torch.Tensor):
        tau = tau.detach().clone().requires_grad_(draw(st.booleans()))
    if "SupCon" in name or "sup_con" in name:
        batch = draw(draws.features(special))
        if options.get("gather_distributed") and batch["mask"] is not None:
            of = torch.arange(len(batch["mask"])) % 3
            batch |= {"labels": of, "mask": None}
    elif "ross" in name:
        number = tau.detach() if isinstance(tau, torch.Tensor) else tau
        batch = draw(draws.logits(special, float(number)))
    else:
        batch = draw(draws.views(special))
        if name == "HEXClipLoss":
            batch["negatives"] = None
    case = Case(name, batch, dict(batch), options)
    a = case.arguments
    if name == "HEXClipLoss":
        a |= {"image_features": a.pop("z0"), "text_features": a.pop("z1"), "logit_scale": tau}
        a.pop("negatives")
        a["logit_bias"] = draw(st.sampled_from((None, 0.5, torch.tensor(-10.0))))
        return case
    if name != "batch_threshold":
        a["temperature"] = tau
    if "logits" not in batch and draw(st.integers(0, 2)) == 0:
        own = any(batch.get(name) is not None for name in ("negatives", "candidates"))
        if own or not options.get("gather_distributed"):
            a["ignored"] = draw(draws.ignored(batch, case.seen["mode"]))
    decider = draw(st.sampled_from((None, None, "groups", "guide")))
    if decider and name in ("HEXLoss", "HEXSupConLoss", "hex_sup_con"):
        if "features" in batch:
            z = batch["features"]
            some = draws.rows(*z.shape[: min(z.dim() - 1, 2)], draw(draws.FEATURES),
                              *z.shape[3:], special=False)  # fmt: skip
            a[decider] = draw(draws.labels(len(z)) if decider == "groups" else some)
            if (c := batch["candidates"]) is not None:
                if decider == "groups":
                    others = draws.labels(len(c))
                else:
                    width = math.prod(a[decider].shape[2:] if z.dim() > 2 else a[decider].shape[1:])
                    others = draws.rows(len(c), width, special=False)
                a[decider] = a[decider], draw(others)
        else:
            of = draws.groups_of if decider == "groups" else draws.guide_of
            a[decider] = draw(of(batch))
    if name in ("hex_loss", "hex_sup_con", "hex_cross_entropy") and "groups" not in a:
        a["eps"] = draw(draws.EPS)
        if draw(st.integers(0, 3)) == 0:
            p = case.problem(case.inputs, 0.1)
            a["eps"] = torch.linspace(-1, 1, p.anchors, dtype=draw(st.sampled_from(DTYPES)))
    return case


# ---- comparisons --------------------------------------------------------------------------------


def check_batch_threshold(case: Case, value: torch.Tensor) -> None:
    assert value.shape == () and value.dtype == torch.float64 and not value.requires_grad
    p, o = case.problem({k: z.detach().to(case.dtype) for k, z in case.inputs.items()}, 0.1), \
        case.seen  # fmt: skip
    wanted = reference.quantile_of(reference.problem_table(*p.measured()), o["quantile"], o["over"])
    assert value.isnan() == wanted.isnan()
    assert value.isnan() or abs(value - wanted) <= case.slack()


def check_threshold(case: Case, module, before: torch.Tensor | None, learns: bool):
    """The threshold of a module's last call, and its state; gives eps for `Case.plain`."""
    last, tracker = module.last, module.threshold
    assert last.eps.shape == last.hard.shape == last.share.shape == ()
    decided = "groups" in case.arguments and case.arguments["groups"] is not None
    if decided or tracker is None:
        assert last.eps.isnan() if decided else last.eps == math.inf
        return last.eps
    if tracker.rule == "by_positive" and not tracker.value.isinf():
        return _check_by_positive(case, last.eps, tracker.options)
    if not tracker.adaptive_rule:
        t = tracker.value
        if not tracker.normalize_rows:
            assert torch.equal(last.eps, t)
            return t

        def of_rows(p):
            low, high = reference.range_of(reference.problem_table(*p.measured()))
            return low.double() + t * (high.double() - low.double())

        return of_rows
    p = case.problem({k: z.detach().to(case.dtype) for k, z in case.inputs.items()}, case.tau)
    with torch.no_grad():
        table = reference.problem_table(*p.measured())
    candidate = reference.quantile_of(table, tracker.quantile, tracker.over)
    rule = tracker.kernel_rule()[2:]
    eps, moved = states.step(before, candidate, p.anchors, *rule)
    slack = case.slack()
    near = dict(rtol=0, atol=slack, equal_nan=True)
    torch.testing.assert_close(last.eps, eps, **near)
    if learns:
        torch.testing.assert_close(tracker.state, moved, **near)
        counts = [k for k in range(states.STATE) if k not in (states.VALUE, states.CANDIDATE)]
        assert torch.equal(tracker.state[counts], moved[counts])
    return last.eps


def _check_by_positive(case: Case, mean: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """The threshold of each row, by the table of all cosines; `mean` is what a module had."""
    p = case.problem({k: z.detach().double() for k, z in case.inputs.items()}, case.tau)
    table = reference.problem_table(*p.measured())
    c = torch.where(table.positive, table.values.double(), 0.0).sum(1)
    less = c.abs() * options["margin"] if options["relative"] else options["margin"]
    own = case.problem({k: z.detach() for k, z in case.inputs.items()}, case.tau)
    eps = c - less + positive.rounding(own)
    if len(eps):
        torch.testing.assert_close(mean, eps.mean(), rtol=1e-5, atol=case.slack(), equal_nan=True)
    return eps


def check_loss(case: Case, value, eps, layout: str, graph: bool) -> None:
    """Value and gradients against the formulas. eps: None where the call was given it."""
    if isinstance(value, dict):
        value = value["contrastive_loss"]
    o, a = case.seen, case.arguments
    if eps is None:
        eps = a.get("eps")
        if case.name == "info_nce":
            eps = math.inf
        eps = torch.as_tensor(math.nan if eps is None else eps, dtype=torch.float64).detach()
    rows, wanted, _, p, eps_rows = case.plain(case.dtype, eps)
    assert value.shape == wanted.shape and value.dtype == case.dtype
    if is_open(case, eps_rows):
        return
    assert torch.equal(value.isnan(), wanted.isnan()), (value, wanted)
    assert value.requires_grad == (graph and case.needs_gradient())
    grad = grad_output(value, layout)
    leaves = case.leaves
    if graph and leaves:
        grads = torch.autograd.grad(value, leaves, grad, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(value, leaves, grad, allow_unused=True)
        assert bits(grads) == bits(again)
        for z, g in zip(leaves, grads, strict=True):
            assert g is None or (g.shape == z.shape and g.dtype == z.dtype)
    if not case.is_tame() or wanted.isnan().any() or is_tied(case, p, eps_rows):
        return
    truth = case.plain(torch.float64, eps, grad)
    same = truth if case.dtype == torch.float64 else case.plain(case.dtype, eps, grad)
    infinite = truth[1].isinf()
    assert torch.equal(value.isinf(), infinite)
    if infinite.any():
        return
    ratio = 1.0 if o["base_temperature"] is None else case.tau / o["base_temperature"]
    run = functools.partial(case.plain, torch.float64, eps)
    condition = condition_of(run, o["tau_plus"], o["variant"], o["decoupled"])
    number = max(1, len(rows)) if o["reduction"] == "sum" else 1
    # The rows' own errors, and what they are differences of, each up to 1/tau or a logit.
    most = truth[0].abs().max().item() if len(rows) else 0.0
    terms = 2 / case.tau
    if "logits" in case.batch:
        x = case.batch["logits"].detach().double()
        terms += 2 * torch.where(x.isinf(), 0.0, x).abs().max().item() if x.numel() else 0.0
    options = dict(tau=case.tau, dtype=case.dtype, condition=condition, about=(case, layout))
    scale = number * ratio * condition * (most * max(4, 2 / case.tau) + terms)
    assert_as_good_as_torch(value.detach(), same[1], truth[1], scale=scale, **options)
    if not (graph and leaves):
        return
    # What the weights of all rows add up to, over the lengths of the embeddings.
    every = grad.double().abs().sum().item() * ratio
    if o["reduction"] == "sum":
        every *= number
    mass = 2 / case.tau * condition * every * max(1.0, o["beta"])
    known = {id(z): k for k, z in enumerate(case.inputs.values())}
    for z, g in zip(leaves, grads, strict=True):
        at = known.get(id(z), len(known))
        exact, close = truth[2][at], same[2][at]
        if exact is None or g is None:
            assert exact is None or not exact.any()
            continue
        if at == len(known):  # of the temperature; CLIP's is the inverse
            inner = -(case.tau**2) if case.name == "HEXClipLoss" else 1.0
            exact, close = ((x * inner).reshape(z.shape) for x in (exact, close))
            size = abs(inner) * (2 * mass / case.tau + most * every / case.tau + terms * mass)
            if o["base_temperature"] is not None and case.dtype == torch.float64:
                # of two gradients, each in the dtype of the temperature before they are added
                size *= max(1.0, torch.finfo(torch.float32).eps / 1e-12)
        elif "logits" in case.batch:
            size = mass * case.tau
        else:
            x = z.detach().double()
            length = (x if x.dim() < 4 else x.flatten(2)).norm(dim=-1)
            # A term, (u_j - c u_i) / |z|, is a difference of what has rounded four times on each
            # side: in the length, the scaling, the cosine and the product.
            size = 8 * mass / length[length > 0].min().item() if length.any() else 0.0
        if exact.numel() and exact.abs().max() > torch.finfo(z.dtype).max / 4:
            continue  # does not fit
        if BY_DOTS and g.dtype == torch.bfloat16 and at < len(known) and "logits" not in case.batch:
            # There the terms are rounded to bfloat16, each by half an ulp, and not only their sum.
            close = close.to(torch.bfloat16)
            size *= 1 + 2**-9 / torch.finfo(torch.float32).eps / 8
        assert_as_good_as_torch(g, close, exact, scale=size, **options)


def grad_output(value: torch.Tensor, layout: str) -> torch.Tensor:
    """Of the value's shape; "expanded" and others are about its layout."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return {
        "ones": lambda: torch.ones_like(grad),
        "randn": lambda: grad,
        "zero": lambda: torch.zeros_like(grad),
        "expanded": lambda: torch.full((), -0.5, dtype=grad.dtype).expand(grad.shape),
        "negative": lambda: torch._neg_view(-grad),
        "strided": lambda: torch.stack([grad, -grad], -1)[..., 0],
    }[layout]()


def is_open(case: Case, eps: torch.Tensor) -> bool:
    """What is known and not mended: a logit of +inf that is no target is in H for the kernels and
    in G for the formulas where eps is from 1 on, and two variants leave H out, not G."""
    logits = case.batch.get("logits")
    if logits is None or case.seen["variant"] == "paper":
        return False
    return bool(((eps >= 1) & (eps < math.inf)).any() and (logits.detach() == math.inf).any())


def is_tied(case: Case, p: problem.Problem, eps: Any) -> bool:
    """Whether a cosine is so close to the threshold that rounding decides on which side."""
    if p.h_is_given:
        return False
    with torch.no_grad():
        table = reference.problem_table(*p.measured())
        if "logits" in case.batch:
            negative = table.negative
            score = table.values.double()
        else:
            *z, ids, mask, tau, mode, several, own = p.measured()
            negative = reference.problem_table(
                *p.inputs[:3], ids, mask, tau, mode, several, own
            ).negative
            score = reference.problem_cosines(
                *(x.double() for x in z), mode, several
            )  # the guide's
    # With one of eps's own rounding, where it follows the range of a row.
    near = (score.clamp(max=1) - eps.reshape(-1, 1)).abs() <= 4 * case.slack()
    near = near & eps.reshape(-1, 1).isfinite()
    return bool((near & negative).any())
