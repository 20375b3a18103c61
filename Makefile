# One door to everything. `make` alone lists the targets.
# The first target that is run installs the project into .venv; later runs reuse it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The numerics here are small and many: one thread per process is faster and, on a shared machine, predictable.
export OMP_NUM_THREADS := 1

# Two files at a time, each from its first test to its last.
PYTEST_OPTIONS ?= -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help .venv demo test check bench clean

help:
	@echo "make demo    the whole study on synthetic speech: train, measure, prune, heal, report (CPU, minutes)"
	@echo "make test    all tests"
	@echo "make check   ruff, ruff format, yamllint, mypy, and the fast tests"
	@echo "make bench   CPU benchmarks against SpeechBrain and transformers, into benchmarks/results/ (minutes)"
	@echo "make .venv   install the project and its tools into .venv (the targets above do it when needed)"
	@echo "make clean   remove .venv and caches (results/ is kept)"
	@echo "PYTHON=...   the Python (3.11 or newer) that .venv is made with; default python3"

.venv: $(VENV)/.installed

# Made anew when pyproject.toml has changed; pip then only changes what differs.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed, $(PYTHON) is not; run: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "==> Installing into $(VENV) (torch is large: the first time takes minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	@echo "==> Installed: $$($(BIN)/python --version), $$($(BIN)/python -m pip list --format=freeze 2>/dev/null \
		| grep -E '^(torch|transformers|speechbrain|peft)==' | tr '\n' ' ')"
	@touch $@

demo: $(VENV)/.installed
	@echo "==> The demo: everything from scratch on synthetic speech; results go to results/"
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/Demo/run.sh

test: $(VENV)/.installed
	@echo "==> All tests (tests on real data skip with a reason where it is absent)"
	@$(BIN)/python -m pytest $(PYTEST_OPTIONS)

check: $(VENV)/.installed
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> yamllint"
	@$(BIN)/yamllint --strict .
	@echo "==> mypy (the package)"
	@$(BIN)/mypy
	@echo "==> Fast tests"
	@$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m 'not slow'

bench: $(VENV)/.installed
	@echo "==> CPU benchmarks; exit code 1 if a gate is missed"
	@$(BIN)/python benchmarks/cpu.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
