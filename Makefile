# Two commands do all the set-up: `make demo` (see it work) and `make test` (lint, types, tests).
PYTHON ?= python3
VENV ?= .venv
TEST_VENV ?= .venv-test
BIN = $(VENV)/bin
TEST_BIN = $(TEST_VENV)/bin

.PHONY: demo test trained-weights test-minimum lint audit api bench bench-full clean

demo: $(VENV)/.installed $(VENV)/.kernels
	$(BIN)/numpyesm demo

# The tests start hundreds of processes: bytecode is kept for them.
test: $(TEST_VENV)/.installed $(TEST_VENV)/.kernels
	$(MAKE) --jobs 2 lint trained-weights
	PYTHONDONTWRITEBYTECODE= $(TEST_BIN)/python -m pytest -m "" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	$(TEST_BIN)/numpyesm demo --output demo-output

# Without a network the tests of trained weights skip.
trained-weights: $(TEST_VENV)/.installed
	-$(TEST_BIN)/python tests/trained_weights.py

# The lowest Python and the lowest versions that are declared; tests of what is not installed there skip themselves.
MINIMUM_PYTHON ?= python3.10
MINIMUM_TESTS = tests/test_text.py tests/test_model.py tests/test_structure.py \
  tests/test_canonical.py tests/test_hostile.py tests/test_locate.py tests/test_small_memory.py \
  tests/test_verification.py tests/test_serverless.py
test-minimum: .venv-minimum/.installed
	.venv-minimum/bin/python -m pytest $(MINIMUM_TESTS)

.venv-minimum/.installed: pyproject.toml requirements-minimum.txt
	$(MINIMUM_PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet "setuptools>=77" -r requirements-minimum.txt
	.venv-minimum/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Known vulnerabilities in what numpyesm and its extras bring; asks PyPI.
audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit '.[all]'
	.venv-audit/bin/pip-audit --local --skip-editable

# The API reference as HTML, from the docstrings.
PUBLIC = numpyesm numpyesm.errors numpyesm.bulk numpyesm.sklearn numpyesm.compat.fair_esm \
  numpyesm.serverless
api:
	$(PYTHON) -m venv .venv-api
	.venv-api/bin/python -m pip install --quiet --editable '.[all]' pdoc
	.venv-api/bin/python -m pdoc --docformat numpy --output-directory api-reference $(PUBLIC)

lint: $(TEST_VENV)/.installed
	$(TEST_BIN)/ruff check .
	$(TEST_BIN)/ruff format --check .
	$(TEST_BIN)/mypy

bench: $(TEST_VENV)/.installed $(TEST_VENV)/.kernels
	$(TEST_BIN)/python -m bench --setup

bench-full: $(TEST_VENV)/.installed $(TEST_VENV)/.kernels
	$(TEST_BIN)/python -m bench --full --setup

# The environments are brought up to date when pyproject.toml changes.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[plot]'
	touch $@

# torch first and alone, so that nothing else chooses its version. On Linux, PyPI's build brings gigabytes of CUDA:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test takes the small one. What is imported is compiled
# then: all of it would take 40 s more.
$(TEST_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_BIN)/python -m pip install --quiet --upgrade pip
	$(TEST_BIN)/python -m pip install --quiet --no-compile torch==2.13.0
	$(TEST_BIN)/python -m pip install --quiet --no-compile --editable '.[test]'
	touch $@

# Compiled kernels from this checkout, for this machine; without a C compiler Numba or NumPy does the work.
KERNEL_SOURCES = $(wildcard numpyesm/kernels/*/*.py packaging/kernels/*.* packaging/kernels/*/*.py) numpyesm/kernels/build.py numpyesm/kernels/constants.py numpyesm/weights/tensor.py
# Of an environment, for some levels, with more options of pip.
define install_kernels
@if ! $(1)/python -c 'import sys; from numpyesm.kernels.build import linker; sys.exit(linker() is None)'; then \
	echo "no compiled kernels, which are faster: they need a C compiler (cc, gcc or clang)"; \
elif NUMPYESM_KERNEL_LEVELS=$(2) $(1)/python -m pip install --quiet --no-deps $(3) ./packaging/kernels; then touch $@; fi
endef
$(VENV)/.kernels: $(VENV)/.installed $(KERNEL_SOURCES)
	$(call install_kernels,$(BIN),best)

$(TEST_VENV)/.kernels: $(TEST_VENV)/.installed $(KERNEL_SOURCES)
	$(call install_kernels,$(TEST_BIN),host,--no-build-isolation)

clean:
	rm -rf $(VENV) $(TEST_VENV) .venv-minimum .venv-audit .venv-api .trained api-reference demo-output build packaging/kernels/build *.egg-info packaging/kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache
