# What the scripts of this folder share: where things are, and the program that is measured. Sourced, not run.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
out="$here/out"
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

# The benchmark that ships pages; build.sh has left its path.
program() {
    [ -s "$out/program" ] || "$here/build.sh" >/dev/null
    cat "$out/program"
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
label="$which-$channels"
set -- --bench --profile "$which" --channels "$channels" --runs "$runs"
