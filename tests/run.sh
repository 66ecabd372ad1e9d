#!/usr/bin/env bash
# Set up what the tests need, then lint, type-check and test. Arguments go to pytest.
#
#   tests/run.sh              the ordinary run, on all processors
#   tests/run.sh -m slow      the long tests
#   tests/run.sh tests/qed/test_geometry.py -k round
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

examples/setup.sh --tests
# An ordinary user's PATH lacks the directories of mkfs, losetup and sfdisk.
export PATH=$PWD/.venv/bin:$PATH:/usr/sbin:/sbin

shellcheck examples/*.sh tests/*.sh tests/bench/*.sh .ci/run
ruff check
ruff format --check
mypy
python -m mypy.stubtest qedfuse.native._fastpath qedfuse.native._clustermap qedfuse.native._sidecar
if [ $# = 0 ]; then
    processors=$(nproc)
    # Some tests make mount namespaces, in which the mounts of the others would live on. (In a chroot, whose root is no
    # mount, the propagation cannot be changed; a container may not have namespaces at all.)
    python=python
    for alone in "unshare --mount --propagation unchanged" "unshare --mount"; do
        ! $alone true 2>/dev/null || python="$alone python"
    done
    # Files stay whole: their tests count together. Not reordered, or those with a few long tests come last.
    set -- --durations=15 --dist=loadfile --no-loadscope-reorder
    set -- "$@" --tx="$((processors < 4 ? processors : 4))*popen//python=$python"
fi
exec pytest "$@"
