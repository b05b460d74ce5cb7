# Needs Python (3.11 or newer), git and make. Everything else goes into .venv.
#   make demo    install, then the main job: distil two students, score them, export them (demo/)
#   make test    install, then every unit test
#   make slow    install, then the tests that take longer: about an hour and a half
#   make lint | docs | wheel
#   make notebooks   install, then run the notebooks on a quick demo, or on the one that FEWSTEP_DEMO names
# PYTHON=python3.12 picks another interpreter; PIP_ARGS is handed to every pip install (an index of CPU-only torch
# wheels, for example); TESTS and PYTEST_ARGS narrow `make test`.

PYTHON ?= python3
PIP_ARGS ?=
TESTS ?= tests
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)

.PHONY: demo test slow lint format docs wheel notebooks clean
.DELETE_ON_ERROR:

demo: $(VENV)/.base
	$(BIN)/fewstep demo

# One thread a process: with as many processes as cores, torch's own threads would only queue for the same cores.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 $(PYTEST_ARGS) $(TESTS)

# Not in parallel: some of these tests start processes of their own, and some count time.
slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --durations=15 $(PYTEST_ARGS) $(TESTS)

lint: $(VENV)/.docs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS) tests/test_notebooks.py

# First the sdist, then the wheel out of it: a stale build/ cannot slip deleted files in.
wheel: $(VENV)/.dev
	rm -rf build dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist site *.egg-info

# The files below are stamps: each says that its install is newer than pyproject.toml.
$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fewstep needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"
	@touch $@

$(VENV)/.base: $(VENV)/.pip pyproject.toml
	@echo "installing fewstep and its dependencies into $(VENV) (torch is large: minutes on a first run)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable . --group dev
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) --editable ".[docs]"
	@touch $@
