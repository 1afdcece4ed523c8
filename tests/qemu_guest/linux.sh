# A Linux guest of a kernel and busybox: what the scripts that boot one share. To be sourced, under `set -euo pipefail`.
#
# `lacking WHY` and `fail WHY`, which do not return, are the caller's.

# need_linux TOOL...: whether this machine has the tools, a static busybox and a guest kernel; $kernel names that one.
need_linux() {
    local tool
    for tool in busybox cpio "$@"; do
        command -v "$tool" >/dev/null || lacking "no $tool here (.ci/install fetches it)"
    done
    # A busybox that needs shared libraries would not start in a guest that has none.
    ! ldd "$(command -v busybox)" >/dev/null 2>&1 || lacking "the busybox here is not static (.ci/install fetches one)"
    if [ -n "${PAGEFERRY_GUEST_KERNEL:-}" ]; then
        kernel=$PAGEFERRY_GUEST_KERNEL
        [ -r "$kernel" ] || fail "PAGEFERRY_GUEST_KERNEL names no readable file: $kernel"
    else
        kernel=$({ compgen -G '/boot/vmlinuz-*-cloud-amd64' || true; } | sort -V | tail -n 1)
        kernel=${kernel:-${XDG_CACHE_HOME:-${HOME:-}/.cache}/pageferry/guest/vmlinuz}
        [ -r "$kernel" ] || lacking "no guest kernel: set PAGEFERRY_GUEST_KERNEL, or let .ci/install fetch one"
    fi
}

# make_initrd FOLDER: FOLDER/initrd, with busybox and, from stdin, what its shell does once the console is the serial
# port and /mem a tmpfs.
make_initrd() {
    local root=$1/root
    mkdir -p "$root"/{bin,dev,proc,mem}
    cp "$(command -v busybox)" "$root/bin/busybox"
    {
        cat <<'INIT'
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
exec </dev/ttyS0 >/dev/ttyS0 2>&1
mount -t tmpfs -o size=90% tmpfs /mem
set -e
INIT
        cat
    } >"$root/init"
    chmod 755 "$root/init"
    (cd "$root" && find . -print0 | cpio --null --create --format=newc --owner=0:0 --quiet) >"$1/initrd"
    rm -r "$root"
}
