# make demo   install what the demo needs, port the shipped checkpoint, compare, draw
# make test   install what the tests need and run all but the slow ones
# make bench  the same, and measure what benchmarks/ measures: some minutes of a quiet machine
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.demo
	$(BIN)/gam-flax demo --force

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.load_resnet50

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[torch,plots]"
	touch $@

$(VENV)/.test: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) gam-flax-demo
