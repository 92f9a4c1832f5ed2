# SPDX-License-Identifier: MIT
"""Builds the extension hex._C. What is not about the extension is in pyproject.toml.

torch is not needed to build. The extension names libtorch_cpu.so as a library it needs, and at
import the loader takes the one that `import torch` has brought in; to get that name into it, it is
linked against an empty library called so.

From the environment: HEX_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer
(`make sanitize`), HEX_WERROR=1 makes warnings errors, CC and CFLAGS are as everywhere. No -march is
wanted: the vector code is chosen at import.
"""

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

LINUX = sys.platform == "linux"  # other systems build too, as far as is known, but are not tested

COMPILE = [
    "-std=gnu17",  # c17 would forbid fused multiply-adds
    "-O3",  # the loops are plain C, for the compiler to vectorise
    "-g0",  # Python's own flags ask for debug information
    "-fexceptions",  # torch throws C++ exceptions through our frames
    # Two parts of -ffast-math. The others would drop NaN and infinity, and reorder sums.
    "-fno-math-errno",  # errno is not read: a square root is an instruction
    "-fno-trapping-math",  # the exception flags are not read: a choice can be vectorised
    "-fopenmp-simd",  # the simd pragmas only: threads are torch's, never a second OpenMP runtime
    "-fvisibility=hidden",  # others see PyInit__C only
    # Warnings. -Wvla: an array of a size from outside could overflow the stack.
    *["-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Wvla"],
]
LINK = []
if LINUX:
    LINK += ["-Wl,-z,relro,-z,now"]  # the table of torch's functions is read-only once it is filled
if os.environ.get("HEX_SANITIZE") == "1":
    COMPILE += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    COMPILE += ["-O2", "-g", "-fno-omit-frame-pointer"]  # lines and callers in the reports
    LINK += ["-fsanitize=address,undefined"]
if os.environ.get("HEX_WERROR") == "1":
    COMPILE += ["-Werror"]


class BuildExt(build_ext):
    """build_ext, with an empty libtorch_cpu.so to link against."""

    def build_extension(self, ext):
        if LINUX:  # elsewhere Python has the linker leave unknown symbols to the loader
            stub = Path(self.build_temp).absolute() / "libtorch_cpu.so"
            stub.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(
                objects=[],
                output_filename=str(stub),
                extra_preargs=["-xc", "/dev/null"],
                extra_postargs=["-Wl,-soname,libtorch_cpu.so"],
            )
            # Weak symbols alone do not make a library needed.
            ext.extra_link_args += ["-Wl,--no-as-needed", str(stub), "-Wl,--as-needed"]
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "hex._C",
            sources=sorted(glob("csrc/*.c") + glob("csrc/cpu/*.c")),
            depends=sorted(glob("csrc/*.h") + glob("csrc/*/*.h") + glob("csrc/cpu/*.inc")),
            # Python's stable ABI as of 3.10: with the tag below, one wheel for all from there on.
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
            libraries=["m", "dl"],
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
