"""What is shown of an image that is closed while its file is asked what it is like."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import trio

from qedfuse.chain.opening import open_for_use
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.fuse.node import Node
from qedfuse.fuse.options import MountOptions
from qedfuse.fuse.shown import attributes_now
from qedfuse.host.file_id import FileId, FileMark
from qedfuse.host.file_storage import FileStorage
from qedfuse.qed.image import Image
from qedfuse.tools.create import create_image
from tests.helpers.judges.expect import raises_errno

MIB = 1 << 20


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / "a.qed", tmp_path / "b.qed"]
    for size, path in enumerate(found, 1):
        trio.run(create_image, str(path), size * MIB)
    return found


def shown_size(monkeypatch: pytest.MonkeyPatch, paths: list[Path], during: Callable[[Node, Image], None]) -> int:
    """Of a node whose image is the first one, while `during` is done to the node with the second one, open as well."""

    async def main() -> int:
        first, second = [await open_for_use(path, read_only=True) for path in paths]
        nowhere = cast(trio.Nursery, None)  # nothing is opened here
        mounted = MountedImage(first.path, open_for_use, nowhere, read_only=False, linger=0)
        mounted.slot.put(first)
        status = first.storage.stat()
        node = Node(1, mounted, FileId.of(status), FileMark.of(status), first.size, fixed=False)

        async def refresh(storage: FileStorage) -> None:
            await trio.lowlevel.checkpoint()
            if storage is first.storage:
                during(node, second)

        monkeypatch.setattr(FileStorage, "refresh", refresh)
        try:
            return (await attributes_now(node, None, options=MountOptions())).size
        finally:
            await first.close()
            await second.close()

    return trio.run(main)


def test_it_is_that_of_the_image_which_is_open_then(monkeypatch: pytest.MonkeyPatch, paths: list[Path]) -> None:
    def reopen(node: Node, image: Image) -> None:
        node.mounted.slot.take()
        node.mounted.slot.put(image)

    assert shown_size(monkeypatch, paths, reopen) == 2 * MIB
    assert shown_size(monkeypatch, paths, lambda _node, _image: None) == MIB


def test_of_a_closed_one_nothing_is_known(monkeypatch: pytest.MonkeyPatch, paths: list[Path]) -> None:
    def close(node: Node, _image: Image) -> None:
        node.mounted.slot.take()

    with raises_errno(errno.ESTALE):
        shown_size(monkeypatch, paths, close)
