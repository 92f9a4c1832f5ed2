# SPDX-License-Identifier: MIT
"""Builds the extension hex._C. What is not about the extension is in pyproject.toml.

torch is not needed to build. The extension names libtorch_cpu.so as a library it needs, and at
import the loader takes the one that `import torch` has brought in; to get that name into it, it is
linked against an empty library called so.

The CUDA kernels are a library of their own, hex/_cuda.so, made where nvcc is found. It needs
nothing but libc, and no GPU to be built. A wheel made with HEX_CUDA=1 has it, one made without
serves CUDA tensors by plain torch operators.

Every build takes the functions of glibc as release 2.17 had them (csrc/glibc.h), not only that of
`make wheel`: so what is tested is what is published, and a build serves older systems too.

HEX_EXTENSION=0 in the environment leaves the extension out, for systems where it cannot be built:
the wheel is then pure Python, and runs the formulas as plain torch operators (hex/_load.py).

Also from there: HEX_CUDA=auto (the default: what nvcc can build, or none of it), 0 (leave it out)
or 1 (an error without nvcc, or where it fails); HEX_CUDA_ARCH, which GPUs ("80,90a", as nvcc
names them, a PTX for newer ones in "120+PTX"; all of CUDA_ARCH by default); NVCC, which nvcc; pip
shows what the build says with -v only. HEX_SANITIZE=1 builds with AddressSanitizer and
UndefinedBehaviorSanitizer (`make sanitize`), HEX_WERROR=1 makes warnings errors, CC and CFLAGS are
as everywhere. No -march is wanted: the vector code is chosen at import.

The same sources, compiler and setuptools give the same wheel and source archive, byte for byte,
whatever the folder, the day, the umask and the user (not so hex/_cuda.so, which is nvcc's). Their
files bear the date SOURCE_DATE_EPOCH, or DATE where that is not set.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

DATE = "1580601600"  # 2020-02-02, which hatchling takes too; a zip knows none before 1980
os.environ.setdefault("SOURCE_DATE_EPOCH", DATE)  # read by bdist_wheel
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
    "-fno-lto",  # a link-time optimiser would move code away from the .symver of csrc/glibc.h
    # Warnings. -Wvla: an array of a size from outside could overflow the stack.
    *["-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Wvla"],
]
LINK = []
if LINUX:
    LINK += ["-Wl,-z,relro,-z,now"]  # the table of torch's functions is read-only once it is filled
if os.environ.get("HEX_SANITIZE") == "1":
    COMPILE += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    COMPILE += ["-O2", "-g", "-fno-omit-frame-pointer"]  # lines and callers in the reports
    COMPILE += ["-fno-wrapv"]  # Python's own flags have an overflow wrap around, unseen
    LINK += ["-fsanitize=address,undefined"]
if os.environ.get("HEX_WERROR") == "1":
    COMPILE += ["-Werror"]


# A GPU runs the code of its own major version with the same or a smaller minor one; sm_90a is
# Hopper alone, with warpgroup instructions. Older GPUs than 8.0 lack what the kernels need. The
# driver compiles the PTX of the newest target that is not newer than the GPU: of 8.0 for those that
# lie in between (11.0), and for all later ones where nvcc knows none of the newer targets.
CUDA_ARCH = "80+PTX,86,89,90a,100,120+PTX"
NVCC_FLAGS = [
    *["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"],
    "-Xcompiler=-fno-exceptions,-fno-rtti,-fno-threadsafe-statics",  # then libstdc++ is not needed
]


def find_nvcc():
    """The path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which(f"{home}/bin/nvcc")


def gencode(targets):
    """nvcc's options for ["80", "90a", "120+PTX"]."""
    options = []
    for target in targets:
        arch, _, ptx = target.partition("+")
        code = f"[sm_{arch},compute_{arch}]" if ptx == "PTX" else f"sm_{arch}"
        options += ["-gencode", f"arch=compute_{arch},code={code}"]
    return options


def is_known(nvcc, target):
    """Asked by the option itself: --list-gpu-arch leaves out 90a."""
    command = [nvcc, "-dryrun", *gencode([target]), "-c", "x.cu"]
    return subprocess.run(command, capture_output=True).returncode == 0


def say(text):
    print(f"hex-ssl: {text}\n", end="", flush=True)  # one piece, for threads say it


def build_cuda(nvcc, build, output, *, must=True):
    """Compile csrc/cuda/ into the folder `build` and link the library `output`. Targets that nvcc
    does not know are left out, or, if all `must` be there, an error."""
    wanted = [t.strip() for t in (os.environ.get("HEX_CUDA_ARCH") or CUDA_ARCH).split(",")]
    targets = [target for target in wanted if is_known(nvcc, target)]
    if unknown := ",".join(t for t in wanted if t not in targets):
        if must or not targets:
            raise CudaError(f"{nvcc} does not know the GPU targets {unknown}")
        say(f"{nvcc} does not know the GPU targets {unknown}: they are left out")
    options = NVCC_FLAGS + gencode(targets)
    build.mkdir(parents=True, exist_ok=True)
    # The longest first, as many at a time as there are cores.
    sources = sorted(glob("csrc/cuda/*.cu"), key=os.path.getsize, reverse=True)
    say(
        f"compiling {len(sources)} CUDA files for {','.join(targets)}, which takes half a minute "
        "for each target on two cores; HEX_CUDA=0 leaves them out"
    )

    def compile_one(numbered):
        number, source = numbered
        say(f"{number} of {len(sources)}, {source}")
        target = build / (Path(source).stem + ".cu.o")
        subprocess.run([nvcc, *options, "-c", source, "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, enumerate(sources, 1)))
    dry = subprocess.run([nvcc, "-dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    top = next((line for line in dry.splitlines() if "TOP=" in line), "TOP=").partition("TOP=")[2]
    libraries = [f"-L{d}" for d in glob(f"{top}/lib64") + glob(f"{top}/targets/*/lib")]
    libraries += ["-lcudart_static", "-lculibos", "-lrt", "-lpthread", "-ldl", "-lm"]
    output.parent.mkdir(parents=True, exist_ok=True)
    cc = os.environ.get("CC", "cc").split()
    hide = ["-s", "-Wl,--exclude-libs,ALL,--gc-sections,-z,defs,-z,relro,-z,now"]
    subprocess.run([*cc, "-shared", "-o", str(output), *objects, *libraries, *hide], check=True)


class CudaError(Exception):
    """The CUDA library cannot be built, and why."""


def make_cuda(build, output):
    """build_cuda as HEX_CUDA says."""
    wanted, nvcc = os.environ.get("HEX_CUDA", "auto"), find_nvcc()
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"HEX_CUDA: got {wanted!r}, wanted auto, 0 or 1")
    if wanted == "1" and not nvcc:
        raise SystemExit("HEX_CUDA=1, but nvcc is not found: set NVCC or CUDA_HOME")
    output.unlink(missing_ok=True)  # one of an earlier build would be of other sources
    if not LINUX or not nvcc or wanted == "0":
        return
    try:
        build_cuda(nvcc, build, output, must=wanted == "1")
    except (CudaError, OSError, subprocess.CalledProcessError) as error:
        output.unlink(missing_ok=True)
        if wanted == "1":
            raise SystemExit(f"HEX_CUDA=1, but the CUDA kernels cannot be built: {error}") from None
        say(
            f"this build goes on without CUDA kernels, for they cannot be built: {error}. "
            "HEX_CUDA=1 makes that an error, HEX_CUDA=0 does not try"
        )


def mode(path):
    """Of a file in an archive, as git would have it: whether it runs, and nothing of the umask."""
    return 0o755 if os.path.isdir(path) or os.stat(path).st_mode & 0o100 else 0o644


class BdistWheel(bdist_wheel):
    """bdist_wheel, whose files have modes that do not come from the umask."""

    def write_wheelfile(self, *arguments, **options):
        super().write_wheelfile(*arguments, **options)  # the last before all is packed
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(mode(path))


class Sdist(sdist):
    """sdist, with files of one date, in one order, and nobody's."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, *owners, **options):
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, *owners, **options)
        date = int(os.environ["SOURCE_DATE_EPOCH"])

        def plain(member):
            member.mode = mode(member.name)
            member.mtime, member.uid, member.gid, member.uname, member.gname = date, 0, 0, "", ""
            return member

        name = base_name + ".tar.gz"
        with (
            open(name, "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=date) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=plain)  # a folder's files by their names
        return name


class BuildExt(build_ext):
    """build_ext, with an empty libtorch_cpu.so to link against, and the CUDA library."""

    def run(self):
        super().run()
        folder = Path("hex") if self.inplace else Path(self.build_lib) / "hex"
        make_cuda(Path(self.build_temp) / "cuda", folder / "_cuda.so")

    def build_extension(self, ext):
        # A Python that was built in a folder of its own has it searched for libraries by all that
        # it links, and who can write there would be loaded.
        linker = self.compiler.linker_so
        self.compiler.linker_so = [word for word in linker if not word.startswith("-Wl,-rpath")]
        if LINUX:  # elsewhere Python has the linker leave unknown symbols to the loader
            stub = Path(self.build_temp).absolute() / "libtorch_cpu.so"
            stub.parent.mkdir(parents=True, exist_ok=True)
            self.compiler.link_shared_object(
                objects=[],
                output_filename=str(stub),
                extra_preargs=["-xc", "/dev/null"],
                extra_postargs=["-Wl,-soname,libtorch_cpu.so"],
            )
            # glibc before 2.34 has dlopen there. A later one keeps the file, which -ldl does not
            # find; other C libraries have none, and the compiler repeats the question.
            ask = [*self.compiler.compiler, "-print-file-name=libdl.so.2"]
            answer = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
            libdl = [answer] if os.path.isabs(answer) else []
            # Weak symbols alone do not make a library needed, nor those that libc has as well.
            ext.extra_link_args += ["-Wl,--no-as-needed", str(stub), *libdl, "-Wl,--as-needed"]
        super().build_extension(ext)


wanted = os.environ.get("HEX_EXTENSION") or "1"
if wanted not in ("0", "1"):
    raise SystemExit(f"HEX_EXTENSION: got {wanted!r}, wanted 0 or 1")
extension = Extension(
    "hex._C",
    sources=sorted(glob("csrc/*.c") + glob("csrc/cpu/*.c") + glob("csrc/cpu/levels/*.c")),
    depends=["setup.py", *sorted(glob("csrc/**/*.h", recursive=True))],
    # Python's stable ABI as of 3.10: with the tag below, one wheel for all from there on.
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    py_limited_api=True,
    extra_compile_args=COMPILE,
    extra_link_args=LINK,
    libraries=["m"],
)

setup(
    ext_modules=[extension] if wanted == "1" else [],
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel, "sdist": Sdist},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
