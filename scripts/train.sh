#!/usr/bin/env bash
# Trains on all GPUs of this machine, or with 2 CPU processes. Sets up .venv if needed.
#
#   scripts/train.sh                                                         the default recipe
#   scripts/train.sh --job.config_file configs/x.toml --training.steps 50    any recipe, any option
#   NPROC=1 scripts/train.sh                                                 another number of processes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""

case " $* " in
    *" --job.config_file"*) recipe=() ;;
    *) recipe=(--job.config_file configs/llama3_debug.toml) ;;
esac
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
case " $* " in *" --job.device cpu "* | *" --job.device=cpu "*) gpus=0 ;; esac
nproc=${NPROC:-$((gpus > 0 ? gpus : 2))}
# Without this, torchrun gives each process one thread and prints a warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(getconf _NPROCESSORS_ONLN) / nproc > 0 ? $(getconf _NPROCESSORS_ONLN) / nproc : 1))}

exec torchrun --standalone --nproc_per_node="$nproc" train.py "${recipe[@]}" "$@"
