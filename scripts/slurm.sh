#!/usr/bin/env bash
# Runs one training run on several machines of a SLURM cluster:
#
#   sbatch --nodes=4 scripts/slurm.sh --job.config_file configs/llama3_8b.toml --checkpoint.enable true
#
# Five minutes before the time limit SLURM sends SIGUSR1 to this script. Then all ranks save after their current step and
# end, and the job is queued again and resumes from that step. After a node has failed, the job is queued again too, and
# resumes from the last checkpoint. job.dump_folder must be on a file system that all machines share.
#SBATCH --job-name=nano-train
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Makes each start of the ranks use a new store: torchrun's store still holds the addresses of the ranks before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds that torchrun gives the ranks to save after SIGTERM; its default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --max-restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$head:${RDZV_PORT:-29500}" \
    train.py "$@" &
step=$!

# srun passes SIGTERM on to every torchrun, which passes it on to its ranks and does not restart them.
is_preempted=false
trap 'is_preempted=true; kill -TERM "$step"' USR1
wait "$step"
status=$?
if $is_preempted; then
    wait "$step" # the first wait was interrupted by the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
