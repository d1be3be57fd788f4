#!/usr/bin/env bash
# Runs pytest so that it ends in any case, then clears away the mounts, processes and files that
# this run left, and only those. Arguments go to pytest; the exit status is pytest's, or 124 or 137
# when the time was up.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

limit_s=2400
# A soak takes hours, and a hang in it is for someone to look at.
[ "${KVFS_SOAK:-0}" = 0 ] || limit_s=172800
base=$(mktemp -d "${TMPDIR:-/tmp}/kvfs-test-XXXXXX") || exit 1
base=$(realpath "$base")
# Some tests read as another user.
chmod 755 "$base"
# pytest and each process that a test starts inherit both.
mark=KVFS_TEST_RUN=$base
export TMPDIR=$base

# Deepest first. Only reads mountinfo: stat on a mount that hangs would hang as well.
our_mounts() {
    local mountpoint
    while read -r _ _ _ _ mountpoint _; do
        mountpoint=$(printf '%b' "$mountpoint")
        case $mountpoint in "$base"/*) echo "$mountpoint" ;; esac
    done </proc/self/mountinfo | tac
}

our_processes() {
    grep -lzxF "$mark" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3
}

# Those of ours that SIGKILL does not end: they wait in the kernel for a filesystem that hangs.
# SIGKILL is bit 8 of the pending signals.
stuck_processes() {
    local pending='^(SigPnd|ShdPnd):\s+[0-9a-f]*[13579bdf][0-9a-f]{2}$'
    comm -12 <(grep -lE "$pending" /proc/[0-9]*/status 2>/dev/null | cut -d/ -f3 | sort) \
        <(our_processes | sort)
}

end_ours() {
    local mountpoint pids
    # By force, which also fails the requests that wait for a daemon.
    while read -r mountpoint; do
        umount -fl "$mountpoint" 2>/dev/null || fusermount3 -uz "$mountpoint" 2>/dev/null
    done < <(our_mounts)
    mapfile -t pids < <(our_processes)
    if [ "${#pids[@]}" -gt 0 ]; then
        echo "test: ending processes that the tests left:" >&2
        ps -o pid,stat,etime,args -p "${pids[*]}" >&2
        kill -KILL "${pids[@]}" 2>/dev/null
    fi
}

# A pytest that pytest-timeout or timeout(1) has ended stays until its mounts and daemons are gone.
watch() {
    local before='' now
    while sleep 5; do
        now=$(stuck_processes)
        [ -n "$(comm -12 <(echo "$before") <(echo "$now") | tr -d '\n')" ] && end_ours
        before=$now
    done
}

clean_up() {
    trap '' INT TERM
    kill "$watchdog" 2>/dev/null
    end_ours
    rm -rf --one-file-system "$base"
}

watch </dev/null >/dev/null 2>&1 &
watchdog=$!
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

timeout --foreground --kill-after=30 "$limit_s" \
    env "$mark" .venv/bin/python -m pytest --basetemp="$base/t" "$@"
