#!/usr/bin/env bash
# Measures what the model is fed with, and writes costs.json and, by the model, RESULTS.md: measure.sh [runs]
#
# Runs the benchmarks scan, ring, bell and ship and takes the pictures of one channel; less than two minutes on a quiet
# machine where everything is built.
set -- pageferry 1 "${1:-16}"
# shellcheck source-path=SCRIPTDIR source=../common.sh
. "$(dirname "$0")/../common.sh"

raw="$out/model"
mkdir -p "$raw"
cd "$root"
bench() {
    local name=$1
    shift
    say "bench $name"
    cargo bench --quiet --bench "$name" -- "$@" >"$raw/$name.txt"
}
bench scan --quick
bench ring --quick
bench bell --quick
bench ship --kinds full,every-2nd --channels 1,2,4 --over tcp --memory warm --turns 9

say "pictures of one channel"
"$here/record.sh" "$which" "$channels" "$runs" >/dev/null 2>&1
"$here/flamegraph.sh" "$which" "$channels" 2>/dev/null
"$here/sched.sh" "$which" "$channels" "$runs" 2>/dev/null
"$here/wakeups.sh" "$which" "$channels" >/dev/null
wc -l <"$out/$label.txt" >"$raw/runs.txt"
for side in source target; do
    awk -f "$here/classes.awk" "$out/$label.$side.folded" >"$raw/$side.classes"
done
cp "$out/$label.wakeups" "$raw/wakeups.txt"

python3 -B "$here/model/costs.py" "$raw" "$(commit)" >"$here/model/costs.json.partial"
mv "$here/model/costs.json.partial" "$here/model/costs.json"
python3 -B "$here/model/model.py" >"$here/model/RESULTS.md"
say "$here/model/costs.json" "$here/model/RESULTS.md"
