#!/usr/bin/env bash
# Set up qedfuse from this checkout: system packages, a virtual environment in .venv, and the install into it.
#
#   examples/setup.sh            what qedfuse and examples/quickstart.sh need
#   examples/setup.sh --tests    also what tests/run.sh needs
#
# For Debian 12, Ubuntu 24.04 or newer, as root or with sudo. Does only what is not yet done.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
root=$PWD
venv=$root/.venv

# Each name is the same in Debian 12 and in Ubuntu 24.04. qemu-storage-daemon is in qemu-system-common in the former,
# in qemu-utils in the latter. gcc only recommends libc6-dev.
packages=(fuse3 libfuse3-dev gcc libc6-dev pkg-config qemu-utils e2fsprogs mount)
level="base"
target="."
case ${1-} in
"") ;;
--tests)
    packages+=(qemu-system-common fio xfsprogs btrfs-progs fdisk attr rsync strace shellcheck)
    level="test"
    target='.[test]'
    ;;
*)
    echo "usage: $0 [--tests]" >&2
    exit 2
    ;;
esac

fail() {
    echo "$0: $*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -- "$@"; fi
}

find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no python 3.11 or newer here; install python3 first"
}

# Whether an interpreter can make a virtual environment with pip and compile extensions.
is_complete() {
    "$1" - 2>/dev/null <<'PYTHON'
import ensurepip, pathlib, sysconfig, venv
raise SystemExit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
PYTHON
}

install_packages() {
    local missing=() package log
    if ! is_complete "$python"; then
        missing+=("python$version-venv" "python$version-dev")
    fi
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        echo "no apt here: install by hand what corresponds to: ${missing[*]} ${packages[*]}"
        return
    fi
    for package in "${packages[@]}"; do
        case $(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true) in
        ?i*) ;;
        *) missing+=("$package") ;;
        esac
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
        fail "neither root nor sudo here; as root, install: ${missing[*]}"
    fi
    echo "installing system packages: ${missing[*]}"
    log=$(mktemp)
    if ! { as_root apt-get update -q &&
        as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get install -q -y \
            --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}"; } >"$log" 2>&1 </dev/null; then
        cat "$log" >&2
        rm -f "$log"
        fail "apt-get could not install the system packages"
    fi
    rm -f "$log"
}

# A virtual environment knows its own path: one that was moved or copied, or whose interpreter is gone, is no use.
venv_works() {
    "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
        grep -qF "$venv/bin/python" "$venv/bin/pip" 2>/dev/null
}

# What the install depends on. Python sources do not count: the install refers to them where they are.
checksum() {
    {
        "$venv/bin/python" -VV
        find pyproject.toml qedfuse \( -name pyproject.toml -o -name '*.c' -o -name '*.h' \) -print0 |
            sort -z | xargs -0 sha256sum
    } | sha256sum
}

install_qedfuse() {
    if ! venv_works; then
        is_complete "$python" ||
            fail "$python lacks its venv module or its headers (python$version-venv, python$version-dev)"
        echo "making a virtual environment in $venv"
        "$python" -m venv --clear "$venv"
    fi
    [ "$(cat "$venv/.setup-$level" 2>/dev/null)" != "$(checksum)" ] || return 0
    echo "installing qedfuse into it (pyfuse3 is compiled: may take a minute)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target"
    checksum >"$venv/.setup-base"
    checksum >"$venv/.setup-$level"
}

python=$(find_python)
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
install_packages
install_qedfuse
# fusermount3 wants it from an ordinary user; systemd makes it at boot, a bare root has none.
[ -e /etc/mtab ] || as_root ln -sf ../proc/self/mounts /etc/mtab
[ -c /dev/fuse ] || as_root modprobe fuse 2>/dev/null || echo "no /dev/fuse here: nothing can be mounted"
