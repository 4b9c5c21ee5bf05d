#!/bin/bash
# Train on this machine:  launch/torchrun.sh train.py --its --arguments
#
# NPROC: processes (default: one for each GPU, else 1). RESTARTS: of the group, after a worker has crashed (3).
# GRACE: seconds from a signal to the kill (30); tell Preemption(grace=) the same. NODES: torchrun's options of a group
# of several nodes, of which this is one.
# Ends with the exit code that the training left (75: start me again, 76: somebody asked to stop), which torchrun
# itself does not pass on.
set -euo pipefail
# shellcheck source=launch/forward.sh
source "$(dirname "${BASH_SOURCE[0]}")/forward.sh"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
grace=${GRACE:-30}
read -r -a nodes <<<"${NODES:---standalone}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / nproc > 0 ? $(nproc) / nproc : 1))}
# over gloo, workers that are restarted otherwise read addresses of the group before
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
DISTCKPT_EXIT_FILE=$(mktemp)
export DISTCKPT_EXIT_FILE
trap 'rm -f "$DISTCKPT_EXIT_FILE"' EXIT

# SIGUSR1, which torchrun would die of and leave its workers behind, is passed on like SIGTERM
forward python -m torch.distributed.run "${nodes[@]}" --nproc-per-node "$nproc" --max-restarts "${RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout "$grace" "$@"

# torchrun, if it is killed, leaves its workers training: they are told to stop, and save, as it would have told them
left() {
    env -u DISTCKPT_EXIT_FILE grep -lzsxF "DISTCKPT_EXIT_FILE=$DISTCKPT_EXIT_FILE" /proc/[0-9]*/environ
}
signal=TERM
for ((tries = 0; tries < 5 * grace + 25; tries++)); do
    mapfile -t workers < <(left)
    ((${#workers[@]})) || break
    workers=("${workers[@]//[!0-9]/}")
    ((tries == 5 * grace)) && signal=KILL
    ((tries % (5 * grace))) || kill -"$signal" "${workers[@]}" 2>/dev/null || true
    sleep 0.2
done
[[ -s $DISTCKPT_EXIT_FILE ]] && code=$(<"$DISTCKPT_EXIT_FILE")
exit "$code"
