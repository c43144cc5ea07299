# make demo   install what the demo needs, port the shipped checkpoint, compare, draw
# make test   install what the tests need and run all but the slow ones
# make bench  the same, and measure what benchmarks/ measures: an hour of a quiet machine
# make tpu-check  compile GAM and ResNet-50 + GAM for TPUs, without one, and check the figures
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test test-all lint bench tpu-check clean

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
	$(BIN)/python -m benchmarks.gam_block
	$(BIN)/python -m benchmarks.gam_block_gpu
	$(BIN)/python -m benchmarks.yolov5
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.convolution_model check

# In an environment of its own: where libtpu is installed, jax looks for a TPU at every start.
tpu-check: $(VENV)-tpu/.tpu-check
	$(VENV)-tpu/bin/python -m benchmarks.tpu_check

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[torch,plots]"
	touch $@

$(VENV)/.test: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(VENV)/.demo $@

$(VENV)-tpu/.tpu-check: $(SOURCES)
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/pip install --quiet --constraint constraints.txt --editable ".[train]"
	-$(VENV)-tpu/bin/pip install --quiet --constraint constraints.txt --editable ".[tpu-check]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-tpu gam-flax-demo
