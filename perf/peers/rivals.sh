#!/usr/bin/env bash
# Brings the rivals: QEMU of this system, QEMU of Debian's trixie in a folder of its own, and the bare loop in C.
#
# Usage: rivals.sh      leaves in perf/out/peers what `measure.py` runs: qemu7 and qemu10 (scripts), bare (a program).
#
# What cannot be had here is left out, loudly; `measure.py` then measures without it, and says so in its results.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$(dirname "$here")/out
mkdir -p "$out/peers"

say() { printf '%s\n' "$*" >&2; }
skip() { say "SKIPPED $*"; }
is_root() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

# need PROGRAM PACKAGE: installs it where we may. False if it is not here after that.
need() {
    command -v "$1" >/dev/null && return
    is_root || return
    say "installing $2"
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$2" >/dev/null
}

# Whatever the system has: on Debian's bookworm that is QEMU 7.2.
this_qemu() {
    rm -f "$out/peers/qemu7"
    need qemu-system-x86_64 qemu-system-x86 || { skip "qemu7: no qemu-system-x86_64 here, and we may not install it"; return; }
    ln -s "$(command -v qemu-system-x86_64)" "$out/peers/qemu7"
}

# Trixie's, in a folder that the tests with real QEMU use as well.
newer_qemu() {
    local program
    rm -f "$out/peers/qemu10"
    program=$("$here/../../tests/qemu_live/trixie") || { skip "qemu10: it cannot be had here"; return; }
    ln -s "$program" "$out/peers/qemu10"
}

bare_loop() {
    rm -f "$out/peers/bare"
    need cc gcc || { skip "bare-c: no C compiler here"; return; }
    cc -O2 -Wall -Wextra -Werror -pthread -o "$out/peers/bare" "$here/bare.c"
}

this_qemu
newer_qemu
bare_loop
