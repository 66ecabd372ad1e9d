"""A host that does not have at hand what is asked for: RWF_NOWAIT fails, always or now and then, in a daemon's process.

Real disks are slow when they like. This library stands in front of preadv2, in C and in Python alike.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>

ssize_t preadv64v2(int fd, const struct iovec *iov, int count, off64_t offset, int flags)
{
    static ssize_t (*real)(int, const struct iovec *, int, off64_t, int);
    static unsigned state = 1;
    if (!real)
        real = dlsym(RTLD_NEXT, "preadv64v2");
    state = state * 1103515245u + 12345u;
    unsigned dice = state >> 16 & 0xff;
    if (flags & RWF_NOWAIT && dice < EAGAIN_OF_256) {
        errno = EAGAIN;
        return -1;
    }
    if (flags & RWF_NOWAIT && dice - EAGAIN_OF_256 < SHORT_OF_256 && iov[0].iov_len > 512) {
        struct iovec part = {iov[0].iov_base, iov[0].iov_len / 2};
        return real(fd, &part, 1, offset, flags);
    }
    return real(fd, iov, count, offset, flags);
}

ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    return preadv64v2(fd, iov, count, offset, flags);
}
"""


def unwilling(monkeypatch: pytest.MonkeyPatch, directory: Path, *, refused: int, shortened: int = 0) -> None:
    """Daemons started from now on: so many of 256 calls with RWF_NOWAIT have nothing, or only a part."""
    source, library = directory / "nowait.c", directory / "nowait.so"
    source.write_text(_SOURCE)
    definitions = [f"-DEAGAIN_OF_256={refused}u", f"-DSHORT_OF_256={shortened}u"]
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", *definitions, "-o", str(library), str(source), "-ldl"], check=True
    )
    monkeypatch.setenv("LD_PRELOAD", f"{os.environ.get('LD_PRELOAD', '')} {library}".strip())
