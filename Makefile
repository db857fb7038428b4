# Every target sets up what it needs in .venv, from nothing: Python 3.10+, and a C++ compiler if there is one.
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
OUT ?= benchmarks/results
GPU_JOBS ?= 6
TESTS ?= tests
# Of this version pip takes the build that its index has: PyPI's for Linux comes with several GB of CUDA packages. Where
# an index has the CPU build too, TORCH=torch==2.13.0+cpu asks for that one.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml

.PHONY: demo test bench gpu gpu-build gpu-test gpu-bench gpu-attention gpu-models gpu-tune gpu-tune-tiles gpu-sanitize gpu-rehearsal lint format info clean
.DEFAULT_GOAL := test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@echo "== setting up $(VENV) (a few minutes the first time)"
	$(PIP) "$(TORCH)" 'setuptools>=77' wheel ninja pybind11 numpy
	$(PIP) --no-build-isolation -e '.[triton,build,demo,test]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m lorasp demo

info: $(VENV)/.installed
	$(BIN)/python -m lorasp info

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -q tests

bench: $(VENV)/.installed
	$(BIN)/python -m lorasp bench --out $(OUT)

# On a machine with a GPU, in the current Python environment and without network: build for that GPU, run the tests that
# need one, then the benchmarks. Each gpu-* target can be called alone; none has run on hardware yet.
gpu: gpu-build gpu-test gpu-bench gpu-attention gpu-models

gpu-build:
	TORCH_CUDA_ARCH_LIST=$$($(PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') \
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --no-index -e .

gpu-test:
	$(PYTHON) -m pytest -q -m gpu -n $(GPU_JOBS) --dist worksteal tests

gpu-bench:
	$(PYTHON) -m lorasp bench --device cuda --shapes llama3-8b square-large --out $(OUT)
	$(PYTHON) -m lorasp bench --device cuda --shapes square-large --dropout 0.1 --out $(OUT)
	$(PYTHON) -m lorasp bench --device cuda --shapes square-large --members 3 --out $(OUT)
	$(PYTHON) -m lorasp bench --device cuda --shapes tokens --providers peft-half peft-half-compile aten lorasp lorasp+fa --out $(OUT)
	$(PYTHON) -m lorasp bench --device cuda --op hidden_cut --out $(OUT)
	$(PYTHON) -m lorasp bench --device cuda --op consistency --out $(OUT)

gpu-attention:
	$(PYTHON) -m lorasp bench --device cuda --op dropkey_attention --seconds 10 --out $(OUT)

gpu-models:
	$(PYTHON) -m lorasp bench --device cuda --model llama-7b roberta-large t5-large --dropout 0.05 --out $(OUT)
	$(PYTHON) benchmarks/report.py --plots

# Writes the GPU's plan table; a second call goes on where the time ended.
gpu-tune:
	$(PYTHON) -m lorasp tune --ranks 16 64 --budget 540

gpu-tune-tiles:
	$(PYTHON) -m lorasp tune --op dropkey_attention --seconds 0.5 --budget 300
	$(PYTHON) -m lorasp tune --op lora_linear_skinny --seconds 0.3 --budget 240

# Every operator and backend on small shapes; without torch's caching allocator, which would hide accesses out of bounds.
gpu-sanitize:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) -m lorasp check --device cuda --backend triton cuda
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PYTHON) -m lorasp check --device cuda --backend triton cuda --dtype bf16

# Without a GPU, but with a CUDA build of torch and nvcc: the gpu tests on a device that computes nothing (tests/idle_gpu),
# which takes itself for sm_90. All of them take hours on two cores: TESTS names some.
gpu-rehearsal:
	TORCH_CUDA_ARCH_LIST=9.0 $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --no-index -e .
	$(PYTHON) tests/idle_gpu/run.py -m pytest -q -m gpu -rfE $(TESTS)

$(VENV)/.linters: pyproject.toml | $(BIN)/python
	$(PIP) 'ruff>=0.9' 'clang-format>=19'
	@touch $@

lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build *.egg-info lorasp/_C*.so
