# SPDX-License-Identifier: MIT
"""Builds the extension hex._C from C. What is not about the extension is in pyproject.toml.

torch is not needed here. The extension must name libtorch_cpu.so among the libraries it needs, so that the loader binds
it to the one that `import torch` has loaded; linking against an empty library of that name is enough for that.

Environment: HEX_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer (see `make sanitize`),
HEX_WERROR=1 makes warnings errors. CC and CFLAGS work as everywhere; CFLAGS=-march=... is not needed, for the vector
code is chosen when the extension is loaded.
"""

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMPILE = [
    "-std=gnu17",  # c17 would turn the contraction of a * b + c to one instruction off
    "-O3",  # the loops are plain C for the compiler to vectorise
    "-g0",  # Python's own flags ask for debug information: ten times the wheel
    "-fPIC",
    "-fexceptions",  # torch throws C++ exceptions through our frames
    "-fno-math-errno",  # nobody reads errno; sqrt and floor become instructions
    "-fno-trapping-math",  # nobody reads the exception flags; selects can be vectorised
    # Not -ffast-math: it drops NaN and infinity, which have a meaning here, and reorders sums.
    "-fopenmp-simd",  # the simd pragmas only; threads are torch's, a second OpenMP runtime is trouble
    "-fvisibility=hidden",  # PyInit__C is the one symbol for others
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wstrict-prototypes",
    "-Wvla",  # a stack array of the caller's size could overflow the stack
]
LINK = []

if sys.platform == "linux":
    LINK += [
        "-Wl,-z,now",  # a symbol that torch lacks must show at import, not at the first call
        "-Wl,-z,relro",  # and the resolved addresses can be read-only after that
    ]
if os.environ.get("HEX_SANITIZE") == "1":
    sanitizers = "-fsanitize=address,undefined"
    COMPILE += [sanitizers, "-fno-sanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer"]
    LINK += [sanitizers]
if os.environ.get("HEX_WERROR") == "1":
    COMPILE += ["-Werror"]


class BuildExt(build_ext):
    """build_ext that links against a stand-in for libtorch_cpu.so."""

    def build_extension(self, ext):
        if sys.platform == "linux":  # elsewhere the linker is told to leave unknown symbols for later
            stub = Path(self.build_temp).absolute() / "libtorch_cpu.so"
            stub.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(
                [],
                str(stub),
                extra_preargs=["-xc", "/dev/null"],
                extra_postargs=["-Wl,-soname,libtorch_cpu.so"],
            )
            ext.extra_link_args += [
                "-Wl,--no-as-needed",  # weak symbols alone do not make a library needed
                str(stub),
                "-Wl,--as-needed",
                "-lm",
            ]
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "hex._C",
            sources=sorted(glob("csrc/*.c") + glob("csrc/cpu/*.c")),
            depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True)),
            define_macros=[("Py_LIMITED_API", "0x030A0000")],  # Python 3.10, as py_limited_api below
            py_limited_api=True,
            extra_compile_args=COMPILE,
            extra_link_args=LINK,
        )
    ],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # one wheel for every Python from 3.10 on
)
