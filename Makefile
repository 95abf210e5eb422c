# One command each. They need make and Python 3.11 or newer with venv and pip; the rest is installed into folders
# named after the interpreter, once, and again when pyproject.toml changes: make test PYTHON=python3.13

PYTHON ?= python3
ID := $(shell $(PYTHON) -c 'import platform, sys; print(sys.implementation.name, platform.python_version() + sys.abiflags, sep="-")')
VENV := .venv-$(or $(ID),missing)
DEV := $(VENV)-dev/bin
PYTEST := -m pytest -m "not slow" -p no:cacheprovider
# What knows no system call is not run again on plain maps.
PLAIN := $(foreach name,layouts_grid layouts_npy layouts_zarr crc32c indexing picture compatibility foreign large \
	package fill records checksums alignment readme demo dask \
	array_reading array_machine crash_arrays crash_fuzz allocators examples,--ignore=tests/test_$(name).py)

.DEFAULT_GOAL := help
.PHONY: help demo test test-optimized test-crash test-all compat lint format clean
.SECONDARY:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)-demo/.ready  ## make a picture of itself in parallel, be killed halfway, go on, check all of it
	@rm -f blockstore-demo.png
	$(VENV)-demo/bin/python -m blockstore demo

test: lint  ## lint, types, the whole suite with the coverage gate; at the same time on plain maps, too
	$(DEV)/coverage erase
	@BLOCKSTORE_PORTABLE=1 $(DEV)/coverage run --parallel-mode $(PYTEST) $(PLAIN) >.portable.log 2>&1 & plain=$$!; \
	$(DEV)/coverage run --parallel-mode $(PYTEST) tests/test_[a-e]*.py >.first.log 2>&1 & first=$$!; \
	$(DEV)/coverage run --parallel-mode $(PYTEST) tests/test_[f-z]*.py blockstore; failed=$$?; \
	show() { echo "$$1:"; if [ $$2 -eq 0 ]; then tail -n 1 $$3; else cat $$3; failed=1; fi; }; \
	wait $$first; show "the first half" $$? .first.log; \
	wait $$plain; show "with BLOCKSTORE_PORTABLE=1" $$? .portable.log; \
	exit $$failed
	$(DEV)/coverage combine --quiet
	$(DEV)/coverage report

test-optimized: $(VENV)-dev/.ready  ## the suite under python -O, where no assert of the library would hold
	$(DEV)/python -O $(PYTEST)

test-crash: $(VENV)-dev/.ready  ## kill, cut the power, fail the disk: the whole laboratory; needs root for most, QUICK=1 for a tenth
	$(DEV)/python -m crashlab $(if $(QUICK),--quick) $(PARTS)

test-all: test test-optimized test-crash  ## everything: test, test-optimized, test-crash, and the slow tests
	$(DEV)/python -m pytest -m slow || [ $$? -eq 5 ]

compat: $(VENV)-dev/.ready  ## read arrays with every tool there is, write docs/compatibility.md; needs PyPI, npm and node
	$(DEV)/python -m compat $(READERS)

lint: $(VENV)-dev/.ready  ## ruff, formatting and strict types
	$(DEV)/ruff check .
	$(DEV)/ruff format --check .
	$(DEV)/mypy

format: $(VENV)-dev/.ready  ## put the code in order
	$(DEV)/ruff check --fix .
	$(DEV)/ruff format .

clean:  ## remove all that these commands make
	rm -rf .venv-* .asv build dist *.egg-info .coverage* .portable.log .first.log blockstore-demo* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(VENV)-NAME has the package as it lies here, with the extra NAME.
$(VENV)-%/.ready: pyproject.toml
	@[ -n "$(ID)" ] || { echo "$(PYTHON) does not run: name another with PYTHON=" >&2; exit 1; }
	@echo "installing into $(@D), once"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

-include benchmarks/bench.mk
