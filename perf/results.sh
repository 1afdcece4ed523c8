#!/usr/bin/env bash
# Takes all figures anew and writes perf/RESULTS.md: results.sh [peers|benches|render]...
#
# peers: the rivals, half an hour. benches: every other benchmark, a few minutes each. render: only what was measured
# before. All three unless told otherwise. Nothing else should run on the machine meanwhile.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."
[ "$#" -gt 0 ] || set -- peers benches render

peers() { "$here/peers/run.sh"; }

benches() {
    mkdir -p "$here/out/bench"
    local file name
    for file in benches/*.rs; do
        name=$(basename "$file" .rs)
        [ "$name" != peers ] || continue
        cargo bench --locked --bench "$name" 2>"$here/out/bench/$name.log" | tee "$here/out/bench/$name.new"
        mv "$here/out/bench/$name.new" "$here/out/bench/$name.txt"
    done
}

render() { python3 "$here/results.py"; }

for stage; do
    case $stage in
    peers | benches | render) "$stage" ;;
    *)
        echo "usage: ${0##*/} [peers|benches|render]..." >&2
        exit 2
        ;;
    esac
done
