# `make demo` runs the whole pipeline on generated data, `make test` all tests, `make install` makes .venv only.
# TORCH=cpu installs torch without CUDA's libraries.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VERSION := $(shell sed -nE 's/__version__ = "(.*)"/\1/p' model_lib/__init__.py)

.DEFAULT_GOAL := help
.PHONY: help install java browser demo quick test pytest soak fuzz audit lint images push test-containers test-cluster compile clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

TORCH ?= cuda
ifeq ($(TORCH),cpu)
TORCH_OPTIONS = --extra-index-url https://download.pytorch.org/whl/cpu
DOWNLOAD = about 0.7 GB
else
DOWNLOAD = on Linux about 3 GB, most of it CUDA's libraries; without a GPU, make install TORCH=cpu takes 0.7 GB
endif

install: $(INSTALLED) java  ## make .venv, with captioner in it; TORCH=cpu: without CUDA

$(INSTALLED): constraints.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "captioner needs Python 3.11 or later, and $(PYTHON) is older; try make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call apt,python3-venv); } || \
		{ echo "python3-venv is missing and could not be installed here: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into .venv, in some minutes: pip downloads $(DOWNLOAD)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH_OPTIONS) --constraint constraints.txt --editable '.[model,evaluate,tracking,pipelines,buckets,app,serve,dev]'
	@touch $@

# METEOR and the caption tokeniser are Java programs; without Java those scores are missing, and the rest works.
java:
	@command -v java >/dev/null || { $(call apt,default-jre-headless); } || \
		echo "no Java: METEOR will be missing, and scores are not comparable (apt-get install default-jre-headless)" >&2

# The report and MLflow's pages are tested in a real browser.
browser:
	@command -v chromium >/dev/null || { $(call apt,chromium); } || \
		{ echo "the tests of web pages need Chromium, and it could not be installed: apt-get install chromium" >&2; exit 1; }

apt = if [ "$$(id -u)" = 0 ]; then SUDO=; else SUDO=sudo; fi; command -v apt-get >/dev/null && \
	echo "running: $$SUDO apt-get update && $$SUDO apt-get install --no-install-recommends $(1)" && \
	$$SUDO apt-get update -qq && \
	$$SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) >/dev/null

demo: install  ## run the whole training pipeline here, on generated scenes
	$(BIN)/captioner run --workdir runs

quick: $(INSTALLED)  ## run the unit tests that start no process or server, in a minute
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not containers and not soak" tests/model_lib

test: install browser  ## run linters, type checker and all tests
	@$(MAKE) --no-print-directory --jobs=2 --keep-going lint pytest

# On two cores: 3 workers, as many tests wait for processes and servers; a file's tests share fixtures.
pytest: $(INSTALLED)
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

soak: install  ## run the tests that take long: attacks at full size, the second stage, a pipeline twice
	$(BIN)/pytest -m soak

FUZZ_SECONDS ?= 60
fuzz: $(INSTALLED)  ## fuzz the readers of files and options: FUZZ_SECONDS=60 for each
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.attacks.fuzz --seconds $(FUZZ_SECONDS)

audit: $(INSTALLED)  ## look up known vulnerabilities of the pinned packages: at PyPI, or in ADVISORIES=FOLDER
ifdef ADVISORIES
	$(BIN)/python -m tests.attacks.advisories $(ADVISORIES)
else
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt
endif

lint: $(INSTALLED)  ## run linters and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# REGISTRY=europe-docker.pkg.dev/project/repository is where the images go; without it they stay on this machine.
TAG ?= $(VERSION)
NAME = $(if $(REGISTRY),$(REGISTRY)/)captioner
BUILD = docker build $(if $(BASE),--build-arg BASE=$(BASE)) --build-arg PIP_OPTIONS="$(PIP_OPTIONS)" $(DOCKER_OPTIONS) \
	--build-arg CORE=$(NAME)-core:$(TAG) --build-arg MODEL=$(NAME)-model:$(TAG)
REVISION := $(shell git rev-parse HEAD 2>/dev/null)
LABELS = --label org.opencontainers.image.version=$(VERSION) --label org.opencontainers.image.revision=$(REVISION)

IMAGES := core model evaluate serve

images:  ## build the container images of the pipelines' steps and of the server: REGISTRY=… TAG=…
	$(BUILD) --file images/core/Dockerfile --target packages --tag $(NAME)-core:$(TAG)-packages .
	$(BUILD) --build-arg REVISION=$(REVISION) --file images/core/Dockerfile $(LABELS) --tag $(NAME)-core:$(TAG) .
	$(BUILD) --file images/model/Dockerfile --target packages --tag $(NAME)-model:$(TAG)-packages .
	$(BUILD) --file images/model/Dockerfile $(LABELS) --tag $(NAME)-model:$(TAG) .
	$(BUILD) --file images/evaluate/Dockerfile $(LABELS) --tag $(NAME)-evaluate:$(TAG) .
	$(BUILD) --file images/serve/Dockerfile $(LABELS) --tag $(NAME)-serve:$(TAG) .
	@docker images --format '{{.Repository}}:{{.Tag}}\t{{.Size}}' | grep -E '^$(NAME)-[a-z]+:$(TAG)	' | sort

push: $(INSTALLED)  ## push the images, write their digests to images/images.lock, compile the pipelines with them
	@test -n "$(REGISTRY)" || { echo "push: name the registry: make push REGISTRY=europe-docker.pkg.dev/project/repository" >&2; exit 2; }
	for image in $(IMAGES); do docker push --quiet $(NAME)-$$image:$(TAG) || exit 1; done
	@sed -n '/^#/p' images/images.lock > images/images.lock.new
	@for image in $(IMAGES); do \
		docker inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' $(NAME)-$$image:$(TAG) \
			| grep -m1 "^$(NAME)-$$image@" | sed "s|^|$$image |" >> images/images.lock.new; done
	@test "$$(grep -c @sha256: images/images.lock.new)" = $(words $(IMAGES)) || { echo "push: the registry gave no digests" >&2; exit 1; }
	@mv images/images.lock.new images/images.lock && cat images/images.lock
	$(BIN)/captioner compile

test-containers: $(INSTALLED)  ## build the images and run both pipelines in them
	@command -v docker-registry >/dev/null || $(call apt,docker-registry) || \
		echo "no docker-registry: make push is not tested (apt-get install docker-registry)" >&2
	tests/containers/engine $(MAKE) images
	$(BIN)/pytest -m containers tests/containers

# The images must be where the cluster gets them from (make push), and its secret `captioner` be there.
# BUCKET: a bucket, or a folder that the cluster mounts under the same path; MLFLOW: as this machine reaches it.
test-cluster: $(INSTALLED)  ## run both pipelines on a cluster: KFP=http://… BUCKET=… MLFLOW=… NODES=2
	CAPTIONER_CLUSTER_KFP=$(KFP) CAPTIONER_CLUSTER_BUCKET=$(BUCKET) CAPTIONER_CLUSTER_MLFLOW=$(MLFLOW) \
		CAPTIONER_CLUSTER_NODES=$(NODES) $(BIN)/pytest -vv -s -r pfsE --no-fold-skipped -m cluster tests/cluster

compile: $(INSTALLED)  ## compile the pipelines to pipelines/compiled
	$(BIN)/captioner compile

clean:  ## remove .venv and runs
	rm -rf $(VENV) runs
