# Everything a person or CI runs. PYTHON: which interpreter makes the environment. VENV: where it lies.
PYTHON ?= python3
VENV ?= .venv
# On Linux, PyPI's torch brings several GB of CUDA. Without an NVIDIA GPU:
#   make setup PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_OPTIONS ?=
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed

.PHONY: setup demo test test-all lint bench clean

setup: $(STAMP)

# A torch that is installed already (a CUDA build, say) is used as it is: the environment sees it and pip leaves it alone.
$(STAMP): pyproject.toml
	@if $(PYTHON) -c "import torch" 2>/dev/null; then \
		echo "using the torch of $$($(PYTHON) -c 'import sys; print(sys.executable)')"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	$(RUN) -m pip install --quiet $(PIP_OPTIONS) -e ".[train,export,onnx,dev]"
	@touch $(STAMP)

demo: setup
	$(RUN) benchmarks/demo.py --output runs/demo

test: setup
	$(RUN) -m pytest -m "not slow"

test-all: setup
	$(RUN) -m pytest

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: setup
	$(RUN) benchmarks/run.py engine --quick

clean:
	rm -rf $(VENV) runs build *.egg-info
