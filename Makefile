# Everything a developer or CI runs. `make` alone lists the targets.

PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu soak crash lint type bench reliability engine-demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install what is missing: system packages, .venv, kvfs itself
	@tools/bootstrap.sh

demo: setup ## mount three tiers, run an engine-like load, print the table (TRACE=FILE, FULL=1, HOLD=1)
	$(PYTHON) -m kvfs.tools.demo $(if $(TRACE),--trace '$(TRACE)') $(if $(filter-out 0,$(FULL)),--full) $(if $(filter-out 0,$(HOLD)),--hold)

test: lint type ## lint, types and all tests
	@tools/bootstrap.sh --tests
	tools/test.sh

soak: setup ## the torture tests, FACTOR=100 times longer: hours (ARGS='-k exerciser' for some)
	@tools/bootstrap.sh --tests
	KVFS_SOAK=$(or $(FACTOR),100) tools/test.sh -m soak --timeout=0 -o faulthandler_timeout=0 \
		--junitxml=.soak.xml -o junit_family=xunit1 $(ARGS); status=$$?; \
		$(PYTHON) -m kvfs.tools.soak_report .soak.xml && exit $$status

crash: setup ## kill the daemon N times at random moments under a load (N=20, SEED=)
	@tools/bootstrap.sh --tests
	KVFS_CRASH_CYCLES=$(or $(N),20) KVFS_CRASH_SEED=$(or $(SEED),$$(date +%s)) \
		tools/test.sh --timeout=0 -o faulthandler_timeout=0 tests/crash/test_kill.py -k survives_every_kill

lint: setup ## ruff and the import contracts
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	.venv/bin/lint-imports

type: setup ## mypy --strict
	$(PYTHON) -m mypy

test-gpu: ## the tests that need a GPU, and its benchmark; needs no FUSE (ARGS= for pytest)
	tools/test_gpu.sh $(ARGS)

reliability: setup ## see what engines see when tiers fail, and write it into docs/RELIABILITY.md
	KVFS_WRITE_MATRIX=1 tools/test.sh tests/mount/test_fault_matrix.py

bench: setup ## speed as ratios to a raw directory on the same disk (ARGS=--quick, ARGS=--scale)
	$(PYTHON) -m kvfs.tools.bench $(ARGS)

engine-demo: setup ## stock vLLM stores and loads its blocks through a mount (6 GB, minutes)
	$(PYTHON) -m kvfs.tools.engine_demo

clean: ## remove what the other targets made
	rm -rf .soak.xml .venv .venv-gpu build dist *.egg-info .demo .engine-demo .bench
	rm -rf .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
