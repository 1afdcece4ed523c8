#!/bin/sh
# Records where both processes spend their CPU time, the kernel included: record.sh [bare|pageferry] [channels] [runs]
. "$(dirname "$0")/common.sh"
need perf linux-perf

# cpu-clock: a timer, which every virtual machine has; hardware counters it may not.
perf record --quiet --event cpu-clock --freq 1999 --call-graph fp --output "$out/$label.data" \
    "$(program)" "$@" | tee "$out/$label.txt" >&2
{
    printf 'perf record of: %s %s\n' "$(basename "$(program)")" "$*"
    printf 'commit %s, kernel %s\n' "$(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)" "$(uname -r)"
    perf report --input "$out/$label.data" --stdio --no-children --call-graph none --sort comm,symbol 2>/dev/null |
        grep -v '^#' | grep -v '^$' | head -40
} >"$out/$label.top"
cat "$out/$label.top"
