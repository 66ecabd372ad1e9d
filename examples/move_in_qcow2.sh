#!/usr/bin/env bash
# Move a qcow2 image to QED where it is: its data stays in place, so that it takes moments and hardly any space.
#
#     examples/move_in_qcow2.sh          makes a small qcow2 image, for a look
#     examples/move_in_qcow2.sh FILE     converts FILE; nothing may be using it
#
# QEDFUSE is the command; the one that examples/setup.sh installs, if it is not set.
set -euo pipefail
top=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
read -ra qedfuse <<<"${QEDFUSE:-$top/.venv/bin/qedfuse}"

say() {
    echo "== $*"
}

work=$(mktemp -d "${TMPDIR:-/tmp}/qedfuse-move-in.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ $# = 0 ]; then
    image=$work/disk.qcow2
    say "a qcow2 image over a raw backing file: data, zeroes, compressed clusters"
    head -c 8M /dev/urandom >"$work/base.raw"
    (cd "$work" && qemu-img create -q -f qcow2 -b base.raw -F raw disk.qcow2 64M)
    qemu-io -f qcow2 -c "write -c -P 3 1M 64k" -c "write -P 1 4M 6M" -c "write -z 2M 1M" "$image" >/dev/null
    cp "$image" "$work/before.qcow2"
else
    image=$1
fi

say "what it is, and whether it is in order; what has snapshots, say, is refused later, and stays as it is"
qemu-img info "$image" | sed -n '2,5s/^/   /p'
qemu-img check -q -f qcow2 "$image"
was=$(stat -c %s "$image")

say "qedfuse convert --in-place: if the machine stops meanwhile, the same command finishes it, and --undo takes it back"
"${qedfuse[@]}" convert --in-place -f qcow2 -O qed "$image"
echo "   $was bytes before, $(stat -c %s "$image") bytes now"

say "QEMU agrees"
qemu-img check -f qed "$image" | sed -n '1s/^/   /p'
if [ $# = 0 ]; then
    echo "   $(qemu-img compare -f qcow2 -F qed "$work/before.qcow2" "$image")"
fi
say "done; its name is as before, so tell whatever uses it that the format is qed now"
