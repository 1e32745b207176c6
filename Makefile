# Everything here sets up .venv by itself, from a fresh clone, with the versions in constraints.txt.
#
#   make explain PYTHON=python3.12     another interpreter (3.11 or newer)
#   make explain PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                                      torch without the CUDA packages, where pip finds both

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
PYTEST_ARGS ?=
# Worker processes of the tests; each runs torch on one thread.
WORKERS ?= 2

# The first interpreter that is new enough and can make virtual environments.
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	if "$$name" -c '$(USABLE)' 2>/dev/null; then echo "$$name"; break; fi; done)

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.PHONY: help explain explain-image test lint bench clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

$(VENV)/pip-ready: constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11 or newer with the venv module was found. Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi
	@echo "==> Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(INSTALL) setuptools
	@touch $@

$(VENV)/package-ready: $(VENV)/pip-ready pyproject.toml
	@echo "==> Installing the package and what it needs (torch, transformers, ...): a minute or two, once"
	@$(INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/tools-ready: $(VENV)/package-ready
	@echo "==> Installing the test tools (pytest, ruff, pyright, ...), once"
	@$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

explain: $(VENV)/package-ready ## Explain an answer about a shipped contract: heat map here, explanation.html on disk.
	@echo "==> Explaining the shipped contract: which of its words made the model answer as it did?"
	@$(BIN)/atman explain --html explanation.html </dev/null
	@echo "==> Open explanation.html in a browser for the interactive view"

explain-image: $(VENV)/package-ready ## Explain what a model sees in a picture: heat maps here, explanation-image.html on disk.
	@echo "==> Explaining the shipped picture: which of its shapes made the model name it?"
	@$(BIN)/atman explain --demo shapes --html explanation-image.html </dev/null
	@echo "==> Open explanation-image.html in a browser for the interactive view"

lint: $(VENV)/tools-ready ## Check style, formatting and types.
	@echo "==> ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "==> pyright"
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

test: lint ## Check style and types, then run the tests (PYTEST_ARGS="-k causal" selects).
	@echo "==> pytest"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

bench: $(VENV)/tools-ready ## Time everything against eager; rows and pictures go to bench/results/.
	@echo "==> Benchmarks: on CPU about half an hour; keep the machine otherwise idle"
	@$(BIN)/python -m pytest bench -q -s -p no:xdist --benchmark-disable-gc --benchmark-columns=min,median,iqr,rounds $(PYTEST_ARGS)
	@for part in savings many_targets memory explain_scaling path; do \
		echo "==> $$part"; $(BIN)/python -m bench.$$part; \
	done

clean: ## Remove .venv, builds and caches.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
