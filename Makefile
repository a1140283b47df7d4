# Everything installs into .venv through constraints.txt: tested versions, and torch's CPU build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard kernels/kbit_kernels/cpu/src/*)

.PHONY: help install demo test lint format study books bench clean

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

bench: $(VENV)/test  ## CPU speed beside llama.cpp; results under benchmarks/results
	$(INSTALL) -e '.[bench]'
	$(BIN)/python benchmarks/cpu_kernels.py
	$(BIN)/python benchmarks/decode.py smollm2-135m-instruct "$$($(BIN)/kbit pull smollm2-135m-instruct)"
	$(BIN)/python benchmarks/readme.py

SHARED ?= ../shared
TEXTS ?= $(wildcard $(SHARED)/data/books/train-0*.txt)
POCKET := build/pocket
study: $(VENV)/test  ## from plain texts (TEXTS=...) to a family, a sweep, laws and a report
	$(BIN)/kbit family train --preset pocket --out $(POCKET)/family $(addprefix --text ,$(TEXTS))
	$(BIN)/kbit sweep scaling/studies/pocket.toml
	$(BIN)/kbit report scaling/studies/pocket.toml --out $(POCKET)/report.html --all

BOOKS := scaling/studies/books
books: $(VENV)/test  ## the committed study again, from the texts and models in SHARED=...
	$(BIN)/kbit family train --preset books --sizes s0,s1,s2 --tokens 8388608 \
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
