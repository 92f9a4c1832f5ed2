# SPDX-License-Identifier: MIT
"""Tells in what context a call happens (under a transform, in a checkpoint, in a backward pass).

`warn` warns at the line of the user's code that made the call.
"""

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

__all__ = ["cat", "is_compiled_in_checkpoint", "is_first_run", "is_in_backward", "is_ordinary",
           "is_transformed", "is_wrapped", "warn"]  # fmt: skip

# The packages between a user's line and a warning.
_PASSED = ("hex", "torch", "lightning", "pytorch_lightning")

# Whether a tensor stands for another in a vmap or func.grad, and has no memory of its own.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def is_transformed(*tensors: Tensor) -> bool:
    """Whether tensors belong to a vmap or func.grad in progress, so that none may be kept."""
    if torch.compiler.is_compiling():  # tensors are not wrapped while they are traced
        return bool(torch._C._are_functorch_transforms_active())
    return any(map(is_wrapped, tensors))


def is_ordinary() -> bool:
    """Whether a tensor that is made now is an ordinary one, which any later call can use.

    Under a func transform or a mode (fake tensors, say) it may be a wrapper, for a trace it is a
    step of it, and in inference mode it is one that no backward can use.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.is_inference_mode_enabled()
        or torch._C._get_tracing_state()
    )


def is_in_backward() -> bool:
    """Whether a backward pass is running.

    There activation checkpointing, in any of its forms, runs for a second time what it wraps. In a
    compiled graph the compiler repeats operators and not this code.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


def is_compiled_in_checkpoint() -> bool:
    """Whether a graph is being compiled inside an activation checkpoint (not the reentrant form).

    Such a graph runs again in the backward, and cannot tell that it does.
    """
    return torch.compiler.is_compiling() and _is_in_checkpoint()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_in_checkpoint() -> bool:
    hooks: tuple[object, ...] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return any("checkpoint_hook" in getattr(hook, "__qualname__", "") for hook in hooks or ())


def is_first_run() -> bool:
    """Whether this call, which has no gradient, is the first run of a reentrant checkpoint.

    The reentrant form (torch's own, and those modelled on it) makes its first run inside the
    forward of an autograd.Function. The callers' frames are searched for one, which takes time, so
    ask everything else before.
    """
    if torch.compiler.is_compiling():
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and "ctx" in code.co_varnames[: code.co_argcount]:
            ctx = frame.f_locals.get("ctx")
            # A Function without next functions has no backward; one around it may have.
            if isinstance(ctx, FunctionCtx) and getattr(ctx, "next_functions", False):
                return True
        frame = frame.f_back
    return False


def cat(tensors: Sequence[Tensor]) -> Tensor:
    """torch.cat under autocast too, which has an error for the half-precision type that is not its
    own, such as float16 where it is set to bfloat16."""
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in tensors])
    half = dtype in (torch.float16, torch.bfloat16)
    wide = half and torch.is_autocast_enabled(tensors[0].device.type)
    return torch.cat([t.to(torch.float32 if wide else dtype) for t in tensors]).to(dtype)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the user's code from which this package was called, directly or through
    torch or Lightning."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and _package(frame) in _PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
