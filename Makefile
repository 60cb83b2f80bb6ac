# make demo   fine-tune the demo model on lora_finetune/data and ask it a question
# make test   all tests
# make lint   ruff
# make bench  speed and memory beside mlx_lm.lora (minutes)
#
# Each makes .venv first, with what it needs. PYTHON=python3.12 picks another Python (3.10 or newer).

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python train_lora.py --train --test \
		--batch-size 2 --iters 30 --learning-rate 2e-4 --steps-per-report 10 \
		--val-batches 5 --test-batches 5 --adapter-file lora_finetune/demo.npz \
		--max-tokens 60 --prompt "$$(printf '### 질문:\n하늘은 왜 파랗게 보입니까?\n\n### 답변:\n')"

test: .venv/installed-for-tests
	$(BIN)/python -m pytest

lint: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python tests/bench/compare_mlx_lm.py
	$(BIN)/python tests/bench/compare_mlx_lm.py --float32

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed; make PYTHON=python3.12 picks another")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-for-tests: .venv/installed tests/requirements.txt
	$(BIN)/pip install --disable-pip-version-check -r tests/requirements.txt
	touch $@
