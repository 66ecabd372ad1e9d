"""The example of how a disk leaves QED."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.images.conversions import MIB, make_chain
from tests.helpers.qemu.cli import ROOT, TIMEOUT, environment, qemu_img


def run(directory: Path, *words: Path) -> subprocess.CompletedProcess[str]:
    more = environment({"QEDFUSE": f"{sys.executable} -m qedfuse", "TMPDIR": str(directory)})
    command = [ROOT / "examples" / "move_out.sh", *words]
    return subprocess.run(command, env=more, capture_output=True, text=True, timeout=2 * TIMEOUT, check=False)


def test_from_nothing(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.count("   Images are identical.") == 2
    assert os.listdir(tmp_path) == []


def test_an_image_that_is_there(tmp_path: Path) -> None:
    image, target = make_chain(tmp_path, ("raw", MIB), ("qed", 3 * MIB)), tmp_path / "disk.raw"
    before = image.read_bytes()
    for expected in (0, 1):  # the second time the target is in the way
        assert run(tmp_path, image, target).returncode == expected
        assert image.read_bytes() == before
        qemu_img("compare", "-f", "qed", "-F", "raw", image, target)


def test_an_image_that_is_damaged_stops_it(tmp_path: Path) -> None:
    image, target = make_chain(tmp_path, ("qed", MIB)), tmp_path / "disk.raw"
    os.truncate(image, image.stat().st_size - 2 * 65536)
    done = run(tmp_path, image, target)
    assert done.returncode != 0
    assert not target.exists()
