# make demo | test | test-long | lint | env | lock | clean
#
# PYTHON=python3.12          the interpreter that .venv is made with (3.11 or newer)
# CONFIG=FILE                the demo's configuration
# ARGS="-k name"             further words for the demo, pytest or ruff
#
# torch (the extra `check`: only used to check the exported checkpoint) comes as its plain build, which on Linux brings gigabytes of CUDA
# libraries. For the CPU build, either
#   PIP_FIND_LINKS=folder-of-wheels make env     a local folder that holds a torch 2.13.0+cpu wheel, or
#   UV_TORCH_BACKEND=cpu make env                lets uv find torch's own CPU builds (needs a network that reaches them)

SHELL := /bin/bash
PYTHON ?= python3
CONFIG ?= experiments/configs/laptop.py
ARGS ?=
# The folder of the demo's run.
RUN = $(or $(patsubst --workdir=%,%,$(filter --workdir=%,$(ARGS))),runs/$(basename $(notdir $(CONFIG))))
WORKERS := --numprocesses=2 --dist=loadgroup --no-loadscope-reorder
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# uv's names for what pip is told through the environment; a cache of our own where there is no home to keep one in.
ifneq ($(strip $(PIP_FIND_LINKS)),)
ifeq ($(strip $(UV_FIND_LINKS)),)
empty :=
comma := ,
space := $(empty) $(empty)
export UV_FIND_LINKS := $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
endif
endif
ifeq ($(strip $(SSL_CERT_FILE)),)
ifneq ($(strip $(PIP_CERT)),)
export SSL_CERT_FILE := $(PIP_CERT)
endif
endif
ifneq ($(shell test -n "$$HOME" && test -d "$$HOME" && test -w "$$HOME" && echo yes),yes)
export UV_CACHE_DIR ?= $(CURDIR)/$(VENV)/.uv-cache
export MPLCONFIGDIR ?= $(CURDIR)/$(VENV)/.matplotlib
endif
# XLA gives a step's memory back to Linux after it: in large pages that costs a thirtieth of the page faults. A training
# step on two cores is 7 to 39 % faster (six pairs of runs).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export UV_HTTP_TIMEOUT ?= 180
export UV_NO_PROGRESS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help demo test test-long lint env lock clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: env
	$(PY) -m experiments.run --config=$(CONFIG) $(ARGS)
	@$(PY) -m tools.solve --suggest=$(RUN) 2>/dev/null || true  # a run of another task has none

test: env
	$(PY) -m pytest $(WORKERS) $(ARGS)

test-long: env
	APR_LONG=1 $(PY) -m pytest --hypothesis-profile=long $(WORKERS) $(ARGS)

lint: env
	$(PY) -m ruff check $(ARGS) apr_jax experiments tools tests

env: $(STAMP)

# The stamp is written last, so an install that was cut short is taken up again.
$(STAMP): requirements.lock
	@start=$$SECONDS; \
	rm -f $(STAMP); \
	if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found=$$($(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || echo "not there"); \
	    echo "Python 3.11 or newer is needed; $(PYTHON) is $$found. Name another one: make demo PYTHON=python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) can't make a venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi; \
	if $(PY) -m pip install -q uv && $(PY) -m uv pip install -q --python $(PY) -r requirements.lock; then \
	  how=uv; \
	else \
	  echo "uv did not do it, going on with pip"; \
	  $(PY) -m pip install -q -r requirements.lock || exit 1; \
	  how=pip; \
	fi; \
	echo "$$how" > $(STAMP); \
	echo "$(VENV) is ready ($$how, $$((SECONDS - start)) s)"

# Anew from pyproject.toml, keeping the pins that still hold (UPGRADE=--upgrade to raise them). What only torch's CUDA
# build needs is left out: the build that an install finds brings its own, exactly pinned, or none.
lock: env
	set -o pipefail; trap 'rm -f .lock.in' EXIT; cp requirements.lock .lock.in; \
	$(PY) -m uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate --extra check --extra test --extra lint --extra bench \
	  $(UPGRADE) -o .lock.in pyproject.toml >/dev/null && \
	{ sed '/^[^#]/,$$d' requirements.lock; grep -vE '^(#|(nvidia|cuda)-|triton=)' .lock.in; } > .lock.out && mv .lock.out requirements.lock

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find apr_jax experiments tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
