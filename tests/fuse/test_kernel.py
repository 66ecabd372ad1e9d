"""Which kernels are trusted with what."""

from __future__ import annotations

import pytest

from qedfuse.fuse.kernel import cache_survives_direct_writes


@pytest.mark.parametrize(
    ("release", "trusted"),
    [
        ("6.18.44-fc-v657", True),
        ("6.18.43", False),
        ("6.18.0-rc3", False),
        ("6.19.0-rc1", True),
        ("6.19-amd64", True),
        ("7.0", True),
        ("6.12.48+deb13-amd64", False),
        ("10.1.2", True),
        ("5.15.0-91-generic", False),
        ("", False),
        ("linux", False),
    ],
)
def test_releases(release: str, trusted: bool) -> None:
    assert cache_survives_direct_writes(release) == trusted
