# Every target sets up .venv by itself; the second time it starts at once.
PYTHON ?= python3
TORCH ?=
MODEL ?= smollm2-135m
SEED ?= 0
BUDGET ?= inf
export PYTHON TORCH

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q
PARALLEL := -n auto --dist worksteal
READY := .venv/.ready

.PHONY: test demo bench reproduce docs lint types test-cpu test-parity test-interpret test-compile test-gpu test-trl test-verl test-fleet test-vllm setup clean

test: lint types test-cpu test-parity test-interpret test-compile test-gpu test-trl test-verl test-fleet test-vllm

demo: $(READY)
	$(BIN)/rlvr-ops demo --model $(MODEL) --seed $(SEED) --out runs/demo-$(MODEL)-$(SEED)

# Peers that need an NVIDIA GPU are installed one by one where there is one; the benchmark goes on without what cannot be had.
GPU_PEERS := cut-cross-entropy nvidia-cutlass-dsl
bench: $(READY)
	@if nvidia-smi >/dev/null 2>&1; then for peer in $(GPU_PEERS); do \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$peer || echo "without $$peer: it could not be installed"; \
	done; fi
	$(PYTEST) --benchmark

# docs/reproduction.md: what has not been run yet, for BUDGET minutes, then its tables and plots.
reproduce: $(READY)
	$(BIN)/python -m experiments.ace --budget $(BUDGET)
	$(BIN)/python -m experiments.report

docs: $(READY)
	$(BIN)/python -c "import mkdocs, material" 2>/dev/null || $(BIN)/python -m pip install --quiet ".[docs]"
	$(BIN)/python -m mkdocs build --quiet

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

test-cpu: $(READY)
	$(PYTEST) $(PARALLEL) -m "not interpret and not compile and not gpu and not parity"

test-parity: $(READY)
	$(PYTEST) -m parity tests/parity

test-interpret: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m interpret

test-compile: $(READY)
	$(PYTEST) -m compile

test-gpu: $(READY)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(PYTEST) -m gpu; else echo "no GPU here: the tests marked gpu are left out"; fi

# Frameworks exclude one another: the tests of each run in an environment of its own.
test-trl test-fleet test-vllm: test-%: .venvs/%.ready
	.venvs/$*/bin/python -m pytest -q tests/integrations/$*

test-verl: .venvs/verl.ready
	@if .venvs/verl/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 13))'; \
	then echo "verl 0.9.1 excludes Python 3.13: its tests are left out"; else .venvs/verl/bin/python -m pytest -q tests/integrations/verl; fi

.venvs/%.ready: pyproject.toml .ci/setup
	bash .ci/setup $*
	touch $@

setup: $(READY)

$(READY): pyproject.toml .ci/setup
	bash .ci/setup
	touch $@

clean:
	rm -rf .venv .venvs
