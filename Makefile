# Two commands do everything on a fresh machine with Python 3.11+, pip and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
OUT ?= demo-out

.PHONY: setup demo test cluster unit ranks lint docs bench notebook clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	touch $@

demo: setup
	$(RUN)/pixrec demo --out $(OUT)

# What needs Ray waits for processes a quarter of its time: the rest runs beside it, one after the other, and yields to it.
test: setup
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target cluster lint unit ranks docs YIELD='nice -n 10'

cluster: setup
	$(RUN)/python -m pytest tests/cluster

unit: setup
	$(YIELD) $(RUN)/python -m pytest tests/unit

ranks: setup
	$(YIELD) $(RUN)/python -m pytest tests/ranks

lint: setup
	$(YIELD) $(RUN)/ruff check .
	$(YIELD) $(RUN)/ruff format --check .
	$(YIELD) $(RUN)/mypy

# The documentation site, into site/. A warning is an error, a link that leads nowhere too.
docs: setup
	$(RUN)/python -m docs.assemble build/docs
	$(RUN)/zensical build --strict --clean
	$(RUN)/python -m docs.check site

bench: setup
	$(RUN)/python -m benchmarks

# Runs docs/quickstart.ipynb and keeps its outputs.
notebook: setup
	UPDATE_NOTEBOOK=1 $(RUN)/python -m pytest tests/cluster/test_notebook.py

clean:
	rm -rf $(VENV) $(OUT) build site .cache
