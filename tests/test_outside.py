"""The process outside: it is given up for the moment when it is slow, and used again when it is back."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

import pytest
import trio

from qedfuse import outside
from qedfuse.outside import Outside


def test_a_slow_process_is_used_again_when_it_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, file = tmp_path / "stuck", tmp_path / "file"
    file.touch()
    settle = outside._settle

    def wait_and_settle(mountpoint: str, size: int | None, times: list[int] | None) -> None:
        while stuck.exists():
            time.sleep(0.01)
        settle(mountpoint, size, times)

    monkeypatch.setattr(outside, "_settle", wait_and_settle)
    monkeypatch.setattr(outside, "_PATIENCE", 0.2)

    def wait_for_answer(process: Outside) -> None:
        select.select([process._socket], [], [])

    async def main(process: Outside) -> None:
        assert await process.set_times((1, 1000))
        assert os.stat(file).st_mtime_ns == 1000
        stuck.touch()
        assert not await process.set_times((1, 2000))
        start = time.monotonic()
        assert not await process.set_times((1, 3000))  # at once: it is known to be stuck
        assert time.monotonic() - start < 0.15
        stuck.unlink()
        with trio.fail_after(10):
            await trio.to_thread.run_sync(wait_for_answer, process)
        assert await process.set_times((1, 4000))
        assert os.stat(file).st_mtime_ns == 4000
        assert await process.set_times((1, 5000))
        assert os.stat(file).st_mtime_ns == 5000

    with Outside(str(file), []) as process:
        trio.run(main, process)
