# make demo   set-up, install, then attention on real input: on the GPU if there is one, else on the CPU
# make test   set-up with pinned packages, install, then the GoogleTest suite and pytest
# make docs   the same set-up, then the pages of docs/ as HTML: build/docs/index.html
# make tables the tables and plots of README.md and docs/, from the recorded lines; with ALL=1 also those of what the
#             compiler makes of each option and of errors on the CPU, which takes minutes
#
# TORCH=0     (test) do not install torch; tests that need it are skipped and say so
# SYSTEM=1    (demo, test) use python3's own packages and install nothing: for machines without a network
# JOBS=N      parallel jobs
TORCH ?= 1
SYSTEM ?=
JOBS ?= $(shell nproc)
PYTEST_ARGS ?=

VENV := .venv
PYTHON := $(if $(SYSTEM),$(shell command -v python3),$(VENV)/bin/python)
# One build folder for the package and the C++ tests: the library and the kernel images are compiled once.
BUILD := build/$(if $(SYSTEM),system,make)
# With SYSTEM=1 the package is staged below the build folder instead of installed.
STAGE := $(CURDIR)/$(BUILD)/stage
ifeq ($(SYSTEM),)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
else
export PYTHONPATH := $(STAGE)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
export FLASHCUTE_TEST_TORCH := $(TORCH)
PIP := $(PYTHON) -m pip --disable-pip-version-check

.PHONY: help demo test test-cpp test-python docs tables setup setup-torch configure-system install lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -9

demo: install
	$(PYTHON) -m flashcute demo

test: test-cpp test-python

# ---- set-up ------------------------------------------------------------------------------------

$(VENV)/.ready: requirements-dev.txt
	python3 -m venv $(VENV)
	$(PIP) install --quiet -r $<
	touch $@

$(VENV)/.docs: requirements-docs.txt $(VENV)/.ready
	$(PIP) install --quiet -r $<
	touch $@

$(VENV)/.torch: requirements-torch.txt $(VENV)/.ready
	$(PIP) install --quiet -r $<
	touch $@

ifeq ($(SYSTEM),)
setup: $(VENV)/.ready

setup-torch: $(if $(filter 0,$(TORCH)),,$(VENV)/.torch)

install: setup
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) install --no-build-isolation . \
	  --config-settings=build-dir=$(BUILD) --config-settings=build.targets=flashcute_package
else
setup setup-torch:

install: configure-system
	cmake --build $(BUILD) --parallel $(JOBS) --target flashcute_package
	cmake --install $(BUILD) --component python --prefix $(STAGE) > $(BUILD)/install.log
endif

configure-system:
	cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(PYTHON) \
	  -DFLASHCUTE_BUILD_PYTHON=ON -DFLASHCUTE_BUILD_TESTS=ON -DFLASHCUTE_FETCH=OFF \
	  $(if $(FLASHCUTE_CUTLASS_DIR),-DFLASHCUTE_CUTLASS_DIR=$(abspath $(FLASHCUTE_CUTLASS_DIR))) \
	  $(if $(FLASHCUTE_CCCL_DIR),-DFLASHCUTE_CCCL_DIR=$(abspath $(FLASHCUTE_CCCL_DIR)))

# ---- tests -------------------------------------------------------------------------------------

# GoogleTest and Google Benchmark: the system's, else apt-get where that needs no password, else fetched.
test-cpp: install
	$(if $(SYSTEM),,tools/system_packages.sh)
	cmake -S . -B $(BUILD) -DFLASHCUTE_BUILD_TESTS=ON -DFLASHCUTE_BUILD_BENCHMARKS=ON
	cmake --build $(BUILD) --parallel $(JOBS)
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error --parallel $(JOBS)

test-python: install setup-torch
	$(PYTHON) -m pytest $(PYTEST_ARGS)

# ---- documentation -----------------------------------------------------------------------------

docs: install $(VENV)/.docs
	$(PYTHON) -m sphinx --fail-on-warning --keep-going --quiet --jobs $(JOBS) -b html docs build/docs
	@echo build/docs/index.html

tables: install $(VENV)/.docs
	$(PYTHON) tools/docs/generate.py $(if $(ALL),--all)

# ---- for developers ----------------------------------------------------------------------------

CXX_FILES = $(shell git ls-files '*.hpp' '*.cpp' '*.cu')

lint: setup
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/clang-format -i $(CXX_FILES)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf build dist $(VENV)
