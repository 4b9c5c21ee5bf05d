# shellcheck shell=bash
# Sourced: runs a command, passes signals on to it, and waits until it has really ended.

# forward COMMAND...: sets `code`, its exit code, and `told`, the signals that came. Who was told to stop before there was
# anything to save, or was killed over it, is to be started again (75), unless it was by Ctrl-C (76).
# REACHED, if set: whoever signals this shell signals the command, too.
forward() {
    local child signal before
    told=''
    "$@" &
    child=$!
    for signal in TERM USR1 INT; do
        # shellcheck disable=SC2064  # the names are those of now
        trap "told+=' $signal'; echo \"\$(date --iso-8601=seconds) SIG$signal\" >&2
            [[ -n \${REACHED:-} ]] || kill -$signal $child 2>/dev/null || true" "$signal"
    done
    while :; do
        before=$told code=0
        wait "$child" || code=$?
        [[ $told == "$before" ]] && break # else a signal has ended the wait, as likely as not
    done
    if [[ $code != 0 && $code != 76 && -n $told ]]; then
        code=75
        [[ $told == *INT* ]] && code=76
    fi
    return 0
}
