# `make help` lists what can be made.

PYTHON ?= python3
# Test files at a time: most of a test's time is one core's, starting Spark and TensorFlow.
JOBS ?= 2
VENV := .venv
STAMP := $(VENV)/.complete
CLASSES := $(VENV)/spark-classes.jsa
# Starts the environment's Python with a Java for Spark.
RUN = JAVA_HOME=$$(tools/java_home.sh) && export JAVA_HOME && $(VENV)/bin/python
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet

# Spark's Python workers run in the same environment as the driver.
export PYSPARK_PYTHON := $(CURDIR)/$(VENV)/bin/python
export PYSPARK_DRIVER_PYTHON := $(PYSPARK_PYTHON)
# No start-up chatter of TensorFlow between the lines of progress.
export TF_CPP_MIN_LOG_LEVEL ?= 3
# A Spark installed elsewhere on this machine must not take the place of the pinned one.
unexport SPARK_HOME PYTHONPATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup mnist test check docs format dist clean distclean

help:  ## list what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
		printf '%-15s %s\n' "$$target" "$$text"; done

setup: $(STAMP)  ## make .venv with pinned versions of everything, and a JRE where there is no Java 17 or newer

# Without its stamp, .venv is the rest of an interrupted setup and made anew; with an old stamp it is brought up to date.
$(STAMP): requirements-dev.txt setup.cfg pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: no $(PYTHON): install Python 3.11, 3.12 or 3.13 with its venv module" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), TensorFlow needs 3.11 to 3.13:" \
			"install one and run 'make PYTHON=python3.12'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "make: $(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV): downloads about 1 GB the first time, which takes some minutes"
	@if [ -f $@ ] && $(VENV)/bin/python -c ''; then rm $@; else $(PYTHON) -m venv --clear $(VENV); fi
	@$(PIP) install --use-pep517 --requirement requirements-dev.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@tools/java_home.sh >/dev/null
	@touch $@

mnist: $(STAMP)  ## train softmax regression on MNIST with two Spark workers; ARGS= for its options
	@$(RUN) -m examples.spark_mnist $(ARGS)

# In their own order: else files of few and long tests come last, and one process waits for the other.
test: $(CLASSES)  ## run the tests, the files of JOBS=2 at a time; ARGS='-k name' and the like for pytest
	@$(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Tests pass without it, and take longer.
$(CLASSES): $(STAMP)
	@$(RUN) tools/class_archive.py $@ 2>/dev/null || echo "make: no archive of Spark's classes: JVMs start slower"

check: $(STAMP)  ## lint, formatting and types
	@$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/python -m ruff format --check .
	@$(VENV)/bin/python -m mypy

docs: $(STAMP)  ## build the documentation's site in build/site
	@$(VENV)/bin/python -m mkdocs build --strict --site-dir build/site

format: $(STAMP)  ## put imports and formatting right
	@$(VENV)/bin/python -m ruff check --fix-only .
	@$(VENV)/bin/python -m ruff format .

# spark-submit --py-files takes no wheel, but the same bytes named .zip.
dist: $(STAMP)  ## build a wheel, and a zip for spark-submit --py-files, in dist/
	@rm -rf build dist
	@$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .
	@for wheel in dist/*.whl; do cp "$$wheel" "$${wheel%-py3-none-any.whl}.zip"; done
	@rm -rf build
	@ls dist/*

clean:  ## remove what builds, tests and tools wrote; keeps .venv, data and runs
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis spark-warehouse metastore_db derby.log
	@find tensorspark examples benchmarks tests tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove .venv too
	@rm -rf $(VENV)
