# Two commands are enough: `make train` and `make test`. Everything else is for those who change the code.
PYTHON ?= python3
BIN := .venv/bin
# As many test files at a time; a file stays in one process, with what its tests share.
WORKERS ?= 2
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable

# The oldest Triton that pyproject.toml takes: torch's build for CUDA brings it, beside that for CPUs lies the newest.
OLD := $(shell sed -n 's/.*"triton>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OLD_PATH := $(CURDIR)/.venv/triton-$(OLD)

.PHONY: train test test-full test-cluster cluster-packages test-triton check format clean

train: .venv/ready
	$(BIN)/shoestring train parallel.pp=2 parallel.dp=2 parallel.ep=2 run.micro_batch=2

test: .venv/ready-test
	$(PYTEST) tests

# What `make test` leaves out: the wide versions of tests, marked `full`.
test-full: .venv/ready-test
	$(PYTEST) tests -m "full and not gpu"

# Tests on a real Slurm, which `make test` skips where there is none, and their wide versions.
test-cluster: cluster-packages .venv/ready-test
	SHOESTRING_CLUSTER=required $(PYTEST) tests/cluster -m "not gpu"

# Debian's packages for these, where one of their commands is missing.
CLUSTER := slurmctld slurmd slurm-client openmpi-bin iproute2 procps
cluster-packages:
	@for program in slurmctld slurmd srun mpirun ip tc pkill; do \
		PATH="$$PATH:/usr/sbin" command -v $$program >/dev/null || missing="$$missing $$program"; \
	done; \
	test -z "$$missing" || { test "$$(id -u)" = 0 && apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(CLUSTER); } || \
		{ echo "missing:$$missing. As root: apt-get install --no-install-recommends $(CLUSTER)" >&2; exit 1; }
# The tests of kernels once more on the oldest Triton, in a folder of its own that comes before what is installed: every
# kernel compiled for every chip, the narrow tests in the interpreter.
test-triton: .venv/ready-test $(OLD_PATH)
	test "$$(PYTHONPATH=$(OLD_PATH) $(BIN)/python -c 'import triton; print(triton.__version__)')" = $(OLD)
	PYTHONPATH=$(OLD_PATH) $(PYTEST) tests/unit/test_kernels_*.py -m "not gpu" -k "test_kernels_compile or not full"

$(OLD_PATH): | .venv/ready
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==$(OLD)
	mv $@.part $@

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
