# Two commands matter: `make train` and `make test`. Each sets up what it needs, once.
RECIPE ?= sandbox_trace
ARGS ?=
METHODS ?= trace
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train plan test lint bench-overhead bench-learning bench-gpu docs clean

train: .venv/.run
	$(BIN)/trl-ext train $(RECIPE) $(ARGS)

plan: .venv/.run
	$(BIN)/trl-ext plan $(RECIPE) $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench-overhead: .venv/.dev
	$(BIN)/python -m tests.bench.overhead $(ARGS)

bench-learning: .venv/.dev
	$(BIN)/python -m tests.bench.learning --methods $(METHODS) $(ARGS)

bench-gpu: .venv/.dev
	$(BIN)/python -m tests.bench.gpu $(ARGS)

docs: .venv/.dev
	$(BIN)/python -m tests.bench.readme

clean:
	rm -rf .venv build *.egg-info

# torch goes first and pinned: any later package would otherwise choose a build of its own.
.venv/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.run
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
