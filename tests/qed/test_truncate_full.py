"""Cutting an image short on a full file system: it gives space back, or it fails and changes nothing."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_image
from tests.helpers.images.chains import check_is_clean, qemu_bytes
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.guests import filesystem, need_guest
from tests.helpers.qemu.cli import qemu_img

CLUSTER = 64 << 10
SIZE = 1 << 20


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("size", [CLUSTER + 5000, CLUSTER + 100, 2 * CLUSTER + 512, 1])
def test_cut_in_a_cluster_with_holes(tmp_path: Path, size: int) -> None:
    """The rest of the last cluster are holes of the host's, which it cannot fill."""
    need_guest()
    with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", "size=2M") as host:
        image = host / "disk.qed"
        qemu_img("create", "-q", "-f", "qed", image, SIZE)

        async def main() -> None:
            async with open_image(image) as engine:
                for cluster in range(4):
                    await engine.write(cluster * CLUSTER, b"a" * 4096)
                await engine.flush()
                fill(host / "ballast")
                held = image.stat().st_blocks
                await engine.resize(size)
                await engine.flush()
                assert image.stat().st_blocks < held
                await engine.resize(SIZE)

        trio.run(main)
        (host / "ballast").unlink()
        expected = (b"a" * 4096 + bytes(CLUSTER - 4096)) * 4
        assert qemu_bytes(image) == expected[:size] + bytes(SIZE - size)
        check_is_clean(image)


def test_cut_off_what_is_in_the_backing_file(tmp_path: Path) -> None:
    """Half a sector of the backing file's takes a cluster of the image's own, for which there is no space."""
    need_guest()
    with filesystem(Path("none"), tmp_path / "host", "-t", "tmpfs", "-o", "size=2M") as host:
        image, base = host / "disk.qed", host / "base.raw"
        base.write_bytes(b"b" * (3 * CLUSTER))
        qemu_img("create", "-q", "-f", "qed", "-b", base, "-F", "raw", image, SIZE)

        async def main() -> None:
            async with open_image(image) as engine:
                await engine.write(4 * CLUSTER, os.urandom(CLUSTER))
                await engine.flush()
                before = bytes(await engine.read(0, SIZE))
                fill(host / "ballast")
                with raises_errno(errno.ENOSPC):
                    await engine.resize(CLUSTER + 100)
                assert engine.size == SIZE
                assert await engine.read(0, SIZE) == before
                await engine.flush()
                (host / "ballast").unlink()
                await engine.resize(CLUSTER + 100)
                await engine.resize(SIZE)

        trio.run(main)
        assert qemu_bytes(image) == b"b" * (CLUSTER + 100) + bytes(SIZE - CLUSTER - 100)
        check_is_clean(image)
