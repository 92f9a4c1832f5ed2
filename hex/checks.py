# SPDX-License-Identifier: MIT
"""The checks of everything that a user passes, and the names of all choices.

A check that fails raises a TypeError or ValueError with the text "NAME: got X, wanted Y". No check
changes anything. Some return the value in the form in which it is used. What is made of the values
is in problem.py, and which options each rule of a threshold has is in schedules.py.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ._calls import is_transformed, is_wrapped

__all__ = ["Mode", "Over", "Positives", "Reduction", "Variant", "as_float",
           "check_base_temperature", "check_bias", "check_candidate", "check_candidates",
           "check_choice", "check_count", "check_dense", "check_device", "check_embeddings",
           "check_eps", "check_eps_or_groups", "check_features", "check_flag", "check_gathers",
           "check_groups", "check_guide", "check_guide_of_candidates", "check_guide_of_features",
           "check_has_numbers", "check_ignored", "check_labels", "check_logits", "check_mask",
           "check_mode", "check_negatives", "check_no_mask_to_gather", "check_number",
           "check_one_decider", "check_one_positive", "check_over", "check_positives",
           "check_process_group", "check_reduction", "check_rows", "check_rows_are",
           "check_temperature", "check_threshold", "check_views", "has_shape", "is_number",
           "shown"]  # fmt: skip

Mode = Literal["ntxent", "query", "cross"]
Variant = Literal["paper", "released", "excluded"]
Reduction = Literal["none", "mean", "sum"]
Over = Literal["all", "negatives"]
Positives = Literal["outside", "inside"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
             torch.uint16, torch.uint32, torch.uint64)  # fmt: skip
_PLAIN = (Tensor, torch.nn.Parameter)
_MODES, _VARIANTS, _REDUCTIONS = get_args(Mode), get_args(Variant), get_args(Reduction)


# ---- tensors ------------------------------------------------------------------------------------


def has_shape(z: Tensor, wanted: Sequence[int]) -> bool:
    """Whether z has this shape.

    A size that a compiled graph does not know, as after mark_unbacked, is taken to be the wanted
    one, and the graph checks it as it runs.
    """
    if not torch.compiler.is_compiling():
        return z.shape == tuple(wanted)
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    if z.dim() != len(wanted):
        return False
    for size, right in zip(z.shape, wanted, strict=True):
        if not guard_or_true(size == right):
            return False
        torch._check(size == right)  # type: ignore[no-untyped-call]
    return True


def check_embeddings(name: str, z: Any) -> None:
    """A dense tensor of a floating dtype that the kernels have."""
    if not isinstance(z, Tensor):
        if isinstance(z, torch.fx.Proxy):
            raise TypeError(
                f"{name}: got a Proxy of torch.fx, wanted a torch.Tensor; symbolic_trace cannot "
                "follow the checks of a loss: make the loss a leaf module of the Tracer, or use "
                "torch.export or torch.compile"
            )
        raise TypeError(f"{name}: got {type(z).__name__}, wanted a torch.Tensor")
    if type(z) is not Tensor and hasattr(z, "to_local"):
        raise TypeError(f"{name}: got a DTensor, wanted a plain tensor; call .to_local()")
    if z.dtype not in _DTYPES:
        labels = z.dim() == 1 and not z.is_complex() and not z.is_floating_point()
        raise TypeError(
            f"{name}: got {z.dtype}, wanted torch.float64, float32, bfloat16 or float16"
            + "; labels go to HEXSupConLoss, logits and a target to HEXCrossEntropyLoss" * labels
        )
    check_dense(name, z)


def check_dense(name: str, z: Tensor) -> None:
    """A tensor with a shape, and with memory for it.

    torch has no shape of a nested tensor, and reads past the end where a storage was freed.
    """
    if z.layout != torch.strided or z.is_nested:
        got = "a nested tensor" if z.is_nested else f"layout {z.layout}"
        raise TypeError(f"{name}: got {got}, wanted a dense tensor")
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return
    if type(z) not in _PLAIN:  # whose memory may be elsewhere
        if isinstance(z, (UninitializedBuffer, UninitializedParameter)):
            raise TypeError(f"{name}: got {type(z).__name__}, wanted a tensor that has a shape")
        return
    if not (z.is_cpu or z.is_cuda) or is_wrapped(z):
        return
    count = z.numel()
    if count and not z.is_contiguous():
        count = 1 + sum((n - 1) * step for n, step in zip(z.shape, z.stride(), strict=True))
    wanted = (z.storage_offset() + count) * z.itemsize if count else 0
    there = z.untyped_storage().nbytes()
    if there < wanted:
        raise ValueError(
            f"{name}: got a storage of {there} bytes, wanted at least {wanted} for its shape (was "
            "it freed or resized?)"
        )


def check_has_numbers(name: str, z: Tensor, device: torch.device) -> None:
    """That z can be taken to the device of the embeddings, which a meta tensor cannot."""
    if z.is_meta and device.type != "meta":
        check_device(name, z, device, "the embeddings")


def check_device(name: str, z: Tensor, device: torch.device, of: str) -> None:
    if z.device != device:
        raise ValueError(f"{name}: got device {z.device}, wanted that of {of}, {device}")


def check_views(z0: Any, z1: Any, names: tuple[str, str] = ("z0", "z1")) -> None:
    """Two views of a batch, (B, D) each."""
    first, second = names
    check_embeddings(first, z0)
    check_embeddings(second, z1)
    if z0.dim() != 2:
        raise ValueError(f"{first}: got shape {tuple(z0.shape)}, wanted (B, D)")
    if not has_shape(z1, z0.shape):
        raise ValueError(
            f"{second}: got shape {tuple(z1.shape)}, wanted that of {first}, {tuple(z0.shape)}"
        )
    if z1.device != z0.device:
        check_device(second, z1, z0.device, first)


def check_negatives(negatives: Any, z0: Tensor) -> None:
    """(K, D), shared by all anchors, or (B, K, D), K for each anchor."""
    check_embeddings("negatives", negatives)
    images, features = z0.shape
    of_each = (images,) if negatives.dim() == 3 else ()
    if negatives.dim() < 2 or not has_shape(negatives, (*of_each, negatives.shape[-2], features)):
        raise ValueError(
            f"negatives: got shape {tuple(negatives.shape)}, wanted (K, {features}) or "
            f"({images}, K, {features})"
        )
    check_device("negatives", negatives, z0.device, "z0")


def check_labels(name: str, labels: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The labels as int64 on the device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name}: got {type(labels).__name__}, wanted a torch.Tensor")
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"{name}: got {labels.dtype}, wanted an integer dtype")
    check_dense(name, labels)
    if not has_shape(labels, shape):
        raise ValueError(f"{name}: got shape {tuple(labels.shape)}, wanted {shape}")
    check_has_numbers(name, labels, device)
    return labels.to(device, torch.int64)


def check_one_decider(groups: Any, guide: Any) -> None:
    if groups is not None and guide is not None:
        raise ValueError("groups, guide: got both, wanted at most one of them")


def check_groups(
    groups: Any, z0: Tensor, negatives: Tensor | None, name: str = "negative"
) -> tuple[Tensor, Tensor | None]:
    """The group of each image and, if there are negatives, or candidates, of each of these."""
    images = (z0.shape[0],)
    if negatives is None:
        return check_labels("groups", groups, images, z0.device), None
    if not isinstance(groups, tuple) or len(groups) != 2:
        raise ValueError(
            f"groups: got {shown(groups)}, wanted (groups, {name}_groups) with {name}s"
        )
    return (
        check_labels("groups[0]", groups[0], images, z0.device),
        check_labels("groups[1]", groups[1], tuple(negatives.shape[:-1]), z0.device),
    )


def check_guide(
    guide: Any, z0: Tensor, negatives: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The guide of views and negatives, detached. Only its number of features may be another."""
    count = 2 if negatives is None else 3
    if not isinstance(guide, (tuple, list)) or len(guide) != count:
        wanted = "(g0, g1)" if negatives is None else "(g0, g1, g_negatives)"
        raise ValueError(f"guide: got {shown(guide)}, wanted a tuple {wanted}")
    g0, g1, others = guide if negatives is not None else (*guide, None)
    try:
        check_views(g0, g1, ("g0", "g1"))
        if others is not None or negatives is not None:
            check_negatives(others, g0)
    except (TypeError, ValueError) as error:
        raise type(error)(f"guide: {error}") from None
    fit = has_shape(g0, (z0.shape[0], g0.shape[1]))
    if negatives is not None:
        fit = fit and has_shape(others, (*negatives.shape[:-1], others.shape[-1]))
    if not fit:
        raise ValueError(
            f"guide: got {[tuple(g.shape) for g in guide]}, wanted, except for the last axis, "
            f"{[tuple(z.shape) for z in (z0, z0, negatives) if z is not None]}"
        )
    check_device("guide", g0, z0.device, "z0")
    return g0.detach(), g1.detach(), None if others is None else others.detach()


def check_features(features: Any, labels: Any, mask: Any) -> None:
    """Features with several positives: (B, V, D), or (N, D) with labels or a mask."""
    check_embeddings("features", features)
    if features.dim() < 2:
        raise ValueError(f"features: got shape {tuple(features.shape)}, wanted (B, V, D) or (N, D)")
    if labels is not None and mask is not None:
        raise ValueError("labels, mask: got both, wanted at most one of them")
    if (
        isinstance(labels, Tensor)
        and labels.is_floating_point()
        and has_shape(labels, features.shape)
    ):
        raise TypeError(
            "labels: got a second batch of embeddings, wanted (B,) integers; two views z0 and z1 "
            "are features of shape (B, 2, D), torch.stack([z0, z1], dim=1)"
        )
    if features.dim() == 2 and labels is None and mask is None:
        raise ValueError(
            "labels, mask: got neither, wanted one of them, for features are (N, D), not (B, V, D)"
        )


def check_candidates(
    features: Tensor, labels: Any, mask: Any, candidates: Any, candidate_labels: Any
) -> None:
    """Candidates (M, D) of checked features, and whether there are labels of both."""
    if candidates is None or candidate_labels is None:
        got = "the labels alone" if candidates is None else "no labels"
        raise ValueError(f"candidates, candidate_labels: got {got}, wanted both or neither")
    if labels is None:
        got = "None" if mask is None else "a mask"
        raise ValueError(f"labels: got {got}, wanted (B,) or (N,) integers with candidates")
    check_embeddings("candidates", candidates)
    width = _width(features)
    if candidates.dim() != 2 or not has_shape(candidates, (candidates.shape[0], width)):
        raise ValueError(f"candidates: got shape {tuple(candidates.shape)}, wanted (M, {width})")
    check_device("candidates", candidates, features.device, "features")


def _width(features: Tensor) -> int:
    """Of a row of features, whose axes after the third are flattened into it."""
    return math.prod(features.shape[2:]) if features.dim() > 2 else features.shape[1]


def check_guide_of_candidates(
    guide: Any, features: Tensor, candidates: Tensor
) -> tuple[Tensor, Tensor]:
    """The guide of features and candidates, detached. The number of features may be another."""
    if not isinstance(guide, (tuple, list)) or len(guide) != 2:
        raise ValueError(
            f"guide: got {shown(guide)}, wanted a tuple (guide, candidate_guide) with candidates"
        )
    own, others = check_guide_of_features(guide[0], features, "guide[0]"), guide[1]
    check_embeddings("guide[1]", others)
    wanted = candidates.shape[0], _width(own)
    if not has_shape(others, wanted):
        raise ValueError(f"guide[1]: got shape {tuple(others.shape)}, wanted {wanted}")
    check_device("guide[1]", others, features.device, "features")
    return own, others.detach()


def check_guide_of_features(guide: Any, features: Tensor, name: str = "guide") -> Tensor:
    """The guide of features, detached. Only its last axis may have another size."""
    check_embeddings(name, guide)
    leading = min(features.dim() - 1, 2)  # images, and views
    wanted = *features.shape[:leading], *guide.shape[leading:]
    if guide.dim() != features.dim() or not has_shape(guide, wanted):
        raise ValueError(
            f"{name}: got shape {tuple(guide.shape)}, wanted that of features, "
            f"{tuple(features.shape)}, except for the last axis"
        )
    check_device(name, guide, features.device, "features")
    detached: Tensor = guide.detach()
    return detached


def check_mask(mask: Any, images: int, device: torch.device) -> Tensor:
    """The mask, which marks the positives of each image, as bool on the device."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: got {type(mask).__name__}, wanted a torch.Tensor")
    if mask.is_complex():
        raise TypeError(f"mask: got {mask.dtype}, wanted bool or a real dtype")
    check_dense("mask", mask)
    if not has_shape(mask, (images, images)):
        raise ValueError(f"mask: got shape {tuple(mask.shape)}, wanted ({images}, {images})")
    check_has_numbers("mask", mask, device)
    positive = mask != 0
    if mask.dtype != torch.bool:
        _check_ones(mask)
    return positive.to(device)


def _check_ones(mask: Tensor) -> None:
    """Raises a ValueError if an entry is neither 0 nor 1.

    On another device than the CPU, where the check would wait, in a compiled graph and for a tensor
    subclass, torch raises a RuntimeError as the graph runs instead.
    """
    if is_transformed(mask):
        return  # the values of the mask cannot be read here
    text = (
        "mask: got values other than 0 and 1, wanted 1 for positives and 0 for the others. "
        "Weights are not supported; to make a mask of them, compare them with a number: weights > t"
    )
    right = ((mask == 0) | (mask == 1)).all()
    if not right.is_cpu or type(right) is not Tensor or torch.compiler.is_compiling():
        torch._assert_async(right, text)
    elif not right:
        raise ValueError(text)


def check_ignored(ignored: Any, shapes: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """The negatives that do not count, (rows, columns) on the device, of one of these shapes."""
    if not isinstance(ignored, Tensor):
        raise TypeError(f"ignored: got {type(ignored).__name__}, wanted a torch.Tensor")
    if ignored.dtype != torch.bool:
        raise TypeError(
            f"ignored: got {ignored.dtype}, wanted torch.bool, True for a negative that does not "
            "count"
        )
    check_dense("ignored", ignored)
    if not any(has_shape(ignored, shape) for shape in shapes):
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"ignored: got shape {tuple(ignored.shape)}, wanted {wanted}")
    check_has_numbers("ignored", ignored, device)
    of_rows = ignored if ignored.dim() == 2 else ignored[None]
    return of_rows.to(device)


def check_logits(logits: Any, target: Any) -> Tensor:
    """The target (N,) of logits (N, C), as int64 on their device."""
    check_embeddings("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, wanted (N, C)")
    return check_labels("target", target, (logits.shape[0],), logits.device)


# ---- options ------------------------------------------------------------------------------------


def check_variant(variant: object) -> None:
    check_choice("variant", variant, _VARIANTS)


def check_reduction(reduction: object) -> None:
    check_choice("reduction", reduction, _REDUCTIONS)


def check_mode(mode: object) -> None:
    check_choice("mode", mode, _MODES)


def check_positives(positives: object) -> None:
    check_choice("positives", positives, get_args(Positives))


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        wanted = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: got {shown(value)}, wanted one of {wanted}")


def shown(value: object) -> str:
    """For an error: the value where it is short, else its type. The repr of a tensor reads it."""
    if value is None or isinstance(value, (str, bool, int, float)):
        if not isinstance(value, int) or abs(value) < 2**64:
            text = repr(value)
            return text if len(text) < 80 else f"{text[:76]}..."
    elif isinstance(value, (tuple, list)) and len(value) <= 64:
        of_each = ", ".join(map(shown, value))
        brackets = "[]" if isinstance(value, list) else "(,)" if len(value) == 1 else "()"
        return brackets[0] + of_each + brackets[1:]
    return type(value).__name__


def check_over(name: str, value: Any) -> Any:
    check_choice(name, value, get_args(Over))
    return str(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number: Python's own, a numpy scalar or a fraction, but not a bool."""
    return isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool)


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, open_end: bool = False
) -> float:
    if not is_number(value):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number")
    number = as_float(name, value)
    if not (low <= number < high or (number == high and not open_end)):
        end = ")" if open_end else "]"
        raise ValueError(f"{name}: got {value}, wanted a number in [{low}, {high}{end}")
    return number


def as_float(name: str, value: Any) -> float:
    """A real number as a float, in whose range it must be."""
    try:
        return float(value)
    except OverflowError:
        got = type(value).__name__
        raise ValueError(
            f"{name}: got {got} beyond the range of float64, wanted one in it"
        ) from None


def check_count(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted an integer")
    count = int(value)
    if not low <= count < 2**53:  # float64 represents all of these exactly
        most = "" if count < low else " and < 2^53"
        raise ValueError(f"{name}: got {shown(value)}, wanted an integer >= {low}{most}")
    return count


def check_cache_bytes(value: Any) -> int | None:
    return None if value is None else check_count("cache_bytes", value, 0)


def check_flag(name: str, value: Any) -> bool:
    """True or False, of Python or numpy."""
    kind = type(value)
    of_numpy = kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")
    if not isinstance(value, bool) and not of_numpy:
        raise TypeError(f"{name}: got {kind.__name__}, wanted a bool")
    return bool(value)


def check_temperature(temperature: float | Tensor, name: str = "temperature") -> float | Tensor:
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point():
            raise TypeError(f"{name}: got {temperature.dtype}, wanted a floating dtype")
        check_dense(name, temperature)
        if temperature.numel() != 1:
            raise ValueError(
                f"{name}: got shape {tuple(temperature.shape)}, wanted a single element"
            )
        return temperature
    if not is_number(temperature):
        raise TypeError(f"{name}: got {type(temperature).__name__}, wanted a number or a tensor")
    number = as_float(name, temperature)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}: got {temperature}, wanted a finite number > 0")
    return number


def check_bias(name: str, bias: Any, like: Tensor) -> None:
    """None, a number, or a tensor of one element."""
    if isinstance(bias, Tensor):
        check_temperature(bias, name)
        check_has_numbers(name, bias, like.device)
    elif bias is not None and not is_number(bias):
        raise TypeError(f"{name}: got {type(bias).__name__}, wanted None, a number or a tensor")


def check_candidate(name: str, value: Any) -> None:
    """A real number as a tensor without dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a torch.Tensor")
    if value.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: got {value.dtype}, wanted torch.float64, float32, bfloat16 or float16"
        )
    check_dense(name, value)
    if value.dim():
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted ()")


def check_base_temperature(base_temperature: Any) -> float | None:
    if base_temperature is None:
        return None
    base = check_number("base_temperature", base_temperature, 0, math.inf, open_end=True)
    if base == 0:
        raise ValueError("base_temperature: got 0, wanted a number > 0")
    return base


def check_eps(eps: Any, rows: int) -> None:
    """A number, a 0-d tensor, or one value a row."""
    if not isinstance(eps, Tensor):
        if not is_number(eps):
            raise TypeError(f"eps: got {type(eps).__name__}, wanted a number or a tensor")
        number = as_float("eps", eps)
        if number != number:  # torch.compile does not trace math.isnan
            raise ValueError("eps: got nan, wanted a cosine")
        return
    if not eps.is_floating_point():
        raise TypeError(f"eps: got {eps.dtype}, wanted a floating dtype")
    check_dense("eps", eps)
    if eps.dim() and tuple(eps.shape) != (rows,):
        raise ValueError(f"eps: got shape {tuple(eps.shape)}, wanted () or ({rows},)")


def check_eps_or_groups(eps: Any, groups: Any) -> None:
    if (eps is None) != (groups is not None):
        got = "neither" if eps is None else "both"
        raise ValueError(f"eps, groups: got {got}, wanted one of them")


def check_threshold(threshold: Any) -> None:
    """The values, other than None, of which a loss makes a ThresholdTracker."""
    wanted = "wanted 'adaptive', a number, a ThresholdTracker or None"
    if isinstance(threshold, str):
        if threshold != "adaptive":
            raise ValueError(f"threshold: got {threshold!r}, {wanted}")
    elif not is_number(threshold):
        raise TypeError(f"threshold: got {type(threshold).__name__}, {wanted}")
    elif math.isnan(as_float("threshold", threshold)):
        raise ValueError("threshold: got nan, wanted a cosine")


def check_one_positive(several: bool) -> None:
    if several:
        raise ValueError(
            "threshold: got by_positive in a loss that allows several positives, wanted a loss of "
            "one, such as HEXLoss; or hex_sup_con with an eps for each row"
        )


def check_process_group(group: Any) -> None:
    available = torch.distributed.is_available()
    if group is not None and not (available and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(
            f"process_group: got {type(group).__name__}, wanted a torch.distributed.ProcessGroup "
            "that this rank belongs to, or None"
        )


def check_gathers(gathers: bool, group: Any, rows: Any = None) -> None:
    for name, value in (("process_group", group), ("rows", rows)):
        if value is not None and not gathers:
            raise ValueError(f"{name}: got {shown(value)}, wanted gather_distributed=True with it")


def check_rows(rows: Any) -> tuple[int, ...]:
    """Integers, the images of every rank."""
    listed = isinstance(rows, Sequence) and not isinstance(rows, str)
    if not listed or not all(isinstance(n, int) and not isinstance(n, bool) for n in rows):
        raise TypeError(
            f"rows: got {shown(rows)}, wanted a tuple of ints, the number of images of each rank"
        )
    return tuple(rows)


def check_rows_are(rows: Sequence[int], images: int, ranks: int, rank: int) -> None:
    """What a rank can tell by itself; where the ranks compare what they bring, that tells more."""
    if len(rows) != ranks or min(rows) < 0 or rows[rank] != images:
        raise ValueError(
            f"rows: got {rows}, wanted the number of images of each of {ranks} ranks, and "
            f"{images} for rank {rank}"
        )


def check_no_mask_to_gather(mask: Any, ignored: Any) -> None:
    if mask is not None:
        raise ValueError(
            "gather_distributed: got True with a mask, wanted labels instead, because a mask says "
            "nothing about the rows of other ranks"
        )
    if ignored is not None:
        raise ValueError(
            "gather_distributed: got True with ignored, wanted it with negatives only, because it "
            "says nothing about the rows of other ranks"
        )
