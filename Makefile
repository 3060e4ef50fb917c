# SPDX-License-Identifier: Apache-2.0
# Needs a Python >= 3.11 and a package index; everything goes into $(VENV).
#   make test PYTHON=python3.12 VENV=.venv312 ARGS="-k routing"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
CONFIG ?= configs/tiny.py
RUN ?= runs/quickstart
PROMPT ?= class Parser
# Tests run in this many processes; compiling keeps one core busy each.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

# Another project's packages on the path would shadow the pinned ones.
unexport PYTHONPATH
unexport PYTHONHOME
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help quickstart install install-hf install-storage test test-fast \
  test-grid lint format constraints clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' \
	  Makefile

quickstart: $(VENV)/.installed  ## install, train the tiny model, let it write
	@$(BIN)/moejax data prepare --config=$(CONFIG)
	@$(BIN)/moejax train --config=$(CONFIG) --workdir=$(RUN)
	@$(BIN)/moejax generate $(RUN) --prompt='$(PROMPT)'
	@echo "report: $(RUN)/report/index.html"

install: $(VENV)/.installed-dev  ## moejax, editable, with the tools of a developer

install-hf: $(VENV)/.installed-dev  ## torch and transformers, for the tests behind [hf]
	@$(PIP) -c constraints.txt -e '.[dev,hf]'

# Emulators of both, which pyproject.toml has no extra for.
install-storage: $(VENV)/.installed-dev  ## emulators, for the tests of gs:// and s3://
	@$(PIP) -c constraints.txt -e '.[dev,gcs,s3]' gcp-storage-emulator \
	  'moto[server]'

test: $(VENV)/.installed-dev  ## all tests; ARGS="-k routing" narrows them
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	  --no-loadscope-reorder $(ARGS)

test-fast: $(VENV)/.installed-dev  ## tests of seconds only
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not grid" $(ARGS)

test-grid: $(VENV)/.installed-dev  ## every way to split a batch; ten minutes
	@$(BIN)/python -m pytest -n $(WORKERS) -m grid $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff: lint, and the format without changing it
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## ruff: fix and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# One file for all Pythons, by markers; names no host. Needs uv.
constraints:  ## pin the newest versions that pyproject.toml allows
	@printf '%s\n' 'transformers>=5,<6' 'tiktoken>=0.12,<1' \
	  'gcp-storage-emulator>=2026.7' 'moto[server]>=5.2,<6' | \
	  uv pip compile pyproject.toml - --universal \
	  --python-version 3.11 --upgrade --no-header --no-annotate --quiet \
	  --extra dev --extra eval --extra notebooks --extra parquet \
	  --extra gcs --extra s3 --output-file constraints.txt

clean:  ## remove environments and caches; runs/ and token_store/ stay
	@rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache \
	  .hypothesis .jax_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune \
	  -exec rm -rf {} +

# An empty folder or a venv whose Python has gone is made anew.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moejax needs Python 3.11 or newer; $(PYTHON) is" \
	    "$$($(PYTHON) -V 2>&1). Name one: make PYTHON=python3.12" >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make environments: its module venv or ensurepip" \
	    "is missing (Debian, Ubuntu: apt install python3-venv)" >&2; \
	  exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "installing moejax into $(VENV) (a minute or two, once)"
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing moejax and its test tools into $(VENV) (once)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
