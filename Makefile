# Everything runs in an environment of its own; PYTHON=python uses the current one instead.
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python

.PHONY: install sample test lint benchmark clean

install: $(VENV)/installed

$(VENV)/installed: setup.cfg pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet torch torchvision
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

ifeq ($(PYTHON),$(VENV)/bin/python)
sample test lint benchmark: install
endif

sample:
	$(PYTHON) scripts/sample.py lml=calibrated

test: export OMP_NUM_THREADS ?= 1
test: lint
	$(PYTHON) -m pytest -n 2 --dist worksteal

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

benchmark:
	$(PYTHON) scripts/benchmark.py

clean:
	rm -rf $(VENV)
