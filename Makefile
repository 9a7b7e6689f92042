# make demo   set-up, install, then attention on real input: on the GPU if there is one, else on the CPU
# make test   set-up with pinned packages, then the GoogleTest suite and pytest
#
# SYSTEM=1    (test) use python3's own packages and install nothing: for machines without a registry
# EXTRAS=...  (demo, test) further packages to install, for example EXTRAS=torch==2.13.0
# JOBS=N      parallel jobs
SYSTEM ?=
EXTRAS ?=
JOBS ?= $(shell nproc)
PYTEST_ARGS ?=

VENV := .venv
PYTHON := $(if $(SYSTEM),$(shell command -v python3),$(VENV)/bin/python)
BUILD := build/$(if $(SYSTEM),system,cpp)
# With SYSTEM=1 the package is staged below the build folder instead of installed.
STAGE := $(CURDIR)/$(BUILD)/stage
ifeq ($(SYSTEM),)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
else
export PYTHONPATH := $(STAGE)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

.PHONY: help demo test test-cpp test-python setup install lint format clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -7

demo: install
	$(PYTHON) -m flashcute demo

test: test-cpp test-python

# ---- set-up ------------------------------------------------------------------------------------

$(VENV)/.ready: requirements-dev.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

ifeq ($(SYSTEM),)
setup: $(VENV)/.ready
	$(if $(EXTRAS),$(PYTHON) -m pip install --quiet --disable-pip-version-check $(EXTRAS))

install: setup
	$(PYTHON) -m pip install --disable-pip-version-check --no-build-isolation .
else
setup:

install: $(BUILD)/.built
	cmake --install $(BUILD) --prefix $(STAGE) > $(BUILD)/install.log
endif

# ---- tests -------------------------------------------------------------------------------------

# GoogleTest and Google Benchmark: the system's, else apt-get where that needs no password, else fetched.
.PHONY: $(BUILD)/.built
$(BUILD)/.built: setup
	$(if $(SYSTEM),,tools/system_packages.sh)
	cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DFLASHCUTE_BUILD_TESTS=ON \
	  -DPython_EXECUTABLE=$(abspath $(PYTHON)) \
	  -DFLASHCUTE_BUILD_PYTHON=$(if $(SYSTEM),ON,OFF) -DFLASHCUTE_FETCH=$(if $(SYSTEM),OFF,ON) \
	  $(if $(FLASHCUTE_CUTLASS_DIR),-DFLASHCUTE_CUTLASS_DIR=$(abspath $(FLASHCUTE_CUTLASS_DIR))) \
	  $(if $(FLASHCUTE_CCCL_DIR),-DFLASHCUTE_CCCL_DIR=$(abspath $(FLASHCUTE_CCCL_DIR)))
	cmake --build $(BUILD) --parallel $(JOBS)

test-cpp: $(BUILD)/.built
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error --parallel $(JOBS)

test-python: install
	$(PYTHON) -m pytest $(PYTEST_ARGS)

# ---- for developers ----------------------------------------------------------------------------

CXX_FILES = $(shell git ls-files '*.hpp' '*.cpp')

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
