# Every target sets up .venv itself and reinstalls only when the requirements change.
PYTHON ?= python3
RUNS ?= runs
VENV := .venv
PY := $(VENV)/bin/python
export JAX_PLATFORMS ?= cpu

.PHONY: help quickstart test test-slow lint format bench bench-peers clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "sam_jax needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/app.stamp: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/app.stamp
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

quickstart: $(VENV)/app.stamp  ## train digits with SGD and SAM, measure both, compare
	$(PY) train.py --task=digits_mlp --optimizer=sgd,sam --seeds=3 --workdir=$(RUNS)/quickstart
	$(PY) eval_hessian.py --workdir=$(RUNS)/quickstart/sgd/seed_0,$(RUNS)/quickstart/sam/seed_0 --out=$(RUNS)/quickstart/compare

test: lint  ## lint, doctests and tests; under 8 minutes on 2 cores
	$(PY) -m pytest -n 2 -m 'not slow' --doctest-modules sam_jax tests

test-slow: $(VENV)/dev.stamp  ## the tests marked slow
	$(PY) -m pytest -m slow tests

lint: $(VENV)/dev.stamp  ## ruff's checks and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/dev.stamp  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/app.stamp  ## time and FLOPs of a SAM step and a Hessian-vector product
	$(PY) -m benchmarks.step_cost

bench-peers:  ## an epoch of SAM against PyTorch Geometric, in its own environment
	$(MAKE) --no-print-directory $(VENV)/app.stamp

clean:  ## remove .venv and caches, keep runs
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache .hypothesis
