# make curve   accuracy against visual-token budget of the shipped model: table, out/curve/curve.png
# make quick   lint, and the promises for three families: a plain one, one with windows, one with prefix blocks
# make test    lint, format, types and tests
# make clean   remove the environment, caches and results
#
# They build .venv when it is missing or older than pyproject.toml or constraints.txt, and reuse it otherwise.

SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
CURVE_FLAGS ?=
# one more than there are cores, as some tests wait for processes of their own
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1)))
QUICK := ([llava- or [llava] or [gemma3- or [gemma3] or [paligemma- or [paligemma]) and not (left- or right- or two- or samples)

.PHONY: curve quick test clean

curve: $(READY)
	$(PY) -m vtc.cli eval --model reference --methods vtc-cls,fastv,random,uniform,smaller-image \
		--budgets 0.5,0.25,0.11 --limit 1000 --out out/curve $(CURVE_FLAGS)

quick: $(READY)
	$(PY) -m ruff check .
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto -k '$(QUICK)' \
		tests/test_promises.py tests/test_families.py tests/test_generation.py tests/test_cache_site.py tests/test_weights.py

test: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy & types=$$!; \
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal || exit; \
	wait $$types || { echo "mypy found errors: they stand above, before the tests" >&2; exit 1; }

# torch goes first and alone, so that the extra index of a machine decides between its CPU and CUDA builds.
# lmms-eval goes last and without what it declares: that includes torchvision, whose wheel for CUDA does not even import
# beside a torch for CPUs and takes transformers down with it. What it really imports is in the extra lmms-eval-lean.
# Where the system's Python comes without ensurepip (Debian without python3-venv), its own pip fills the environment.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vtc needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + ": run make PYTHON=/path/to/a/newer/python3")'
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(PY) install pip; }
	$(PY) -m pip install $$(grep '^torch==' constraints.txt)
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	$(PY) -m pip install --no-deps $$(grep '^lmms-eval==' constraints.txt)
	touch $@

clean:
	rm -rf .venv out build .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
