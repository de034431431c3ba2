# The two set-up commands are `make demo` and `make test`; each makes its own virtual environment in .venv.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
JOBS ?= 2
BIN := $(VENV)/bin
SOURCES := $(shell find csrc tools/build -type f 2>/dev/null) setup.py pyproject.toml constraints.txt

# Some containers forbid Python to keep what it compiles: every process of the tests and the demo would compile its imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-slow test-installed bench lint clean
help:
	@echo "make demo    a scaling law on embedded images, and a prediction that is then tested (5 to 15 minutes)"
	@echo "make test    the test suite, JOBS=2 files at a time"
	@echo "make test-slow       the slow tests too"
	@echo "make test-installed  the built wheel, in an environment of its own"
	@echo "make bench   the kernels, blocks and steps beside PyTorch's, timed (10 minutes on a quiet machine)"
	@echo "make lint    format, lint and type checks"
	@echo "make clean   remove what the build leaves"

# torch comes first and from the constraints: the build then uses it, and nothing downloads another.
INSTALL = $(PYTHON) -m venv $(VENV) \
	&& $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch numpy setuptools wheel \
	&& $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt --no-build-isolation -e

$(VENV)/.ready: $(SOURCES)
	$(INSTALL) ".[test]"
	@touch $@

# The demo waits neither for nvcc, whose part of the build takes minutes, nor for what the tests need.
$(VENV)/.demo: $(SOURCES)
	DITSCALE_SKIP_CUDA=1 && export DITSCALE_SKIP_CUDA && $(INSTALL) .
	@touch $@

demo: $(or $(wildcard $(VENV)/.ready),$(VENV)/.demo)
	$(BIN)/ditscale demo --out $(OUT)

test: $(VENV)/.ready
	$(BIN)/python -P -m pytest -n $(JOBS) --dist loadfile

test-slow: $(VENV)/.ready
	$(BIN)/python -P -m pytest -n $(JOBS) --dist loadfile -m "slow or not slow"

# The wheel in an environment of its own, run from elsewhere: what a user gets, not what a checkout has.
test-installed: $(VENV)/.ready
	sh tools/test_installed.sh $(BIN)/python

# BENCH="--allow-noise" measures on a machine that is busy, too; every row then says how busy.
bench: $(VENV)/.ready
	$(BIN)/ditscale bench all $(BENCH)

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# With the libraries go the marks that they are built: else the next target would run without any.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache ditscale/lib $(VENV)/.ready $(VENV)/.demo
