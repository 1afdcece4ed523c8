#!/usr/bin/env bash
# Draws where source and target spend their CPU time, each apart: flamegraph.sh [bare|pageferry] [channels] [runs]
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"
need perf linux-perf
need_inferno

is_current "$out/$label.data" || "$here/record.sh" "$which" "$channels" "$runs" >/dev/null
rm -f "$out/$label".{source,target}.folded
perf script --input "$out/$label.data" --no-inline --ns --fields comm,pid,tid,time,event,ip,sym 2>>"$out/perf.log" |
    awk -v source="$(cat "$out/$label.data.source")" -v stem="$out/$label" -f "$here/fold.awk"
for side in source target; do
    "$tools/bin/inferno-flamegraph" --title "$side: ship ${arguments[*]:1}, commit $(commit)" \
        --subtitle "CPU time by cpu-clock; kernel $(uname -r)" <"$out/$label.$side.folded" >"$out/$label.$side.svg"
    say "$out/$label.$side.svg"
done
