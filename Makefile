PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo env test lint proof bench clean

demo: .venv/demo  ## train a small model on Shakespeare and let it write
	@# error 1: runs/demo is a run with other settings, which is then shown as it is
	$(BIN)/transnormer train recipes/demo.toml || [ $$? -eq 1 ]
	$(BIN)/transnormer generate --model runs/demo --prompt "ROMEO:" --max-tokens 300

env: .venv/env  ## everything that needs no GPU

test: .venv/env
	@# without these, tests would skip themselves
	@$(BIN)/python -c "import importlib.metadata as m, sys; [*map(m.version, ['tensorboard', 'torchao', *['triton'] * (sys.platform == 'linux')])]"
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: .venv/env
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy experiments

proof: .venv/env  ## the long proofs; docs/proof.md holds their last log
	@mkdir -p build
	$(BIN)/pytest -m proof -v | tee build/proof.log

bench: .venv/env  ## the figures of benchmarks/results
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/report.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

.venv/env: .venv/demo
	$(PIP) --editable '.[data,tensorboard,gpu,hf,peft,convert,eval,bits,float8,dev]'
	@touch $@

clean:
	rm -rf .venv build data runs
