# Two commands do everything on a fresh machine with Python 3.11+, pip and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
OUT ?= demo-out

.PHONY: setup demo test unit ranks cluster lint bench clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(RUN)/pixrec demo --out $(OUT)

# What needs Ray leaves half of two cores idle; the rest runs beside it.
test: setup
	$(MAKE) --no-print-directory --jobs=2 cluster unit lint ranks

unit ranks cluster: setup
	$(RUN)/python -m pytest tests/$@

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: setup
	$(RUN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(OUT)
