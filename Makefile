# Every target sets up .venv itself and reinstalls only when the requirements change.
PYTHON ?= python3
RUNS ?= runs
VENV := .venv
PY := $(VENV)/bin/python
export JAX_PLATFORMS ?= cpu
# Has glibc (Linux) ask for huge pages: on a CPU large arrays cost much time otherwise.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help quickstart test test-newest test-slow lint format bench bench-peers table1 clean
help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

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
	$(PY) eval_hessian.py --workdir='$(RUNS)/quickstart/sgd/seed_*,$(RUNS)/quickstart/sam/*/seed_*' --out=$(RUNS)/quickstart/compare

test: lint  ## lint, doctests and tests; about 20 minutes on 2 cores
	$(PY) -m pytest -n 2 -m 'not slow' --doctest-modules --doctest-glob='*.md' sam_jax input_pipelines models training measurements reports tasks studies docs tests

$(VENV)/newest/dev.stamp: requirements.txt requirements-dev.txt
	$(NEWEST) -m venv --clear $(VENV)/newest
	$(VENV)/newest/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

test-newest: $(VENV)/bin/python  ## contract suite and doctests on the machine's newest Python
	@newest=$$(.ci/newest_python $(PY)) && if [ -z "$$newest" ]; then \
	  echo "test-newest: skipped, no Python newer than that of $(VENV) is on this machine"; \
	else \
	  $(MAKE) --no-print-directory $(VENV)/newest/dev.stamp NEWEST="$$newest" && \
	  $(VENV)/newest/bin/python -m pytest -n 2 -m 'not slow' --doctest-modules --doctest-glob='*.md' sam_jax input_pipelines models training measurements reports tasks studies docs tests/sam_jax/test_contract.py; \
	fi

test-slow: $(VENV)/dev.stamp  ## the tests marked slow
	$(PY) -m pytest -n 2 -m slow tests

lint: $(VENV)/dev.stamp  ## ruff's checks and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/dev.stamp  ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/app.stamp  ## cost of a SAM step and of an HVP (MANUAL_DIR=DIR: molecules)
	$(PY) -m benchmarks.step_cost $(if $(MANUAL_DIR),--task=mutagenicity_gcn --manual_dir=$(MANUAL_DIR))

$(VENV)/peers.stamp: benchmarks/peers/requirements.txt | $(VENV)/bin/python
	$(PYTHON) -m venv $(VENV)/peers
	$(VENV)/peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

bench-peers: $(VENV)/app.stamp $(VENV)/peers.stamp  ## against PyTorch and PyTorch Geometric (MANUAL_DIR=DIR)
	$(PY) -m benchmarks.networks_against_torch --network=attention --batch_size=64 --peer_python=$(VENV)/peers/bin/python
	$(PY) -m benchmarks.networks_against_torch --network=wrn --peer_python=$(VENV)/peers/bin/python
	$(PY) -m benchmarks.gcn_epoch --manual_dir=$(MANUAL_DIR) --peer_python=$(VENV)/peers/bin/python

table1: $(VENV)/app.stamp  ## Table I of the paper beside the published one (MANUAL_DIR=DIR)
	JAX_PLATFORMS= $(PY) -m benchmarks.table_one --manual_dir=$(MANUAL_DIR) --out=$(RUNS)/table_one $(TABLE1_FLAGS)

clean:  ## remove .venv and caches, keep runs
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache .hypothesis
