# Every target makes its own environment: all that is needed is Python 3.10 or newer (up to 3.14 is pinned) and pip.
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUNTIME := $(VENV)/.runtime
# Without compiling: most of the 20,000 modules are never imported, and those that are keep what their first import compiled.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e
JOBS   ?= 2
PYTHON ?= $(shell command -v python3.11 || command -v python3)

.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-thorough test-slow lint docs ros-test ros-lock soak fleet-test fleet fleet-lock constraints resolve ready-bundle kernels engines fullsize one-line fiffdepth quantization bench-rewrites accuracy acceptance train clean

help:
	@echo "make demo            run fe2e-tiny on three photographs (installs what runs on a CPU, and no torch)"
	@echo "make test-unit       the quick tests (a minute)"
	@echo "make test            the test suite (five minutes on two quiet cores)"
	@echo "make test-thorough   the same and further variants of it, as CI runs them (fifteen to twenty-five minutes)"
	@echo "make test-slow       the tests that take minutes each"
	@echo "make ros-test        the tests of the ROS 2 node (two minutes, and 360 MB once for an environment with rclpy)"
	@echo "make soak            the node under ten times its rate for ten minutes"
	@echo "make ros-lock        pin that environment anew in ros2/test-requirements.txt"
	@echo "make fleet-test      Triton Inference Server (a minute, and 400 MB once for an environment with the server)"
	@echo "make fleet           the same, and Ray: trees, shards, 2,000 images while actors and a node go, requests while replicas go (fifteen minutes)"
	@echo "make fleet-lock      pin that environment anew in tests/fleet/triton-requirements.txt"
	@echo "make lint            ruff, mypy, import contracts"
	@echo "make docs            build the site, strictly, into out/site"
	@echo "make ready-bundle    build the fe2e-tiny that comes with the package, and the demo's photographs"
	@echo "make constraints     pin every dependency anew in constraints.txt (UPGRADE=--upgrade takes newer versions)"
	@echo "make resolve         which extra can be installed on which Python and platform, asked of the package index"
	@echo "make kernels         compile the GPU kernels for every architecture, and what they use"
	@echo "make engines         build TensorRT engines in every precision and size, and what they take"
	@echo "make fullsize        build full-size FE2E from random weights, bf16, fp8, fp8 with attention (three hours, 70 GB)"
	@echo "make one-line        the one line at full size, from a server on this machine (an hour, 65 GB)"
	@echo "make fiffdepth       build full-size FiffDepth in every precision, and time it beside diffusers (45 minutes, 15 GB)"
	@echo "make quantization    calibrate fe2e-tiny to fp8 and int8, and score every precision (15 minutes)"
	@echo "make bench-rewrites  what each exact rewrite saves, measured here"
	@echo "make accuracy        score fe2e-tiny on held-out synthetic scenes"
	@echo "make acceptance CHECKPOINT=... DATA=...  build the real model and compare with its authors' scores (on a GPU)"
	@echo "make train           train fe2e-tiny anew (two and a half hours on two cores; resumes)"
	@echo "make clean           remove the environment, caches and out/"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No python3 found: install Python 3.11, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10: install Python 3.11, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[dev]"
	@touch $@

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@test -f $(STAMP) || { echo '$(INSTALL) ".[cpu]"' && $(INSTALL) ".[cpu]"; }
	@touch $@

demo: $(RUNTIME)
	@$(BIN)/densegeo demo

ready-bundle: $(STAMP)
	$(BIN)/densegeo build --model fe2e-tiny --precision fp32 --backend onnxruntime --output runtime/bundles/fe2e-tiny
	$(BIN)/python -m densegeo.training.photographs

# Workers take tests from each other; what they share is built once (tests/support/shared.py).
one-line: $(STAMP)
	$(BIN)/python -m tests.full_size --json out/one-line.json

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-unit: $(STAMP)
	$(PYTEST) -m unit

test: $(STAMP)
	$(PYTEST) -m "not thorough and not slow and not gpu and not ros and not fleet"

test-thorough: $(STAMP)
	$(PYTEST) -m "not slow and not gpu and not ros and not fleet"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout=3600

ros-test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ros

soak: $(STAMP)
	$(BIN)/python -m tests.ros2.soak --seconds 600

ros-lock: $(STAMP)
	$(BIN)/uv --no-config pip compile --quiet --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  $(UPGRADE) --output-file ros2/test-requirements.txt ros2/test-requirements.in

fleet-test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fleet tests/fleet

fleet: fleet-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout=3600 tests/fleet

fleet-lock: $(STAMP)
	$(BIN)/uv --no-config pip compile --quiet --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  $(UPGRADE) --output-file tests/fleet/triton-requirements.txt tests/fleet/triton-requirements.in

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

constraints: $(STAMP)
	$(BIN)/uv --no-config pip compile --quiet --universal --python-version 3.10 --all-extras --no-annotate $(UPGRADE) \
	  --constraints constraints.in --output-file constraints.txt pyproject.toml

resolve: $(STAMP)
	@$(BIN)/python -m tests.resolution

kernels: $(STAMP)
	$(BIN)/python -m densegeo.kernels.compile --output out/kernels

engines: $(STAMP)
	$(BIN)/python benchmarks/engine_builds.py $(wildcard out/fullsize/bf16)

fullsize: $(STAMP)
	$(BIN)/python benchmarks/fullsize.py
	$(BIN)/python benchmarks/fullsize.py --precision fp8
	$(BIN)/python benchmarks/fullsize.py --precision fp8 --attention

fiffdepth: $(STAMP)
	$(BIN)/python benchmarks/fiffdepth.py build
	$(BIN)/python benchmarks/fiffdepth.py speed

quantization: $(STAMP)
	$(BIN)/python benchmarks/quantization.py

bench-rewrites: $(STAMP)
	$(BIN)/python benchmarks/rewrites.py
	$(BIN)/python benchmarks/rewrites.py --model fiffdepth

accuracy: $(STAMP)
	$(BIN)/densegeo build --model fe2e-tiny --output out/fe2e-tiny
	$(BIN)/python benchmarks/accuracy.py out/fe2e-tiny

# More options of `densegeo build` go into BUILD.
acceptance: $(STAMP)
	@test -n "$(CHECKPOINT)" && test -n "$(DATA)" || { echo "Say make acceptance CHECKPOINT=... DATA=..." >&2; exit 2; }
	$(BIN)/python benchmarks/acceptance.py --checkpoint "$(CHECKPOINT)" --data "$(DATA)" -- $(BUILD)

train: $(STAMP)
	$(BIN)/python training/train.py

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
