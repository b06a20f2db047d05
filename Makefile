# make demo   set up .venv and rehearse the whole job at small size; where a Docker engine answers, the provisioning too
# make test   set up .venv and run the whole test suite
# make lint   ruff, mypy, import-linter, yamllint, ansible-lint

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More words for pip: an index, a proxy, a wheelhouse.
PIP_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=

.PHONY: demo test lint venv clean help

help:
	@sed -n 's/^# //p' Makefile

demo: venv
	$(BIN)/mixtral-run rehearse $(DEMO_ARGS)
	$(BIN)/mixtral-run rehearse --host

test: venv
	$(BIN)/python -m pytest $(TEST_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/yamllint --strict .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-lint -q

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@./tests/setup_venv.sh $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
