# make demo    train with lying workers, in less than a minute; the picture lands in this folder
# make grid    six rules against six attacks: a heatmap in outputs/grids/digits/report
# make test    run one test of each kind, in minutes
# make test-all   run the rest of the tests, too
# make lint    style, types, import layers
# make check   lint and test
# make docs    the documentation as a site, in build/site; a warning is an error
# make chaos   thirty trainings on a parameter server whose workers are killed
#
# Needs Python 3.10 or newer with pip, nothing else: everything is installed into .venv on first use.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo grid test test-rest test-all lint check docs chaos clean

demo: .venv/demo-installed
	$(BIN)/lightning-byz demo

grid: .venv/demo-installed
	$(BIN)/lightning-byz grid configs/grids/digits.yaml

test: .venv/dev-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

test-rest: .venv/dev-installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --select rest

test-all: test test-rest

lint: .venv/dev-installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

docs: .venv/dev-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

chaos: .venv/dev-installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py

clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/%-installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --editable '.[$*]'
	touch $@
