# Everything starts here; `make` alone lists what there is. Each target sets up what it needs and does that only once.

PYTHON ?= python3
VENV := .venv
SGLANG := build/sglang-cpu
SGLANG_VERSIONS ?= 0.5.16 0.5.23
WHEELS := build/wheels
SCRIPTS := .ci/run $(wildcard tools/*.sh) $(shell find examples -name '*.sh')
ENGINES := vllm==0.26.0 vllm==0.30.0 vllm==0.33.0 sglang==0.5.16 sglang==0.5.20 sglang==0.5.23
PYTEST_ARGS ?=
WORKERS ?= 2
ENGINE ?=
SEED ?=
KILLS ?= 100
FAULTS ?= $(KILLS)
SOAK_S ?= 600
FRAMES ?= 1000000
NVRTC ?= build/nvrtc
BENCH_BYTES ?=
BENCH_ARGS ?=

# Run with another Python whose environment has gms, an engine and the tools already: make test-gpu RUN=python3
RUN ?= $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lint format test-gpu chaos restarts soak fuzz bench groups peers kernels wheels environment sglang-environment sglang-versions clean

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: ## Two stock vLLM engines share weights, then kill -9 and the shadow serves; on the GPU where this Python has a CUDA vLLM, else on CPU.
	@tools/demo.sh "$(PYTHON)"

test: export PYTHONDONTWRITEBYTECODE = # thousands of processes would compile everything anew
test: lint wheels sglang-environment ## Lint, types, and all tests that need no GPU, real engines on CPU included; two at once: WORKERS=4 runs four, WORKERS=0 one after the other
	$(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS) -m "not gpu and not long"

test-long: wheels sglang-environment environment ## Further tests with real engines on CPU, of minutes each.
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m long

lint: environment ## ruff, mypy, the import contracts and shellcheck.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/shellcheck $(SCRIPTS)

format: environment ## Format the code.
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test-gpu: ## The tests that need an NVIDIA GPU, in an environment that has one: make test-gpu RUN=python3
	$(RUN) -m pytest $(PYTEST_ARGS) -m gpu tests

chaos: $(if $(filter $(VENV)/bin/python,$(RUN)),environment) $(if $(filter sglang,$(ENGINE)),sglang-environment) ## Kill real engines at random while requests flow, then a soak: make chaos ENGINE=sglang SEED=7 KILLS=100 SOAK_S=600; writes build/chaos.json and build/soak.json.
	PYTHONPATH=tests:tests/engine $(RUN) -m chaos $(if $(ENGINE),--engine $(ENGINE)) $(if $(SEED),--seed $(SEED)) --kills $(KILLS)
	PYTHONPATH=.:tests $(RUN) -m chaos.soak $(if $(SEED),--seed $(SEED)) --seconds $(SOAK_S)

restarts: $(if $(filter $(VENV)/bin/python,$(RUN)),environment) ## Kill a device server under its clients, and do them other harm: make restarts SEED=7 KILLS=200 FAULTS=200; writes build/restarts.json.
	PYTHONPATH=.:tests $(RUN) -m chaos.restarts $(if $(SEED),--seed $(SEED)) --kills $(KILLS) --faults $(FAULTS)

soak: $(if $(filter $(VENV)/bin/python,$(RUN)),environment) ## A device server under steady load, whose memory and descriptors have to stay flat: make soak SEED=7 SOAK_S=600; writes build/soak.json.
	PYTHONPATH=.:tests $(RUN) -m chaos.soak $(if $(SEED),--seed $(SEED)) --seconds $(SOAK_S)

fuzz: $(if $(filter $(VENV)/bin/python,$(RUN)),environment) ## Hostile frames against a live server, and inputs for the codec: make fuzz SEED=7 FRAMES=1000000; writes build/fuzz.json.
	PYTHONPATH=. $(RUN) -m tests.fuzz $(if $(SEED),--seed $(SEED)) --frames $(FRAMES)

bench: $(if $(filter $(VENV)/bin/python,$(RUN)),environment) ## All benchmarks that need no engine, beside peers and limits: make bench BENCH_BYTES=4GiB; writes build/bench.json.
	$(RUN) -m tools.bench $(if $(BENCH_BYTES),--bytes $(BENCH_BYTES)) $(BENCH_ARGS)

groups: $(if $(filter $(VENV)/bin/python,$(RUN)),environment) ## Groups of up to 256 ranks without an engine: leases, attach and failover against their number: make groups GROUPS_ARGS="--plot build/groups.svg"; writes build/groups.json.
	PYTHONPATH=. $(RUN) -m tools.groups $(GROUPS_ARGS)

peers: $(if $(filter $(VENV)/bin/python,$(RUN)),environment) ## Install the loaders of others that make bench measures, beside the torch that is there: make peers RUN=python3
	$(RUN) -m pip install --no-deps --group peers

kernels: ## Make the GPUs' code (PTX) from its sources, with a pinned compiler.
	$(PYTHON) -m pip install --no-deps --target $(NVRTC) nvidia-cuda-nvrtc-cu12==12.0.76
	$(PYTHON) tools/kernels.py $(NVRTC)/nvidia/cuda_nvrtc/lib/libnvrtc.so.12

wheels: $(WHEELS)/.stamp ## Download the wheels of vLLM and SGLang that the contract tests read.

sglang-versions: environment ## The tests with SGLang's engines, with other versions of SGLang than that of make test.
	set -e; for version in $(SGLANG_VERSIONS); do \
	  GMS_CPU_SGLANG=$$version tools/cpu_sglang.sh build/sglang-cpu-$$version "$(PYTHON)"; \
	  GMS_TEST_SGLANG_PYTHON=$$PWD/build/sglang-cpu-$$version/bin/python $(VENV)/bin/python -m pytest $(PYTEST_ARGS) -m "not long" tests/engine/test_sglang_*.py; \
	done

sglang-environment: $(SGLANG)/.stamp ## Make build/sglang-cpu: a real SGLang for CPU, and gms.

environment: $(VENV)/.stamp ## Make .venv: a real CPU vLLM, gms, and the tools.

$(VENV)/.stamp: tools/cpu_vllm.sh pyproject.toml
	tools/cpu_vllm.sh $(VENV) "$(PYTHON)"
	@touch $@

$(SGLANG)/.stamp: tools/cpu_sglang.sh pyproject.toml $(wildcard tests/sglang_on_cpu/*.* tests/sglang_on_cpu/*/*.py)
	tools/cpu_sglang.sh $(SGLANG) "$(PYTHON)"
	@touch $@

$(WHEELS)/.stamp: tools/engine_wheels.sh Makefile
	tools/engine_wheels.sh $(WHEELS) "$(PYTHON)" $(ENGINES)
	@touch $@

clean: ## Remove what these targets made.
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
