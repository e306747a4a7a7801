# Everything runs in VENV, an environment of its own; the first target that needs it makes it. Needed beforehand: Python
# >= 3.11, a C++20 compiler and make; cmake and ninja come with the packages of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALLED := $(VENV)/.openneutron-installed
BENCHMARK_PACKAGES := $(VENV)/.openneutron-benchmark-packages
SOURCES := $(shell find src csrc -type f ! -name '*.pyc' ! -name '_host*.so' ! -path '*.egg-info/*')

.PHONY: demo lint test test-rest test-all dev check soak mutants sanitize fuzz faults bench fidelity suite scaling docs site clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)  ## from a trained network to a measured .pte
	$(BIN)/python -m examples.digits.demo

lint: $(INSTALLED)  ## linter, types
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint $(BENCHMARK_PACKAGES)  ## linter, types, and one row of each table of tests; takes minutes
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-rest: $(INSTALLED) $(BENCHMARK_PACKAGES)  ## the tests that `make test` leaves out, and all tests that read data
	$(BIN)/python -m pytest --rest $(PYTEST_FLAGS)

test-all: test test-rest  ## linter, types, all tests

dev: $(INSTALLED) $(BENCHMARK_PACKAGES)  ## what `make check` needs, and PYTHONPATH=src: the native module beside the sources
	cp $(VENV)/lib/python3*/site-packages/openneutron/runtime/_host*.so src/openneutron/runtime/

check:  ## linter, types, and the tests of one room, AREA, on the sources as they are; after `make dev`
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/$(AREA)

soak: $(INSTALLED)  ## checks random models for MINUTES: each is refused with a typed error or gives a correct .pte
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10) --jobs 2

sanitize: $(INSTALLED)  ## the native module under AddressSanitizer and UndefinedBehaviorSanitizer, then ThreadSanitizer
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m tests.sanitize address
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python -m tests.sanitize thread

fuzz: $(INSTALLED)  ## mutated files for all readers, for MINUTES together
	$(PIP) install -c constraints.txt atheris || echo 'No atheris for this Python: coverage does not guide the mutations.'
	$(BIN)/python -m tests.fuzz.run --minutes $(or $(MINUTES),10)

faults: $(INSTALLED)  ## each file operation of each writer fails, or the process ends there, for MINUTES
	$(BIN)/python -m tests.faults.walk --kill --minutes $(or $(MINUTES),10)

mutants: $(INSTALLED)  ## damaged files through every reader for MINUTES: each gives a typed error, and none ends the process
	$(BIN)/python -m tests.mutants --minutes $(or $(MINUTES),10)

bench: $(INSTALLED) $(BENCHMARK_PACKAGES)  ## beside ExecuTorch's own backend, which OPENNEUTRON_BENCH names
	$(BIN)/python -m benchmarks.compare

fidelity: $(INSTALLED)  ## real networks from float to .pte; their weights are in the folder OPENNEUTRON_DATA names
	$(BIN)/python -m benchmarks.fidelity

suite: $(INSTALLED) $(BENCHMARK_PACKAGES)  ## whole networks, random weights: what runs where, how true int8 is
	$(BIN)/python -m benchmarks.suite
	$(BIN)/python -m benchmarks.streaming

scaling: $(INSTALLED) $(BENCHMARK_PACKAGES)  ## how OpenNeutron's own seconds grow with the network
	$(BIN)/python -m benchmarks.scaling

docs: $(INSTALLED)  ## the support table, from the operators' declarations
	$(BIN)/python -m openneutron.ops.document > docs/operators.md

site: $(INSTALLED)  ## the pages of docs/ as a site in out/site: `python -m http.server -d out/site`; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	! grep -rnoE '<(link|script|img)[^>]+(href|src)="?(https?:)?//[^" >]+' out/site --include='*.html'  # it works offline

clean:
	rm -rf .venv build dist out .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first: what follows is then resolved against this very build of it. The package is built against the
# executorch in the environment, hence without isolation.
$(VENV)/.openneutron-dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt executorch torchao ai-edge-litert cloudpickle flatbuffers joblib numpy rich ruamel.yaml.clib tomlkit typer \
		vl-convert-python jinja2 scikit-build-core pybind11 cmake ninja \
		pytest pytest-xdist hypothesis ruff mypy scikit-learn pillow safetensors ai-edge-model-explorer dacite jsonschema dask distributed ray \
		mkdocs-material 'mkdocstrings[python]'
	touch $@

$(INSTALLED): $(VENV)/.openneutron-dependencies CMakeLists.txt README.md $(SOURCES)
	OPENNEUTRON_NATIVE=1 $(PIP) install --no-build-isolation --no-deps --force-reinstall -C build-dir=$(abspath $(VENV))/openneutron-build .
	$(PIP) check
	touch $@

$(BENCHMARK_PACKAGES): $(VENV)/.openneutron-dependencies
	$(PIP) install -c constraints.txt --no-deps torchvision
	touch $@
