#!/bin/bash
# Train on as many nodes as there are, from one to four; run this on each:
#     launch/elastic.sh HEAD:29400 RUN_ID train.py --its --arguments
#
# NNODES (1:4), NPROC (one for each GPU), RESTARTS (100). When a node is lost or comes back, the group starts again with
# what there is, from the last commit.
set -euo pipefail

endpoint=$1 run=$2
shift 2
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec python -m torch.distributed.run --nnodes "${NNODES:-1:4}" --nproc-per-node "${NPROC:-$((gpus > 0 ? gpus : 1))}" \
    --max-restarts "${RESTARTS:-100}" --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$run" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 "$@"
