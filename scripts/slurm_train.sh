#!/usr/bin/env bash
# Train on several nodes under SLURM: one torchrun per node, one process per GPU, one meeting point.
#
#   sbatch --nodes 8 scripts/slurm_train.sh train_configs/llama3_70b.toml [--section.key value ...]
#
# Submit it from the project's folder, which all nodes must see, as must job.dump_folder. A job that is requeued goes on
# from its newest checkpoint by itself, on however many nodes it gets.
#SBATCH --job-name=reshard
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
set -euo pipefail
CONFIG=${1:?usage: sbatch --nodes N scripts/slurm_train.sh CONFIG.toml [--section.key value ...]}
shift
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"  # sbatch runs a copy of this file, from elsewhere
export PATH=$PWD/.venv/bin:$PATH

# Processes per node: what SLURM gave, e.g. "8" or "h100:8"; override with NGPU.
gpus=${SLURM_GPUS_ON_NODE:-8}
NGPU=${NGPU:-${gpus##*:}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Refuse a config that cannot run, and tokenise once, before hundreds of processes wait for it.
reshard config --check --world-size $((SLURM_NNODES * NGPU)) "$CONFIG" "$@"
reshard tokenize "$CONFIG" "$@"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec python3 scripts/launch.py srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "$NGPU" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:${MASTER_PORT:-29500}" \
    -m reshard train "$CONFIG" "$@"
