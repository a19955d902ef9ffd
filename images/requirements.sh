#!/bin/sh
# Install what some of captioner's extras need, at the versions of constraints.txt, without captioner itself:
#     requirements.sh EXTRAS [PIP OPTIONS]
set -eu
extras=$1
shift
mkdir -p model_lib
[ -e model_lib/__init__.py ] || echo '__version__ = "0"' > model_lib/__init__.py
pip install --no-cache-dir --constraint constraints.txt "$@" ".[$extras]"
pip uninstall --yes captioner
