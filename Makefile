# make help says what there is. Everything runs in .venv, which the targets make when they need it.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0

BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/cpu/*)

.DEFAULT_GOAL := help
.PHONY: help venv build test lint format sanitize demo bench examples wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/installed ## the environment: torch, and what the tests and examples import

build: .venv/built ## hex, in the environment, from this folder

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo '$(PYTHON) cannot make a virtual environment: apt install python3-venv'; exit 1; }
	@for tool in gcc g++; do command -v $$tool >/dev/null || { \
	    echo "$$tool is missing: apt install $$tool"; exit 1; }; done
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)'
	# without its dependencies: they name a torch of their own
	$(BIN)/pip install --quiet --no-deps '$(TORCHVISION)'
	touch $@

.venv/built: .venv/installed $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean: ## remove what was built, the environment included
	rm -rf .venv build dist *.egg-info hex/*.so
