#!/usr/bin/env bash
# Brings the rivals: QEMU of this system, QEMU of Debian's trixie in a folder of its own, and the bare loop in C.
#
# Usage: rivals.sh      leaves in perf/out/peers what `measure.py` runs: qemu7 and qemu10 (scripts), bare (a program).
#
# What cannot be had here is left out, loudly; `measure.py` then measures without it, and says so in its results.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$(dirname "$here")/out
trixie=$out/trixie
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

# A minimal trixie with QEMU in it. Nothing is mounted and nothing in it is started but the installation and QEMU, which
# runs by the folder's own loader and libraries: it sees the files of this system.
newer_qemu() {
    local lib=$trixie/usr/lib/x86_64-linux-gnu
    rm -f "$out/peers/qemu10"
    if [ ! -x "$trixie/usr/bin/qemu-system-x86_64" ]; then
        if ! is_root || ! need debootstrap debootstrap; then
            skip "qemu10: a debootstrap folder takes root"
            return
        fi
        say "building $trixie (450 MB)"
        rm -rf "$trixie.new"
        # Not https: the minimal system has no certificates to check it with. Packages are signed.
        if ! debootstrap --variant=minbase trixie "$trixie.new" http://deb.debian.org/debian >"$out/trixie.log" 2>&1 ||
            ! DEBIAN_FRONTEND=noninteractive LC_ALL=C chroot "$trixie.new" \
                apt-get install -q -y --no-install-recommends qemu-system-x86 >>"$out/trixie.log" 2>&1; then
            skip "qemu10: trixie could not be installed, see $out/trixie.log"
            return
        fi
        rm -rf "$trixie"
        mv "$trixie.new" "$trixie"
    fi
    printf '#!/bin/sh\nexec %q --library-path %q %q "$@"\n' \
        "$trixie/lib64/ld-linux-x86-64.so.2" "$lib" "$trixie/usr/bin/qemu-system-x86_64" >"$out/peers/qemu10"
    chmod +x "$out/peers/qemu10"
}

bare_loop() {
    rm -f "$out/peers/bare"
    need cc gcc || { skip "bare-c: no C compiler here"; return; }
    cc -O2 -Wall -Wextra -Werror -pthread -o "$out/peers/bare" "$here/bare.c"
}

this_qemu
newer_qemu
bare_loop
