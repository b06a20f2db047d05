# make demo   set up .venv and rehearse the whole job at small size; where a Docker engine answers, the provisioning too
# make check  lint and unit tests: a few minutes, for every change
# make test   the whole test suite, in two lanes; what CI runs after make lint
# make test-all  the same without taking over any result of an earlier run
# make soak   kills, damaged input and a simulated fleet, for 30 minutes; writes the table of docs/reliability.md
# make mutants  change one place of a module at a time and run its unit tests: what they do not notice; not part of CI
# make lock   write the locks: versions and hashes of all packages, digests of the base images; reads pip's index and registries
# make lint   ruff, mypy, import-linter, yamllint, ansible-lint

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More words for pip: an index, a proxy, a wheelhouse.
PIP_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=
SOAK_ARGS ?=
MUTANTS_ARGS ?=
LOCK_ARGS ?=
# Two at a time. The first two take nearly all of the time, each on one processor.
LINTERS := lint-mypy lint-ansible lint-ruff lint-imports lint-yaml

.PHONY: demo check test test-all soak mutants lock lint $(LINTERS) venv clean help

help:
	@sed -n 's/^# //p' Makefile

demo: venv
	$(BIN)/mixtral-run rehearse $(DEMO_ARGS)
	$(BIN)/mixtral-run rehearse --host

check: lint
	$(BIN)/python -m tests.lanes --unit $(TEST_ARGS)

test: venv
	$(BIN)/python -m tests.lanes $(TEST_ARGS)

test-all: export MIXTRAL_RUN_TEST_NO_CACHE := 1
test-all: test

soak: venv
	$(BIN)/python -m tests.soak --write $(SOAK_ARGS)

mutants: venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python -m tests.mutants $(MUTANTS_ARGS)

lock: venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[lock]'
	$(BIN)/python -m tests.locks $(LOCK_ARGS)

lint: venv
	@$(MAKE) --no-print-directory --keep-going -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync) $(LINTERS)

lint-ruff:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-mypy:
	$(BIN)/mypy

lint-imports:
	$(BIN)/lint-imports

lint-yaml:
	$(BIN)/yamllint --strict .

lint-ansible:
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-lint -q

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@./tests/setup_venv.sh $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
