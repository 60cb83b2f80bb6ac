# make demo   fine-tune the demo model on lora_finetune/data and ask it a question
# make test   all tests
# make lint   ruff
# make bench  speed and memory, beside mlx_lm.lora and on large data (minutes)
#
# Each makes .venv first, with what it needs. PYTHON=python3.12 picks another Python (3.11 to 3.14).

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python train_lora.py --train --test \
		--batch-size 2 --iters 12 --learning-rate 5e-4 --steps-per-report 4 \
		--val-batches 2 --test-batches 2 --adapter-file lora_finetune/demo.npz \
		--prompt "The capital of France is" --max-tokens 40 --temp 0

test: .venv/installed-for-tests
	$(BIN)/python -m pytest

lint: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python tests/bench/cpu.py
	$(BIN)/python tests/bench/cpu.py --epochs 3
	$(BIN)/python tests/bench/cpu.py --vocabulary
	$(BIN)/python tests/bench/prepare.py
	$(BIN)/python tests/bench/tokenizing.py

.venv/installed: requirements.txt
	@$(PYTHON) lora_finetune/check_platform.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-for-tests: .venv/installed tests/requirements.txt
	$(BIN)/pip install --disable-pip-version-check -r tests/requirements.txt
	touch $@
