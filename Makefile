# `make train`, `make eval` and `make test` each set up what they need, once.
RECIPE ?= sandbox_trace
RUN ?=
TASKS ?=
PRESET ?=
ARGS ?=
METHODS ?= trace
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train plan eval test lint bench-overhead bench-learning bench-preference bench-evals bench-gpu docs clean

train: .venv/.run
	$(BIN)/trl-ext train $(RECIPE) $(ARGS)

plan: .venv/.run
	$(BIN)/trl-ext plan $(RECIPE) $(ARGS)

eval: .venv/.run
	$(BIN)/trl-ext eval $(RUN) $(if $(TASKS),--tasks $(TASKS)) $(if $(PRESET),--preset $(PRESET)) $(ARGS)

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench-overhead: .venv/.dev
	$(BIN)/python -m tests.bench.overhead $(ARGS)

bench-learning: .venv/.dev
	$(BIN)/python -m tests.bench.learning --methods $(METHODS) $(ARGS)

bench-preference: .venv/.dev
	$(BIN)/python -m tests.bench.preference $(ARGS)

bench-evals: .venv/.dev
	$(BIN)/python -m tests.bench.evals $(ARGS)

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
