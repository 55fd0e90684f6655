# The commands to remember. Each sets up what it needs in .venv, on a machine with Python 3.11+, pip and make only.

VENV   := .venv
PYTHON := $(VENV)/bin/python
OLDEST := .venv-oldest
# Two processes, each with whole files of tests and half of the cores; where one is gone, the run ends.
TWO    := -n 2 --dist loadfile --max-worker-restart 0

# Nothing below fetches anything but packages: the model travels with the repository.
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
# Python keeps what it has compiled: without, each process that a test starts takes some ten seconds longer to import.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check fix docs bench test-oldest clean

help:
	@echo "make demo         ask the shipped reader about a receipt and a page, draw what the shipped detector finds"
	@echo "make test         the test suite: no network, no GPU, up to twenty minutes"
	@echo "make test-slow    the tests that take several processes, or minutes: up to twenty"
	@echo "make check        formatting, lint and types, as continuous integration sees them"
	@echo "make fix          format the code and mend what lint can mend"
	@echo "make docs         the documentation site, into site/; fails on a broken link"
	@echo "make bench        time our parts against plain peers, ONNX Runtime and OpenVINO; ROWS=deform: some of it"
	@echo "make test-oldest  the suite on the oldest supported torch and transformers, in $(OLDEST)"
	@echo "make clean        remove both environments and the caches"

demo: $(VENV)/.ready-demo
	@$(PYTHON) examples/demo.py
	@$(PYTHON) examples/boards.py

test: $(VENV)/.ready-dev
	@echo "running the tests"
	@$(PYTHON) -m pytest -m "not slow" $(TWO)

test-slow: $(VENV)/.ready-dev
	@echo "running the slow tests"
	@$(PYTHON) -m pytest -m slow $(TWO)

check: $(VENV)/.ready-dev
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

fix: $(VENV)/.ready-dev
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

docs: $(VENV)/.ready-docs
	@$(PYTHON) docs/site.py
	@$(PYTHON) -m zensical build --clean --strict

# make bench ROWS="piip training": the rows whose table or name holds these words
bench: $(VENV)/.ready-bench
	@$(PYTHON) benchmarks/run.py $(ROWS)

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest $(TWO)

clean:
	rm -rf $(VENV) $(OLDEST) dist build site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

# ---- set-up: an environment, a stamp for what is installed in it, and both only once ----------------------------

# The first Python on the PATH that is new enough; empty where there is none.
find_python = for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
		$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$name && break; \
	done

# $(call make_environment,FOLDER). Debian's python3 may lack ensurepip; the pip beside it can then fill the folder.
define make_environment
	@python=$$($(find_python)); \
	if [ -z "$$python" ]; then \
		echo "Stepwell needs Python 3.11 or newer, and python3, python3.11, ... on your PATH are older or missing."; exit 1; \
	fi; \
	echo "making $(1) with $$($$python --version)"; \
	$$python -m venv $(1) >/dev/null 2>&1 \
		|| { $$python -m venv --clear --without-pip $(1) && $$python -m pip --python $(1)/bin/python install -q pip; } \
		|| { rm -rf $(1); echo "could not make $(1): on Debian and Ubuntu, 'apt install python3-venv python3-pip' helps"; exit 1; }
endef

# $(call install,FOLDER,PACKAGES). uv where it can be had, since it is several times quicker; else pip.
define install
	@echo "installing into $(1): $(2)"
	@echo "(torch and its companions are large: some minutes the first time, seconds the second)"
	@$(1)/bin/python -m uv --version >/dev/null 2>&1 \
		|| $(1)/bin/python -m pip install --quiet uv \
		|| echo "uv cannot be installed here; going on with pip"
	@if $(1)/bin/python -m uv --version >/dev/null 2>&1; then \
		$(1)/bin/python -m uv pip install --python $(1)/bin/python $(2); \
	else \
		$(1)/bin/python -m pip install --quiet $(2); \
	fi
endef

$(VENV)/bin/python:
	$(call make_environment,$(VENV))

$(OLDEST)/bin/python:
	$(call make_environment,$(OLDEST))

$(VENV)/.ready-demo: pyproject.toml | $(VENV)/bin/python
	$(call install,$(VENV),-e .)
	@touch $@

$(VENV)/.ready-dev: pyproject.toml | $(VENV)/bin/python
	$(call install,$(VENV),-e ".[dev]")
	@touch $@ $(VENV)/.ready-demo $(VENV)/.ready-docs

$(VENV)/.ready-docs: pyproject.toml | $(VENV)/bin/python
	$(call install,$(VENV),-e ".[docs]")
	@touch $@

$(VENV)/.ready-bench: $(VENV)/.ready-dev
	$(call install,$(VENV),-e ".[bench]")
	@touch $@

$(OLDEST)/.ready: pyproject.toml | $(OLDEST)/bin/python
	$(call install,$(OLDEST),-e ".[dev]" torch==2.11.0 torchvision==0.26.0 transformers==5.17.0)
	@touch $@
