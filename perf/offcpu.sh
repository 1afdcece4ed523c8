#!/usr/bin/env bash
# Draws where source and target do not run, asleep or waiting for a CPU: offcpu.sh [bare|pageferry] [channels] [runs]
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
need_inferno

is_current "$out/$label.sched.data" || "$here/sched.sh" "$which" "$channels" "$runs"
for side in source target; do
    "$tools/bin/inferno-flamegraph" --title "$side, not running: ship ${arguments[*]:1}, commit $(commit)" \
        --subtitle "kernel $(uname -r)" --countname us --colors io \
        <"$out/$label.$side.waits" >"$out/$label.$side.waits.svg"
    say "$out/$label.$side.waits.svg"
done
# What the stacks say in one line each: the system call, or the fault, that a thread waits in.
for side in source target; do
    awk -v side="$side" -v runs="$(wc -l <"$out/$label.sched.txt")" '
        {
            us = $NF
            split($0, frames, ";")
            what = match($0, /__((x64|arm64)_)?sys_[a-z0-9_]+/) ? substr($0, RSTART, RLENGTH) : "fault or interrupt"
            sub(/^__((x64|arm64)_)?sys_/, "", what)
            if ($0 ~ /\[waits for a CPU\] [0-9]+$/) what = "waits for a CPU"
            sum[frames[1] "\t" what] += us
        }
        END {
            for (key in sum) {
                if (sum[key] / runs < 50) continue
                split(key, part, "\t")
                printf "%-7s %-9s %-22s %9.1f ms a run\n", side, part[1], part[2], sum[key] / runs / 1e3
            }
        }' "$out/$label.$side.waits" | sort
done | tee "$out/$label.waits"
