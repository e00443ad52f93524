# `make demo` and `make test` are each enough on a fresh clone with a bare python3 (3.10 or newer).

SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
OUT ?= demo
JOBS ?= auto

# Byte-compiling what is never imported would take longer than the rest of an install.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile --quiet

.PHONY: help demo test check format clean reference

help:
	@echo "make demo       held-out pictures through the dense and the compressed reference model"
	@echo "make test       all tests"
	@echo "make check      ruff and mypy"
	@echo "make format     ruff, in place"
	@echo "make reference  train and measure the reference experiment from nothing (hours)"
	@echo "make clean      remove the environment, caches and the demo's output"

demo: $(VENV)/demo.stamp
	@$(BIN)/unicompress demo --out "$(OUT)"

test: $(VENV)/test.stamp
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

check: $(VENV)/test.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/test.stamp
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@rm -rf "$(VENV)" build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# torch comes first and on its own. A plain request takes a CPU build where the configured index has
# one; on Linux without an NVIDIA card the PyTorch CPU index is asked next, since PyPI has CUDA builds.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: unicompress needs Python 3.10 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "creating $(VENV) and installing torch $(TORCH)"
	@$(PYTHON) -m venv "$(VENV)"
	@if [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then \
	    $(PIP) "torch==$(TORCH)"; \
	elif ! $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null; then \
	    $(PIP) "torch==$(TORCH)" --index-url "$(CPU_INDEX)" || { \
	        echo "error: no CPU build of torch $(TORCH) at $(CPU_INDEX): check the connection," \
	             "or name another index: make CPU_INDEX=..." >&2; exit 1; }; \
	fi
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "installing unicompress and what the demo needs"
	@$(PIP) "torch==$(TORCH)" -e ".[demo]"
	@touch $@

$(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml
	@echo "installing unicompress and what the tests need"
	@$(PIP) "torch==$(TORCH)" -e ".[demo,train,eval-light,hosts,dev]"
	@touch $@

# The reference experiment: tokenizer, plug-in, both language models, and their evaluation. Hours on two
# cores; an interrupted stage goes on where it was (delete runs/reference to begin anew).
RECIPES := recipes/reference
RUNS := runs/reference
SHIPPED := src/unicompress/reference/weights

reference: $(VENV)/test.stamp
	@$(BIN)/unicompress train tokenizer $(RECIPES)/tokenizer.yaml --resume
	@$(BIN)/unicompress train stage-one $(RECIPES)/stage_one.yaml --resume
	@$(BIN)/unicompress train stage-one $(RECIPES)/refine.yaml --resume
	@for side in dense compressed; do for part in $$side $${side}_longer $${side}_drawing; do \
	    $(BIN)/unicompress train stage-two $(RECIPES)/stage_two_$$part.yaml --resume || exit 1; done; done
	@$(BIN)/python -m unicompress.training.ship $(RUNS)/stage_two_dense_drawing/final $(SHIPPED)/dense
	@$(BIN)/python -m unicompress.training.ship $(RUNS)/stage_two_compressed_drawing/final $(SHIPPED)/compressed \
	    --refined $(RUNS)/refine/final
	@for task in understanding generation reconstruction easy-vqa; do \
	    $(BIN)/unicompress evaluate compressed --task $$task --json docs/results/$$task.json || exit 1; done
	@$(BIN)/unicompress bench generation --batch 1 --repeats 5 --processor-time --janus \
	    --plot docs/pictures/bench-reference.png --json docs/results/bench-reference.json
	@$(BIN)/python -m unicompress.evals.results_page docs/results
