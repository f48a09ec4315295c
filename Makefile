# Two commands do all the set-up: `make study` and `make test`. Each works alone. On GPU hosts `make envs` builds an
# environment for each framework, because their CUDA libraries clash in one; a study's `environments` names them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# TensorFlow comes twice: with CUDA, and a smaller build for hosts without an NVIDIA GPU.
TENSORFLOW := $(if $(shell command -v nvidia-smi),tensorflow,tensorflow-cpu)
READY := $(VENV)/.ready
HOROVOD := $(VENV)/.horovod
ENVS := .venvs/torch/.horovod .venvs/tensorflow/.horovod
PACKAGES := cluster trainers analysis launch

.PHONY: study test fast lowest lint environment horovod envs clean

# What two targets need is no by-product to be deleted.
.SECONDARY:

study: environment
	$(VENV)/bin/scalestudy run studies/demo.yaml

test: horovod
	$(VENV)/bin/pytest

fast: environment
	$(VENV)/bin/pytest -m "not slow"

# With the lowest versions that pyproject.toml allows. Warnings are no errors there: old packages warn of what is new.
lowest: build/lowest/.ready
	build/lowest/bin/pytest -m "not slow" -o filterwarnings=default --disable-warnings

build/lowest/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/pip install -q -c constraints-lowest.txt torch
	build/lowest/bin/pip install -q -c constraints-lowest.txt -e '.[torch,tensorflow-cpu,ray]' pytest hypothesis
	touch $@

lint: environment
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p build/types/scalestudy
	for package in $(PACKAGES); do ln -sfn ../../../$$package build/types/scalestudy/$$package; done
	$(VENV)/bin/mypy $(PACKAGES:%=-p scalestudy.%)
	$(VENV)/bin/mypy benchmarks/*.py
	$(VENV)/bin/mypy tests
	$(VENV)/bin/shellcheck .ci/run slurm/*.sh trainers/*.sh

environment: $(READY)

horovod: $(HOROVOD)

envs: $(ENVS)

# Horovod in every environment, built for what is in it.
%/.horovod: %/.ready trainers/horovod.sh
	trainers/horovod.sh $*/bin/python
	touch $@

$(READY): EXTRAS := torch,$(TENSORFLOW),ray,test
.venvs/torch/.ready: EXTRAS := torch
.venvs/tensorflow/.ready: EXTRAS := $(TENSORFLOW)

%/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scalestudy needs Python 3.11 or newer")'
	@# Debian ships venv on its own.
	$(PYTHON) -c 'import ensurepip, venv' || test "$$(id -u)" != 0 || \
	    { apt-get update -q && apt-get install -q -y python3-venv; }
	$(PYTHON) -m venv $* || { echo 'install venv first: apt-get install python3-venv' >&2; exit 1; }
	@# torch first, so that nothing else can choose another build of it.
	case ',$(EXTRAS),' in *,torch,*) $*/bin/pip install -q -c constraints.txt torch;; esac
	$*/bin/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) .venvs build
