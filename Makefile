# Two commands set a newcomer up: `make repro` and `make test`. Everything runs from .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUNBUFFERED := 1
# Waiting threads sleep: a fifth less CPU on small models, the same bits.
export OMP_WAIT_POLICY ?= PASSIVE
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
FAST := -m "not slow and not chaos and not gpu and not ci"
CI := -m "ci and not slow and not chaos and not gpu"
CPU := -m "not slow and not chaos and not gpu"
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -X faulthandler -m pytest $(SHARED) --max-worker-restart 0
EXTRAS := train,openvino,nncf,trt-rtx,parquet,dev
# The versions the project was tested with; LATEST=1 takes the newest that pyproject.toml allows.
PINNED := $(if $(LATEST),,-c constraints.txt)
ROUNDS ?= 100
MINUTES ?= 8
OUT ?= .work/gpu
export RECIPE DATA OUT # the shell reads them as variables: a path may hold any character
comma := ,
PACKAGES := pipeline exporters stages benchmarks

.DEFAULT_GOAL := help
.PHONY: help venv constraints repro test test-ci test-all gpu coverage chaos check format size clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINNED) -e '.[$(EXTRAS)]'
	@touch $@

venv: $(VENV)/.installed  ## .venv with everything installed, LATEST=1 without constraints.txt

constraints: $(VENV)/.installed  ## constraints.txt from what .venv holds, for every Python and system (uv resolves them)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/python -m pip freeze --exclude-editable --exclude uv > constraints.txt
	@$(BIN)/uv pip compile pyproject.toml $(addprefix --extra ,$(subst $(comma), ,$(EXTRAS))) --extra kernels --extra benchmarks \
	  --universal --python-version 3.10 --no-header --no-annotate --quiet --output-file constraints.txt
	@$(BIN)/python -m pip uninstall --quiet --yes uv

repro: $(VENV)/.installed  ## the whole chain on params.yaml, or on RECIPE=name [DATA=path]; prints where the report is
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo "repro: not a git repository; run 'git init' here first (DVC needs it)" >&2; exit 2; }
	@$(BIN)/python -m stages.check $(if $(RECIPE),--recipe "$$RECIPE") $(if $(DATA),--data "$$DATA") $(if $(FORCE),--force)
	@$(BIN)/python -m pipeline.project.dvc_locks
	@$(BIN)/dvc repro
	@echo "report: $(CURDIR)/reports/index.html (for CI: reports/edge.md)"

test: $(VENV)/.installed  ## every module's guarantee, about 17 minutes on 2 cores
	$(PYTEST) $(FAST)

test-ci: $(VENV)/.installed  ## the rest of the CPU suite, 15 to 30 minutes: whole chains, kills, several processes, large matrices
	$(PYTEST) $(CI)

test-all: $(VENV)/.installed  ## both, and the slow and the GPU tests
	$(PYTEST) -m "not chaos"

gpu:  ## all that only a CUDA device can tell, MINUTES=8 [DATA=cifar100] [OUT=DIR]; needs no .venv (docs/gpu.md)
	@python="$$(command -v $(BIN)/python || echo $(PYTHON))"; \
	"$$python" -m benchmarks.gpu --minutes $(MINUTES) --out "$$OUT" $(if $(DATA),--data "$$DATA")

coverage: $(VENV)/.installed  ## lines of pipeline/, stages/, exporters/ that test and test-ci run
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest $(SHARED) $(CPU)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --sort=cover

chaos: $(VENV)/.installed  ## accidents at random moments anywhere in the chain, ROUNDS=100 of them, 20 minutes
	$(PYTEST) -m chaos
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --rounds $(ROUNDS)

check: $(VENV)/.installed  ## ruff, mypy strict, house tests
	$(BIN)/ruff format --check $(PACKAGES) tests
	$(BIN)/ruff check $(PACKAGES) tests
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

format: $(VENV)/.installed  ## ruff format and the safe fixes
	$(BIN)/ruff format $(PACKAGES) tests
	$(BIN)/ruff check --fix $(PACKAGES) tests

size:  ## lines by package, tests apart
	@for p in $(PACKAGES) tests; do printf '%-12s %s\n' $$p "$$(find $$p -name '*.py' -exec cat {} + | wc -l)"; done

clean:  ## everything a run made, not .venv
	rm -rf data artifacts .work .dvc/cache .dvc/tmp reports/train reports/curves reports/bench/*.npz \
		reports/edge.json reports/edge.md reports/evidence.json reports/index.html reports/pareto.csv
