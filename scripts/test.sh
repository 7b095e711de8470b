#!/usr/bin/env bash
# Runs the whole test suite and the linter, in the environment that it makes if needed:
#   bash scripts/test.sh                       everything
#   bash scripts/test.sh --quick               the fast tests of the parts that most changes touch, in under 3 minutes
#   bash scripts/test.sh -m "not slow"         without the tests that take more than a few seconds
#   bash scripts/test.sh tests/test_models.py  any arguments of pytest
# TEST_PROCESSES files run side by side [2], with one thread each: many tests start processes of their own and wait.
# In the order of their names: ordered by the number of tests, the few long ones would come last, one file alone.
# A test that hangs for 10 minutes ends its process with all stacks printed (pyproject.toml); a process that ends, or is
# killed for its memory, ends the suite with an error; and so does TEST_MINUTES [60].
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
"$PYTHON" -m ruff check .
export OMP_NUM_THREADS=1
if [ "${1:-}" = --quick ]; then
  shift
  parts=(options preflight entry models fused weights checkpoints optim engine samplers datasets main)
  set -- -m "not slow" $(printf 'tests/test_%s.py ' "${parts[@]}") "$@"
fi
exec timeout --kill-after=60 "${TEST_MINUTES:-60}m" "$PYTHON" -m pytest -n "${TEST_PROCESSES:-2}" \
  --max-worker-restart=0 --dist loadfile --no-loadscope-reorder "$@"
