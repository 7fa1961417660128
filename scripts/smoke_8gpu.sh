#!/usr/bin/env bash
# Checks that the debug models train alike in twenty layouts on this machine. Sets up .venv if needed. The arguments go
# to scripts/smoke.py; see docs/smoke.md.
#
#   scripts/smoke_8gpu.sh                    all GPUs (1, 2, 4 or 8), or 8 CPU processes where there is none
#   scripts/smoke_8gpu.sh 4 --cpu            4 CPU processes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""

export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # hides gloo's warnings about host names
exec python scripts/smoke.py "$@"
