# Two commands do all the set-up: `make study` and `make test`. Each works alone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# TensorFlow comes twice: with CUDA, and a smaller build for hosts without an NVIDIA GPU.
TENSORFLOW := $(if $(shell command -v nvidia-smi),tensorflow,tensorflow-cpu)
READY := $(VENV)/.ready
PACKAGES := cluster trainers analysis launch

.PHONY: study test fast lint environment clean

study: environment
	$(VENV)/bin/scalestudy run studies/demo.yaml

test: environment
	$(VENV)/bin/pytest

fast: environment
	$(VENV)/bin/pytest -m "not slow"

lint: environment
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p build/types/scalestudy
	for package in $(PACKAGES); do ln -sfn ../../../$$package build/types/scalestudy/$$package; done
	$(VENV)/bin/mypy $(PACKAGES:%=-p scalestudy.%)
	$(VENV)/bin/shellcheck .ci/run slurm/*.sh

environment: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scalestudy needs Python 3.11 or newer")'
	@# Debian ships venv on its own.
	$(PYTHON) -c 'import ensurepip, venv' || test "$$(id -u)" != 0 || \
	    { apt-get update -q && apt-get install -q -y python3-venv; }
	$(PYTHON) -m venv $(VENV) || { echo 'install venv first: apt-get install python3-venv' >&2; exit 1; }
	@# torch first, so that nothing else can choose another build of it.
	$(VENV)/bin/pip install -q -c constraints.txt torch
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[torch,$(TENSORFLOW),ray,test]'
	touch $@

clean:
	rm -rf $(VENV) build
