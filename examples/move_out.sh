#!/usr/bin/env bash
# Move a disk out of QED: a copy as a raw file, with all that its backing files have; the image stays as it is.
#
#     examples/move_out.sh                  makes a small image with a backing file, for a look
#     examples/move_out.sh FILE TARGET      copies FILE to TARGET, which must not exist; nothing may be writing FILE
#
# QEDFUSE is the command; the one that examples/setup.sh installs, if it is not set.
set -euo pipefail
top=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
read -ra qedfuse <<<"${QEDFUSE:-$top/.venv/bin/qedfuse}"

say() {
    echo "== $*"
}

work=$(mktemp -d "${TMPDIR:-/tmp}/qedfuse-move-out.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

case $# in
0)
    image=$work/disk.qed target=$work/disk.raw
    say "an image over a raw backing file: data, zeroes, and what it has not itself"
    head -c 8M /dev/urandom >"$work/base.raw"
    "${qedfuse[@]}" create -q -b base.raw -F raw "$image" 64M
    qemu-io -f qed -c "write -P 1 4M 6M" -c "write -z 2M 1M" -c "write -P 2 60M 64k" "$image" >/dev/null
    ;;
2) image=$1 target=$2 ;;
*)
    echo "usage: $0 [FILE TARGET]" >&2
    exit 2
    ;;
esac
if [ -e "$target" ]; then
    echo "$0: $target is there already" >&2
    exit 1
fi

say "whether it is in order; leaked clusters are no harm to data (exit code 3)"
"${qedfuse[@]}" check "$image" | sed 's/^/   /' || [ "${PIPESTATUS[0]}" = 3 ]

say "qedfuse convert: should it fail or be interrupted, there is no target"
"${qedfuse[@]}" convert -f qed -O raw "$image" "$target"
echo "   $(stat -c '%s bytes, of which %b blocks of %B are stored' "$target")"

say "the same content, for us and for QEMU"
"${qedfuse[@]}" compare -f qed -F raw "$image" "$target" | sed 's/^/   /'
qemu-img compare -f qed -F raw "$image" "$target" | sed 's/^/   /'

say "done; whatever uses the raw file is told that it is raw: a guest may write any format's magic to its start"
