# make        builds .venv          make test   all tests, the real server's included
# make demo   the whole way, live   make lint   ruff, format check, mypy
# make soak   proofs that take longer than CI allows

SHELL := /bin/bash
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PACKAGES := florence2 export/florence2_export release/florence2_release client/florence2_client training/florence2_training
SOURCES := $(PACKAGES) export/to_onnx.py export/to_tensorrt.py model_repository demo benchmarks tests

# One release of torch, so that a later build of a package does not bring another. Where only the CPU is used, a CPU build
# saves gigabytes: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make
TORCH := torch==2.13.0

.PHONY: all demo test lint soak clean
all: .venv/installed

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is missing: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv is missing: apt install python3-venv"; exit 1; }
	@cd release && $(PYTHON) -c 'import sys; from florence2_release.installation import libpython; sys.exit(not libpython())' \
		|| { echo "the shared library of $$($(PYTHON) -V) is missing, which Triton's python stub links: apt install libpython3-dev"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[export,local-server,train,ray,ui,bench,dev]'
	@touch $@

demo: .venv/installed
	$(BIN)/python demo/run.py

test: .venv/installed
	$(BIN)/pytest -n 2 --dist loadfile

soak: .venv/installed
	$(BIN)/pytest -m soak -s

lint: .venv/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(PACKAGES)

clean:
	rm -rf .venv var
