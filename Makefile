PYTHON ?= python
SOURCES = etap_integration tests tools setup.py

BUDGET ?= 600

.PHONY: help build host test gpu-test sanitize gpu-all lint format types numerics overview doctor bench report clean

help:           ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/: *##/:/'

build:          ## operator library and host module, in place
	ETAP_BUILD=op $(PYTHON) setup.py build_ext --inplace

host:           ## host module only: no nvcc, no torch headers
	ETAP_BUILD=host $(PYTHON) setup.py build_ext --inplace

test:           ## everything that runs here; GPU tests are skipped without a Hopper GPU
	$(PYTHON) -m pytest

gpu-test:       ## the GPU tests alone
	$(PYTHON) -m pytest tests/gpu -q

sanitize:       ## compute-sanitizer's memcheck and racecheck on every kernel; needs a Hopper GPU
	$(PYTHON) -m tools.sanitize

gpu-all:        ## the GPU tests and all benchmark grids, the most important first, in BUDGET seconds
	$(PYTHON) -m tools.bench gpu-all --budget-s $(BUDGET)

lint:           ## ruff, and the types
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy

format:         ## ruff, fixing
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m ruff format $(SOURCES)

types:          ## mypy
	$(PYTHON) -m mypy

numerics:       ## error of the numerics models against fp64, on the CPU
	$(PYTHON) -m etap_integration.numerics

overview:       ## the main command
	$(PYTHON) -m etap_integration

doctor:         ## what is here, and what would run
	$(PYTHON) -m etap_integration doctor

bench:          ## the operator beside unpatched upstreams; needs a Hopper GPU
	$(PYTHON) -m etap_integration bench

report:         ## README tables and plots from the recorded rows
	$(PYTHON) -m etap_integration report

clean:          ## what was built, in place
	rm -rf build dist *.egg-info etap_integration/_C/*.so etap_integration/_C/ptxas.json
