# Two commands set everything up: `make demo` and `make test`. Both are quick the second time.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_OUT ?= demo-out
# As many processes as there are cores, four at most (tests/conftest.py).
PARALLEL := --numprocesses auto --dist worksteal

.PHONY: help setup demo test soak check lint types unit bench browser clean

help:
	@echo "make demo    filter the sample photos with a text policy, through Ray, and write a report"
	@echo "make test    the tests (sets everything up first)"
	@echo "make soak    the tests and the long ones: more kills, thousands of rows, every damaged policy"
	@echo "make check   lint, types and unit tests"
	@echo "make bench   measure speed and memory"
	@echo "make clean   remove the virtual environment and the demo's output"

setup: $(READY)

$(READY): pyproject.toml constraints.txt constraints-dev.txt
	@test -n "$(PYTHON)" || { echo "clipfilter needs Python 3.11, 3.12 or 3.13 on the PATH" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-dev.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/clipfilter run samples/photos --policy demo --out $(DEMO_OUT) --engine ray --thumbnails show --max-failures 0.1

test: $(READY) browser
	$(BIN)/python -m pytest $(PARALLEL)

soak: $(READY) browser
	$(BIN)/python -m pytest $(PARALLEL) -m ""

check: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/python -m pytest $(PARALLEL) tests/unit -q -m "not integration and not soak"

bench: $(READY)
	$(BIN)/python benchmarks/throughput.py

# The report's tests drive Chromium; where it is missing and cannot be installed they say so and are skipped.
browser:
	@command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && \
	  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium; } >/dev/null 2>&1; } || \
	echo "Chromium is not installed: browser tests will be skipped"

clean:
	rm -rf $(VENV) $(DEMO_OUT)
