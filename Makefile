# Everything a checkout needs. Works on a machine with Python >= 3.11, make and a package index.
#
#   make demo            a whole cold start on this machine, no GPU, no cloud; then it keeps serving
#   make test            the tests
#   make test-sky        the tests against a real SkyPilot, on a Slurm cluster it makes (root, Linux, 20 minutes)
#   make test-sglang     the tests against a real SGLang on this machine's CPU (Linux, x86_64; tests/sglang/README.md)
#   make test-compiled   the gateway's tests against a compiled build of it (a C compiler, Python's headers)
#   make bench           the gateway beside nginx, haproxy and the Rust routers (bench/README.md)
#   PYTHON=python3.12    another Python for the environment       ARGS="..."   arguments of demo, test..., chaos, bench

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# uv from the PATH, else from the package index into the project's own environment.
UV = $(shell command -v uv || echo $(BIN)/uv)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-compiled test-sky test-sglang chaos lint check docs lock wheel wheel-compiled \
	compiled bench bench-peers

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## the environment in .venv, exactly requirements.lock

demo: $(STAMP)  ## from zero to an answer on this machine (ARGS=--once: end then)
	@$(BIN)/gateway demo $(ARGS)

# Many tests wait for processes: three at a time on two cores. A file's tests stay together.
TEST_PROCESSES ?= 3

test: $(STAMP)  ## all tests
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(ARGS)

test-compiled: compiled  ## the data plane's tests against machine code, in a copy of the tree
	@cd $(TREE) && PYTHONPATH=$(CURDIR)/$(TREE) TEST_COMPILED=1 $(CURDIR)/$(BIN)/python -m pytest \
	  -n $(TEST_PROCESSES) --dist loadfile $(COMPILED_TESTS) $(ARGS)

test-sky: $(STAMP)  ## replicas on a real SkyPilot and Slurm, on this machine (root, Linux)
	@VENV="$(CURDIR)/$(VENV)" tests/e2e/sky/bed.sh test $(ARGS)

test-sglang: $(STAMP)  ## a real SGLang on this machine's CPU, behind the gateway (Linux, x86_64)
	@$(BIN)/python tests/sglang/install.py
	@$(BIN)/python -m pytest -m sglang --durations=10 tests/sglang $(ARGS)

chaos: $(STAMP)  ## 100,000 requests while replicas, workers and controller are killed (tests/chaos/README.md)
	@$(BIN)/python -m tests.chaos $(ARGS)

lint: $(STAMP)  ## style and types
	@$(BIN)/ruff check gateway replicas tests bench hatch_build.py
	@$(BIN)/mypy

check: lint test  ## what CI runs

docs: $(STAMP)  ## the generated parts of README.md
	@$(BIN)/python tests/test_docs.py

lock: $(STAMP)  ## requirements.lock from pyproject.toml, keeping the versions that still fit
	@$(UV) pip compile -q --universal --generate-hashes --extra test --extra dev --extra slurm pyproject.toml -o requirements.lock

wheel: $(STAMP)  ## dist/skygate-*.whl, for every platform
	@$(BIN)/python -m hatchling build -t wheel

COMPILE := HATCH_BUILD_HOOK_ENABLE_CUSTOM=true
TREE := build/compiled/tree
COMPILED_TESTS := $(wildcard tests/gateway/test_*.py) tests/replicas/test_board.py \
	$(patsubst %,tests/e2e/test_%.py,chaos kill reload replica_tls restart)

wheel-compiled: $(STAMP)  ## the same with its hot modules compiled, for this platform and Python
	@$(COMPILE) $(BIN)/python -m hatchling build -t wheel

compiled: build/compiled/.built  ## build/compiled/tree, a copy of this one with those modules compiled
	@rm -rf $(TREE) && mkdir -p $(TREE)
	@$(BIN)/python -m zipfile -e build/compiled/*.whl $(TREE)
	@cp -R gateway replicas config tests bench pyproject.toml README.md $(TREE)

build/compiled/.built: $(STAMP) pyproject.toml hatch_build.py $(wildcard gateway/*.py replicas/*.py)
	@rm -rf build/compiled && mkdir -p build/compiled
	@$(COMPILE) $(BIN)/python -m hatchling build -t wheel -d build/compiled
	@touch $@

BENCH_BUILD := bench/build

bench: compiled $(BENCH_BUILD)/loadgen $(BENCH_BUILD)/upstream  ## the data plane measured beside its peers (ARGS=--help)
	@$(BIN)/python -m bench run $(ARGS)

bench-peers: $(STAMP)  ## nginx, haproxy and the routers for `make bench`, into ~/.cache/skygate-bench
	@$(BIN)/python -m bench peers $(ARGS)

$(BENCH_BUILD)/%: bench/src/%.c $(wildcard bench/src/*.h)
	@mkdir -p $(@D)
	@$(CC) -O2 -Wall -Wextra -Wno-implicit-fallthrough -o $@ $<

# --no-build-isolation: hatchling, too, comes from the lock.
$(STAMP): requirements.lock pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; found: $$(python3 --version 2>&1 || true)." \
	       "Name another one: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { command -v uv >/dev/null && uv venv --quiet --python $(PYTHON) $(VENV); } \
	  || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	@echo "Installing requirements.lock into $(VENV)"
	@$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@
