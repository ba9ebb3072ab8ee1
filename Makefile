# Two commands matter: `make serve` (install what is missing, serve the demo model) and `make test`.
# Everything lives in .venv; a finished install is one stamp file, so calling again costs nothing.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Without an NVIDIA GPU one exact torch is installed first: a range could pull gigabytes of CUDA. Where an index of
# CPU builds can be reached, `make install TORCH_INDEX=https://download.pytorch.org/whl/cpu` takes it from there.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
TORCH := $(if $(filter 0,$(HAS_GPU)),torch==2.13.0,torch)
TORCH_INDEX ?=
# Comes with a torch for GPUs; without one, tests interpret and compile its kernels.
TRITON := $(if $(filter 0,$(HAS_GPU)),'triton==3.6.0; sys_platform == "linux"')

MODEL ?= demo
ARGS ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
UNIT_TIER := -n auto --maxprocesses 4 --dist loadfile tests/test_architecture.py tests/unit
# Tests of dashboards and alerts want what no package index has: apt-get install prometheus prometheus-alertmanager chromium
TOOLS := prometheus promtool amtool chromium
MISSING := $(foreach tool,$(TOOLS),$(if $(shell command -v $(tool)),,$(tool)))
NO_TOOLS_TIER := $(if $(strip $(MISSING)),--ignore=tests/deploy/test_observability.py --ignore=tests/deploy/test_prometheus_rules.py)
NO_GPU_TIER := $(if $(filter 0,$(HAS_GPU)),--ignore=tests/gpu)

.PHONY: install dev serve test test-clients test-deploy lint check chaos render dashboards bench bench-gpu bench-moe
.PHONY: bench-peers clean help

help:
	@echo "make serve [MODEL=demo ARGS='--tp 2']   install if needed, then serve on port 8000"
	@echo "make install                            .venv with everything a user needs"
	@echo "make check                              ruff, pyright, architecture, unit tests"
	@echo "make test                               the whole test suite"
	@echo "make test-clients                       other people's clients, each in an environment of its own, at a real server"
	@echo "make test-deploy                        the chart with helm and on a real Ray, beginning to end (needs PostgreSQL)"
	@echo "make render                             chart's schema, manifests and copies, from what they are made of"
	@echo "make chaos                              kill, stop and slow down processes under load: the long form"
	@echo "make dashboards                         Grafana's JSON from observability/panels, and a picture of each"
	@echo "make bench [ARGS='--concurrency 8']     load the server that is running"
	@echo "make bench-gpu                          Qwen's models on one GPU, beside its bandwidth and matrix rate (8 minutes)"
	@echo "make bench-moe                          decode a mixture of experts on this CPU, beside its memory's bandwidth"
	@echo "make bench-peers [ARGS='--dry-run']     beside llama.cpp, vLLM, OpenVINO and transformers on this CPU; resumable"
	@echo "make clean                              remove .venv and what tools left behind"

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is missing: apt-get install python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments: apt-get install python3-venv (or python3.11-venv)"; exit 1; }
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing $(TORCH)"
	@$(PIP) install -qq -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	@echo "Installing qwen-ray and what it needs (a few minutes)"
	@$(PIP) install -qq -c constraints.txt -e .
	@$(BIN)/python -m qwen_ray.kernels.cpu.library
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what tests and checks need"
	@$(PIP) install -qq -c constraints.txt -e '.[dev]' $(TRITON)
	@touch $@

serve: install
	@exec $(BIN)/qwen-ray serve $(MODEL) $(ARGS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

check: lint
	$(PYTEST) $(UNIT_TIER)

test: dev
	$(PYTEST) $(UNIT_TIER)
	$(if $(strip $(MISSING)),@echo "Dashboards and alerts are not tested: $(strip $(MISSING)) missing")
	$(PYTEST) $(NO_GPU_TIER) $(NO_TOOLS_TIER) -m "not chaos and not deploy" --ignore=tests/unit --ignore=tests/clients tests
	$(PYTEST) -m chaos tests/chaos -k again_and_again

test-clients: dev
	$(PYTEST) -s tests/clients $(ARGS)

test-deploy: dev
	$(PYTEST) tests/deploy tests/cluster/test_serve_config.py $(ARGS)

chaos: dev
	QWEN_RAY_CHAOS_LONG=1 $(PYTEST) -s -m chaos tests/chaos tests/cluster $(ARGS)

render: dev
	$(BIN)/python -m deploy.render "$$($(BIN)/python tests/deploy/tools.py)"

# The JSON from its source, and a picture of each from a running server's metrics (apt-get install prometheus chromium).
dashboards: dev
	$(BIN)/python -m observability.panels
	QWEN_RAY_PICTURES=observability/dashboards $(PYTEST) tests/deploy/test_observability.py

bench: install
	@$(BIN)/qwen-ray bench $(ARGS)

bench-gpu: install
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-moe: install
	@$(BIN)/python benchmarks/moe.py $(ARGS)

bench-peers: dev
	@$(BIN)/python -m benchmarks.peers $(ARGS)

clean:
	rm -rf $(VENV) *.egg-info build dist .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
