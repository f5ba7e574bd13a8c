#!/bin/sh
# Writes requirements.lock: what `make venv` installs, in the versions of constraints.txt, each file with its SHA-256.
#
#   pip install uv; sh scripts/lock.sh      # after a change of constraints.txt or of the extras dev, quant and ui
#
# Not in it: torch and what torch alone brings (CUDA), of which every index has builds of its own; `make venv` installs
# them first, in the versions of constraints.txt.
set -eu
cd "$(dirname "$0")/.."
omit='torch triton '$(grep -oE '^(nvidia|cuda)-[a-z0-9-]+' constraints.txt | sort -u | tr '\n' ' ')
# shellcheck disable=SC2046  # one option a name
uv pip compile pyproject.toml --extra dev --extra quant --extra ui --quiet --universal --python-version 3.10 \
  --fork-strategy requires-python --constraint constraints.txt --generate-hashes --no-annotate --no-header \
  --custom-compile-command 'sh scripts/lock.sh' $(printf -- '--no-emit-package %s ' $omit) --output-file requirements.lock
