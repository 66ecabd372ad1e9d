"""Chains of backing files on the host, what QEMU reads through them and what qedfuse does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from qedfuse.chain.chain import open_layer
from qedfuse.chain.policy import BackingPolicy
from qedfuse.errors import QedfuseError
from qedfuse.host.mountinfo import find_by_id
from qedfuse.host.offload import offload
from qedfuse.layers.layer import Layer
from qedfuse.layers.resolve import read_layer
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.header import FEATURE_BACKING_FILE, FEATURE_BACKING_FORMAT_NO_PROBE, HEADER_BYTES, Header
from tests.helpers.doubles.host_calls import local_call
from tests.helpers.qemu.cli import qemu_img

T = TypeVar("T")

SIZE = 256 << 10


def run(function: Callable[[], Awaitable[T]]) -> T:
    """Run to the end, at most 60 seconds: nothing here may hang."""

    async def limited() -> T:
        with trio.fail_after(60):
            return await function()

    return trio.run(limited)


def qemu_bytes(image: Path, format: str = "qed") -> bytes:
    """What QEMU reads."""
    flat = image.with_name(image.name + ".flat")
    qemu_img("convert", "-f", format, "-O", "raw", image, flat)
    return flat.read_bytes()


def header_of(path: Path) -> Header:
    return Header.decode(path.read_bytes()[:HEADER_BYTES], str(path))


def check_is_clean(path: Path) -> None:
    assert "No errors were found on the image." in qemu_img("check", path)


def qemu_writes(path: Path, format: str = "qed") -> bool:
    command = ["qemu-io", "-f", format, "-c", "write -P 0x11 0 512", str(path)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


async def contents(layer: Layer) -> bytes:
    return bytes(await read_layer(layer, 0, layer.size))


def our_bytes(
    path: str | Path, format: str | None = None, *, share: bool = False, policy: BackingPolicy | None = None
) -> bytes:
    async def read() -> bytes:
        layer = await open_layer(path, format, share=share, policy=policy or BackingPolicy())
        try:
            return await contents(layer)
        finally:
            await layer.close()

    return run(read)


def refusal(path: str | Path, policy: BackingPolicy | None = None) -> QedfuseError:
    """The error of opening a chain: one plain line."""
    with pytest.raises(QedfuseError) as caught:
        our_bytes(path, policy=policy)
    assert "\n" not in str(caught.value)
    return caught.value


def pattern(seed: int) -> bytes:
    return bytes([seed]) * SIZE


def make_raw(path: Path, seed: int = 0xA5) -> Path:
    path.write_bytes(pattern(seed))
    return path


def make_qed(path: Path, backing: str | bytes | None = None, *, raw: bool = False) -> Path:
    """An empty image whose header says what it is told to, however wrong."""
    name = os.fsencode(backing or b"")
    header = Header(
        cluster_size=4096,
        table_size=2,
        header_size=2,
        features=(FEATURE_BACKING_FILE if name else 0) | (FEATURE_BACKING_FORMAT_NO_PROBE if raw else 0),
        compat_features=0,
        autoclear_features=0,
        l1_table_offset=8192,
        image_size=SIZE,
        backing_filename_offset=HEADER_BYTES if name else 0,
        backing_filename_size=len(name),
    )
    path.write_bytes((header.encode() + name).ljust(8192 + Geometry(4096, 2).table_bytes, b"\0"))
    return path


@contextmanager
def no_descriptor_leaks() -> Iterator[None]:
    """The process has the same files open before and after."""
    trio.run(trio.to_thread.run_sync, os.getpid)  # trio's own, once and for all
    trio.run(offload, local_call(os.getpid))  # and ours
    find_by_id(0)
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before
