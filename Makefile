# `make demo` and `make test` do all the set-up themselves; they need python3, pip and a network.
PYTHON ?= python3
VENV ?= .venv
# A constraints file for pip, e.g. CONSTRAINTS=constraints/ci.txt for the versions that CI pins.
CONSTRAINTS ?=
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
SETUP_FILES := pyproject.toml setup.py $(CONSTRAINTS)
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help demo test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   install into $(VENV) and segment fresh toy scenes with the shipped tiny model"
	@echo "make test   install into $(VENV) and run all tests (PYTEST_ARGS='-k ops' selects)"
	@echo "make lint   ruff, mypy and clang-format"
	@echo "make clean  remove $(VENV) and everything built"
	@echo "PYTHON=python3.12 chooses the interpreter, CONSTRAINTS=constraints/ci.txt the versions that CI pins"

demo: $(VENV)/demo.stamp
	$(BIN)/errseg demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NATIVE),$(BIN)/clang-format --dry-run --Werror $(NATIVE))

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems ship venv without ensurepip: there the outer pip installs one into the new environment.
$(BIN)/python:
	@echo "Setting up $(VENV): a few minutes the first time."
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip "setuptools>=77,<82"

# Editable, so that what runs is the checkout; one install per goal, repeated only when these files change.
$(VENV)/demo.stamp: EXTRAS = train
$(VENV)/test.stamp: EXTRAS = test,train,bench,data,eval,ray
$(VENV)/lint.stamp: EXTRAS = test,train,bench,data,eval,ray,dev
$(VENV)/demo.stamp $(VENV)/test.stamp $(VENV)/lint.stamp: $(SETUP_FILES) | $(BIN)/python
	$(INSTALL) --editable ".[$(EXTRAS)]"
	@touch $@
