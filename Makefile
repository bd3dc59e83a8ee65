# Every target sets up what it needs in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Two workers with one thread each: torch's own threads would fight over the cores.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-all test-browser check format bench docs clean

demo: .venv/ready
	$(BIN)/masformer demo

test: .venv/ready
	$(TEST)

test-all: .venv/ready
	$(TEST) -m "not gpu and not browser"

test-browser: .venv/ready
	$(TEST) -m browser

check: .venv/ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: .venv/ready
	$(BIN)/python -m tests.models.families_page > docs/families.md

bench: .venv/ready
	$(BIN)/python -m benchmarks.memory

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
