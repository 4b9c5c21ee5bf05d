# shellcheck shell=bash
# Sourced by the batch scripts: run a step, pass signals on to it, wait until it has really ended, and queue the job
# again if the training says so (exit code 75) or was killed.

LAUNCH=${LAUNCH:-$SLURM_SUBMIT_DIR/launch}
# shellcheck disable=SC1091  # the user's own
[[ -n ${VENV:-} ]] && source "$VENV/bin/activate"
export LAUNCH
# on a file system that every node sees: the first rank leaves its exit code here, which torchrun does not pass on
export DISTCKPT_EXIT_FILE="$SLURM_SUBMIT_DIR/exit-$SLURM_JOB_ID-${SLURM_ARRAY_TASK_ID:-0}"
readonly REQUEUE=75
readonly MOST_LIVES=${MOST_LIVES:-1000}

run_and_requeue() {
    rm -f "$DISTCKPT_EXIT_FILE"
    echo "$(date --iso-8601=seconds) attempt ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $*"
    "$@" &
    local step=$! code=0 signal
    for signal in USR1 TERM; do
        # srun passes it to every task: torchrun, and through it the training
        # shellcheck disable=SC2064  # the name of the signal is that of now
        trap "echo \"\$(date --iso-8601=seconds) SIG$signal, passed on\"; kill -$signal $step 2>/dev/null || true" "$signal"
    done
    while kill -0 "$step" 2>/dev/null; do # a wait that a signal interrupts is no end
        code=0
        wait "$step" || code=$?
    done
    [[ -s $DISTCKPT_EXIT_FILE ]] && code=$(<"$DISTCKPT_EXIT_FILE")
    rm -f "$DISTCKPT_EXIT_FILE"
    echo "$(date --iso-8601=seconds) ended with $code"
    if [[ $code == "$REQUEUE" && ${SLURM_RESTART_COUNT:-0} -lt $MOST_LIVES ]]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
