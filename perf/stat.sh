#!/usr/bin/env bash
# Counts what the kernel counts for both processes: stat.sh [bare|pageferry] [channels] [runs]
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
need perf linux-perf

events=cpu-clock,context-switches,cpu-migrations,page-faults
# Hardware counters where the machine has them: a count of nothing is worse than none.
if [[ $(perf stat --event cycles true 2>&1) =~ [0-9]\ +cycles ]]; then
    events=$events,cycles,instructions,cache-references,cache-misses,dTLB-load-misses
else
    say "no hardware counters here: software events only"
fi
perf stat --event "$events" --output "$out/$label.stat" "$(program)" "${arguments[@]}" >&2
cat "$out/$label.stat"
