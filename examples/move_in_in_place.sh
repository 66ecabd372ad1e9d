#!/usr/bin/env bash
# Move in without a copy, and out again: a raw disk becomes a QED image where it is, in a moment and in hardly more
# space than it had; QEMU checks it and writes to it; then it becomes a raw disk again.
#
# Needs no root. Works in a scratch directory, and can be run again. QEDFUSE: the command, if it is not that of
# examples/setup.sh.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
read -ra qedfuse <<<"${QEDFUSE:-$PWD/.venv/bin/qedfuse}"
PATH=$PATH:/usr/sbin:/sbin

say() {
    echo "== $*"
}

fail() {
    echo "move_in_in_place: $*" >&2
    exit 1
}

work=$(mktemp -d "${TMPDIR:-/tmp}/qedfuse-in-place.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
disk=$work/guest.raw
image=$work/guest.qed

say "a raw disk with an ext4 of 64 MiB in it, and some space behind that"
truncate --size=64M "$disk"
mkfs.ext4 -q -F -d examples "$disk"
truncate --size=80M "$disk"
before=$(sha256sum <"$disk")
cp --sparse=always "$disk" "$work/copy.raw" # for the comparison below; the conversion needs none
du --block-size=1 "$disk"

say "in place to qed"
# The disk must not be in use. If it has other names (hard links), --force is needed. If the machine stops meanwhile,
# the same command finishes it, and with --undo takes it back.
time "${qedfuse[@]}" convert --in-place -f raw -O qed "$disk"
mv "$disk" "$image" # the format has changed, so the name should
du --block-size=1 "$image"

say "what QEMU says"
qemu-img check -f qed "$image"
qemu-img compare -f raw -F qed "$work/copy.raw" "$image"

say "a guest writes, in place: the file grows no more"
size=$(stat --format=%s "$image")
qemu-io -f qed -c "write -P 7 64M 1M" "$image"
[ "$(stat --format=%s "$image")" = "$size" ] || fail "the image has grown"
qemu-io -f qed -c "write -z 64M 1M" "$image"

say "and out again"
mv "$image" "$disk"
time "${qedfuse[@]}" convert --in-place -f qed -O raw "$disk"
[ "$(sha256sum <"$disk")" = "$before" ] || fail "the disk has changed"
e2fsck -fn "$disk"

say "done: the same disk, byte for byte"
