# `make help` lists what there is. The targets make their own environment, .venv, when they need it.

PYTHON ?= python3
# One torch, named wherever pip installs something that depends on torch, so that pip never trades
# it for another. From PyPI it is the CUDA build; a CPU build that pip is told of (PIP_FIND_LINKS,
# PIP_EXTRA_INDEX_URL) is preferred and is several times smaller.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
# LOCK=requirements/ci.txt installs exactly that, each file held to its hash, as CI does. It is for
# all but torch and torchvision, whose files differ from index to index, and what torch brings for
# CUDA. Without it what pip takes for the newest is installed, whatever index gives it.
LOCK ?=

BIN := $(CURDIR)/.venv/bin
C_FILES := $(wildcard csrc/*.[ch] csrc/*/*.[ch] csrc/cpu/levels/*.[ch] csrc/cuda/*.cu* \
    tests/emulation/*) tests/abi_check.cpp $(wildcard tests/*.c) benchmarks/core.c
# The CUDA kernels take minutes to compile; `make cuda` does it once. `make build
# HEX_CUDA=1` has them in .venv, `make wheel-cuda` in a wheel.
export HEX_CUDA ?= 0
# Two processes with a thread each; tests that are about threads set their number themselves. A file
# goes to one process: test_build.py builds once for all its tests. A process that dies ends the run.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv build test thorough cuda lint format sanitize fuzz coverage reliability demo bench \
    gpu examples wheel wheel-cuda check-wheel versions lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

venv: .venv/torch ## .venv with torch

build: .venv/hex ## hex in .venv, from this folder, with all that its tests and examples import

# Those that compile the CUDA kernels, which takes minutes.
CUDA_TESTS := $(addprefix tests/test_cuda_,emulation.py blocks.py sets.py build.py mutants.py)
# Those that compile the CPU core again (by other compilers, for instructions that few CPUs have, with
# planted errors, with sanitizers), those of all levels in memory full of NaN, of allocations that
# fail, of what a build gives, of the benchmarks, of the documentation site, of the notebook, and of
# every one of the paper's runs.
THOROUGH_TESTS := $(addprefix tests/test_,clang.py aarch64.py bf16_level.py work_done_twice.py \
    unwritten_memory.py build.py benchmark.py benchmark_gpu.py failing_allocations.py \
    alone_planted.py races.py site.py notebook.py paper_every_run.py)
NOT_ALWAYS := $(addprefix --ignore=,$(CUDA_TESTS) $(THOROUGH_TESTS))

test: lint ## lint, then the tests: eight minutes
	$(PYTEST) $(NOT_ALWAYS)

thorough: build ## slow tests: the core compiled again, errors planted, wheels, benchmarks, the site
	$(PYTEST) $(THOROUGH_TESTS)

cuda: build ## the CUDA kernels: emulated on the CPU, what nvcc makes of them, planted errors
	$(PYTEST) $(CUDA_TESTS)

lint: build ## what a formatter, a linter and a type checker can find
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/mypy

format: build ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

# In a copy of the sources, with an extension of its own, and with the list of files that a source
# archive has, for git knows none of a copy. Left out are tests that never enter the extension, that
# of the heap, which is the sanitizer's here, and the public functions' fuzzer, for
# tests/test_alone.py has one of the operators.
#   detect_leaks                no: Python and torch keep memory until the end
#   allocator_may_return_null   an allocation that fails is for us to report
#   malloc_fill_byte            what nothing wrote is NaN, in every type
#   quarantine_size_mb          freed memory is kept back; less of it, for tests that watch memory
#   LD_PRELOAD of libstdc++     the sanitizer looks once, at the start, for what throws exceptions
#   PYTHONPATH                  processes that a test starts import this copy too
#   --capture=sys               a report ends the process; what pytest had captured would be lost
sanitize: FILL = malloc_fill_byte=255:max_malloc_fill_size=1048576
sanitize: build ## the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf build/sanitize && mkdir -p build/sanitize
	git ls-files -z | xargs -0 cp --parents --target-directory=build/sanitize
	cd build/sanitize && HEX_SANITIZE=1 $(BIN)/python setup.py --quiet egg_info build_ext --inplace
	cd build/sanitize && \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=16:$(FILL) \
	    UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$$PWD \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    $(PYTEST) --capture=sys --ignore-glob='*/test_build.py' --ignore-glob='*/test_abi.py' \
	    --ignore-glob='*/test_work.py' --ignore-glob='*/test_reference*.py' \
	    --ignore-glob='*/test_heap.py' --ignore-glob='*/test_fuzz.py' \
	    $(filter-out %_emulation.py %_blocks.py %_sets.py,$(NOT_ALWAYS))

# The environment's HEX_SEED draws what is drawn; without it every run draws anew, and says its own.
fuzz: export HEX_FUZZ_SECONDS ?= 3600
fuzz: build ## any arguments, to every operator and every public function: an hour
	$(PYTEST) tests/test_alone.py tests/test_fuzz.py -k 'any_arguments or test_fuzz' --timeout 0

# PART=--part is quicker, PART=--csrc leaves out hex/.
coverage: export HEX_PYTEST = $(NOT_ALWAYS)
coverage: build ## the lines and branches of csrc and of hex/ that are taken; an error, if one is not
	$(BIN)/python tests/covered.py $(PART)

reliability: export HEX_ROUNDS ?= 10
reliability: export HEX_FUZZ_SECONDS ?= 600
reliability: coverage ## all that tests draw a part of: failures, races, coverage, any arguments: two hours
	$(PYTEST) $(addprefix tests/test_,alone.py races.py failing_allocations.py fuzz.py) --timeout 0
	$(MAKE) sanitize

demo: build ## train on handwritten digits, with InfoNCE and with HEX: three minutes, with pictures
	$(BIN)/python examples/demo.py

bench: build ## time and memory beside plain torch, torch.compile, other libraries: half an hour
	$(BIN)/python benchmarks/bench.py

# A warning is an error, because most warnings are of links that lead nowhere.
.PHONY: docs links notebook
SPHINX = $(BIN)/python -m sphinx --quiet --fail-on-warning --doctree-dir build/doctrees docs
docs: build ## the documentation site, in build/site
	$(SPHINX) build/site
	@echo 'build/site/index.html'

links: build ## what the absolute links of the site lead to; needs the network
	$(SPHINX) --builder linkcheck build/links

notebook: build ## run docs/first_run.ipynb and store what it shows: a minute or two
	$(BIN)/python docs/run_notebook.py

# A test that hangs in the device ends its process, the others go on. For the sanitizer each tensor is
# an allocation of its own, so that what is past its end is nobody's.
gpu: export HEX_CUDA = 1
gpu: export PATH := $(PATH):/usr/local/cuda/bin
gpu: build ## on a machine with a CUDA GPU: tests, times, sanitizers, a training run: an hour
	test -e hex/_cuda.so || $(BIN)/python setup.py --quiet build_ext --inplace
	timeout 900 $(BIN)/python -m pytest -m gpu tests/test_gpu.py -n 4 --timeout 120 --timeout-method thread
	$(BIN)/python benchmarks/bench.py --gpu
	for tool in memcheck racecheck initcheck synccheck; do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 600 compute-sanitizer --tool $$tool --error-exitcode 9 \
	        $(BIN)/python -m pytest -m gpu tests/test_gpu.py -k battery --timeout 0 || exit; done
	$(BIN)/python examples/simclr.py --loss hex --device cuda --amp bf16

examples: build ## every method with its own loss and with HEX, and a table: some minutes
	$(BIN)/python examples/minimal.py
	$(BIN)/python examples/compare.py

# Into the folder $(1) the files $(2), built with the options $(3). What builds them is fetched anew,
# so it is held to its hash here.
define archives
	rm -rf build/dist $(1)/*.whl $(1)/*.tar.gz
	$(if $(LOCK),PIP_CONSTRAINT=$(abspath $(LOCK))) $(BIN)/python -m build --outdir build/dist $(3)
	$(BIN)/python tests/archives.py build/dist/$(2) --into $(1)
	$(BIN)/twine check --strict $(1)/*.*
endef

wheel: export HEX_CUDA = 0
wheel: build ## dist/: the source archive, and from it the wheel, as they are published
	$(call archives,dist,*)

# Its version ends in the CUDA of nvcc, 1.0+cu130, so that nobody takes one wheel for the other. An
# index refuses such a version: it is for a release's page.
CUDA = $(shell PATH="$$PATH:/usr/local/cuda/bin" $${NVCC:-nvcc} --version | \
    sed -n 's/.*release \([0-9]*\)\.\([0-9]*\),.*/cu\1\2/p')
wheel-cuda: export HEX_CUDA = 1
wheel-cuda: build ## dist/cuda/: the wheel with the CUDA kernels, which takes minutes
	$(call archives,dist/cuda,*.whl,-C--global-option=egg_info -C--global-option=--tag-build=+$(or $(CUDA),$(error nvcc is not found: set NVCC)))

# VERSIONS='--python 3.12 --torch 2.10 --most-mb 4000' chooses; --help has the rest.
versions: build ## one wheel with many releases of torch and Python; what it fetches it says first
	$(BIN)/python tests/versions.py $(VERSIONS)

check-wheel: venv ## what `make wheel` made, with the oldest torch and the newest; says first what it fetches
	$(BIN)/python tests/versions.py --wheel dist/*.whl --python this --torch 2.10 newest $(VERSIONS)

# For every Python from 3.10 on and every system, with the hashes of all files of a release.
lock: venv ## requirements/ci.txt, anew: the newest of what CI installs, with hashes
	$(PIP) uv
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes \
	    --extra examples --extra test --extra benchmarks --extra dev --extra docs pyproject.toml \
	    requirements/ci.in --excludes requirements/not.in --custom-compile-command 'make lock' \
	    --output-file requirements/ci.txt

clean: ## remove what was built, .venv included
	rm -rf .venv build dist *.egg-info hex/*.so

# At torch pip would call torchvision missing where what LOCK installs asks for it.
.venv/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo '$(PYTHON) is older than 3.10; make PYTHON=... takes another'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo '$(PYTHON) cannot make environments: apt install python3-venv'; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s; open(os.path.join(s.get_paths()["include"], "Python.h"))' || \
	    { echo '$(PYTHON) has no headers: apt install python3-dev'; exit 1; }
	@for tool in gcc g++; do command -v $$tool >/dev/null || \
	    { echo "$$tool is missing: apt install $$tool"; exit 1; }; done
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(LOCK),--no-deps --require-hashes -r $(LOCK),--upgrade pip 'setuptools>=77')
	$(PIP) --no-warn-conflicts '$(TORCH)'
	$(PIP) --no-deps '$(TORCHVISION)'
	@touch $@

# With LOCK all is there already: --no-index ends in an error where LOCK lacks something.
.venv/hex: .venv/torch setup.py pyproject.toml $(wildcard csrc/*.[ch] csrc/cpu/*.[ch] csrc/cpu/levels/*.[ch] csrc/cuda/*.h)
	@PYTHONWARNINGS=ignore $(PIP) $(if $(LOCK),--no-index) --no-build-isolation --editable '.[examples,test,benchmarks,dev,docs]' '$(TORCH)' '$(TORCHVISION)'
	@touch $@
