#!/usr/bin/env bash
# Builds the benchmark that ships pages, with everything a profiler wants to know, and remembers where it is: build.sh
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

cd "$root"
# Frame pointers, so that stacks need no unwinding tables; all debug information, so that inlined functions have names.
RUSTFLAGS="${RUSTFLAGS:-} -C force-frame-pointers=yes" CARGO_TARGET_DIR="$target" \
    cargo bench --profile profiling --bench ship --no-run --message-format=json |
    sed -n 's/.*"name":"ship".*"executable":"\([^"]*\)".*/\1/p' | tail -1 >"$out/program"
[ -s "$out/program" ] || { say "cargo built no program"; exit 1; }
cat "$out/program"
