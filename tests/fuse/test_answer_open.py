"""OPEN is answered past pyfuse3: what becomes of the handle, and of errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_for_use
from qedfuse.fuse.mounted_image import MountedImage
from qedfuse.fuse.operations import Operations
from qedfuse.fuse.options import MountOptions
from qedfuse.fuse.tree import ROOT, Tree
from qedfuse.qed.image import Image
from qedfuse.tools.create import create_image
from tests.helpers.doubles.request import NotedRequest

REFUSED = OSError(errno.ENOMEM, "Cannot allocate memory")


class OpenRequest(NotedRequest):
    """`outcome`: of a reply: whether the kernel takes it, or an error. `handles`: those that it was given."""

    def __init__(self, outcome: bool | OSError) -> None:
        super().__init__()
        self.handles: list[int] = []
        self._outcome = outcome

    def reply(self, error: int = 0, /) -> None:
        super().reply(error)
        self._take()

    def reply_open(self, fh: int, /, *, direct: bool, keep_cache: bool) -> bool:
        self.handles.append(fh)
        return self._take()

    def _take(self) -> bool:
        if isinstance(self._outcome, OSError):
            raise self._outcome
        return self._outcome


def answer(path: Path, request: OpenRequest, flags: int, *, broken: bool = False) -> bool:
    """Whether the image is in use afterwards. `broken`: it cannot be resized."""

    async def resize(_size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def open_it(path: str) -> Image:
        image = await open_for_use(path, read_only=True)
        if broken:
            image.resize = resize  # type: ignore[method-assign, assignment]
        return image

    host = path.stat()

    async def main() -> bool:
        async with trio.open_nursery() as nursery:
            mounted = MountedImage(str(path), open_it, nursery, read_only=False, linger=0)
            await mounted.acquire(to_write=False)
            tree = Tree()
            tree.set_root(mounted)
            edge = Operations(tree, MountOptions(), host)
            await edge.answer_open(request, ROOT, flags)
            mounted.release()
            in_use = not await mounted.close_if_idle()
            await mounted.close()
        return in_use

    return trio.run(main)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qed"
    trio.run(create_image, str(path), 1 << 20)
    return path


@pytest.mark.parametrize("outcome", [True, False, REFUSED], ids=["taken", "withdrawn", "refused"])
def test_a_handle_that_the_kernel_has_not_got_uses_no_image(image: Path, outcome: bool | OSError) -> None:
    request = OpenRequest(outcome)
    assert answer(image, request, os.O_RDWR) is (outcome is True)
    assert (len(request.handles), request.replies) == (1, [])


@pytest.mark.parametrize("outcome", [True, REFUSED], ids=["taken", "refused"])
def test_an_error_is_told_and_logged(image: Path, outcome: bool | OSError, caplog: pytest.LogCaptureFixture) -> None:
    request = OpenRequest(outcome)
    assert not answer(image, request, os.O_RDWR | os.O_TRUNC, broken=True)
    assert (request.handles, request.replies) == ([], [errno.ENOSPC])
    assert caplog.messages[0] == "open failed: no space left on device"
