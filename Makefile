# Every target does the set-up that it needs. PYTHON picks the interpreter that the environment is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor

.PHONY: setup bench regression gpu wheels test lint types wheel wheel-check oracle coverage clean

setup: $(READY)

# torch comes first and pinned: resolved freely, pip would take a build with gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

bench: $(READY)
	$(BIN)/python -m fastdiff.bench

# Is this commit slower than BASE? What CI asks of a pull request: counts gate anywhere, times where the self-test passes;
# where it fails, which is its 3, ab takes none. make's own exit code is 2 whatever ab's is, which its last line names:
# "Error 1" is a regression, 3 a wrong result or a run not to be believed, 4 what could not be measured.
BASE ?= main
regression: $(READY)
	@$(BIN)/python -m fastdiff.bench selftest --quick || [ $$? -eq 3 ]
	@$(BIN)/python -m fastdiff.bench ab --base $(BASE)

# On a CUDA machine, which may have no network: in that machine's own Python, which has torch. WHEELS is a folder of
# wheels for what it lacks; OUT is where the journal and the report go, and is read by the next run. TIER is A, B or C,
# CELL one cell instead, BUDGET the seconds after which a run is cut. An OUT or so of the environment is not meant: these
# are given on make's own command line.
TIER := A
CELL :=
BUDGET :=
OUT := reports/runs/gpu
gpu:
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .cache/wheels $(WHEELS)/*.whl)
	PYTHONPATH="$(CURDIR):$(CURDIR)/.cache/wheels$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -m fastdiff.bench gpu --tier $(TIER) --out $(OUT) $(if $(BUDGET),--budget-s $(BUDGET)) $(if $(CELL),--cell "$(CELL)")

# What such a machine lacks, beside torch, transformers, scipy and pytest, fetched where there is a network: diffusers, in
# the version that is tested. LACKS may name more packages of constraints.txt.
LACKS ?= diffusers
wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: --constraint constraints.txt --dest .cache/wheelhouse $(LACKS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Two processes, a file of tests each at a time.
test: lint types
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The whole product of the scheduler matrix, which `make test` samples pairwise: five minutes on two idle cores.
oracle: $(READY)
	$(BIN)/python -m tests.oracle --full --out reports/oracle

coverage: $(READY)
	$(BIN)/python -m tests.oracle --coverage reports/coverage.md
	$(BIN)/python -m tests.families.coverage reports/coverage.md

wheel: $(READY)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

# The wheel must work where nothing of this folder is: an empty environment, another working directory.
wheel-check: wheel
	rm -rf .cache/wheel-check
	$(PYTHON) -m venv .cache/wheel-check
	.cache/wheel-check/bin/python -m pip install --quiet --constraint constraints.txt torch
	.cache/wheel-check/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls dist/*.whl)[bench]"
	cd .cache/wheel-check && bin/python -m fastdiff.bench --quick

clean:
	rm -rf $(VENV) dist build .cache .mypy_cache .pytest_cache .ruff_cache
