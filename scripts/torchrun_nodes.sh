#!/usr/bin/env bash
# Train on several nodes without a scheduler: the same line on every node, by hand, ssh, pdsh or a container's start.
#
#   NNODES=2 HEAD=node1 scripts/torchrun_nodes.sh train_configs/llama3_8b.toml [--section.key value ...]
#
#   NNODES  nodes that take part; all must be started within 15 minutes
#   HEAD    name or address of one of them, where all meet
#   PORT    on HEAD; default: 29500
#   NGPU    processes on this node, the same on all; default: the visible CUDA devices, or 1 without any
#   RUN_ID  any word, the same on all nodes; two runs that share a HEAD and a PORT need two
#
# The config, the tokenizer and job.dump_folder must be seen by all nodes. A run that has stopped goes on from its newest
# checkpoint when the line is typed again, on however many nodes; a node that dies stops the others.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -x $root/.venv/bin/reshard ]]; then PATH=$root/.venv/bin:$PATH; fi

usage='usage: NNODES=2 HEAD=node1 scripts/torchrun_nodes.sh CONFIG.toml [--section.key value ...]'
NNODES=${NNODES:?$usage}
HEAD=${HEAD:?$usage}
CONFIG=${1:?$usage}
shift
NGPU=${NGPU:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# A config that cannot run is refused here, on each node, before any of them waits for another.
reshard config --check --world-size $((NNODES * NGPU)) "$CONFIG" "$@"

cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
exec python3 "$root/scripts/launch.py" torchrun --nnodes "$NNODES" --nproc-per-node "$NGPU" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${RUN_ID:-reshard}" --rdzv-conf join_timeout=900 \
    --local-ranks-filter "${LOG_RANK:-0}" -m reshard train "$CONFIG" "$@"
