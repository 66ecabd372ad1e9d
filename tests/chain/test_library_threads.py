"""Several threads, each with an event loop and images of its own, as in a server."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import qedfuse
from qedfuse.host.offload import idle_worker
from qedfuse.qed.table_pages import PagePool, shared_pool
from tests.helpers.doubles.host_calls import local_call
from tests.helpers.qemu.cli import qedfuse as qedfuse_command
from tests.helpers.qemu.cli import qemu_img

SIZE = 32 << 20


@pytest.fixture
def _busy_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They alternate far more often, and have hardly any memory for tables."""
    interval = sys.getswitchinterval()
    monkeypatch.setattr(PagePool.__init__, "__defaults__", (4,))
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_busy_threads")
def test_each_has_its_own_data(tmp_path: Path) -> None:
    rounds: list[int] = []

    async def work(number: int, path: Path) -> None:
        rnd = random.Random(number)
        model = bytearray(SIZE)
        async with qedfuse.open_image(path) as image:
            with trio.move_on_after(4):
                while True:
                    size = rnd.choice([100, 4096, 3 << 19])  # the last one in a worker thread
                    offset = rnd.randrange(SIZE - size)
                    data = rnd.randbytes(size)
                    model[offset : offset + size] = data
                    with trio.CancelScope(shield=True):
                        await image.write(offset, data)
                        if rnd.random() < 0.2:
                            await image.flush()
                    offset = rnd.randrange(SIZE - 65536)
                    assert await image.read(offset, 65536) == model[offset : offset + 65536]
                    rounds.append(number)
        async with qedfuse.open_image(path, read_only=True) as image:
            assert await image.read(0, SIZE) == model

    def run(number: int, path: Path) -> None:
        try:
            trio.run(work, number, path)
        except BaseException as error:
            errors.append(error)

    errors: list[BaseException] = []
    paths = [tmp_path / f"{number}.qed" for number in range(3)]
    for path in paths:
        qemu_img("create", "-q", "-f", "qed", "-o", "cluster_size=4k,table_size=2", path, str(SIZE))
    threads = [threading.Thread(target=run, args=(number, path)) for number, path in enumerate(paths)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert {*rounds} == {0, 1, 2}
    for path in paths:
        assert qedfuse_command("check", path).code == 0  # (QEMU counts too many small clusters as leaked)


def test_a_worker_has_one_call_at_a_time() -> None:
    call = local_call(os.getpid)
    worker = idle_worker(call)
    assert worker is not None
    try:
        assert idle_worker(call) is not worker
    finally:
        if not worker.attempt(call):
            trio.run(worker.wait_long)
        assert worker.finish() == os.getpid()
    again = idle_worker(call)
    assert again is worker
    if not worker.attempt(call):
        trio.run(worker.wait_long)
    assert worker.finish() == os.getpid()


def test_a_pool_is_for_one_thread() -> None:
    pools = [shared_pool(), shared_pool()]
    thread = threading.Thread(target=lambda: pools.append(shared_pool()))
    thread.start()
    thread.join()
    assert pools[0] is pools[1] is not pools[2]
