#!/usr/bin/env bash
# Train on this node: one process per GPU, or on CPU. What follows on the line goes to `reshard train`.
#
#   NGPU=2 CONFIG=train_configs/debug_model.toml ./run_llama_train.sh --training.steps 50
#
#   NGPU      processes; default: the visible CUDA devices, or 1 without any
#   CONFIG    TOML file (CONFIG_FILE means the same, CONFIG goes first); default: train_configs/debug_model.toml
#   LOG_RANK  whose output is shown, e.g. 0,1; default: 0
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -x $root/.venv/bin/reshard ]]; then PATH=$root/.venv/bin:$PATH; fi

NGPU=${NGPU:-$(python3 -c 'import torch; print(max(1, torch.cuda.device_count()))')}
CONFIG=${CONFIG:-${CONFIG_FILE:-$root/train_configs/debug_model.toml}}

# A config that cannot run is refused here, in one sentence and with exit code 2, before any rank exists.
reshard config --check --world-size "$NGPU" "$CONFIG" "$@"

cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
exec python3 "$root/scripts/launch.py" torchrun --nproc-per-node "$NGPU" --rdzv-backend c10d --rdzv-endpoint localhost:0 \
    --local-ranks-filter "${LOG_RANK:-0}" -m reshard train "$CONFIG" "$@"
