# captioner: `make demo` shows everything, `make test` checks everything, `make install` makes .venv alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VERSION := $(shell sed -nE 's/__version__ = "(.*)"/\1/p' model_lib/__init__.py)

.DEFAULT_GOAL := help
.PHONY: help install java demo test lint image compile clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) java  ## make .venv, with captioner in it

$(INSTALLED): constraints.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "captioner needs Python 3.11 or later, and $(PYTHON) is older; try make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "installing python3-venv"; $(call apt,python3-venv); } || \
		{ echo "python3-venv is missing and could not be installed here: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[evaluate,tracking,pipelines,gcs,dev]'
	@touch $@

# METEOR and the caption tokeniser are Java programs; without Java those scores are missing, and the rest works.
java:
	@command -v java >/dev/null || { echo "installing Java for the caption metrics"; $(call apt,default-jre-headless); } || \
		echo "no Java: METEOR will be missing, and scores are not comparable (apt-get install default-jre-headless)" >&2

apt = if [ "$$(id -u)" = 0 ]; then SUDO=; else SUDO=sudo; fi; \
	command -v apt-get >/dev/null && $$SUDO apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive $$SUDO apt-get install -y -qq --no-install-recommends $(1) >/dev/null

demo: install  ## run the whole training pipeline here, on generated scenes
	$(BIN)/captioner run --workdir runs

test: install lint  ## run the tests
	$(BIN)/pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

image:  ## build the container image of the pipeline's steps, for captioner run --runner docker
	docker build --file images/captioner/Dockerfile --tag captioner:$(VERSION) $(DOCKER_OPTIONS) .

compile: $(INSTALLED)  ## compile the pipelines to pipelines/compiled
	$(BIN)/captioner compile

clean:  ## remove .venv and runs
	rm -rf $(VENV) runs
