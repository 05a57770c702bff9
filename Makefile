# The commands of a fresh machine. Each makes .venv first, and again only when the pins or the package's needs change.
.PHONY: train test test-nightly lint format bench clean help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One more index to find torch in. PyPI's wheel for Linux brings 3 GB of CUDA libraries, of no use without an NVIDIA
# driver; PyTorch's own index has one without them, 2.13.0+cpu, which pip takes before a plain 2.13.0.
DRIVER := $(wildcard /dev/nvidia[0-9]* /dev/dxg)
TORCH_INDEX ?= $(if $(filter Linux,$(shell uname)),$(if $(DRIVER),,https://download.pytorch.org/whl/cpu))

train: $(VENV)/.installed  ## install, then train a small language model on Python's own source (less than 4 minutes)
	$(BIN)/shoal train recipes/quickstart.toml

# Two files at a time: much of a test is waiting for ranks to start or to end.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/.installed-dev  ## install, then run the tests
	$(PYTEST)

test-nightly: $(VENV)/.installed-dev  ## the long tests too
	$(PYTEST) -m "nightly or not nightly"

lint: $(VENV)/.installed-dev  ## style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## one training step against hand-written DDP and the Hugging Face Trainer
	$(BIN)/python benchmarks/step.py

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' Makefile

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: shoal needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1)"; \
	    echo "  → make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments"; \
	    echo "  → on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and by name: the pinned release and no other, which may bring other packages.
$(VENV)/.torch: constraints.txt | $(VENV)/.python
	$(if $(TORCH_INDEX),$(PIP) install --quiet --retries 1 --extra-index-url $(TORCH_INDEX) --no-deps torch==2.13.0)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

# In one go: pip looks at every package once, and what `make train` needs is among them.
$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test,lint]'
	@touch $(VENV)/.installed $@
