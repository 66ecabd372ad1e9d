"""What the process may have at most (ulimit), and what that means for it.

Source: getrlimit(2); Linux Documentation/mm/overcommit-accounting.rst (vm.overcommit_memory=2 counts address space).
"""

from __future__ import annotations

import errno
import mmap
import resource

#: More than ever wait in practice: requests that wait for one image must not keep others from theirs.
_MOST_REQUESTS = 10_000
_LEAST_REQUESTS = 99
_REQUEST_SPACE = (1 << 20) + (64 << 10)


def raise_limits() -> int | None:
    """Raise to what the caller may have: an open image takes a descriptor for each file of its chain, and an image file
    may grow to any size. Returns how many bytes of file are left at most, None without a limit."""
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
        soft, hard = resource.getrlimit(limit)
        if soft != hard:
            resource.setrlimit(limit, (hard, hard))
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    return None if size == resource.RLIM_INFINITY else size


def _address_space() -> int | None:
    """Bytes that the process may map; None without a limit."""
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if space == resource.RLIM_INFINITY else space


def reserve(most: int, least: int) -> mmap.mmap:
    """Address space for private memory, which costs nothing as long as it is not touched: `most` bytes, or less (not
    less than `least`) where there is little: at most a quarter of the limit. Raises MemoryError."""
    limit = _address_space()
    size = most
    while size > least and limit is not None and size > limit // 4:
        size //= 2
    while True:
        size = max(size, least)
        try:
            return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            if size == least:
                raise MemoryError from None
            size //= 2


def most_requests() -> int:
    """How many requests of the kernel may wait in tasks of their own. Each takes address space for the largest one."""
    space = _address_space()
    if space is None:
        return _MOST_REQUESTS
    return min(_MOST_REQUESTS, max(_LEAST_REQUESTS, space // 4 // _REQUEST_SPACE))


def explain_shortage(error: BaseException) -> str | None:
    """One line for an error that says that there is no memory or no thread to be had; None for any other."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        what = "out of memory"
    elif isinstance(error, ImportError) and "failed to map segment" in str(error):
        what = "out of memory"
    elif (isinstance(error, RuntimeError) and "start new thread" in str(error)) or (
        type(error) is BlockingIOError and error.filename is None  # pthread_create(3): EAGAIN
    ):
        what = "cannot start a thread"
    else:
        return None
    space = _address_space()
    if space is not None:
        return f"{what}: address space is limited to {space >> 10} KiB (ulimit -v)"
    return what
