#!/usr/bin/env bash
# Records where both processes spend their CPU time, the kernel included: record.sh [bare|pageferry] [channels] [runs]
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
need perf linux-perf

# cpu-clock: a timer, which every virtual machine has; hardware counters it may not.
record "$out/$label.data" --event cpu-clock --freq 1999 --call-graph fp | tee "$out/$label.txt" >&2
{
    printf 'perf record of: %s %s\n' "$(basename "$(program)")" "${arguments[*]}"
    printf 'commit %s, kernel %s\n' "$(commit)" "$(uname -r)"
    perf report --input "$out/$label.data" --stdio --no-children --call-graph none --sort comm,symbol 2>/dev/null |
        grep -v -e '^#' -e '^$' | awk 'NR <= 40'
} >"$out/$label.top"
cat "$out/$label.top"
