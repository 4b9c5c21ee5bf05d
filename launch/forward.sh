# shellcheck shell=bash
# Sourced: runs a command, passes signals on to it, waits until it has really ended, and finds its exit code.

# forward COMMAND...: sets `code`, and `told` to the signals that came. The code is what the training left in
# DISTCKPT_EXIT_FILE, since torchrun passes none on; or the command's. Who was told to stop before there was anything
# to save, or was killed over it, is to be started again (75), unless it was by Ctrl-C (76).
forward() {
    local child signal before
    told=''
    "$@" &
    child=$!
    for signal in TERM USR1 INT; do
        # shellcheck disable=SC2064  # the names are those of now
        trap "told+=' $signal'; echo \"\$(date --iso-8601=seconds) SIG$signal, passed on\" >&2
            kill -$signal $child 2>/dev/null || true" "$signal"
    done
    while :; do
        before=$told code=0
        wait "$child" || code=$?
        [[ $told == "$before" ]] && break # else a signal has ended the wait, as likely as not
    done
    if [[ -s ${DISTCKPT_EXIT_FILE:-} ]]; then
        code=$(<"$DISTCKPT_EXIT_FILE")
    elif [[ $code != 0 && -n $told ]]; then
        code=75
        [[ $told == *INT* ]] && code=76
    fi
    return 0
}
