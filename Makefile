# `make train` trains the embedded default; `make test` passes the tests. Each sets itself up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes, each with whole files, in the order of tests/conftest.py: most of the time goes
# into compiling, on one core.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
WORKDIR ?= runs/base
FUZZ_SECONDS ?= 1200
# What XLA compiled for tests, for the next run of them; "" compiles everything.
SDJAX_TEST_CACHE ?= $(abspath $(VENV))/xla
export SDJAX_TEST_CACHE

.PHONY: train test check test-all test-gpus test-wheel test-newest fuzz lint docs clean

train: $(VENV)/.installed
	$(BIN)/python -m sdjax.main --config=configs/base.py --workdir=$(WORKDIR)

# ROOM=diffusion: the tests of one room alone.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PARALLEL) $(if $(ROOM),tests/$(ROOM))

# Lint, and the tests that compile no network and start no process: some two minutes.
check: lint
	$(BIN)/python -m pytest -m "unit and not slow" $(PARALLEL)

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "" $(PARALLEL)

# What is compiled for GPUs needs JAX's plugin for CUDA, NVIDIA's libdevice (since jax 0.12), and no
# GPU. They are kept apart: in the environment the plugin would complain at every start.
test-gpus: $(VENV)/gpus/.installed
	PYTHONPATH=$(VENV)/gpus $(BIN)/python -m pytest tests/planning/test_plan_gpus.py

# Debian 13 in a folder: Python 3.13 and the newest releases. It needs root rights and debootstrap.
test-newest:
	tests/newest.sh $(VENV)-newest

# The wheel in an environment of its own, where there is no clone.
test-wheel: $(VENV)/.installed-test
	rm -rf $(VENV)/wheel
	$(BIN)/python -m build --outdir $(VENV)/wheel . >$(VENV)/build.log
	$(BIN)/python -m venv $(VENV)/wheel/env
	$(VENV)/wheel/env/bin/python -m pip install --quiet $(VENV)/wheel/*.whl
	tests/smoke.sh $(VENV)/wheel/env/bin/python

# Hostile files for every reader, FUZZ_SECONDS for each; SECURITY.md says what came of it.
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m tests.fuzz --seconds=$(FUZZ_SECONDS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/: it must build without a warning, and loads nothing from outside.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(v < (3, 11) and "sdjax needs Python 3.11 or newer, this is %d.%d: set PYTHON=" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# torch comes with gigabytes of CUDA on some indexes; the tests need the CPU build only.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/gpus/.installed: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/gpus \
	  "jax-cuda12-pjrt==$$($(BIN)/python -c 'import jax; print(jax.__version__)')" \
	  nvidia-cuda-nvcc-cu12
	touch $@

$(VENV)/.installed-lint: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-test

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@ $(VENV)/.installed
