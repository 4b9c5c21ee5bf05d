# shellcheck shell=bash
# Sourced by the batch scripts: run a step, pass signals on to it, wait until it has really ended, and queue the job
# again if the training says so (exit code 75). A node that is lost has SLURM itself do so (--requeue).

LAUNCH=${LAUNCH:-$SLURM_SUBMIT_DIR/launch}
# shellcheck source=launch/forward.sh
source "$LAUNCH/forward.sh"
# shellcheck disable=SC1091  # the user's own
[[ -n ${VENV:-} ]] && source "$VENV/bin/activate"
# torchrun would kill the workers 30 s after the signal; of the 120 s of --signal, it may use these
export LAUNCH GRACE=${GRACE:-110}
# of the array task: the number of its last task is also that of the whole array
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
readonly job=${job:-$SLURM_JOB_ID} life=${SLURM_RESTART_COUNT:-0}
readonly REQUEUE=75
readonly MOST_LIVES=${MOST_LIVES:-1000}

run_and_requeue() {
    echo "$(date --iso-8601=seconds) attempt $life on $SLURM_JOB_NODELIST: $*"
    forward env REACHED=1 "$@" # srun passes a signal on to every process of the step
    echo "$(date --iso-8601=seconds) ended with $code"
    # a job that was cancelled no longer runs, and stays cancelled: scontrol would queue even that again
    if [[ $code == "$REQUEUE" && $life -lt $MOST_LIVES && $(squeue -h -j "$job" -o %T) == RUNNING ]]; then
        scontrol requeue "$job"
    fi
    exit "$code"
}
