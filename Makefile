# Each target is enough on a fresh machine with Python 3.11 or later and make.
PYTHON ?= python3
BIN := .venv/bin
# a process for each core, each with one thread
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo test quick lint docs clean

demo: .venv/demo  ## lottery tickets of LeNet-300-100 at 60x on real MNIST, and a report of them
	$(BIN)/gsm lottery lenet300
	$(BIN)/gsm report runs/lenet300-lottery-fast-x60-s0 -o runs/lenet300-lottery-fast-x60-s0/report.html

test: .venv/installed lint  ## everything that must hold
	$(PYTEST)

quick: .venv/installed  ## what to run after every edit, in under a minute
	$(BIN)/ruff check src tests benchmarks examples docs
	$(PYTEST) -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs/*.py
	$(BIN)/ruff format --check --line-length 88 --exclude '*.py' docs  # what a page shows without scrolling
	$(BIN)/mypy

docs: .venv/installed  ## the documentation site, in build/docs: a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs
	@echo "open build/docs/index.html"

# the demo does without what only the tests need
.venv/demo: EXTRA := experiments
.venv/installed: EXTRA := dev
.venv/demo .venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf .venv
