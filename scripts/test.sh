#!/usr/bin/env bash
# The whole test suite and the linter, with all of their own set-up. Arguments go to pytest: scripts/test.sh -k parity
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

ruff check .
ruff format --check .
# Two files of tests at a time: many wait for processes to start, and leave a core idle.
exec python -m pytest -n 2 --dist loadfile "$@"
