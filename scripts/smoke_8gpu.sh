#!/usr/bin/env bash
# Do twenty layouts of the debug models train alike on this machine? With all of its own set-up; see scripts/smoke.py,
# which takes the arguments, and docs/smoke.md.
#
#   scripts/smoke_8gpu.sh                    all GPUs (1, 2, 4 or 8), or 8 CPU processes where there is none
#   scripts/smoke_8gpu.sh 4 --cpu            4 CPU processes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""

export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # gloo's remarks on host names
exec python scripts/smoke.py "$@"
