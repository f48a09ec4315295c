# Two commands do all the set-up: `make study` and `make test`. Each works alone. torch and TensorFlow cannot both have
# CUDA in one environment, since their cuDNN and NCCL are files of the same names: where TensorFlow is to use GPUs,
# `make envs` builds an environment for each, and a study's `environments` names them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# TensorFlow comes twice: for GPUs, and a smaller build for hosts without an NVIDIA GPU. The extra `tensorflow` brings
# CUDA's libraries along, the package `tensorflow` does not.
TENSORFLOW := $(if $(shell command -v nvidia-smi),tensorflow,tensorflow-cpu)
TORCH := torch
READY := $(VENV)/.ready
HOROVOD := $(VENV)/.horovod
ENVS := .venvs/torch/.horovod .venvs/tensorflow/.horovod
GPU_BUILDS := build/gpu/both/.horovod build/gpu/tensorflow/.horovod
PACKAGES := cluster trainers analysis launch

.PHONY: study test fast lowest lint environment horovod envs gpu-build gpu-bundle clean always

# What two targets need is no by-product to be deleted.
.SECONDARY:

study: environment
	$(VENV)/bin/scalestudy run studies/demo.yaml

test: $(HOROVOD)
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
	@test -e $<

envs: $(ENVS)

# Horovod for GPUs, built and loaded on a host that need not have one: nvcc, a C++ compiler and 14 GB are enough. Once
# for both frameworks as in .venv of a GPU host, with torch's NCCL, and once for TensorFlow with its own.
gpu-build: export HOROVOD_GPU_OPERATIONS := NCCL
gpu-build: $(GPU_BUILDS)
	@for built in $(GPU_BUILDS); do test -e $$built || exit 1; done

# What benchmarks/gpu.py needs on a machine that has torch and no network: wheels for its Python, ours among them.
# PyArrow is large, and only telemetry needs it: by itself, to be left behind where it is there already.
GPU_PYTHON ?= 3.12
GPU_DOWNLOAD = $(VENV)/bin/pip download -q --no-deps --only-binary=:all: -c constraints.txt --implementation cp \
    --python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64
gpu-bundle: environment
	rm -rf build/gpu-bundle build/gpu-bundle-pyarrow build/lib
	$(VENV)/bin/pip wheel -q --no-deps -w build/gpu-bundle .
	$(GPU_DOWNLOAD) -d build/gpu-bundle pydantic pydantic-core annotated-types typing-extensions typing-inspection \
	    nvidia-ml-py psutil pyyaml pytest pluggy iniconfig packaging pygments
	$(GPU_DOWNLOAD) -d build/gpu-bundle-pyarrow pyarrow
	du -sh build/gpu-bundle build/gpu-bundle-pyarrow

# Horovod in every environment, built for what is in it. Exit code 3: a GPU build lacks something, and horovod.sh has
# said what. All but Horovod goes on without it.
%/.horovod: %/.ready %.operations trainers/horovod.sh
	@rm -f $@
	trainers/horovod.sh $*/bin/python && touch $@ || test $$? = 3

$(READY): EXTRAS := torch,ray,test
$(READY): ALSO := $(TENSORFLOW)
.venvs/torch/.ready: EXTRAS := torch
.venvs/tensorflow/.ready: EXTRAS := $(TENSORFLOW)
build/gpu/tensorflow/.ready: EXTRAS := tensorflow
build/gpu/both/.ready: EXTRAS := torch
build/gpu/both/.ready: ALSO := tensorflow
# ===: not a build whose version goes on, such as +cpu.
build/gpu/both/.ready: TORCH := $(shell sed -n 's/^torch==/torch===/p' constraints.txt)

# What an environment was made for, and Horovod in it: another wish makes it anew, from nothing.
%.wish: always
	@mkdir -p $(@D); echo '$(strip $(EXTRAS) $(ALSO) $(TORCH))' | cmp -s - $@ || echo '$(strip $(EXTRAS) $(ALSO) $(TORCH))' > $@
%.operations: always
	@mkdir -p $(@D); echo '$(HOROVOD_GPU_OPERATIONS)' | cmp -s - $@ || echo '$(HOROVOD_GPU_OPERATIONS)' > $@
always:

%/.ready: %.wish pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scalestudy needs Python 3.11 or newer")'
	@# Debian ships venv on its own.
	$(PYTHON) -c 'import ensurepip, venv' || test "$$(id -u)" != 0 || \
	    { apt-get update -q && apt-get install -q -y python3-venv; }
	$(PYTHON) -m venv $(if $(filter %.wish,$?),--clear) $* || { echo 'install venv first: apt-get install python3-venv' >&2; exit 1; }
	@# torch first, so that nothing else can choose another build of it.
	case ',$(EXTRAS),' in *,torch,*) $*/bin/pip install -q -c constraints.txt '$(TORCH)';; esac
	$*/bin/pip install -q -c constraints.txt -e '.[$(EXTRAS)]' $(ALSO)
	touch $@

clean:
	rm -rf $(VENV) $(VENV).wish $(VENV).operations .venvs build
