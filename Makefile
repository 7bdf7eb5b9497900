# The two commands of the README are `make demo` and `make test`; each installs what it needs.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= deploy/models/recall
# The first Python here that Baton runs on.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)

.PHONY: help install demo test check lint typecheck imports protos protos-check format bench clean

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Baton needs Python 3.11 or 3.12; name one with PYTHON=..." >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch, Ray, NIXL and the rest (a minute or two; the versions are those of constraints.txt)"
	@$(BIN)/python -m pip install --progress-bar on --disable-pip-version-check -c constraints.txt \
		'torch==2.13.0' | grep --line-buffered -E '^(Collecting|Downloading|Installing)' | cut -c -100
	@$(BIN)/python -m pip install --progress-bar on --disable-pip-version-check -c constraints.txt -e '.[dev]' \
		| grep --line-buffered -E '^(Collecting|Installing)' | cut -c -100
	@touch $@

install: $(VENV)/.installed  ## Create the environment and install everything

demo: $(VENV)/.installed  ## Start a service on this machine, send it prompts, show what happened, stop it
	@$(BIN)/baton demo --model $(MODEL)

test: check  ## Install and run every check
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: lint typecheck imports protos-check

lint: $(VENV)/.installed  ## Style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed  ## Types
	@$(BIN)/mypy

imports: $(VENV)/.installed  ## Who may import whom
	@$(BIN)/lint-imports

protos: $(VENV)/.installed  ## Generate the code of protos/baton.proto
	@PYTHON=$(abspath $(BIN)/python) protos/generate.sh

protos-check: $(VENV)/.installed  ## Whether the generated code is that of protos/baton.proto
	@PYTHON=$(abspath $(BIN)/python) protos/generate.sh --check

format: $(VENV)/.installed  ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## Remove the environments and caches
	@rm -rf $(VENV) .venv-protoc .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist *.egg-info
