# make demo: trains and scores on the embedded demo set. make test: the tests. Both set up a fresh machine first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# another package index for torch alone, e.g. PyTorch's own with builds for the CPU
TORCH_INDEX ?=
TEST_ARGS ?=
DEMO_ARGS ?=
PEFT_TESTS := $(VENV)/test-sources/peft-0.21.2.tar.gz
SOURCES := $(shell find csrc masm_ext python _build_backend -type f -not -path '*/__pycache__/*' -not -name '*.so')

.PHONY: help demo test test-kernels test-abi docs gpu-proof gpu-check gpu-test gpu-sanitize lint format clean
help:
	@echo "make demo   train and score on the embedded demo set (2 to 5 minutes on 2 cores); results in demo-run/"
	@echo "make test   build, install and run the tests (about 18 minutes on 2 cores)"
	@echo "make test-kernels   every kernel compiled, interpreted, emulated, sanitized and mutated (about half an hour)"
	@echo "make test-abi   one build of the package beside torch $(OTHER_TORCHES) (downloads 6 GB)"
	@echo "make docs   the documentation site, in build/site"
	@echo "make gpu-proof  on an NVIDIA GPU: build, tests, times and sanitizers in 14 minutes; results in gpu-proof/"
	@echo "make gpu-check   on an NVIDIA GPU: gpu-test, then gpu-sanitize (see docs/gpu.md)"
	@echo "make gpu-test   the tests that need a GPU"
	@echo "make gpu-sanitize   tests of the operators and the optimizer under compute-sanitizer; SANITIZERS=\"$(SANITIZERS)\""
	@echo "make lint   ruff and clang-format, as CI runs them"
	@echo "make clean  remove the virtual environment and build folders"

demo: $(BIN)/.installed
	$(BIN)/masm demo --out demo-run $(DEMO_ARGS)

# One process a core. A run that prints nothing for 30 seconds names the tests that are running.
PYTEST := $(BIN)/python -m pytest -n auto --dist load --maxschedchunk 1

test: $(BIN)/.installed $(PEFT_TESTS) $(VENV)/vision/.installed
	$(PYTEST) $(TEST_ARGS)

test-kernels: $(BIN)/.installed $(VENV)/triton-3.6/.installed
	$(PYTEST) -m kernels $(TEST_ARGS)

# One build beside the oldest torch that it serves and the newest: 6 GB of downloads, so not part of test-kernels.
OTHER_TORCHES ?= 2.10.0 2.15.0
test-abi: $(BIN)/.installed $(OTHER_TORCHES:%=$(VENV)/torch-%/.installed)
	$(BIN)/python -m pytest -m kernels tests/package/test_abi.py $(TEST_ARGS)

$(VENV)/torch-%/.installed: $(BIN)/python
	@echo "== installing torch $* into an environment of its own"
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --quiet torch==$* numpy safetensors tqdm $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

# On a machine with an NVIDIA GPU, with the environment that docs/gpu.md sets up (a CUDA build of torch, nvcc).
GPU_PYTHON ?= python
GPU_PROOF ?= gpu-proof
SANITIZED := tests/gpu/test_ops_on_gpu.py tests/gpu/test_masked_adamw_on_gpu.py tests/gpu/test_optimizer_on_gpu.py -k "not graph and not opcheck and not waits and not same_bits"
SANITIZER_ARGS ?=
SANITIZERS ?= memcheck racecheck initcheck synccheck
gpu-proof:
	$(GPU_PYTHON) benchmarks/gpu_proof.py --out $(GPU_PROOF)

gpu-check: gpu-test gpu-sanitize

gpu-test:
	$(GPU_PYTHON) -m pytest -m gpu

gpu-sanitize:
	@command -v compute-sanitizer >/dev/null || { echo "make: compute-sanitizer is missing: it comes with the CUDA toolkit; put its folder on PATH"; exit 1; }
	for tool in $(SANITIZERS); do \
		echo "== compute-sanitizer --tool $$tool"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 --launch-timeout 0 \
			$(GPU_PYTHON) -m pytest -m gpu $(SANITIZED) $(SANITIZER_ARGS) || exit 1; \
	done

# The documentation site, in build/site. A broken link or an undocumented argument is an error.
docs: $(BIN)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(BIN)/.docs: $(BIN)/.installed
	$(PIP) mkdocs-material "mkdocstrings[python]"
	@touch $@

CLANG_FORMATTED := $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
lint: $(BIN)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run --Werror $(CLANG_FORMATTED)

format: $(BIN)/.installed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix . && $(BIN)/clang-format -i $(CLANG_FORMATTED)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing: install Python 3.10 or newer, or set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"make: Python {v[0]}.{v[1]} is too old: masm_ext needs 3.10 or newer; set PYTHON=...")'
	@command -v $${CXX:-c++} >/dev/null || { echo "make: no C++ compiler: install g++ 11 or newer (Debian: apt install g++), or set CXX=..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: Python lacks venv (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Torch and the build tools first: the package is built against the torch that will run it.
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
$(BIN)/.tools: $(BIN)/python constraints.txt
	@echo "== installing torch and the build tools into $(VENV)"
	$(PIP) torch $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP) numpy scikit-build-core cmake ninja
	@touch $@

$(BIN)/.installed: $(BIN)/.tools CMakeLists.txt pyproject.toml $(SOURCES)
	@echo "== building masm_ext and installing it with its extras"
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation ".[detect,app,c2pa,dask,datasets,demo,heic,peers,peft,quantize,tensorboard,test]"
	@touch $@

# PEFT's own tests, which run on the MASM tuner; they stay in the environment. Without network those tests skip.
$(PEFT_TESTS): $(BIN)/.installed
	-$(BIN)/python -m pip download --disable-pip-version-check --quiet --no-deps --no-binary :all: -d $(@D) peft==0.21.2 && touch $@

# A second Triton, that of common GPU images: kernels are proved on both.
$(VENV)/triton-3.6/.installed: $(BIN)/python
	@echo "== installing Triton 3.6 beside the pinned one"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $(@D) triton==3.6.0
	@touch $@

# timm and open_clip need torchvision. PyPI has its CUDA build only, and beside a CPU build of torch that build stops
# transformers from loading any model. So they are in a folder of their own (tests/detect/models/test_vision_packages.py).
$(VENV)/vision/.installed: $(BIN)/python constraints.txt
	@echo "== installing timm, open_clip and torchvision for their own tests (50 MB), beside the installed torch"
	$(PIP) --quiet --no-deps --upgrade --target $(@D) torchvision timm open_clip_torch ftfy wcwidth
	@touch $@

clean:
	rm -rf $(VENV) build demo-run
