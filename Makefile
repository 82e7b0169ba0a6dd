PYTHON ?= python

.PHONY: build host test gpu-test lint format report clean

build:          ## operator library and host module, in place
	ETAP_BUILD=op $(PYTHON) setup.py build_ext --inplace

host:           ## host module only: no nvcc, no torch headers
	ETAP_BUILD=host $(PYTHON) setup.py build_ext --inplace

test:           ## everything that runs here; GPU tests are skipped without a Hopper GPU
	$(PYTHON) -m pytest

gpu-test:       ## the GPU tests alone
	$(PYTHON) -m pytest tests/gpu -q

lint:
	$(PYTHON) -m ruff check etap_integration tests tools setup.py
	$(PYTHON) -m ruff format --check etap_integration tests tools setup.py

format:
	$(PYTHON) -m ruff check --fix etap_integration tests tools setup.py
	$(PYTHON) -m ruff format etap_integration tests tools setup.py

report:         ## error of the numerics models against fp64, on the CPU
	$(PYTHON) -m etap_integration.numerics

clean:
	rm -rf build dist *.egg-info etap_integration/_C/*.so etap_integration/_C/ptxas.json
