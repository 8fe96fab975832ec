# Everything runs in $(VENV), which the first target that needs it makes from $(PYTHON).
# Another Python is another directory:  make test VENV=.venv312 PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=

PY        := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
HALF_MADE := $(VENV)/.unfinished
CXX_DIRS   = $(wildcard bench csrc kernels tests)
CXX_FILES  = $(if $(CXX_DIRS),$(shell find $(CXX_DIRS) -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp'))

# nvcc from PyPI, where it is asked for
NVCC_WHEELS = $(if $(filter pypi,$(TILEMASK_CUDA)),$(PY) -m pip install --quiet -r csrc/nvcc.txt,:)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format library wheel bench bench-overhead readme gpu-bench gpu-test clean

help:  ## this list
	@echo "make TARGET [ARGS=\"...\"] [PYTHON=python3] [VENV=.venv] [JOBS=2]"
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  \1 \2/p' $(firstword $(MAKEFILE_LIST)) \
	  | awk '{ name = $$1; $$1 = ""; printf "  %-15s%s\n", name, $$0 }'

demo: $(INSTALLED)  ## python -m tilemask demo $(ARGS)
	@$(PY) -m tilemask demo $(ARGS)

test: $(INSTALLED)  ## pytest $(ARGS), on JOBS processes
	@$(PY) -m pytest -n $(JOBS) $(ARGS)

lint: $(INSTALLED)  ## what pre-commit checks, without changing a file
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(if $(CXX_FILES),$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES),:)

format: $(INSTALLED)  ## bring every file into shape
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .
	@$(if $(CXX_FILES),$(VENV)/bin/clang-format -i $(CXX_FILES),:)

library: $(INSTALLED)  ## the CUDA kernels, for this directory: for its GPUs, or for all
	@$(NVCC_WHEELS)
	@TILEMASK_CUDA=$(or $(filter pypi,$(TILEMASK_CUDA)),required) \
	  $(PY) setup.py -q build_library --inplace

wheel: $(INSTALLED)  ## the wheel, in dist/, with the CUDA kernels if nvcc is there
	@$(NVCC_WHEELS)
	@rm -rf build/lib build/bdist.* dist/*.whl  # setuptools would pack files that are no longer there
	@$(PY) -m build --wheel --no-isolation --outdir dist
	@for wheel in dist/*linux*.whl; do \
	  if [ -e $$wheel ]; then $(PY) -m auditwheel show $$wheel | sed -n 1,3p; fi; done

bench: $(INSTALLED)  ## python -m tilemask bench $(ARGS): table, JSON and HTML page in bench-results
	@$(PY) -m tilemask bench $(ARGS)

bench-overhead: $(INSTALLED)  ## what a call costs in Python, on the CPU, in build/overhead
	@$(PY) -m tilemask bench --suite overhead --device cpu --out build/overhead $(ARGS)

readme: $(INSTALLED)  ## README's performance section anew from bench/results
	@$(PY) -m tilemask.bench.readme $(ARGS)

# The package laid out as it is installed: nothing to install, no network. The library is made for
# the GPUs of this machine, if there is an nvcc.
gpu-bench:  ## 8 minutes of benchmarks with the torch of PYTHON, results in OUT=dir
	@$(if $(OUT),,$(error gpu-bench needs a directory for its results: make gpu-bench OUT=dir))
	@TILEMASK_CUDA=$(or $(TILEMASK_CUDA),auto) $(PYTHON) setup.py -q build_library --inplace
	@rm -rf build/site && mkdir -p build/site && cp -R python/tilemask build/site/tilemask
	@cp -R kernels build/site/tilemask/kernels && cp -R bench build/site/tilemask/bench
	@PYTHONPATH=build/site PYTHONUNBUFFERED=1 $(PYTHON) -m tilemask bench --suite gpu --limit 440 \
	  --warm 8 --out $(OUT) $(ARGS)

gpu-test:  ## the GPU suite with the torch of PYTHON, results in OUT=dir
	@$(if $(OUT),,$(error gpu-test needs a directory for its results: make gpu-test OUT=dir))
	@$(PYTHON) tests/gpu/run.py --out $(OUT) $(ARGS)

clean:  ## remove what was built, and the caches; $(VENV) stays
	@rm -rf build dist python/*.egg-info .cache .pytest_cache .ruff_cache
	@rm -f python/tilemask/libtilemask.so python/tilemask/_build_info.py
	@find $(wildcard bench kernels python tests) -name __pycache__ -prune -exec rm -rf {} +

# HALF_MADE marks the environment from its first moment until everything is in it: one that an
# interrupted run left is made anew. torch comes first, from the pinned list, so that installing the
# package has nothing left to choose. The CUDA library takes minutes: `make library`.
$(INSTALLED): constraints.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  v < (3, 10) and sys.exit("tilemask needs Python 3.10 or newer, $(PYTHON) is %d.%d: make PYTHON=..." % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments (no venv or no ensurepip):" \
	       "install them (Debian, Ubuntu: the package python3-venv), or choose another: make PYTHON=..." >&2; \
	  exit 1; }
	@if [ -e $(HALF_MADE) ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(HALF_MADE)
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  echo "creating $(VENV) with $$($(PYTHON) --version) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch, triton and the tools of constraints.txt (at first, some minutes) ..."
	@$(PY) -m pip install --quiet --disable-pip-version-check -r constraints.txt
	@echo "installing tilemask itself, editable ..."
	@TILEMASK_CUDA=off \
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@rm $(HALF_MADE) && touch $@
