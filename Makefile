# Set-up is part of every target: a fresh machine needs Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint setup pins

demo: $(READY)  ## train the demonstration models and write runs/demo/report.html
	$(BIN)/zoo demo $(DEMO)

test: $(READY)  ## the whole test suite
	@# In their own order: those with few tests, which take longest, would come last otherwise.
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(READY)

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MoE Zoo needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV): pinned packages from requirements.txt, about 8 GB with the GPU libraries of torch"
	@test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	@$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check uv
	@# The list is complete, so nothing is resolved: torchrec would ask for a GPU build of fbgemm that does not load.
	@# Compiled now, once: where Python may not write bytecode, every program would compile its imports, for 10 s.
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --compile-bytecode -r requirements.txt
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --editable .
	@touch $@

pins: $(READY)  ## choose the newest versions that go together, and write them to requirements.txt
	@echo "# Every package of the development environment, as tested together. Made by 'make pins'; install with --no-deps." > $(READY).txt
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--no-header --no-annotate --no-emit-package fbgemm-gpu --quiet >> $(READY).txt
	mv $(READY).txt requirements.txt
