"""Whether a chain is still what its names lead to, also while that cannot be found out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from qedfuse.chain.chain import open_layer
from qedfuse.chain.policy import BackingPolicy
from qedfuse.chain.staleness import names_are_current
from qedfuse.host.closing import closing
from tests.helpers.doubles.shortage import SHORTAGES, each_call_fails
from tests.helpers.images.chains import make_qed, make_raw, run


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Over two files, the lower of which is reached by a link."""
    make_raw(tmp_path / "base")
    (tmp_path / "link").symlink_to("base")
    make_qed(tmp_path / "middle.qed", "link")
    return make_qed(tmp_path / "top.qed", "middle.qed")


@pytest.mark.parametrize("confined", [False, True])
def test_names_that_lead_elsewhere(top: Path, confined: bool) -> None:
    policy = BackingPolicy(root=str(top.parent) if confined else None)

    async def body() -> None:
        async with closing(await open_layer(top, policy=policy)) as layer:
            assert await names_are_current(layer, policy)
            make_raw(top.parent / "new").rename(top.parent / "base")
            assert not await names_are_current(layer, policy)
            (top.parent / "base").unlink()
            assert not await names_are_current(layer, policy)

    run(body)


@pytest.mark.parametrize("confined", [False, True])
@pytest.mark.parametrize("code", SHORTAGES, ids=os.strerror)
def test_a_shortage_changes_no_file(top: Path, code: int, confined: bool) -> None:
    policy = BackingPolicy(root=str(top.parent) if confined else None)

    async def body() -> None:
        async with closing(await open_layer(top, policy=policy)) as layer:
            for failing in each_call_fails(code, least=20):
                with failing():
                    assert await names_are_current(layer, policy)

    run(body)


def test_nor_does_a_lack_of_threads(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("can't start new thread")

    async def body() -> None:
        async with closing(await open_layer(top)) as layer:
            with monkeypatch.context() as patch:
                patch.setattr(trio.to_thread, "run_sync", refuse)
                assert await names_are_current(layer)

    run(body)
