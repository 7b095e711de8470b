#!/usr/bin/env bash
# Runs the whole test suite and the linter, in the environment that it makes if needed:
#   bash scripts/test.sh                       everything
#   bash scripts/test.sh -m "not slow"         without the tests that take more than a few seconds
#   bash scripts/test.sh tests/test_models.py  any arguments of pytest
# TEST_PROCESSES files run side by side [2], with one thread each: many tests start processes of their own and wait.
# In the order of their names: ordered by the number of tests, the few long ones would come last, one file alone.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
"$PYTHON" -m ruff check .
export OMP_NUM_THREADS=1
"$PYTHON" -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
