"""What every conversion `Target` promises: raw files and block devices, QED images, new or there already."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from qedfuse.chain.chain import open_layer
from qedfuse.chain.policy import ANY_BACKING
from qedfuse.errors import QedfuseError
from qedfuse.host.closing import closing
from qedfuse.host.file_id import FileId
from qedfuse.host.file_storage import FileStorage
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.new_image import new_header
from qedfuse.tools.convert_image_target import old_qed_target, overlay_target
from qedfuse.tools.convert_target import (
    FileTarget,
    NewQedTarget,
    RawTarget,
    Target,
    new_qed_target,
    raw_target,
)
from tests.helpers.images.conversions import flat, qemu_finds_no_error, scatter, usage
from tests.helpers.images.devices import device_with
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.hosts import host_of
from tests.helpers.qemu.cli import qemu_img

MIB = 1 << 20
SIZE = 3 * MIB + 512

NEW = ["new raw file", "emptied raw file", "new image", "new image over a file"]
OLD = ["old raw file", "block device", "old image", "old image over a file"]
KINDS = NEW + OLD


@dataclass
class Subject:
    """A target that is not open yet, and what its disk reads as before, up to the target's own end."""

    path: Path
    open: Callable[..., AbstractAsyncContextManager[Target]]
    before: bytes
    is_image: bool = False

    def content(self) -> bytes:
        """What others read there now."""
        if not self.is_image:
            with self.path.open("rb") as file:
                return file.read()
        qemu_finds_no_error(self.path)
        return flat(self.path).read_bytes()


Sources = dict[FileId, str]


@pytest.fixture
def subject(kind: str, tmp_path: Path) -> Iterator[Subject]:
    with ExitStack() as stack:
        yield _make(kind, tmp_path, stack)


def _make(kind: str, directory: Path, stack: ExitStack) -> Subject:
    junk = random.Random(1).randbytes(SIZE + MIB)
    below = directory / "below.raw"
    below.write_bytes(junk[: 2 * MIB])
    if kind in ("new image", "new image over a file"):
        return _new_image(directory / "out.qed", below if "over" in kind else None)
    if kind in ("old image", "old image over a file"):
        path = directory / "out.qed"
        more = ["-b", below.name, "-F", "raw"] if "over" in kind else []
        qemu_img("create", "-q", "-f", "qed", *more, path.name, str(SIZE + MIB), cwd=directory)
        scatter(path, "qed", SIZE + MIB, 3)

        def old(size: int = SIZE, sources: Sources | None = None) -> AbstractAsyncContextManager[Target]:
            return old_qed_target(str(path), size, policy=ANY_BACKING, sources=sources or {})

        return Subject(path, old, flat(path).read_bytes(), is_image=True)
    path = directory / "out.raw"
    create = kind in NEW
    before = b"" if create else junk
    if kind != "new raw file":
        path.write_bytes(junk)
    if kind == "block device":
        path.write_bytes(before := junk[: SIZE + MIB - 512])
        path = stack.enter_context(device_with(path, len(before)))

    def raw(size: int = SIZE, sources: Sources | None = None) -> AbstractAsyncContextManager[Target]:
        return raw_target(str(path), size, create=create, sources=sources or {})

    return Subject(path, raw, before or bytes(SIZE))


def _new_image(path: Path, below: Path | None) -> Subject:
    name = os.fsencode(below.name) if below else b""

    @asynccontextmanager
    async def opening(size: int = SIZE, sources: Sources | None = None) -> AsyncIterator[Target]:
        header = new_header(str(path), size, Geometry(), name, backing_is_raw=bool(below))
        if below is None:
            async with new_qed_target(str(path), header, sources=sources or {}) as target:
                yield target
            return
        backing = await open_layer(str(below), "raw")
        async with overlay_target(str(path), header, name, backing, sources=sources or {}) as overlay:
            yield overlay

    before = below.read_bytes() if below else b""
    return Subject(path, opening, before[:SIZE].ljust(SIZE, b"\0"), is_image=True)


async def fill(target: Target, model: bytearray) -> None:
    """Front to back, in whole blocks: data, zeroes, and what is left as it was."""
    rnd = random.Random(2)
    offset = 0
    while offset < SIZE:
        length = min(max(target.unit, rnd.choice([512, 4096, 65536, 131_072])), SIZE - offset)
        match rnd.randrange(3):
            case 0:
                model[offset : offset + length] = data = rnd.randbytes(length)
                await target.write(offset, memoryview(data))
            case 1:
                model[offset : offset + length] = bytes(length)
                await target.zero(offset, length)
        offset += length


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_filled_is_read(kind: str, subject: Subject) -> None:
    """And the rest is as it was, also behind the end of what is filled."""

    async def main() -> None:
        model = bytearray(subject.before)
        async with subject.open() as target:
            await fill(target, model)
        assert subject.content() == model

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_blank_means_zeroes_or_what_is_below(kind: str, subject: Subject) -> None:
    async def main() -> None:
        async with subject.open() as target:
            assert target.blank == (kind in NEW)
            assert target.unit >= 1
        assert subject.content() == subject.before

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it_zeroed(kind: str, subject: Subject) -> None:
    """Reads as zeroes, whatever was there or lies below, and takes no space where space can be saved."""

    async def main() -> None:
        async with subject.open() as target:
            await target.zero(0, SIZE)
        assert subject.content() == bytes(SIZE) + subject.before[SIZE:]
        if kind in NEW:
            assert usage(subject.path) < MIB

    trio.run(main)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "block device"])
def test_zeroes_that_shall_take_space_do(kind: str, subject: Subject) -> None:
    async def main() -> None:
        async with subject.open() as target:
            target.keep_zeroes()
            await target.write(0, memoryview(bytes(2 * MIB)))
        assert subject.content() == bytes(2 * MIB) + subject.before[2 * MIB :]
        assert usage(subject.path) >= 2 * MIB

    trio.run(main)


@pytest.fixture(scope="module", params=["btrfs", "xfs"])
def sharing_host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with host_of(request.param, tmp_path_factory.mktemp("host") / "disk", 400 * MIB) as point:
        yield point


@pytest.mark.parametrize("kind", [*NEW[:3], "old raw file"])
def test_what_is_shared_is_read(kind: str, sharing_host: Path, tmp_path: Path) -> None:
    """As what is written is, in turns with it, also in one cluster. What does not lie alike on blocks is not shared."""
    directory = sharing_host / tmp_path.name
    directory.mkdir()
    content = random.Random(4).randbytes(SIZE)
    (directory / "source").write_bytes(content)
    rnd = random.Random(5)
    shared = 0

    async def put(target: FileTarget, source: FileStorage, offset: int, start: int, size: int) -> int:
        """Returns how much was shared."""
        done = 0
        while done < size:
            step = await target.share(offset + done, source, start + done, size - done)
            assert 0 <= step <= size - done and step % target.block_size == 0
            if not step:
                break
            done += step
        await target.write(offset + done, memoryview(content[start + done : start + size]))
        return done

    async def main(subject: Subject) -> None:
        nonlocal shared
        model = bytearray(subject.before)
        source = FileStorage.open(directory / "source", writable=False)
        async with subject.open() as target, closing(source):
            assert isinstance(target, RawTarget | NewQedTarget)
            offset = 0
            while offset < SIZE:
                size = min(rnd.choice([512, 4096, 12_288, 65_536, 300_032]), SIZE - offset)
                start = rnd.choice([offset, offset, rnd.randrange(0, SIZE - size + 1, 512)])
                model[offset : offset + size] = content[start : start + size]
                shared += await put(target, source, offset, start, size)
                offset += size
        assert subject.content() == model

    with ExitStack() as stack:
        trio.run(main, _make(kind, directory, stack))
    assert shared > 64 * 4096


class Failed(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["fails", "is cancelled"])
def test_half_filled(kind: str, how: str, subject: Subject) -> None:
    """What was made is gone, what was there and was to be replaced is empty, and a disk that is filled is half-filled:
    an image among these is sound."""

    async def main() -> None:
        existed = subject.path.exists()
        with trio.CancelScope() as scope:
            try:
                async with subject.open() as target:
                    await target.write(0, memoryview(b"x" * MIB))
                    if how == "fails":
                        raise Failed
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            except Failed:
                pass
        if kind in OLD:
            assert subject.content() == b"x" * MIB + subject.before[MIB:]
        elif existed:
            assert subject.path.stat().st_size == 0
        else:
            assert not subject.path.exists()

    trio.run(main)


@pytest.mark.parametrize("kind", OLD)
def test_what_is_too_small_is_refused_untouched(kind: str, subject: Subject) -> None:
    async def main() -> None:
        with raises_errno(errno.ENOSPC):
            async with subject.open(size=len(subject.before) + 512):
                pass
        assert subject.content() == subject.before

    trio.run(main)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("new")])
def test_a_source_is_refused_untouched(kind: str, subject: Subject) -> None:
    """By whatever name."""
    link = subject.path.with_name("link") if subject.path.parent != Path("/dev") else subject.path
    if link != subject.path:
        link.symlink_to(subject.path)
    before = subject.path.read_bytes()

    async def main() -> None:
        with pytest.raises(QedfuseError, match="is read from"):
            async with subject.open(sources={FileId.at(link): "the source"}):
                pass
        assert subject.path.read_bytes() == before

    trio.run(main)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_else_may_write_it_meanwhile(kind: str, subject: Subject) -> None:
    """The locks of QEMU, or that of a device."""

    async def main() -> None:
        async with subject.open() as target:
            await target.write(0, memoryview(b"x" * 512))
            with pytest.raises(OSError, match=r"in use|busy") as caught:
                async with raw_target(str(subject.path), 512, create=False, sources={}):
                    pass
            assert caught.value.errno in (errno.EBUSY, errno.EAGAIN)

    trio.run(main)
