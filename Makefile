# Everything at a glance: `make`. What these run also works by hand after `source .venv/bin/activate`.
STUDY ?= laptop
PYTHON ?=

# Commands of the environment come first in every recipe. Recipes name the folder by the variable, never by its text, which
# may hold quotes.
export VENV_BIN := $(CURDIR)/.venv/bin
export PATH := $(VENV_BIN):$(PATH)
SHELL := /bin/bash
INSTALLED := .venv/.installed

.PHONY: help reproduce environment test test-slow test-all docs publish lint format reference lock clean-study
.DEFAULT_GOAL := help

help:
	@echo "make reproduce              environment, then every figure, table and verdict of the study 'laptop', and its report"
	@echo "make reproduce STUDY=smoke  the same for another study in config/studies/"
	@echo "make test                   the tests of every module, minutes on two cores, and the checks of 'make lint'"
	@echo "make test-all               the same, then the tests that are slow by design (make test-slow)"
	@echo "make lint                   ruff, mypy, snakefmt, snakemake --lint; notebooks without outputs"
	@echo "make docs                   the documentation, in site/index.html"
	@echo "make format                 let ruff, snakefmt and nbstripout repair what 'make lint' would complain about"
	@echo "make environment            .venv with exactly the packages of requirements.lock"
	@echo "make reference              write the references of keys and datasets, and the JSON schema, again"
	@echo "make publish STUDY=h200     add the jobs in results/h200/jobs to the datasets in results/reference/h200"
	@echo "make lock                   resolve pyproject.toml into requirements.lock again (UPGRADE=1: newest versions)"
	@echo "make clean-study STUDY=x    delete results/x"

reproduce: environment
	snakemake --cores all --config study=$(STUDY)
	@echo
	@verdicts=results/$(STUDY)/tables/verdicts.md; if [ -e $$verdicts ]; then \
	    awk -F ' *[|] *' 'NR > 2 && $$5 == "all" { print $$6 ": " $$2 " (" $$3 ($$4 ? ", " $$4 : "") ")" }' $$verdicts; fi
	@echo
	@echo "Report: results/$(STUDY)/report.html"

environment: $(INSTALLED)

# Modules are compiled when they are first imported: pip would compile 20,000 of which most never are, in a minute.
INSTALL := python -m pip install --quiet --disable-pip-version-check --no-compile

# The interpreter: PYTHON if given, else python3, else the newest one that Snakemake 9 and the lock allow.
$(INSTALLED): requirements.lock requirements-peers.txt pyproject.toml
	@PATH="$${PATH#"$$VENV_BIN":}"; \
	suitable='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))'; \
	for candidate in $(or $(PYTHON),.venv/bin/python python3 python3.14 python3.13 python3.12 python3.11); do \
	    if "$$candidate" -c "$$suitable" >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11 to 3.14 with venv here$(if $(PYTHON), under the name $(PYTHON)) ($$(python3 --version 2>&1))." \
	        "Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.13;" \
	        "or conda env create -f environment.yml) or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	fi; \
	echo "Installing the packages of requirements.lock into .venv ($$("$$python" --version)): minutes the first time"; \
	if [ "$$python" != .venv/bin/python ]; then "$$python" -m venv --clear .venv; fi
	@$(INSTALL) -r requirements.lock
	@$(INSTALL) --no-deps -r requirements-peers.txt
	@$(INSTALL) --no-deps --editable .
	@touch $@

# A process a core, each with two tests on hand; more than eight would not help and take a gigabyte each.
PYTEST := python -m pytest --numprocesses logical --maxprocesses 8 --dist loadgroup

test: environment
	$(PYTEST) -m "not slow"
	@$(MAKE) --no-print-directory lint

test-slow: environment
	$(PYTEST) -m slow

test-all: test test-slow

# The datasets of results/reference/ hold whole jobs: `gdn-mup extract` gives them back. What is there stays.
publish: environment
	@mkdir -p results/reference/$(STUDY); for kind in results/$(STUDY)/jobs/*; do \
	    dataset=results/reference/$(STUDY)/$$(basename $$kind).nc; \
	    gdn-mup collect --study config/studies/$(STUDY).yaml --kind $$(basename $$kind) \
	        --output $$dataset $$kind/*.nc $$(ls $$dataset 2>/dev/null) || exit; \
	done

# Several at once, each with its output in one piece (not by the make of macOS, which is of 2006).
LINTERS := ruff-check ruff-format mypy snakefmt snakemake-lint nbstripout
.PHONY: $(LINTERS)

lint: environment
	@$(MAKE) --no-print-directory --jobs $(if $(filter output-sync,$(.FEATURES)),--output-sync) $(LINTERS)

ruff-check:
	ruff check
ruff-format:
	ruff format --check
mypy:
	mypy
snakefmt:
	snakefmt --check Snakefile workflow
snakemake-lint:
	snakemake --lint
nbstripout:
	nbstripout --verify notebooks/*.ipynb docs/*.ipynb

docs: environment
	mkdocs build --strict
	@echo
	@echo "Open site/index.html in a browser."

format: environment
	ruff check --fix
	ruff format
	snakefmt Snakefile workflow
	nbstripout notebooks/*.ipynb docs/*.ipynb

reference: environment
	python -m gdn_mup.study.reference

lock: environment
	python tools/lock_requirements.py $(if $(UPGRADE),--upgrade)

clean-study:
ifneq ($(origin STUDY),command line)
	@echo "error: say which study: make clean-study STUDY=smoke (there are: $(notdir $(wildcard results/*)))" >&2; exit 2
else ifeq ($(filter-out reference,$(notdir $(STUDY))),)
	@echo "error: STUDY=$(STUDY): results/reference is part of the repository" >&2; exit 2
else
	rm -rf results/$(notdir $(STUDY))
endif
