# Two commands are enough: `make train` and `make test`. Everything else is for those who change the code.
PYTHON ?= python3
BIN := .venv/bin
# As many test files at a time; a file stays in one process, with what its tests share.
WORKERS ?= 2
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

.PHONY: train test test-full check format clean

train: .venv/ready
	$(BIN)/shoestring train parallel.pp=2 parallel.dp=2 parallel.ep=2 run.micro_batch=2

test: .venv/ready-test
	$(PYTEST) tests

# What `make test` leaves out: the wide versions of tests, marked `full`.
test-full: .venv/ready-test
	$(PYTEST) tests -m "full and not gpu"

check: .venv/ready-test .venv/ready-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/pytest tests/unit/test_house.py tests/unit/test_imports.py

format: .venv/ready-check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp is a copy of the pyproject.toml that was installed: set-up runs again when its content changes, not when git
# merely touches it, and otherwise nothing here needs the network.
.venv/ready: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or later is needed, for example: make PYTHON=python3.11 train" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	cmp -s pyproject.toml $@ || $(PIP) .
	@cp pyproject.toml $@

.venv/ready-%: pyproject.toml | .venv/ready
	cmp -s pyproject.toml $@ || $(PIP) ".[$*]"
	@cp pyproject.toml $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
