# Each target sets up its own virtual environment from nothing but Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread per test process: two processes with two threads each would fight for two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow serve lint bench clean

demo: $(READY)
	$(BIN)/python -m longctx.demo

test: $(READY)
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(READY)
	$(PYTEST) -m "slow and not gpu"

serve: $(READY)
	$(BIN)/longctx serve

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/longctx bench niah --out out/bench
	$(BIN)/longctx bench document --out out/bench
	$(BIN)/longctx bench decode --against transformers --out out/bench
	$(BIN)/longctx bench restart --out out/bench
	$(BIN)/longctx bench quality --out out/bench

$(READY): pyproject.toml CMakeLists.txt $(wildcard longctx/kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist out .pytest_cache .hypothesis .mypy_cache .ruff_cache
