# Each target does its own set-up on a bare checkout; all it needs is Python 3.11 or later and make.
#
#   make quickstart                       generate data, train, evaluate, export, report: a few minutes on two cores
#   make quickstart OUT=DIR ARGS="..."    write to DIR; hand further options to `hrm-text quickstart`
#   make test  [ARGS="-k packing"]        the tests, on WORKERS=2 processes
#   make check                            lint, format, types, layers: what CI runs before the tests
#   make format                           mend what ruff can mend
#   make clean                            remove the environment and the tools' caches; runs/ stays
#
# PyPI's PyTorch for Linux is the CUDA build (several GB). For the small CPU build (or another CUDA), name its index:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
#
# PYTHON=python3.12 chooses the interpreter that the environment is made from.

PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
PIP     := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt \
           $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help quickstart test check format clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.run
	$(VENV)/bin/hrm-text quickstart $(if $(OUT),--out "$(OUT)") $(ARGS)

# One thread per worker: the workers already share the cores. Stealing work leaves the tests of a file together, so that
# what they share is made once.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -q $(ARGS)

check: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# The stamps say which set is installed from the present pyproject.toml and constraints.txt.

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing hrm-text into $(VENV); PyTorch is the large part (a minute or two) ..."
	$(PIP) -e '.[serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing hrm-text and its development tools into $(VENV); PyTorch is the large part (a minute or two) ..."
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.run $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "hrm-text needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo not found)." >&2; \
	    echo "Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
