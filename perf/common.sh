# shellcheck shell=bash
# What the scripts of this folder share: where things are, and the program that is measured. Sourced, not run.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
out="$here/out"
# shellcheck disable=SC2034  # for build.sh
target=${CARGO_TARGET_DIR:-$root/target}
tools="$root/target/tools"
mkdir -p "$out"

say() { printf '%s\n' "$*" >&2; }

# The programs that measure, from the system's packages. Installed where we are root, asked for where we are not.
need() {
    command -v "$1" >/dev/null 2>&1 && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "installing $2"
        apt-get install -y --no-install-recommends "$2" >/dev/null || {
            apt-get update >/dev/null && apt-get install -y --no-install-recommends "$2" >/dev/null
        }
    else
        say "$1 is not here: install the package $2 (Debian's name)"
        exit 1
    fi
}

need_inferno() {
    [ -x "$tools/bin/inferno-flamegraph" ] && return
    say "building inferno into $tools"
    cargo install --quiet --locked --root "$tools" --no-default-features --features cli inferno
}

# The benchmark that ships pages; build.sh has left its path.
program() {
    if [ ! -s "$out/program" ] || [ ! -x "$(cat "$out/program")" ]; then "$here/build.sh" >/dev/null; fi
    cat "$out/program"
}

# Whether this recording is there, and of the program as it is now.
is_current() { [ -s "$1" ] && [ -s "$out/program" ] && [ "$1" -nt "$(cat "$out/program")" ]; }

commit() { git -C "$root" rev-parse --short HEAD 2>/dev/null || echo unknown; }

# record RECORDING PERF-OPTION...: runs the program under perf record. Which of its two processes is the source stands in
# RECORDING.source; the target is the other one.
record() {
    local recording=$1
    shift
    # shellcheck disable=SC2016  # the inner shell expands them
    perf record --quiet --output "$recording" "$@" \
        bash -c 'echo $$ >"$0"; exec "$@"' "$recording.source" "$(program)" "${arguments[@]}"
}

# What is run: `bare` or `pageferry`, the channels, and how often 1 GiB is shipped.
which=${1:-pageferry}
channels=${2:-2}
runs=${3:-10}
case $which in
bare | pageferry) ;;
*)
    say "usage: ${0##*/} [bare|pageferry] [channels] [runs]"
    exit 2
    ;;
esac
# shellcheck disable=SC2034  # for the others, too
label="$which-$channels"
arguments=(--bench --profile "$which" --channels "$channels" --runs "$runs")
