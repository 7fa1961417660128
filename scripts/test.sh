#!/usr/bin/env bash
# Runs the linter and the whole test suite. Sets up .venv if needed. Arguments go to pytest: scripts/test.sh -k parity
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

ruff check .
ruff format --check .
# Two test files at a time: a test that waits for its processes to start leaves a core idle.
exec python -m pytest -n 2 --dist loadfile "$@"
