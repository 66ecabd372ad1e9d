#!/usr/bin/env bash
# Make the root directory of a Debian system with its QEMU, for the benchmark's --qemu-root.
#
#   tests/bench/qemu_root.sh ROOT                  of sid, which has the newest QEMU
#   tests/bench/qemu_root.sh ROOT SUITE [MIRROR]   of another release; MIRROR as for debootstrap
#
# As root, with debootstrap installed. Takes a minute and 400 MB.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 3 ]; then
    echo "usage: $0 ROOT [SUITE [MIRROR]]" >&2
    exit 2
fi
root=$1
suite=${2-sid}

fail() {
    echo "$0: $*" >&2
    exit 1
}

[ ! -e "$root" ] || fail "$root exists"
command -v debootstrap >/dev/null || fail "debootstrap is not installed"
debootstrap --variant=minbase --include=qemu-utils "$suite" "$root" ${3+"$3"}
[ -e "$root/usr/bin/qemu-storage-daemon" ] || fail "$suite has no qemu-storage-daemon in qemu-utils"
