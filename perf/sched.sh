#!/usr/bin/env bash
# Records when threads are woken, run and stop running, with stacks: sched.sh [bare|pageferry] [channels] [runs]
#
# The scheduler's tracepoints are the whole machine's: only root may have them, or who may with perf_event_paranoid at -1.
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
need perf linux-perf

# A thread's name has 15 characters at most; threads without a name of their own have the program's.
program_name=$(basename "$(program)" | cut -c 1-15)
ours() { printf '%s ~ "pf-*" || %s == "%s"' "$1" "$1" "$program_name"; }
if ! record "$out/$label.sched.data" --all-cpus \
    --event 'sched:sched_switch/call-graph=fp/' --filter "$(ours prev_comm) || $(ours next_comm)" \
    --event sched:sched_waking --filter "$(ours comm)" | tee "$out/$label.sched.txt" >&2; then
    say "perf could not record the scheduler's tracepoints: root can, where the kernel has tracefs"
    exit 1
fi
rm -f "$out/$label".{source,target}.waits "$out/$label".{wakes,running}
perf script --input "$out/$label.sched.data" --no-inline --ns --fields comm,pid,tid,time,event,trace,ip,sym 2>>"$out/perf.log" |
    awk -v source="$(cat "$out/$label.sched.data.source")" -v stem="$out/$label" -v mine="^(pf-|$program_name$)" \
        -f "$here/sched.awk"
