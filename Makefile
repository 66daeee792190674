# make demo: export, verify and run the shipped checkpoint.   make test: everything CI checks.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: test lint soak timing demo clean

test: $(VENV)/.dev lint
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: $(VENV)/.demo
	$(BIN)/dijiang export examples/tiny-python -o demo --force
	$(BIN)/dijiang verify demo --against examples/tiny-python --text examples/tiny-python/held_out.txt
	$(BIN)/dijiang run demo -p "def main(" --max-tokens 64 --temperature 0.8 --top-p 0.95 --seed 1

soak: $(VENV)/.dev
	$(BIN)/pytest -m soak -s

timing: $(VENV)/.dev
	$(BIN)/pytest -m timing -s

# The environments: demo has what a Jetson needs, no torch; dev has everything.
$(VENV)/.demo: EXTRAS := cpu,export
$(VENV)/.dev: EXTRAS := dev
$(VENV)/.demo $(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
