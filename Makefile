# Everything runs in .venv, which any target makes first. PYTHON chooses the interpreter (3.11+).
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test
TESTS ?= not slow and not tpu
# Processes that run tests side by side; most of their time goes into compilation, on one core each.
WORKERS ?= 2
# The tests of a file share models and compiled programs; those that compile for TPUs share nothing.
DIST ?= loadfile
RUN := $(VENV)/bin/python -m
RUFF_FLAGS := --line-length 100
RUFF_RULES := --extend-select I,B,UP,RUF
CODE := glmjax experiments tpu tests
# The newest interpreter that runs; pyenv's are named in full, since its shims want a choice first.
LATEST_PYTHON ?= $(shell for p in python3.14 python3.13 python3.12 \
	$$(ls -d $$HOME/.pyenv/versions/3.1[2-9]*/bin/python 2>/dev/null | sort -rV); do \
	$$p -c '' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow test-tpu test-latest test-launch lint types format bench \
	reproduce notebooks clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 14

install: $(VENV)/installed  ## Make .venv with glmjax and all it needs

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

train: install  ## Train a small GLM on text that every machine has (about 3 minutes on 2 cores)
	$(RUN) glmjax train experiments/quickstart.py

test: install  ## Run the tests (10 to 20 minutes on 2 cores)
	$(RUN) pytest -q -n $(WORKERS) --dist $(DIST) -m "$(TESTS)" $(FILES)

test-slow:  ## Run the tests that take long, such as the kill test
	$(MAKE) test TESTS="slow and not tpu"

test-tpu:  ## Compile the kernels for five TPU generations and count their cycles; needs no TPU
	$(MAKE) test VENV=.venv-tpu EXTRAS=test,tpu TESTS=tpu DIST=load

test-latest:  ## Run test and test-tpu on the newest Python at hand, with the newest jax
	@test -n "$(LATEST_PYTHON)" || { echo "no Python 3.12 or newer found; set LATEST_PYTHON"; exit 1; }
	$(MAKE) test PYTHON=$(LATEST_PYTHON) VENV=.venv-latest EXTRAS=test,tpu
	$(MAKE) test VENV=.venv-latest EXTRAS=test,tpu TESTS="tpu and not slow" DIST=load

test-launch:  ## Check the launch files with the tools that read them: xpk, sky, hadolint, shellcheck
	$(MAKE) test VENV=.venv-launch EXTRAS=launch-test FILES=tests/tpu WORKERS=0

lint: install  ## Check style
	$(RUN) ruff check $(RUFF_FLAGS) $(RUFF_RULES) $(CODE)
	$(RUN) ruff format $(RUFF_FLAGS) --check $(CODE)

types: install  ## Check types
	$(RUN) mypy

format: install  ## Rewrite the code in the project's style
	$(RUN) ruff check $(RUFF_FLAGS) $(RUFF_RULES) --fix $(CODE)
	$(RUN) ruff format $(RUFF_FLAGS) $(CODE)

bench: install  ## Measure the input pipeline and the training step
	$(RUN) glmjax bench data
	$(RUN) glmjax bench train

reproduce: install  ## Recompute GLM-130B's published numbers and write the report
	$(RUN) experiments.reproduce

notebooks:  ## Run the notebooks and write them with their outputs (15 minutes; one compiles for TPUs)
	$(MAKE) install VENV=.venv-tpu EXTRAS=test,tpu
	.venv-tpu/bin/python -m experiments.notebooks.render

clean:  ## Remove environments, caches and runs
	rm -rf .venv .venv-tpu .venv-latest .venv-launch .mypy_cache .ruff_cache .pytest_cache *.egg-info runs
