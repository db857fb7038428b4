# Every target sets up what it needs in .venv, from nothing: Python 3.10+, and a C++ compiler if there is one.
PYTHON ?= python3
VENV ?= .venv
OUT ?= benchmarks/results
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# The CPU build of torch on Linux; an unpinned torch pulls several GB of CUDA packages.
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml

.PHONY: demo test bench gpu lint format info clean
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@echo "== setting up $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" 'setuptools>=77' wheel ninja pybind11 numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[triton,build,demo,test]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m lorasp demo

info: $(VENV)/.installed
	$(BIN)/python -m lorasp info

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -q tests

bench: $(VENV)/.installed
	$(BIN)/python -m lorasp bench --out $(OUT)

# In the current Python environment, without network: build, the tests that need a GPU, the benchmarks.
gpu:
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
	mkdir -p $(OUT)
	$(PYTHON) -m pytest -q -m gpu tests
	$(PYTHON) -m lorasp bench --device cuda --out $(OUT)
	$(PYTHON) -m lorasp bench --op dropkey_attention --device cuda --out $(OUT)

$(VENV)/.linters: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'ruff>=0.9' 'clang-format>=19'
	@touch $@

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build *.egg-info lorasp/_C*.so
