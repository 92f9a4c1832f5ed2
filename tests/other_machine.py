# SPDX-License-Identifier: MIT
"""The kernels of another machine in the place of this one's: torch.ops.hex of CPU tensors, served
by a program (other_machine.c) that an emulator runs. As a program itself it compares them with
hex/reference.py, as test_isa.py and test_labels.py do.

    python other_machine.py qemu-aarch64 PROGRAM
"""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hex  # noqa: F401, which defines the operators

# In the order of hex_operators in csrc/ops.c.
OPERATORS = ("forward", "adaptive", "backward", "quantile", "block_quantiles", "block_forward",
             "settle", "total")  # fmt: skip
# Torch's numbers for them, as in alone/torch.h; another number is a number's.
DTYPES = {torch.float32: 6, torch.float64: 7, torch.float16: 5, torch.bfloat16: 15, torch.int64: 4,
          torch.bool: 11}  # fmt: skip
OF_CODE = {code: dtype for dtype, code in DTYPES.items()}
WORD = -1
ERROR_SIZE = 512


class Machine:
    """The operators of a program that runs."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1 << 20
        )
        self.library = torch.library.Library("hex", "IMPL")
        self.level = self._text()
        self.calls = 0

    def _get(self, size: int) -> bytearray:
        data = bytearray(self.process.stdout.read(size))
        if len(data) != size:
            raise RuntimeError(f"the program ended, with {self.process.wait()}")
        return data

    def _text(self) -> str:
        return self._get(ERROR_SIZE).partition(b"\0")[0].decode()

    def _tensor(self) -> Tensor:
        code, dim = struct.unpack("qq", self._get(16))
        size, dtype = struct.unpack(f"{dim}q", self._get(8 * dim)), OF_CODE[code]
        data = self._get(math.prod(size) * dtype.itemsize)
        if not data:  # which frombuffer refuses
            return torch.empty(size, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).view(size)

    def call(self, name: str, *arguments: Any) -> Any:
        schema = getattr(torch.ops.hex, name).default._schema
        given = [*arguments, *(a.default_value for a in schema.arguments[len(arguments) :])]
        parts = [struct.pack("qqq", OPERATORS.index(name), len(given), len(schema.returns))]
        for value, argument in zip(given, schema.arguments, strict=True):
            if isinstance(value, Tensor):
                head = DTYPES[value.dtype], value.dim(), *value.shape
                parts += [struct.pack(f"{len(head)}q", *head)]
                parts += [value.contiguous().flatten().view(torch.uint8).numpy().tobytes()]
            else:
                parts += [struct.pack("qd" if str(argument.type) == "float" else "qq", WORD, value)]
        self.process.stdin.write(b"".join(parts))
        self.process.stdin.flush()
        if error := self._text():
            raise RuntimeError(error)
        self.calls += 1
        outputs = tuple(self._tensor() for _ in schema.returns)
        return outputs if len(outputs) > 1 else outputs[0]

    def serve(self) -> None:
        """From now on, for this process."""
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # of overriding
        for name in OPERATORS:

            def kernel(*arguments: Any, name: str = name) -> Any:
                return self.call(name, *arguments)

            self.library.impl(name, kernel, "CPU", allow_override=True)


if __name__ == "__main__":
    machine = Machine(sys.argv[1:])
    machine.serve()

    import batteries
    import test_isa
    import test_labels
    import test_tiles

    for rule in ("all", "median"):  # the others take other branches of the same loops
        test_tiles.test_one_call_finds_the_threshold_and_the_loss_of_two(rule, "cluster")
    batteries.battery_of_blocks()
    # A step that divides neither the dtypes nor the variants goes through all of them.
    print(machine.level, test_isa.check_all(3), test_labels.check_half(), machine.calls)
