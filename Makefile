# make setup | demo | test | check | bench: each sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# The S3 server of the tests has old-style dependencies: it lives in an environment of its own.
S3_VENV := .venv-s3
S3_STAMP := $(S3_VENV)/.installed

.PHONY: setup s3 demo test check bench bench-demo

setup: $(STAMP)

s3: $(S3_STAMP)

$(S3_STAMP): constraints-s3.txt
	test -x $(S3_VENV)/bin/python || $(PYTHON) -m venv $(S3_VENV)
	$(S3_VENV)/bin/python -m pip install --quiet --disable-pip-version-check swift -c constraints-s3.txt
	touch $(S3_STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $(STAMP)

demo: setup
	$(BIN)/repa demo

test: setup s3
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/store.py

bench-demo: setup
	$(BIN)/python benchmarks/demo_seeds.py
