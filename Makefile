# Everything a person or CI runs. PYTHON: which interpreter makes the environment. VENV: where it lies.
PYTHON ?= python3
VENV ?= .venv
# On Linux, PyPI's torch brings several GB of CUDA. Without an NVIDIA GPU (setup says so):
#   make setup PIP_OPTIONS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_OPTIONS ?=
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed

.PHONY: docs setup demo test test-all fuzz lint bench bench-full bench-record bench-twice clean tensorrt-bindings pycuda-bindings resolve

setup: $(STAMP)

# A torch of the right version that PYTHON has already (a CUDA build, say) is used as it is: a .pth file shows the new environment
# where it lies, also from within another virtual environment, and pip leaves alone what satisfies it.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@place=$$($(PYTHON) -c "import os, torch; v = tuple(map(int, torch.__version__.split('.')[:2])); \
		print(os.path.dirname(os.path.dirname(torch.__file__)) if (2, 11) <= v < (2, 14) else '')" 2>/dev/null); \
	if [ -n "$$place" ]; then echo "using the torch in $$place"; \
		echo "$$place" > "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer-torch.pth"; \
	elif [ "$$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia ] && [ -z "$(PIP_OPTIONS)" ]; then \
		echo "no NVIDIA driver here: if pip fetches torch with CUDA (several GB), see PIP_OPTIONS in the Makefile"; fi
	$(RUN) -m pip install --quiet $(PIP_OPTIONS) -e ".[train,metrics,logging,export,onnx,openvino,node,ray,dev]"
	@touch $(STAMP)

# For the tests that hold our code against the real TensorRT on a machine without a GPU (150 MB, NVIDIA's licence, tests alone): the names
# of three versions, and the real parser and builder of TensorRT for RTX. Without them those tests are skipped, with
# MASK2CT_TENSORRT_BINDINGS set to their folder they fail. Polygraphy (Apache-2.0) is a second opinion on our graphs.
BINDINGS = $(VENV)/tensorrt-bindings
LEAN = 11.4.0.106
RTX = 1.7.1.116

tensorrt-bindings: $(BINDINGS)/.installed

$(BINDINGS)/.installed: $(STAMP) Makefile
	rm -rf $(BINDINGS)
	for version in 10.13.2.6 10.16.1.11 11.4.0.106; do \
		$(RUN) -m pip install --quiet --no-deps --target $(BINDINGS)/$$version tensorrt-cu13-bindings==$$version || exit 1; done
	$(RUN) -m pip install --quiet --no-deps --target $(BINDINGS)/lean tensorrt-lean-cu13-bindings==$(LEAN) tensorrt-lean-cu13-libs==$(LEAN)
	$(RUN) -m pip install --quiet --no-deps --target $(BINDINGS)/rtx tensorrt-rtx-cu13-libs==$(RTX) \
		tensorrt-rtx-cu13-bindings==$(RTX) polygraphy==0.53.6
	$(RUN) -m pip install --quiet --no-deps --target $(BINDINGS)/cuda cuda-core==1.2.2 cuda-bindings==13.5.0 cuda-pathfinder==1.9.0 numpy
	@touch $@

# For the slow test that runs the real PyCUDA on a stand-in driver: compiles it (minutes) against the toolkit in CUDA_ROOT.
PYCUDA = $(VENV)/pycuda-bindings
CUDA_ROOT ?= /usr/local/cuda

pycuda-bindings: $(PYCUDA)/.installed

$(PYCUDA)/.installed: $(STAMP)
	mkdir -p $(PYCUDA)/home $(PYCUDA)/stub
	echo "int nothing(void) { return 0; }" | gcc -shared -fPIC -Wl,-soname,libcuda.so.1 -x c - -o $(PYCUDA)/stub/libcuda.so
	printf "CUDA_ROOT = '$(CUDA_ROOT)'\nCUDA_ENABLE_CURAND = False\nCUDADRV_LIB_DIR = ['$(abspath $(PYCUDA))/stub']\n" > $(PYCUDA)/home/.aksetup-defaults.py
	HOME=$(abspath $(PYCUDA))/home PATH="$(CUDA_ROOT)/bin:$$PATH" $(RUN) -m pip install --quiet --no-deps --target $(PYCUDA)/site pycuda==2026.1
	@touch $@

demo: setup
	$(RUN) tools/demo.py --output runs/demo

test: setup
	$(RUN) -m pytest -m "not slow"

test-all: setup
	$(RUN) -m pytest

fuzz: setup
	MASK2CT_FUZZ=2000 $(RUN) -m pytest tests/test_fuzz.py

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Does every extra resolve on every Python that we say? Asks the index, installs nothing but uv (MIT or Apache-2.0).
resolve: setup
	$(RUN) -m pip install --quiet "uv>=0.9,<1"
	$(RUN) tools/resolve_extras.py

# The documentation's site, in build/site; a warning is an error.
docs: setup
	$(RUN) -m pip install --quiet $(PIP_OPTIONS) "mkdocs-material>=9.6,<10" "mkdocstrings[python]>=1.0,<2"
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict # NO_MKDOCS_2_WARNING: its notice of a successor

# docs/results/benchmarks.md says what each suite measures. bench: a size for a laptop; bench-full: 300 x 512 x 512 and every contender.
SUITES = engine stream memory coldstart io train

bench: setup
	$(RUN) benchmarks/run.py $(SUITES) --quick

bench-full: setup
	$(RUN) benchmarks/run.py $(SUITES) commands
	$(RUN) benchmarks/harness/targets.py

# The same, kept in benchmarks/results/history.jsonl, and the tables of docs/results/throughput.md anew: on a machine that does nothing else.
bench-record: setup
	$(RUN) benchmarks/run.py $(SUITES) commands --record
	$(RUN) benchmarks/harness/targets.py --record
	$(RUN) benchmarks/report.py
	$(RUN) benchmarks/report.py --tables

# Do two runs say the same? Twice as long as bench.
bench-twice: setup
	$(RUN) benchmarks/run.py $(SUITES) --quick --json runs/bench/one.json
	$(RUN) benchmarks/run.py $(SUITES) --quick --json runs/bench/other.json
	$(RUN) benchmarks/harness/reproducibility.py runs/bench/one.json runs/bench/other.json

clean:
	rm -rf $(VENV) runs build *.egg-info
