# From nothing on a fresh machine:
#   make demo    sets everything up and writes Python with the model that ships in the package
#   make test    sets everything up and runs the tests
#
# Without an NVIDIA GPU, torch is pinned to the release that CPU builds are tested with. pip takes the CPU build wherever
# its configuration offers one; TORCH_INDEX=<address> adds PyTorch's index of CPU builds for one call:
#   make demo TORCH_INDEX=<the address that PyTorch's install page shows for "CPU">

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= def read_json(path):
# Tests run on one thread each, so this is also the number of cores in use.
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(os.cpu_count() or 2, 8))")

GPU := $(shell nvidia-smi --list-gpus 2>/dev/null | head -n 1)
CONSTRAINTS := constraints/$(if $(GPU),tested,cpu).txt
INSTALL := $(VENV)/bin/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)
# On all cores, where pip takes one. Some packages hold files that no Python compiles.
COMPILE := $(VENV)/bin/python -m compileall -qq -j 0 $(VENV)/lib || true
SETUP := pyproject.toml $(wildcard constraints/*.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs wheel release clean

help:
	@echo "make demo    set up $(VENV) and write text with the shipped model (PROMPT='def read_json(path):')"
	@echo "make test    set up $(VENV) and run the tests (JOBS=$(JOBS), ARGS='-k cache')"
	@echo "make lint    set up $(VENV); ruff and mypy"
	@echo "make docs    set up $(VENV); build the documentation into site/"
	@echo "make wheel   build the wheel into dist/"
	@echo "make release build both archives, check them, and try the wheel in an environment of its own"
	@echo "make clean   remove $(VENV), build outputs and caches"

demo: $(VENV)/.installed
	@$(VENV)/bin/mamba2-hf generate '$(subst ','\'',$(PROMPT))'

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file mypy-scripts.ini

wheel: $(VENV)/.installed-dev
	$(VENV)/bin/python -m build --wheel

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# The wheel writes text from outside of the checkout, in an environment that has never seen it.
release: $(VENV)/.installed-dev
	rm -rf dist build/release
	$(VENV)/bin/python -m build
	$(VENV)/bin/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 'torch>=2.11'
	build/release/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) dist/*.whl
	cd build/release && bin/mamba2-hf generate "def read_json(path):" -n 16 && bin/mamba2-hf env

clean:
	rm -rf $(VENV) build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache

# torch goes first and alone: asked for together with packages that accept any version, pip may pick another release.
$(VENV)/.torch: $(SETUP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mamba2-hf needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up $(VENV) ($(if $(GPU),NVIDIA GPU found,no NVIDIA GPU: torch for the CPU)); the first time takes minutes"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 'torch>=2.11'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch
	@$(INSTALL) --editable .
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch
	@$(INSTALL) --editable '.[dev]'
	@$(COMPILE)
	@touch $@ $(VENV)/.installed
