"""Names and nodes of a mount. No mount here."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_for_use
from qedfuse.fuse.errnos import errno_of
from qedfuse.fuse.image_sources import shown_name
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.fuse.tree import Tree
from qedfuse.host.file_id import FileId, FileMark
from qedfuse.tools.create import create_image
from tests.helpers.doubles.shortage import SHORTAGES, each_call_fails
from tests.helpers.judges.expect import raises_errno

MIB = 1 << 20


def new_image(path: Path, size: int) -> None:
    trio.run(create_image, str(path), size)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a.qed", "a.raw"), ("a", "a.raw"), ("a.img", "a.img.raw"), (".qed", ".qed.raw"), ("a.qed.qed", "a.qed.raw")],
)
def test_names(name: str, shown: str) -> None:
    assert shown_name(name) == shown


def with_tree(directory: Path, body: Callable[[Tree], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                def make(path: str) -> MountedImage:
                    return MountedImage(
                        path,
                        lambda path: open_for_use(path, read_only=True),
                        nursery,
                        read_only=False,
                        linger=0.0,
                    )

                tree = Tree([str(directory)], make)
                await body(tree)
                for node in tree.nodes:
                    await node.mounted.close()

    trio.run(main)


async def names(tree: Tree) -> list[bytes]:
    return [entry.name for entry in await tree.entries()]


def test_every_name_in_the_list_is_found(tmp_path: Path) -> None:
    for name in ("a.qed", "b", "c.qed.qed", "d.raw", "\udcff.qed"):
        new_image(tmp_path / name, MIB)
    (tmp_path / ".qed").write_bytes((tmp_path / "a.qed").read_bytes())
    (tmp_path / "noise").write_bytes(b"x" * 100)
    (tmp_path / "noise.qed").write_bytes(b"x" * 100)

    async def body(tree: Tree) -> None:
        listed = await tree.entries()
        assert [os.fsdecode(entry.name) for entry in listed] == [
            ".qed.raw",
            "a.raw",
            "b.raw",
            "c.qed.raw",
            "d.raw.raw",
            "noise.raw",
            "\udcff.raw",
        ]
        for entry in listed:
            found = await tree.find(entry.name)
            assert found is not None and found.node is entry.node
        for missing in (b"a.qed", b"a", b".raw", b"noise", b"x.raw", b"a.qed.raw"):
            assert await tree.find(missing) is None

    with_tree(tmp_path, body)


def test_a_qed_file_hides_one_without_the_suffix(tmp_path: Path) -> None:
    new_image(tmp_path / "a", MIB)
    new_image(tmp_path / "a.qed", 2 * MIB)

    async def body(tree: Tree) -> None:
        (entry,) = await tree.entries()
        assert entry.peek is not None and entry.peek.size == 2 * MIB
        found = await tree.find(b"a.raw")
        assert found is not None and found.node is entry.node

    with_tree(tmp_path, body)


def test_a_node_lasts_as_long_as_its_file_is_unchanged(tmp_path: Path) -> None:
    image = tmp_path / "a.qed"
    new_image(image, MIB)

    async def body(tree: Tree) -> None:
        (entry,) = await tree.entries()
        node = entry.node
        async with await tree.acquire(node, to_write=True) as opened:
            await opened.write(0, b"x" * 4096)
        assert (await tree.entries())[0].node is node
        node.mounted.release()
        while node.mounted.busy:
            assert (await tree.entries())[0].node is node
            await trio.sleep(0.001)
        assert (await tree.entries())[0].node is node  # we changed it ourselves
        image.rename(tmp_path / "b.qed")
        (entry,) = await tree.entries()
        assert (entry.name, entry.node) == (b"b.raw", node)
        assert node.mounted.path == str(tmp_path / "b.qed")
        os.utime(tmp_path / "b.qed", ns=(5, 5))
        with raises_errno(errno.ESTALE):
            await tree.acquire(node, to_write=False)
        (entry,) = await tree.entries()
        assert entry.node is not node and entry.node.id != node.id
        with raises_errno(errno.ESTALE):
            tree.node(node.id)

    with_tree(tmp_path, body)


def test_a_node_keeps_the_file_of_an_image_that_has_replaced_its_own(tmp_path: Path) -> None:
    """Read-only images, too, whose file is as we have found it when we close them."""
    directory, copy = tmp_path / "source", tmp_path / "copy.qed"
    directory.mkdir()
    image = directory / "a.qed"
    new_image(image, MIB)

    async def body(tree: Tree) -> None:
        (entry,) = await tree.entries()
        node, mounted = entry.node, entry.node.mounted
        await tree.acquire(node, to_write=False)
        async with mounted.quiesced() as old:
            shutil.copyfile(image, copy)
            os.utime(copy, ns=(5, 5))
            copy.rename(image)
            mounted.replace(await open_for_use(image, read_only=True))
            await old.close()
        assert (await tree.entries())[0].node is node
        mounted.release()
        while mounted.busy:
            assert (await tree.entries())[0].node is node
            await trio.sleep(0.001)
        assert (await tree.entries())[0].node is node
        assert node.key == FileId.at(image) and mounted.left.mark == FileMark.of(image.stat())
        os.utime(image, ns=(6, 6))
        assert (await tree.entries())[0].node is not node, "another process has changed it since"

    with_tree(directory, body)


def test_what_is_gone_is_forgotten_when_the_kernel_has(tmp_path: Path) -> None:
    new_image(tmp_path / "a.qed", MIB)
    new_image(tmp_path / "b.qed", MIB)

    async def body(tree: Tree) -> None:
        first, _second = await tree.entries()
        first.node.lookups += 1
        (tmp_path / "a.qed").unlink()
        (tmp_path / "b.qed").unlink()
        assert await tree.entries() == []
        assert tree.nodes == [first.node]
        tree.forget(first.node.id, 1)
        assert await tree.entries() == []
        assert tree.nodes == []

    with_tree(tmp_path, body)


@pytest.mark.parametrize("code", SHORTAGES, ids=os.strerror)
@pytest.mark.parametrize("wanted", [None, b"a.raw", b"b.raw", b"c.raw"])
def test_no_image_is_forgotten_for_a_shortage(tmp_path: Path, code: int, wanted: bytes | None) -> None:
    """Neither now, when it is an error, nor afterwards."""
    source = tmp_path / "source"
    source.mkdir()
    for path in (source / "a.qed", source / "b", tmp_path / "elsewhere"):
        new_image(path, MIB)
    (source / "c.qed").symlink_to("../elsewhere")

    async def all_or_an_error(tree: Tree) -> None:
        try:
            if wanted is None:
                assert await names(tree) == [b"a.raw", b"b.raw", b"c.raw"]
            else:
                assert await tree.find(wanted) is not None
        except Exception as error:
            if errno_of(error) != code:
                raise

    for failing in each_call_fails(code, least=5):

        async def body(tree: Tree, failing: Callable[[], AbstractContextManager[None]] = failing) -> None:
            with failing():
                await all_or_an_error(tree)
            listed = await tree.entries()
            assert [(entry.name, entry.peek and entry.peek.size) for entry in listed] == [
                (b"a.raw", MIB),
                (b"b.raw", MIB),
                (b"c.raw", MIB),
            ]

        with_tree(source, body)


def test_a_directory_that_is_gone_is_empty(tmp_path: Path) -> None:
    async def body(tree: Tree) -> None:
        assert await tree.entries() == []
        assert await tree.find(b"a.raw") is None

    with_tree(tmp_path / "gone", body)
