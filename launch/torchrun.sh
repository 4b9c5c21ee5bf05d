#!/bin/bash
# Train on this machine:  launch/torchrun.sh train.py --its --arguments
#
# NPROC: processes (default: one for each GPU, else 1). RESTARTS: of the group, after a worker has crashed (3).
# GRACE: seconds from a signal to the kill (30); tell Preemption(grace=) the same.
# Ends with the exit code that the training left (75: start me again, 76: somebody asked to stop), which torchrun
# itself does not pass on.
set -euo pipefail
# shellcheck source=launch/forward.sh
source "$(dirname "${BASH_SOURCE[0]}")/forward.sh"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / nproc > 0 ? $(nproc) / nproc : 1))}
# over gloo, workers that are restarted otherwise read addresses of the group before
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
DISTCKPT_EXIT_FILE=$(mktemp)
export DISTCKPT_EXIT_FILE
trap 'rm -f "$DISTCKPT_EXIT_FILE"' EXIT

# SIGUSR1, which torchrun would die of and leave its workers behind, is passed on like SIGTERM
forward python -m torch.distributed.run --standalone --nproc-per-node "$nproc" --max-restarts "${RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "${GRACE:-30}" "$@"
exit "$code"
