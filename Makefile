# Two commands do all the set-up: `make demo` (see it work) and `make test` (lint, types, tests).
PYTHON ?= python3
VENV ?= .venv
TEST_VENV ?= .venv-test
BIN = $(VENV)/bin
TEST_BIN = $(TEST_VENV)/bin

.PHONY: demo test lint bench bench-full clean

demo: $(VENV)/.installed
	$(BIN)/numpyesm demo

test: $(TEST_VENV)/.installed lint
	$(TEST_BIN)/python -m pytest
	$(TEST_BIN)/numpyesm demo --output demo-output

lint: $(TEST_VENV)/.installed
	$(TEST_BIN)/ruff check .
	$(TEST_BIN)/ruff format --check .
	$(TEST_BIN)/mypy

bench: $(TEST_VENV)/.installed
	$(TEST_BIN)/python -m bench --setup

bench-full: $(TEST_VENV)/.installed
	$(TEST_BIN)/python -m bench --full --setup

# The environments are made anew when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[plot]'
	touch $@

# torch first and alone: a range would pull gigabytes of CUDA packages.
$(TEST_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_BIN)/python -m pip install --quiet --upgrade pip
	$(TEST_BIN)/python -m pip install --quiet torch==2.13.0
	$(TEST_BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(TEST_VENV) demo-output build *.egg-info .pytest_cache .mypy_cache .ruff_cache
