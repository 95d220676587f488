#!/bin/bash
# A run of the paper without a scheduler: this script on each machine, HEAD the first one's name; from the root:
#   HEAD=node0 NODES=4 GPUS=8 configs/paper/launch/torchrun.sh --config configs/paper/pretrain.yaml \
#       --config configs/paper/1.5b.yaml --config configs/paper/a100x32.yaml
# One machine needs neither HEAD nor NODES. A rank that dies takes the others down, and all go on from the last state,
# RESTARTS times. SIGTERM or SIGUSR1 to torchrun reaches every rank: the state is saved, and torchrun waits for that.
set -euo pipefail

# Else ranks that are started again may read each other's addresses from the start before (pytorch/pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec "${TORCHRUN:-.venv/bin/torchrun}" \
    --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" --max-restarts "${RESTARTS:-3}" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600 \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv-id simplear \
    -m simplear.cli fit "$@" --ckpt_path last
