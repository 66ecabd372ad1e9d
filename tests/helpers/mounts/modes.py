"""Tests that run twice: with requests answered by the native fast path, and by Python alone."""

from __future__ import annotations

import importlib.util
import os

import pytest

from qedfuse.fuse.kernel import cache_survives_direct_writes
from tests.helpers.mounts.mounts import EXTRA_OPTIONS

#: The words of a mode for `mounted`.
Mode = tuple[str, ...]

NATIVE: Mode = ()
PYTHON: Mode = ("--no-fastpath",)

_LOADED = [
    pytest.mark.skipif("--no-fastpath" in EXTRA_OPTIONS, reason="--no-fastpath is chosen for all mounts"),
    pytest.mark.skipif(
        importlib.util.find_spec("qedfuse.native._fastpath") is None, reason="the fast path is not built"
    ),
]
_MODE = os.environ.get("QEDFUSE_FASTPATH")

#: The marks of a test that is nothing without the fast path.
NEEDS_NATIVE = [*_LOADED, pytest.mark.skipif(_MODE is not None, reason=f"QEDFUSE_FASTPATH is {_MODE}")]

#: Whether files are opened past the page cache beside others that are not, and can be mapped.
OPENS_DIRECTLY = cache_survives_direct_writes(os.uname().release)
NEEDS_DIRECT = [*NEEDS_NATIVE, pytest.mark.skipif(not OPENS_DIRECTLY, reason="this kernel's page cache may go stale")]

#: Gives a test the argument `mode`.
MODES = pytest.mark.parametrize(
    "mode",
    [
        pytest.param(NATIVE, id="native", marks=_LOADED),
        pytest.param(PYTHON, id="python"),
    ],
)


def answers_in_c(mode: Mode) -> bool:
    return mode == NATIVE and _MODE in (None, "nospin")


def makes_holes(mode: Mode) -> bool:
    """Whether fallocate reaches us: pyfuse3 has no handler for it."""
    return mode == NATIVE and _MODE != "pass"
