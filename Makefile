# Everything a new user types. Each target does its own set-up in .venv; a second call starts at once.
#
#   make demo        build, make the sample clip, stream it, answer three questions, write out/demo
#   make test        the whole CPU suite
#   make build       compile csrc/ and bindings/ into the tree, incrementally
#   make bench       microbenchmarks of every op on this machine
#   make sanitize    the ops' tests with the CPU kernels under AddressSanitizer and UBSan (Linux, GCC)
#   make lint        ruff and clang-format; make format applies them
#   make packaging   wheel and sdist, built and imported from an empty folder
#   make gpu-check   on a machine with a GPU: build, GPU tests, compute-sanitizer, benchmarks

PYTHON ?= python3
VENV ?= .venv
# Pinned so that every machine tests the same thing: on Linux PyPI's build, which has CUDA. For the
# CPU alone, or where the driver wants another CUDA, name a build of 2.6 or newer (and
# PIP_EXTRA_INDEX_URL where it lies), as in TORCH="torch==2.13.0+cpu".
TORCH ?= torch==2.13.0
# What the interpreter and the cross-compile gates were tested with. Builds of torch with CUDA bring
# their own Triton, which is then left alone.
TRITON ?= triton==3.6.0
# CUDA is compiled where there is a GPU; VICO_CUDA=1 compiles it wherever nvcc is.
ifndef VICO_CUDA
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
export VICO_CUDA := 0
endif
endif

# Threads that wait for each other sleep: on a machine that does anything else, spinning costs more.
demo test: export OMP_WAIT_POLICY ?= passive

# Relative, since the checkout may lie in a folder whose name has a space; BIN_PATH is to be quoted.
BIN := $(VENV)/bin
BIN_PATH := $(abspath $(BIN))
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
SUFFIX = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
NATIVE := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/include/vico/*.h bindings/*)

.PHONY: demo test build bench sanitize lint format packaging gpu-check clean help
.DEFAULT_GOAL := help
# A python that could not make a virtual environment leaves half of one behind.
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml setup.py CMakeLists.txt | $(BIN)/python
	@echo "Installing torch and what else is needed into $(VENV): a few minutes"
	$(PIP) install -q --upgrade pip
	$(PIP) install -q "$(TORCH)"
	$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || $(PIP) install -q "$(TRITON)"
	VICO_COMPILE=0 $(PIP) install -q -e ".[dev]" "cmake>=3.24" ninja "pybind11>=2.13"
	@touch $@

build: $(STAMP)
	@PATH="$(BIN_PATH):$$PATH" cmake -S . -B build/cmake -G Ninja -Wno-dev --log-level=WARNING \
	  -DPython_EXECUTABLE="$(BIN_PATH)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" >build-configure.log 2>&1 \
	  || { cat build-configure.log; exit 1; }
	@rm -f build-configure.log
	@PATH="$(BIN_PATH):$$PATH" cmake --build build/cmake --parallel
	@# Moved into place: copying over a module that a running process has mapped would crash it.
	@# Imported before that: a module that does not load must not replace one that does.
	@cmp -s build/cmake/_C$(SUFFIX) vicostream_kernels/_C$(SUFFIX) || \
	  { (cd build/cmake && "$(BIN_PATH)/python" -c "import torch, _C") && cp build/cmake/_C$(SUFFIX) build/_C.new && mv -f build/_C.new vicostream_kernels/_C$(SUFFIX); }

# Once for each instruction set that this machine has: of a better one VICO_ISA would make the best.
ISAS = import vicostream_kernels.backends as b; all = "baseline avx2 avx512 avx512bf16 amx".split(); \
  print(*all[:1 + all.index(b.info()["native"]["isa"])])
SANITIZED := build/sanitize
sanitize: build
	PATH="$(BIN_PATH):$$PATH" VICO_CUDA=0 cmake -S . -B $(SANITIZED) -G Ninja -Wno-dev --log-level=WARNING \
	  -DPython_EXECUTABLE="$(BIN_PATH)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" \
	  -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize=alignment -fno-omit-frame-pointer -g1 -D_GLIBCXX_ASSERTIONS"
	PATH="$(BIN_PATH):$$PATH" cmake --build $(SANITIZED) --parallel
	set -e; for isa in $$($(BIN)/python -c '$(ISAS)'); do \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_WAIT_POLICY=passive \
	  PYTHONPATH=tests VICO_SANITIZED="$(abspath $(SANITIZED))/_C$(SUFFIX)" VICO_ISA=$$isa \
	  $(BIN)/python -m pytest -q -n auto --maxprocesses 4 -p kit.sanitized tests/ops -k "not reference-cpu and not out_of_memory"; \
	done

demo: build
	$(BIN)/vicostream run sample --preset live --report out/demo --show-pruning out/demo

# A file of tests stays in one process; tests/conftest.py says which come first.
test: build
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: build
	$(BIN)/vicostream bench

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu,$(NATIVE))

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu,$(NATIVE))

packaging: $(STAMP)
	$(BIN)/pytest tests/packaging -m packaging

# No network and no virtual environment: the machine's own python has torch, Triton and pytest.
# Where all GPUs are Hoppers CUDA is compiled for them alone: in a third of the time.
# GPU_OPTIONS="--skip=benchmark" and the like go to the check, GPU_BUILT=1 takes what the last call
# has built, GPU_BUDGET is seconds for everything, the build included.
GPU_OPTIONS ?=
GPU_BUILT ?=
GPU_BUDGET ?= 580
GPU_KINDS = $(sort $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null))
GPU_TARGET = $(if $(filter-out 9.0,$(GPU_KINDS)),,$(if $(GPU_KINDS),90a-real))
GPU_INSTALL = "$(GPU_PYTHON)" -m pip install -q --no-index --no-build-isolation --no-deps --target $(GPU_SITE) .
GPU_PYTHON ?= $(shell python3 -c "import torch" 2>/dev/null && echo python3 || echo "$(BIN_PATH)/python")
GPU_SITE := out/gpu-check/site

gpu-check:
	@nvidia-smi -L >/dev/null 2>&1 || { echo "make gpu-check needs an NVIDIA GPU; none was found" >&2; exit 2; }
	@# Without our CUDA kernels, where they do not build, the check can't pass, but it tells of the others.
	started=$$(date +%s) && \
	  { [ -n "$(GPU_BUILT)" ] || { rm -rf $(GPU_SITE) && mkdir -p $(GPU_SITE) && export PATH="$$PATH:/usr/local/cuda/bin" && \
	    { VICO_CUDA_ARCHITECTURES=$(GPU_TARGET) VICO_CUDA=1 VICO_STRICT=1 $(GPU_INSTALL) || VICO_CUDA=0 $(GPU_INSTALL); }; }; } && \
	  cd out/gpu-check && PYTHONPATH="$(abspath $(GPU_SITE))" "$(GPU_PYTHON)" -m vicostream_kernels.bench.gpu_check --root "$(CURDIR)" --budget $$(($(GPU_BUDGET) + started - $$(date +%s))) $(GPU_OPTIONS)

clean:
	rm -rf build out dist vicostream_kernels/_C*.so *.egg-info
