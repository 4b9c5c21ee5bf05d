#!/bin/bash
# Train on as many nodes as there are, from one to four; run this on each:
#     launch/elastic.sh HEAD:29400 RUN_ID train.py --its --arguments
#
# NNODES (1:4), RESTARTS (100), PATIENCE: seconds that a group waits for more nodes (30); and those of torchrun.sh. When a
# node is lost or comes back, the group starts again with what there is, from the last commit. HEAD is the one that
# must stay.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/forward.sh
source "$here/forward.sh"

export NODES="--nnodes ${NNODES:-1:4} --rdzv-backend c10d --rdzv-endpoint $1 --rdzv-id $2"
NODES+=" --rdzv-conf last_call_timeout=${PATIENCE:-30}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} RESTARTS=${RESTARTS:-100}
shift 2
while :; do
    forward "$here/torchrun.sh" "$@"
    # all save and stop where one node is told to stop: the others go on without it
    [[ $code == 75 && -z $told ]] || exit "$code"
done
