# What can be done here? Every target installs what it needs first.
#
#   make install   .venv with reshard in it, from requirements.lock
#   make demo      seed, train, change the layout, export, evaluate: a few minutes on two CPU cores
#   make check     format, lint, types, house rules, fast tests (under 5 minutes): run it before every commit
#   make test      everything that CI runs
#   make proof     what takes longer or needs foreign programs; one part of it: make proof PART=faults (a folder of tests/proof)
#   make size      lines by room
#   make lock      renew requirements.lock from pyproject.toml

PYTHON ?= python3
BIN := .venv/bin
# One thread per process: the tests start several ranks, and ranks that fight for cores are slow.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= 2
IN_PARALLEL := -n $(WORKERS) --dist loadfile
PARTS := $(patsubst %/,%,$(filter-out %__pycache__/,$(wildcard tests/proof/*/)))
DEV_TOOLS := editables hatchling import-linter mypy pytest pytest-timeout pytest-xdist ruff safetensors transformers

.PHONY: install demo check test proof size lock

install: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name one: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint requirements.lock "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: install
	@$(BIN)/python scripts/demo.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) $(IN_PARALLEL) -m "not slow" $(wildcard tests/unit tests/attacks tests/cli)

test: install
	$(PYTEST) $(IN_PARALLEL) tests --ignore tests/proof

proof: install
	@test -d tests/proof/$(PART) || { echo "there is no part $(PART) of the proof, there are: $(notdir $(PARTS))" >&2; exit 2; }
	$(PYTEST) tests/proof/$(PART) --durations 3

size:
	@for room in $(sort $(dir $(wildcard src/reshard/*/__init__.py))) 'src/reshard -maxdepth 1' scripts tests; do \
		printf '%6d  %s\n' "$$(find $$room -name '*.py' -exec cat {} + | wc -l)" "$$room"; done

lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)"
	.venv-lock/bin/python -m pip install --quiet '.[data,gguf,plot,tensorboard]' $(DEV_TOOLS)
	{ grep '^#' requirements.lock; .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude reshard \
		| sed 's/+.*//' | grep -Evi '^(nvidia-|triton|cuda-)'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf .venv-lock
