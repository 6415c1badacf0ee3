# `make demo` and `make test` work on a fresh clone: they make .venv first, and again when the pins change.
# PYTHON names the interpreter (3.11 or newer) that .venv is made from.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# Two processes of one thread each: on two cores 0.58 of the time of one process of two.
PYTEST := -m pytest -q -n 2 --dist loadfile

# deepspeed compiles a kernel when it is first used, never while it is installed.
export DS_BUILD_OPS = 0
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo docs test test-all test-real test-gpu test-lowest coverage check size clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not gpu"

# Every command once on SmolLM2-135M-Instruct, which a package carries; skipped, saying so, where it cannot be had.
test-real: $(INSTALLED)
	$(BIN)/python -m pytest -q -rs -m slow tests/real

# Installs nothing: a machine with an accelerator brings its own torch, and pytest.
test-gpu:
	python3 -m pytest -q -m gpu -rs

# In an environment of its own, with the lowest versions that are supported.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q "$$(grep '^torch==' constraints-lowest.txt)"
	.venv-lowest/bin/python -m pip install -q -c constraints-lowest.txt -e ".[test]"
	OMP_NUM_THREADS=1 .venv-lowest/bin/python $(PYTEST)

# Which lines the tests reach, in the processes they start too. A third longer than `make test`.
coverage: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt coverage
	$(BIN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run $(PYTEST); failed=$$?; $(BIN)/python -m coverage combine -q; \
	$(BIN)/python -m coverage report --skip-covered; exit $$failed

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/commands from the command line itself, tables of memory from plans, docs/models.md from the zoo.
docs: $(INSTALLED)
	$(BIN)/python tools/commands.py
	$(BIN)/python tools/models_table.py

size:
	@$(PYTHON) tools/size.py

clean:
	rm -rf .venv .venv-lowest .coverage* .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist

# torch comes first and alone, at its pin: a build of it that this machine prefers (such as the one for CPUs) is kept,
# and nothing after it pulls in another. `.[test]` is what the tests need; `.[dev]` is larger by lm-eval, wandb and
# tensorboard, which tests use where they are installed.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test]"
	@touch $@
