"""What tests of chains and of open images share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.images.chains import SIZE, no_descriptor_leaks
from tests.helpers.qemu.cli import qemu_img


@pytest.fixture(autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    with no_descriptor_leaks():
        yield


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty one."""
    path = tmp_path / "disk.qed"
    qemu_img("create", "-q", "-f", "qed", path, SIZE)
    return path
