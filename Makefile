# Everything a developer or CI runs. `make` alone lists the targets.

PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint type bench engine-demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing: system packages, .venv, kvfs itself
	@tools/bootstrap.sh

demo: setup ## mount three tiers, run an engine-like load, print the table (TRACE=FILE, FULL=1)
	$(PYTHON) -m kvfs.tools.demo $(if $(TRACE),--trace '$(TRACE)') $(if $(filter-out 0,$(FULL)),--full)

test: lint type ## lint, types and all tests
	tools/test.sh

lint: setup ## ruff and the import contracts
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	.venv/bin/lint-imports

type: setup ## mypy --strict
	$(PYTHON) -m mypy

bench: setup ## speed as ratios to a raw directory on the same disk (ARGS=--quick, ARGS=--scale)
	$(PYTHON) -m kvfs.tools.bench $(ARGS)

engine-demo: setup ## stock vLLM stores and loads its blocks through a mount (6 GB, minutes)
	$(PYTHON) -m kvfs.tools.engine_demo

clean: ## remove what the other targets made
	rm -rf .venv build dist *.egg-info .demo .engine-demo .bench
	rm -rf .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
