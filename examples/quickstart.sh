#!/usr/bin/env bash
# The main job from nothing: set qedfuse up, then mount a QED image that QEMU made as a raw file, read and write the
# file system in it, and let QEMU judge the result.
#
# For Debian 12, Ubuntu 24.04 or newer with python3, as root or with sudo. Works in a scratch directory, leaves nothing
# mounted and can be run again.
set -euo pipefail
script=$(readlink -f "$0")
cd "$(dirname "$script")/.."
qedfuse=$PWD/.venv/bin/qedfuse
PATH=$PATH:/usr/sbin:/sbin

say() {
    echo "== $*"
}

fail() {
    echo "quickstart: $*" >&2
    exit 1
}

if [ "${1-}" != --set-up ]; then
    say "set-up: system packages, virtual environment, install"
    examples/setup.sh
    if [ "$(id -u)" != 0 ]; then
        say "sudo: a loop mount needs root"
        exec sudo -- "$script" --set-up
    fi
fi
[ -c /dev/fuse ] || fail "no /dev/fuse here; load the kernel's fuse module, or give the container the device"

work=$(mktemp -d "${TMPDIR:-/tmp}/qedfuse-quickstart.XXXXXX")
image=$work/guest.qed # what QEMU knows
raw=$work/guest.raw   # where qedfuse shows it
guest=$work/guest     # where its file system is mounted
source=/usr/include/linux
written=/usr/include/asm-generic

is_mounted() {
    mountpoint -q "$1"
}

clean_up() {
    status=$?
    trap - EXIT
    if is_mounted "$guest"; then umount "$guest" || umount -l "$guest" || true; fi
    if is_mounted "$raw"; then timeout 60 "$qedfuse" umount "$raw" || true; fi
    if is_mounted "$raw"; then fusermount3 -uz "$raw" || true; fi
    if is_mounted "$guest" || is_mounted "$raw"; then
        echo "quickstart: $work is still in use and stays" >&2
    else
        rm -rf "$work"
    fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The same tree has the same sum, wherever it is.
sum_of() {
    (cd "$1" && find . -type f -not -path './lost+found/*' -print0 | sort -z | xargs -0 sha256sum) | sha256sum
}

# udev may hold the loop device, and with it the raw file, for a moment longer.
wait_for_loop() {
    local tries
    for tries in $(seq 100); do
        [ -n "$(losetup -j "$raw")" ] || return 0
        sleep 0.1
    done
    fail "a loop device still uses $raw after $((tries / 10)) s"
}

use_loop_mount() {
    mount -o loop "$raw" "$guest"
    say "read: checksums of the files in the image"
    [ "$(sum_of "$guest/linux")" = "$(sum_of "$source")" ] || fail "the files in the image differ from $source"
    echo "   all are the same"
    say "write: copy $written into the image, delete a file, sync, unmount"
    cp -r "$written" "$guest/written"
    rm "$guest/linux/fs.h"
    sync -f "$guest"
    umount "$guest"
    wait_for_loop
}

use_debugfs() {
    say "read: checksums of the files in the image"
    debugfs -R "rdump /linux $work/copy" "$raw" >/dev/null 2>"$work/log" || fail "$(cat "$work/log")"
    [ "$(sum_of "$work/copy/linux")" = "$(sum_of "$source")" ] || fail "the files in the image differ from $source"
    echo "   all are the same"
    say "write: copy $written into the image, delete a file"
    {
        echo "mkdir written"
        echo "cd written"
        find "$written" -type f -printf 'write %p %f\n'
        echo "rm /linux/fs.h"
    } >"$work/commands"
    debugfs -w -f "$work/commands" "$raw" >/dev/null 2>"$work/log" || fail "$(cat "$work/log")"
    sync "$raw"
}

mkdir "$guest" "$work/tree" "$work/copy"
touch "$raw"

say "make a disk with an ext4 file system that holds $source ($(find "$source" -type f | wc -l) files)"
cp -rL "$source" "$work/tree/linux"
mkfs.ext4 -q -d "$work/tree" "$work/before.raw" 64M >/dev/null

say "qemu-img convert it to $image"
qemu-img convert -f raw -O qed "$work/before.raw" "$image"
qemu-img info "$image" | sed -n '2,5s/^/   /p'

say "qedfuse mount $image $raw"
"$qedfuse" mount "$image" "$raw"
stat -c '   %A, %s bytes, %b blocks of %B bytes' "$raw"
cmp "$raw" "$work/before.raw"
echo "   every byte is as in the disk it was made from"

# Tried on an ordinary file, so that a fault of ours cannot pass for a machine without loop devices.
if mount -o loop,ro "$work/before.raw" "$guest" 2>"$work/log"; then
    umount "$guest"
    say "loop-mount the file system in $raw"
    use_loop_mount
else
    say "no loop mounts here ($(head -n 1 "$work/log")): debugfs reads and writes the file system instead"
    use_debugfs
fi

say "qedfuse umount $raw"
"$qedfuse" umount "$raw"

say "qemu-img check"
qemu-img check "$image" | sed 's/^/   /'

say "mount it again, read-only, and copy it: qemu-img compare"
"$qedfuse" mount --ro "$image" "$raw"
cp --sparse=always "$raw" "$work/after.raw"
"$qedfuse" umount "$raw"
qemu-img compare -f qed -F raw "$image" "$work/after.raw" | sed 's/^/   /'

say "the file system in QEMU's view of the image"
qemu-img convert -f qed -O raw "$image" "$work/qemu.raw"
e2fsck -fn "$work/qemu.raw" 2>&1 | tail -n 1 | sed 's/^/   /'
rm -rf "$work/copy/"*
debugfs -R "rdump /written $work/copy" "$work/qemu.raw" >/dev/null 2>"$work/log" || fail "$(cat "$work/log")"
[ "$(sum_of "$work/copy/written")" = "$(sum_of "$written")" ] || fail "what was written is not in the image"
echo "   has the files that were written"
say "done"
