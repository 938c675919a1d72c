# Two commands do everything on a fresh machine with Python 3.11+, pip and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
OUT ?= demo-out

.PHONY: setup demo test lint bench clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(RUN)/pixrec demo --out $(OUT)

# The unit part first (seconds), then what needs processes or Ray.
test: setup lint
	$(RUN)/python -m pytest tests/unit
	$(RUN)/python -m pytest tests/ranks tests/cluster

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: setup
	$(RUN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(OUT)
