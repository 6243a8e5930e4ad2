# make demo | test | lint | bench | end-to-end: each sets up .venv by itself, once.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0

BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
SOURCES := $(shell find csrc -type f)

.PHONY: setup demo test lint format bench end-to-end clean
.DEFAULT_GOAL := test

setup: $(VENV)/.installed

# torch first and pinned: the extension is built against the torch that is there.
$(VENV)/.torch:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja pybind11
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/rlhf demo --overwrite

test: setup
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The peers, beside the torch and the transformers that are there; without them the table names who is missing.
$(VENV)/.peers: $(VENV)/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet "$(TORCH)" "rlhf-kernels[bench]" && touch $@ || true

# Less than ten minutes; benchmarks/results/ then has the numbers, `python -m benchmarks --readme` shows them.
bench: $(VENV)/.peers
	$(BIN)/python -m benchmarks --json --plot --seconds 510

# Our PPO beside TRL's, about five minutes; writes benchmarks/results/end-to-end.json, its plot and README.md.
end-to-end: setup
	$(BIN)/python -m benchmarks.end_to_end

clean:
	rm -rf build *.egg-info rlhf_kernels/*.so
