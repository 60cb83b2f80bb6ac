# make demo   fine-tune a small model on data/demo, and watch how its answer to a question changes
# make test   all tests
# make lint   ruff
# make bench  speed and memory, beside mlx_lm.lora and on large data (minutes)
#
# Each makes .venv first, with what it needs. PYTHON=python3.12 picks another Python (3.11 to 3.14).

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench
.DELETE_ON_ERROR:

# Eight answers, four questions for each. A fifth question for each is for validation, and one of
# them is asked: in five ways, so that wordings are learnt and not single questions.
demo: .venv/installed
	$(BIN)/python train_lora.py --train --data data/demo --adapter-file lora_finetune/demo.npz \
		--batch-size 4 --iters 64 --learning-rate 4e-4 --mask-prompt --steps-per-eval 16 \
		--steps-per-report 8 --temp 0 --prompt "물은 몇 도에서 끓습니까?"

test: .venv/installed-for-tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python tests/bench/cpu.py
	$(BIN)/python tests/bench/cpu.py --epochs 3
	$(BIN)/python tests/bench/cpu.py --vocabulary
	$(BIN)/python tests/bench/cpu.py --hybrid
	$(BIN)/python tests/bench/prepare.py
	$(BIN)/python tests/bench/tokenizing.py

# pip's own lines go to a file, and are shown where it fails.
INSTALL = { $(BIN)/pip install --disable-pip-version-check -r $(1) >.venv/install.log 2>&1 \
	|| { cat .venv/install.log; echo "README.md says for which systems this is" >&2; exit 1; }; }

CHECK = import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 14) else \
	"error: Python 3.11 to 3.14 is needed, and this is %d.%d; make PYTHON=python3.12 picks another" % v)

.venv/installed: requirements.txt
	@$(PYTHON) -c '$(CHECK)'
	@echo "Making .venv and installing MLX and what else requirements.txt names; takes a minute or more"
	@$(PYTHON) -m venv .venv
	@$(call INSTALL,requirements.txt)
	@touch $@

.venv/installed-for-tests: .venv/installed tests/requirements.txt
	@echo "Installing pytest and what else tests/requirements.txt names"
	@$(call INSTALL,tests/requirements.txt)
	@touch $@
