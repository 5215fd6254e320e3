# `make demo` and `make test` need Python 3.11 or newer, git and make; they install everything else into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test smoke lint types floors check clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt .ci/install.py
	@$(PYTHON) .ci/install.py
	@touch $@

demo: install
	$(BIN)/dicm demo --out demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 25

# What a second version of Python has to show: every module is imported, an image goes through a codec, networks train.
smoke: install
	$(BIN)/python -m pytest tests/test_smoke.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

floors: install
	$(BIN)/lint-imports

check: test lint types floors

clean:
	rm -rf .venv demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
