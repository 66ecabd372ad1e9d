#!/usr/bin/env bash
# Run the tests of what is in C with AddressSanitizer and UndefinedBehaviorSanitizer. Arguments go to pytest.
#
# Works on a copy, so that no other program meets the slow library.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."

python=$PWD/.venv/bin/python
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r qedfuse tests pyproject.toml "$copy"
cd "$copy"
rm -f qedfuse/native/*.so

suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
build() { # module source...
    gcc -std=gnu11 -O1 -g -fPIC -shared -fvisibility=hidden -Wall -Wextra -Werror -fno-omit-frame-pointer \
        -fsanitize=address,undefined -fsanitize-undefined-trap-on-error \
        -I"$include" "${@:2}" -o "qedfuse/native/$1$suffix"
}
build _fastpath qedfuse/native/fastpath/*.c
build _clustermap qedfuse/native/clustermap/clustermap.c
build _sidecar qedfuse/native/sidecar/sidecar.c

# Python itself is not instrumented, so the runtime must be in the process first; what Python never frees is no leak of
# ours. Only Python is started that way, not the other programs that the tests run.
cat >sanitized <<END
#!/bin/sh
LD_PRELOAD="$(gcc -print-file-name=libasan.so) \$LD_PRELOAD" exec "$python" "\$@"
END
chmod +x sanitized
cat >only_python.py <<END
import os, sys
del os.environ["LD_PRELOAD"]
sys.executable = "$copy/sanitized"
END
# A daemon has no stderr: reports go to files. Undefined behaviour traps, and that is reported as ILL; assertions, which
# are compiled in here, as ABRT.
export ASAN_OPTIONS=detect_leaks=0:handle_sigill=1:handle_abort=1:log_path=$copy/report
export PYTHONMALLOC=malloc
status=0
./sanitized -m pytest -p only_python -p no:cacheprovider \
    tests/check/test_check.py tests/daemon/test_kernel_times.py tests/fuse/test_fastpath*.py \
    tests/fuse/test_oversize.py tests/fuse/test_direct_handles.py \
    tests/fuse/test_replace_image.py tests/fuse/test_seek_mapped.py tests/fuse/test_seek_model.py \
    tests/qed/test_begin_flush.py tests/qed/test_cluster_map.py tests/qed/test_one_mapping.py "$@" || status=$?
if compgen -G "$copy/report*" >/dev/null; then
    cat "$copy"/report*
    status=1
fi
exit "$status"
