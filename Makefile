# Every target builds .venv by itself. constraints.txt pins torch, so that pip takes the CPU build where one is at hand.
PYTHON ?= python3
BIN := .venv/bin
THREADS := $(shell nproc 2>/dev/null || echo 2)
# One thread a process: two test processes with two threads each wait for one another most of the time
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=offline

.PHONY: demo test lint docs format setup clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt requirements-embedded.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || (echo "hfkd needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-embedded.txt
	touch .venv/ready

demo: .venv/ready
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --num_cpu_threads_per_process $(THREADS) recipes/self_distill_roberta.py --overwrite

test: .venv/ready
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs dist build site .mypy_cache .ruff_cache .pytest_cache
