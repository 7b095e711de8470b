#!/usr/bin/env bash
# Runs the whole test suite and the linter, in the environment that it makes if needed:
#   bash scripts/test.sh                       everything
#   bash scripts/test.sh -m "not slow"         without the tests that take more than a few seconds
#   bash scripts/test.sh tests/test_models.py  any arguments of pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
