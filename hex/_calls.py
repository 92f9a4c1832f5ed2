# SPDX-License-Identifier: MIT
"""What kind of call this is: transformed, of a checkpoint, in a backward; and whose line."""

import sys
import warnings
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ["is_compiled_in_checkpoint", "is_first_run", "is_in_backward", "is_transformed", "warn"]

_PASSED = ("hex", "torch", "lightning", "pytorch_lightning")  # packages that call a loss for a user


def is_transformed(*tensors: Tensor) -> bool:
    """Inside vmap or func.grad, whose tensors must not outlive the call."""
    if torch.compiler.is_compiling():  # which knows no wrapped tensors
        return bool(torch._C._are_functorch_transforms_active())
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))


def is_in_backward() -> bool:
    """Inside a backward: there activation checkpointing, in any of its forms, runs what it wrapped
    again. In a compiled graph the compiler repeats operators, not this code.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


def is_compiled_in_checkpoint() -> bool:
    """In a graph that is being made inside an activation checkpoint of the form that is not
    reentrant. That graph runs again in the backward and cannot know it there."""
    return torch.compiler.is_compiling() and _is_in_checkpoint()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_in_checkpoint() -> bool:
    hooks: tuple[object, ...] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return any("checkpoint_hook" in getattr(hook, "__qualname__", "") for hook in hooks or ())


def is_first_run() -> bool:
    """Without a gradient, but inside the forward of an autograd.Function: so the reentrant form of
    checkpointing runs a training step the first time (torch's, and those made after it).

    Looks at the callers' frames, so ask it last.
    """
    if torch.compiler.is_compiling():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and "ctx" in code.co_varnames[: code.co_argcount]:
            ctx = frame.f_locals.get("ctx")
            # Without next functions there will be no backward of it; of one around it there may be.
            if isinstance(ctx, FunctionCtx) and getattr(ctx, "next_functions", False):
                return True
        frame = frame.f_back
    return False


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the line of the user's code that called this package, torch or Lightning."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and _package(frame) in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
