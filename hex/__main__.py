# SPDX-License-Identifier: MIT
"""`python -m hex`: prints what is installed and what it runs on, and checks the CPU kernels.

The check compares the kernels with hex.reference on one small batch for each mode and dtype. It is
for people who have just installed hex-ssl or who doubt a result. The tests are far stricter.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from . import __version__, ops, reference
from ._load import _C, cuda_is_built, cuda_problem
from .checks import Mode, Variant
from .functional import hex_loss
from .problem import of_views

IMAGES, FEATURES, NEGATIVES = 33, 29, 41  # no size of a kernel's tiles divides these
TEMPERATURE = 0.1
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# mode in hex.reference: (the argument `mode` of hex_loss, the shape of the negatives)
MODES: dict[str, tuple[Mode, tuple[int, ...] | None]] = {
    "ntxent": ("ntxent", None),
    "query": ("query", None),
    "cross": ("cross", None),
    "unpaired": ("ntxent", (NEGATIVES, FEATURES)),
    "paired": ("ntxent", (IMAGES, NEGATIVES, FEATURES)),
}


def main(arguments: list[str] | None = None) -> int:
    """Prints the report. Returns the exit status: 0 if all is right, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m hex",
        description="Prints what is installed and what it runs on, then checks the CPU kernels "
        "against the reference, hex/reference.py, in float64.",
        epilog="Exit status: 0 if every error is within its limit, 1 otherwise. HEX_ISA=base, "
        "neon, avx2, avx512, avx512_bf16 or avx512_amx in the environment chooses the level of the "
        "CPU kernels, which hex-ssl otherwise chooses to suit the CPU.",
    )
    parser.parse_args(arguments)
    for name, value in installation():
        print(f"{name:<13} {value}")
    if _C is None:
        print("\nThere are no kernels to check: the formulas of the reference serve every device.")
        return 0
    print(
        "\nThe kernels against the reference in float64. Each error is the largest of its row,"
        "\nrelative to the largest value. Its limit is twice the error of the reference in the same"
        "\ndtype, plus a few ulp."
        f"\n\n{'':18} {'threshold':^17}  {'loss':^17}      gradient"
        f"\n{'mode':<8} {'dtype':<9} {'  '.join(['   error    limit'] * 3)}"
    )
    right = True
    with threads(1):  # batches this small are slower with more
        for mode in MODES:
            for dtype in DTYPES:
                pairs = check(mode, dtype)
                within = all(error <= limit for error, limit in pairs)
                right &= within
                figures = "  ".join(f"{error:8.1e} {limit:8.1e}" for error, limit in pairs)
                name = str(dtype).removeprefix("torch.")
                print(f"{mode:<8} {name:<9} {figures}{'' if within else '  WRONG'}")
    n = torch.get_num_threads()
    if n > 1:
        same = same_bits(n)
        right &= same
        print(f"\n{n} threads give the same bits as one: {'yes' if same else 'NO'}")
    print(f"\n{'All checks passed.' if right else 'Something is wrong: see above.'}")
    return 0 if right else 1


def installation() -> list[tuple[str, str]]:
    """What is installed and what it runs on, as (name, value) for each line."""
    wanted, problem = os.environ.get("HEX_ISA"), _C.isa_problem() if _C else None
    asked = (
        f"HEX_ISA = {wanted}{f': {problem}' if problem else ''}" if wanted else "HEX_ISA not set"
    )
    return [
        ("hex-ssl", f"{__version__}, {Path(__file__).parent}"),
        ("torch", torch.__version__),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
        ("CPU kernels", f"{ops.isa()} ({asked})"),
        ("threads", str(torch.get_num_threads())),
        (
            "CUDA kernels",
            cuda_problem(torch.cuda.current_device()) or "in use"
            if torch.cuda.is_available()
            else "none"
            if _C is None
            else f"{'' if cuda_is_built() else 'not '}in this build; torch sees no CUDA device",
        ),
        ("devices", ", ".join(devices())),
    ]


def devices() -> list[str]:
    """The devices that torch sees, the CPU first."""
    found = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for i in range(torch.accelerator.device_count()):
            about = f" ({torch.cuda.get_device_name(i)})" if accelerator.type == "cuda" else ""
            found.append(f"{accelerator.type}:{i}{about}")
    return found


def check(mode: str, dtype: torch.dtype) -> list[tuple[float, float]]:
    """(error, limit) of the threshold, of the loss and of the gradient.

    Of several values of a kind it is the pair whose error is closest to its limit. The limit is
    twice the error of the reference in the same dtype, plus 4 ulp of a cosine, which are 4 / tau
    ulp of an exponent. A gradient is also rounded to the dtype of the input.
    """
    batch = make_batch(mode, dtype)
    wide = [z.double() for z in batch]
    eps = between(reference.cosines(*three(wide), mode)[0])
    ulp = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    allowed = (4 * ulp, 4 * ulp / TEMPERATURE, 4 * ulp / TEMPERATURE + torch.finfo(dtype).eps)
    pairs: tuple[list[tuple[float, float]], ...] = ([], [], [])
    for variant in ("paper", "released"):
        truth = run(from_reference, wide, eps, mode, variant)
        plain = run(from_reference, batch, eps, mode, variant)
        ours = run(from_kernels, batch, eps, mode, variant)
        for i, (t, p, o) in enumerate(zip(truth, plain, ours, strict=True)):
            kind = min(i, 2)  # from 2 on, gradients
            pairs[kind].append((distance(o, t), 2 * distance(p, t) + allowed[kind]))
    return [max(p, key=lambda pair: pair[0] / pair[1]) for p in pairs]


def same_bits(n: int) -> bool:
    """Whether n threads and one give the same threshold, losses and gradients."""
    # So many images that the kernels do share them out among threads.
    batch = make_batch("ntxent", torch.float32, images=8 * IMAGES)
    eps = torch.tensor(0.3, dtype=torch.float64)
    results = []
    for count in (n, 1):
        with threads(count):
            results.append(run(from_kernels, batch, eps, "ntxent", "paper"))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Runs the block with n threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_batch(mode: str, dtype: torch.dtype, images: int = IMAGES) -> list[Tensor]:
    """z0, z1 and, if the mode has any, negatives: rows in four groups, of different lengths."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centres = 1.2 * rows(4, FEATURES)
    image = centres[torch.arange(images) % 4] + rows(images, FEATURES)
    batch = [image + rows(images, FEATURES), image + rows(images, FEATURES)]
    shape = MODES[mode][1]
    if shape is not None:
        batch.append(centres[0] + 1.4 * rows(*shape))
    return [z.to(dtype) for z in batch]


def between(cosines: Tensor) -> Tensor:
    """A threshold, 0-d, with no cosine near it, so that rounding moves no candidate across it."""
    c = cosines.flatten().sort().values
    c = c[len(c) * 7 // 10 : len(c) * 8 // 10]
    k = int(c.diff().argmax())
    return (c[k] + c[k + 1]) / 2


def three(batch: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """z0, z1 and negatives, which are an empty (0, D) if there are none."""
    z0, z1, *negatives = batch
    return z0, z1, negatives[0] if negatives else z0.new_empty(0, FEATURES)


def run(
    compute: Callable[[list[Tensor], Tensor, Tensor, str, Variant], tuple[Tensor, Tensor]],
    batch: list[Tensor], eps: Tensor, mode: str, variant: Variant,
) -> list[Tensor]:  # fmt: skip
    """The threshold with the ranges of the rows, the losses of the rows, and the gradients of the
    inputs and of tau, all as float64. `compute` is from_reference or from_kernels."""
    leaves = [z.clone().requires_grad_() for z in batch]
    tau = torch.tensor(TEMPERATURE, dtype=torch.float64, requires_grad=True)
    threshold, loss = compute(leaves, eps, tau, mode, variant)
    gradients = torch.autograd.grad(loss.double().mean(), [*leaves, tau])
    return [x.detach().double() for x in (threshold, loss, *gradients)]


def from_reference(
    batch: list[Tensor], eps: Tensor, tau: Tensor, mode: str, variant: Variant
) -> tuple[Tensor, Tensor]:
    inputs = three(batch)
    threshold = reference.threshold(*inputs, mode, 0.9, "negatives")
    low, high = reference.row_range(*inputs, mode)
    loss = reference.loss_rows(*inputs, eps, tau, mode, variant=variant)[0]
    return torch.cat([threshold[None], low.double(), high.double()]), loss


def from_kernels(
    batch: list[Tensor], eps: Tensor, tau: Tensor, mode: str, variant: Variant
) -> tuple[Tensor, Tensor]:
    kind, _ = MODES[mode]
    z0, z1, *negatives = batch
    problem = of_views(z0, z1, negatives[0] if negatives else None, kind, tau)
    threshold = problem.threshold(0.9, "negatives")
    low, high = problem.row_range()
    loss = hex_loss(*batch, eps=eps, temperature=tau, mode=kind, variant=variant, reduction="none")
    return torch.cat([threshold[None], low.double(), high.double()]), loss


def distance(x: Tensor, truth: Tensor) -> float:
    """The largest error relative to the largest value, or infinity if there is a NaN."""
    error = (x - truth).abs().max() / truth.abs().max()
    return float(error.nan_to_num(nan=torch.inf))


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # as with `python -m hex | head`
        # Python flushes once more as it exits, and that must not fail either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
