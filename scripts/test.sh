#!/usr/bin/env bash
# The whole test suite and the linter, with all of their own set-up. Arguments go to pytest: scripts/test.sh -k parity
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

ruff check .
ruff format --check .
exec python -m pytest "$@"
