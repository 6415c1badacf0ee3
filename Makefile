# `make demo` and `make test` work on a fresh clone: they make .venv first, and again when the pins change.
# PYTHON names the interpreter (3.11 or newer) that .venv is made from.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# deepspeed compiles a kernel when it is first used, never while it is installed.
export DS_BUILD_OPS = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-all test-gpu check size clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -q

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not gpu"

# Installs nothing: a machine with an accelerator brings its own torch, and pytest.
test-gpu:
	python3 -m pytest -q -m gpu -rs

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

size:
	@$(PYTHON) tools/size.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist

# torch comes first and alone, at its pin: a build of it that this machine prefers (such as the one for CPUs) is kept,
# and nothing after it pulls in another. `.[test]` is what the tests need; `.[dev]` is larger by lm-eval, wandb and
# tensorboard, which no test here imports.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	@touch $@
