# `make help` lists the targets. Each needs .venv, which is made, or brought up to date, on the way.
PYTHON_IN_VENV := .venv/bin/python
SOURCES := ibtpo engine/ibtpo_engine kernels/ibtpo_kernels
LINTED := $(SOURCES) tests bench examples
CSRC := $(wildcard kernels/csrc/*.cpp kernels/csrc/*.h)
STAMP := .venv/.installed
STAMP_LOWEST := .venv-lowest/.installed
PEERS := .venv/.peers
SUITES ?= bench
# One a core; the longest tests start processes of their own.
TEST_PROCESSES = $(shell getconf _NPROCESSORS_ONLN)

RUN_TESTS = -m pytest -n $(TEST_PROCESSES) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Idle threads sleep instead of spinning: several times faster where other processes want the cores too (docs/log.md).
train test test-lowest: export OMP_WAIT_POLICY ?= passive

# What is imported is compiled once and kept, in .venv and beside the sources, not compiled anew by every process.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train test test-lowest bench roofline sanitize lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install ibtpo into it, editable

$(STAMP) $(STAMP_LOWEST): pyproject.toml CMakeLists.txt scripts/setup.sh $(CSRC)
	@IBTPO_LOWEST=$(if $(findstring lowest,$@),1) scripts/setup.sh

train: $(STAMP) ## train the built-in policy; flags through ARGS="..."
	@.venv/bin/ibtpo train $(ARGS)

test: $(STAMP) ## run the tests, a file at a time in each process; flags through ARGS="..." (-n 0: in one process)
	@$(PYTHON_IN_VENV) $(RUN_TESTS) $(ARGS)

test-lowest: $(STAMP_LOWEST) ## the same with the lowest versions of everything that pyproject.toml allows, in .venv-lowest
	@.venv-lowest/bin/python $(RUN_TESTS) $(ARGS)

bench: $(PEERS) ## run the benchmark suites, then the roofline; ARGS="..." for pytest, SUITES=bench/bench_engine.py for one
	@$(PYTHON_IN_VENV) -m pytest $(SUITES) -o python_files='bench_*.py' --benchmark-columns=median,iqr,rounds \
	  --benchmark-max-time=0.1 --benchmark-min-rounds=3 $(ARGS)
	@$(PYTHON_IN_VENV) -m ibtpo_kernels.roofline --limit 330

roofline: $(PEERS) ## measure every op against its limits and its peers; flags through ARGS="..."
	@$(PYTHON_IN_VENV) -m ibtpo_kernels.roofline $(ARGS)

$(PEERS): $(STAMP)
	@$(PYTHON_IN_VENV) scripts/install_peers.py
	@touch $@

sanitize: $(STAMP) ## run the kernel tests under the address and undefined-behaviour sanitizers
	@scripts/sanitize.sh $(ARGS)

lint: $(STAMP) ## check style and types
	$(PYTHON_IN_VENV) -m ruff check $(LINTED)
	$(PYTHON_IN_VENV) -m ruff format --check $(LINTED)
	$(PYTHON_IN_VENV) -m mypy
	.venv/bin/clang-format --dry-run --Werror $(CSRC)

format: $(STAMP) ## rewrite the sources in the house style
	$(PYTHON_IN_VENV) -m ruff check --fix $(LINTED)
	$(PYTHON_IN_VENV) -m ruff format $(LINTED)
	.venv/bin/clang-format -i $(CSRC)

clean: ## remove what was built, .venv included
	rm -rf .venv .venv-lowest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
