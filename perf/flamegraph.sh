#!/bin/sh
# Draws the recording that record.sh made, or makes one: flamegraph.sh [bare|pageferry] [channels] [runs]
. "$(dirname "$0")/common.sh"
need perf linux-perf

[ -s "$out/$label.data" ] || "$here/record.sh" "$which" "$channels" "$runs" >/dev/null
if [ ! -x "$tools/bin/inferno-flamegraph" ]; then
    say "building inferno into $tools"
    cargo install --quiet --locked --root "$tools" inferno
fi
title="ship --profile $which --channels $channels, commit $(git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown)"
perf script --input "$out/$label.data" --no-inline 2>/dev/null |
    "$tools/bin/inferno-collapse-perf" >"$out/$label.folded"
"$tools/bin/inferno-flamegraph" --title "$title" --subtitle "kernel $(uname -r), cpu-clock" \
    <"$out/$label.folded" >"$out/$label.svg"
say "$out/$label.svg"
