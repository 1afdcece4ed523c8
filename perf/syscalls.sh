#!/usr/bin/env bash
# Counts the system calls of both processes by name: syscalls.sh [bare|pageferry] [channels] [runs]
#
# Counted by strace, which stops the program at each call: the counts are right, the times are not.
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
need strace strace

strace --follow-forks --summary-only --summary-sort-by=calls --output "$out/$label.syscalls" \
    "$(program)" "${arguments[@]}" >&2
say "for $runs runs of 1 GiB, set-up included:"
cat "$out/$label.syscalls"
