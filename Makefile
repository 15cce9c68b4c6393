# `make demo` and `make test` need Python 3.11 and make; everything else they install into .venv.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo quick test lint types unit bench clean

demo: .venv/ready ## train and compare three small models, in under five minutes
	$(BIN)/python scripts/demo.py

test: lint types unit ## everything that must hold before a commit

quick: .venv/ready-dev lint ## lint and the tests that need no whole run
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow and not program"

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready-dev
	$(BIN)/mypy

unit: .venv/ready-dev ## two workers of one thread each: more threads would only wait for each other
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

bench: .venv/ready
	$(BIN)/python scripts/bench.py matrix
	$(BIN)/python scripts/bench.py harness

.venv/ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean: ## the environment and caches; runs/ stays
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
