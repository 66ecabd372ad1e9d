"""The kernel's asynchronous writes: several at a time on one file, as QEMU and loop devices make them.

Ordinary writes to a file of a FUSE mount come one after another. Source: io_submit(2), linux/aio_abi.h.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
from collections.abc import Iterator

_NUMBERS = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}  # io_setup, io_getevents, io_submit
_IOCB = struct.Struct("=QIIHhIQQqQII")
_EVENT = struct.Struct("=QQqq")
_PWRITE = 1
_MOST = 64  # writes in flight

SUPPORTED = platform.machine() in _NUMBERS


class AsynchronousWriter:
    """`path` is opened with O_DIRECT, without which nothing is asynchronous. No write of more than 64 KiB."""

    _ROOM = 64 << 10

    def __init__(self, path: str) -> None:
        self._setup, self._getevents, self._submit = _NUMBERS[platform.machine()]
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._memory = mmap.mmap(-1, _MOST * self._ROOM)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._free = list(range(_MOST))
        self._sizes: dict[int, int] = {}
        self._context = ctypes.c_ulong(0)
        self._call(self._setup, _MOST, ctypes.byref(self._context))

    @staticmethod
    def _call(number: int, *arguments: object) -> int:
        done = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments)
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(done)

    def submit(self, writes: list[tuple[int, bytes]]) -> list[int]:
        """Begin to write these (offset, data), at once; the numbers by which `finished` tells of their ends."""
        iocbs = bytearray()
        numbers = []
        for offset, data in writes:
            number = self._free.pop()
            start = number * self._ROOM
            self._memory[start : start + len(data)] = data
            self._sizes[number] = len(data)
            iocbs += _IOCB.pack(number, 0, 0, _PWRITE, 0, self._fd, self._address + start, len(data), offset, 0, 0, 0)
            numbers.append(number)
        memory = (ctypes.c_char * len(iocbs)).from_buffer(iocbs)
        first = ctypes.addressof(memory)
        pointers = (ctypes.c_void_p * len(writes))(*range(first, first + len(iocbs), _IOCB.size))
        done = self._call(self._submit, self._context, ctypes.c_long(len(writes)), pointers)
        assert done == len(writes), done
        return numbers

    def finished(self) -> Iterator[int]:
        """Waits for all that is under way."""
        event = ctypes.create_string_buffer(_EVENT.size)
        one = ctypes.c_long(1)
        while self._sizes:
            assert self._call(self._getevents, self._context, one, one, event, None) == 1
            number, _object, result, _ = _EVENT.unpack(event.raw)
            assert result == self._sizes.pop(number), result
            self._free.append(number)
            yield number
