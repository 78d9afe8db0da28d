# Development of amlmount. `make` alone prints the targets.
# PYTHON=python3.12 chooses another Python (3.11 or newer) for .venv; ARGS="..." is handed to pytest, the demo or the bench.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

BIN := .venv/bin
ARGS ?=
SETUP := .venv/.setup-done
TESTS := .venv/.tests-done
AZURITE := tests/azurite/node_modules/.setup-done
BENCH := .venv/.bench-done
export PYTHON

.PHONY: help
help: ## print this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: $(SETUP) ## install what amlmount needs: packages from apt where missing, the rest into .venv

$(SETUP): pyproject.toml requirements.lock scripts/setup
	@scripts/setup python
	@touch $@

$(TESTS): $(SETUP)
	@scripts/setup tests
	@touch $@

.PHONY: azurite
azurite: $(AZURITE) ## install Azurite, the Blob service the tests run against (and node where missing)

$(AZURITE): tests/azurite/package.json tests/azurite/package-lock.json
	@scripts/setup azurite
	@touch $@

.PHONY: demo
demo: $(SETUP) ## mount a real directory as a frozen dataset, compare every byte, print the speed
	@$(BIN)/python -m amlmount.demo $(ARGS)

.PHONY: test
test: lint types pytest ## everything CI checks: lint, types and tests

.PHONY: pytest
pytest: $(TESTS) $(AZURITE) ## the tests alone, for instance make pytest ARGS="-k manifest -x"
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: lint
lint: $(TESTS) ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.PHONY: format
format: $(TESTS) ## let ruff format and fix the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: types
types: $(TESTS) ## mypy, strict
	@$(BIN)/mypy

.PHONY: bench
bench: $(BENCH) ## measure against rclone and plain reads (installs nginx with Lua where missing)
	@$(BIN)/python -m bench $(ARGS)

$(BENCH): $(SETUP)
	@scripts/setup bench
	@touch $@

.PHONY: clean
clean: ## remove everything that the targets above made
	@rm -rf .venv tests/azurite/node_modules dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find amlmount tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
