# Everything installs into .venv through constraints.txt: tested versions, and torch's CPU build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard kernels/kbit_kernels/cpu/src/*)
# The parts of `make bench`; each writes its section of benchmarks/results/MACHINE.json.
BENCHES := bench-kernels bench-start bench-quantize bench-smollm2 bench-context bench-llama bench-sets

.PHONY: help install demo test lint format study books bench $(BENCHES) bench-models clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/core: $(VENV)/pip $(SOURCES)
	$(INSTALL) -e .
	@touch $@

$(VENV)/test: $(VENV)/core
	$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/lint: $(VENV)/test
	$(INSTALL) -e '.[lint]'
	@touch $@

install: $(VENV)/core  ## kbit for the CPU, without torch

demo: $(VENV)/core  ## a real model: pull, quantize to 4 bits, evaluate, chat, one table
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/test  ## every test
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/lint  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# llama.cpp compiled for this machine. gcc takes the zeros of its AMX tile configuration for dead
# stores, and every product then crashes where there is AMX (ggml-org/llama.cpp, issue 20824).
$(VENV)/bench: $(VENV)/test
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" \
	    $(INSTALL) -e '.[bench]'
	@touch $@

# llama.cpp's libraries for every processor, for benchmarks/instruction_sets.py.
$(VENV)/variants: constraints.txt | $(VENV)/bench
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'" \
	    $(INSTALL) --no-deps --no-cache-dir --no-binary llama-cpp-python --target $@ llama-cpp-python
	@touch $@

bench: $(BENCHES)  ## CPU speed, memory, start beside llama.cpp and others; README's table and plot
	$(BIN)/python benchmarks/plot.py
	$(BIN)/python benchmarks/readme.py

bench-models: $(VENV)/bench
	$(BIN)/python benchmarks/models.py smollm2-135m-instruct llama-1b

bench-kernels: $(VENV)/bench
	$(BIN)/python -m pytest benchmarks/cpu_kernels.py

bench-start bench-quantize bench-context: bench-models
	$(BIN)/python benchmarks/$(@:bench-%=%).py

bench-smollm2: bench-models
	$(BIN)/python benchmarks/decode.py smollm2-135m-instruct

bench-llama: bench-models
	$(BIN)/python benchmarks/decode.py llama-1b

bench-sets: bench-models $(VENV)/variants
	$(BIN)/python benchmarks/instruction_sets.py

SHARED ?= ../shared
TEXTS ?= $(wildcard $(SHARED)/data/books/train-0*.txt)
POCKET := build/pocket
study: $(VENV)/test  ## from plain texts (TEXTS=...) to a family, a sweep, laws and a report
	$(BIN)/kbit family train --preset pocket --out $(POCKET)/family $(addprefix --text ,$(TEXTS))
	$(BIN)/kbit sweep scaling/studies/pocket.toml
	$(BIN)/kbit report scaling/studies/pocket.toml --out $(POCKET)/report.html --all

BOOKS := scaling/studies/books
books: $(VENV)/test  ## the committed study again, from the texts and models in SHARED=...
	$(BIN)/kbit family train --preset books --sizes s0,s1,s2 --tokens 8388608 --workers 2 \
	    --out build/family-long --tokenizer $(SHARED)/models/books-s0/tokenizer.json \
	    $(addprefix --text ,$(TEXTS))
	$(BIN)/kbit sweep $(BOOKS)/study.toml --path shared=$(SHARED) --pack
	$(BIN)/kbit report $(BOOKS)/study.toml --out $(BOOKS)/report.html --all --findings $(BOOKS)/FINDINGS.md

format: $(VENV)/lint  ## put the sources in ruff's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove what was built, the environment too
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find kernels -name '*.so' -delete
