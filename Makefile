# `make demo` and `make test` need Python 3.11 or 3.12, git and make; they install everything else into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint types floors check clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 13) or sys.exit("dicm needs Python 3.11 or 3.12, this is " + sys.version.split()[0] + "; run: make PYTHON=python3.12 <target>")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' constraints.txt)"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt --group dev -e '.[anchors,export]'
	@touch $@

demo: install
	$(BIN)/dicm demo --out demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 25

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
