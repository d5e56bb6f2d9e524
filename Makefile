# Two commands are enough: `make train` and `make test`. Everything else is for those who change the code.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-full check format clean

train: .venv/ready
	$(BIN)/shoestring train

test: .venv/ready-test
	$(BIN)/pytest tests

check: .venv/ready-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: .venv/ready-check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp per extra: set-up runs again only when pyproject.toml changes, and never touches the network otherwise.
.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/ready-%: pyproject.toml | .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
