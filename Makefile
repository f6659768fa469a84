# `make run` and `make test` need nothing but Python 3.11+ with venv; everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_ARGS ?=

.PHONY: run test check format bench curves clean

run: $(STAMP)
	$(BIN)/relod robot --task create --mode local-only $(RUN_ARGS)

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

# The loop while working: as `test`, without the tests that start whole processes or learn.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -m "not slow"

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Each in its short form, some minutes; the tables of benchmarks/README.md become what this machine measured.
bench: $(STAMP)
	$(BIN)/relod bench all --short --tables benchmarks/README.md

# The README's first picture: three runs in real time, 45 minutes.
curves: $(STAMP)
	$(BIN)/python benchmarks/learning.py --clock wall --seeds 0,1,2 --minutes 9
	$(BIN)/relod plot out/learning --out docs/learning-curves.svg --reference "scripted search=-83" \
		--reference "random, held 60 cycles=-441" --reference "uniformly random=-603"

# constraints.txt pins what was tested; remove it from the line to try newer releases.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,plots,gym]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
