# make                 builds .venv
# make demo            the whole way, live
# make test            all tests, the real server's included; ROOM=client those of one room
# make lint            ruff, format check, mypy
# make soak            proofs that take longer than CI allows
# make fuzz            hostile inputs: SEED=1 INPUTS=100000, FUZZ for other options of `python -m fuzz`
# make perf_analyzer   Triton's load generator, for florence2 bench
# make screenshots     of the page, into docs/images
# make clean           removes .venv and var

SHELL := /bin/bash
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PACKAGES := florence2 $(foreach room,cli apps release training export evaluation data client demo,$(room)/florence2_$(room))
SOURCES := $(PACKAGES) export/to_onnx.py export/to_tensorrt.py model_repository demo/run.py benchmarks tests

# One release of torch, so that a later build of a package does not bring another. Where only the CPU is used, a CPU build
# saves gigabytes: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make
TORCH := torch==2.13.0

.PHONY: all help demo test lint screenshots soak fuzz perf_analyzer clean
all: .venv/installed

.venv/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is missing: apt install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python's venv is missing: apt install python3-venv"; exit 1; }
	@cd release && $(PYTHON) -c 'import sys; from florence2_release.tritonserver import libpython; sys.exit(not libpython())' \
		|| { echo "the shared library of $$($(PYTHON) -V) is missing, which Triton's python stub links: apt install libpython3-dev"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e '.[export,local-server,train,ray,ui,bench,dev]'
	@touch $@

demo: .venv/installed
	$(BIN)/python demo/run.py

help:
	@sed -n 's/^# \(make.*\)/\1/p' $(firstword $(MAKEFILE_LIST))

ROOM :=
test: .venv/installed
	$(BIN)/pytest $(if $(ROOM),tests/$(ROOM),-n 2 --dist loadfile)

soak: .venv/installed
	$(BIN)/pytest -m soak -s

SEED := 1
INPUTS := 100000
FUZZ :=
fuzz: .venv/installed
	PYTHONPATH=tests:benchmarks:$$PYTHONPATH $(BIN)/python -m fuzz --seed $(SEED) --inputs $(INPUTS) \
		--report benchmarks/fuzz.md $(FUZZ)

screenshots: .venv/installed
	mkdir -p docs/images
	FLORENCE2_SCREENSHOTS=$(CURDIR)/docs/images $(BIN)/pytest tests/server/test_ui.py

lint: .venv/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(PACKAGES)

# The wheel of the server's own release, which runs on glibc 2.36, and the CUDA library that it links. Needs libb64-0d.
perf_analyzer: var/perf_analyzer/perf_analyzer
var/perf_analyzer/perf_analyzer: .venv/installed
	rm -rf $(@D) && mkdir -p $(@D)/wheels
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --platform manylinux1_x86_64 --platform manylinux2014_x86_64 \
		--dest $(@D)/wheels tritonclient==2.51.0 nvidia-cuda-runtime-cu12==12.9.79
	for wheel in $(@D)/wheels/*.whl; do $(BIN)/python -m zipfile --extract $$wheel $(@D)/wheels || exit 1; done
	mv $(@D)/wheels/tritonclient-*.data/data/bin/perf_analyzer $(@D)/perf_analyzer.bin
	mv $(@D)/wheels/nvidia/cuda_runtime/lib/libcudart.so.12 $(@D)
	rm -r $(@D)/wheels
	printf '%s\n' '#!/bin/sh' 'here=$$(dirname "$$(readlink -f "$$0")")' \
		'LD_LIBRARY_PATH="$$here$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}" exec "$$here/perf_analyzer.bin" "$$@"' > $@.sh
	chmod +x $@.sh $(@D)/perf_analyzer.bin
	$@.sh --version || { echo "apt install libb64-0d, then make perf_analyzer again"; exit 1; }
	mv $@.sh $@

clean:
	rm -rf .venv var
