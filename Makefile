# Two commands are enough: `make demo` trains and evaluates the quickstart, `make test` passes all
# tests. Both make their own virtual environment in .venv. The README has the plain pip equivalents.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# every test worker takes one thread: two-thread operations stall beside a busy process
WORKERS ?= 2

.PHONY: demo test lint types tests install install-dev format clean

demo: install
	$(BIN)/valkyrie train quickstart
	$(BIN)/valkyrie eval quickstart

test: lint types tests

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/mypy

tests: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
