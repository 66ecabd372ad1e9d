"""Coverage-guided fuzzing of everything that reads an image: open, check, map, read, write, repair; and qcow2.

    python -m tests.fuzz.fuzz_open -max_total_time=600 DIRECTORY        ten minutes; inputs are kept in DIRECTORY
    python -m tests.fuzz.fuzz_open -fork=2 -max_total_time=36000 DIRECTORY
    python -m tests.fuzz.fuzz_open crash-0123abc                        one input again, with its traceback

The options are libFuzzer's. An input is a recipe, not an image: its first byte chooses between a valid QED image with
words changed, a QED image with this header and these words in its tables, and the bytes of a qcow2 image. Only
OSErrors with one plain line may come out, in a bounded number of steps, and what a repair has repaired must be sound.

Needs atheris: `pip install .[test]` brings it where it has wheels (x86-64).
"""

from __future__ import annotations

import importlib
import os
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["qedfuse"]):
    for module in ("check", "image", "mapping", "opening"):
        importlib.import_module(f"qedfuse.{module}")

import trio

from qedfuse.errors import QedfuseError, describe
from qedfuse.header import HEADER_BYTES, Header
from qedfuse.layer import read_layer
from qedfuse.qcow2 import Qcow2Layer
from tests.helpers.mutants import LIMITS, Change, Fence, Trial, Victim, make_victims, mutate
from tests.helpers.ram import RamFile

KINDS = ["limit", "cluster", "copy", "flip", "any"]
MAX_INPUT = 4096
#: Seconds for one input before it counts as a hang.
TIMEOUT = 30


class Target:
    def __init__(self) -> None:
        self.victims: list[Victim] = trio.run(make_victims)

    def __call__(self, data: bytes) -> None:
        recipe = atheris.FuzzedDataProvider(data)
        mode = recipe.ConsumeIntInRange(0, 3)
        if mode == 3:
            trio.run(survey_qcow2, recipe.ConsumeBytes(recipe.remaining_bytes()))
        else:
            victim = self.victims[recipe.ConsumeIntInRange(0, len(self.victims) - 1)]
            file = self._mutant(recipe, victim) if mode < 2 else self._patchwork(recipe, victim)
            trio.run(survey_qed, victim, file)

    def _mutant(self, recipe: Any, victim: Victim) -> RamFile:
        """Few words changed, to something that means something."""
        dirty = recipe.ConsumeBool()
        size = None
        if recipe.ConsumeIntInRange(0, 3) == 0:
            size = (
                ("cut", recipe.ConsumeProbability()) if recipe.ConsumeBool() else ("grown", recipe.ConsumeUInt(8) >> 1)
            )
        how: list[Change] = []
        while recipe.remaining_bytes() > 4 and len(how) < 40:
            kind = KINDS[recipe.ConsumeIntInRange(0, len(KINDS) - 1)]
            place = recipe.ConsumeIntInRange(0, len(victim.places) - 1)
            if kind == "limit":
                value = LIMITS[recipe.ConsumeIntInRange(0, len(LIMITS) - 1)]
            elif kind == "cluster":
                value = recipe.ConsumeIntInRange(-2, 60)
            elif kind == "copy":
                value = recipe.ConsumeIntInRange(0, len(victim.places) - 1)
            elif kind == "flip":
                value = recipe.ConsumeIntInRange(0, 63)
            else:
                value = recipe.ConsumeUInt(8)
            how.append((place, (kind, value)))
        return mutate(victim, how, size, dirty)

    def _patchwork(self, recipe: Any, victim: Victim) -> RamFile:
        """Any header, and runs of any bytes anywhere."""
        file = victim.chain.file.fork()
        header = recipe.ConsumeBytes(HEADER_BYTES)
        file.write(0, header if recipe.ConsumeBool() else header[: recipe.ConsumeIntInRange(0, HEADER_BYTES)])
        while recipe.remaining_bytes() > 4:
            at = recipe.ConsumeIntInRange(0, file.size // 8) * 8
            file.write(at, recipe.ConsumeBytes(recipe.ConsumeIntInRange(1, 64)))
        return file


async def survey_qed(victim: Victim, file: RamFile) -> None:
    before = file.key()
    trial = Trial(victim, file.fork())
    await trial.look()
    assert trial.file.key() == before, "a reader has written"
    await trial.use()
    await trial.repair()
    await Trial(victim, file).repair()


async def survey_qcow2(content: bytes) -> None:
    file = RamFile()
    file.write(0, content)
    storage = Fence("image", file, writable=False)
    try:
        layer = await Qcow2Layer.open(storage, None)
    except QedfuseError as error:
        assert_plain(error)
        return
    for at in {0, 1, 512, 5000, layer.size // 2, max(0, layer.size - 4096)}:
        length = min(20_000, layer.size - at)
        if length > 0:
            try:
                assert len(await read_layer(layer, at, length)) == length
                runs = await layer.map(at, layer.size - at)
                assert 0 < sum(run.length for run in runs) <= layer.size - at
            except QedfuseError as error:
                assert_plain(error)
    await layer.close()


def assert_plain(error: QedfuseError) -> None:
    line = describe(error)
    assert line.startswith("image: ") and "\n" not in line, line


def small_qcow2(version: int) -> bytes:
    """A qcow2 image of 64 KiB with clusters of 512 bytes: one of data, one of zeroes, one compressed."""
    cluster = 512
    stream = zlib.compress(b"compressed" * 51 + b"!!", 9, -12)
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, 0, 0, 9, 1 << 16, 0, 2, cluster, 5 * cluster, 1, 0, 0)
    if version == 3:
        head += struct.pack(">QQQII", 0, 0, 0, 4, 104) + struct.pack(">II", 0xE2792ACA, 3) + b"raw\0\0\0\0\0"
    l1 = struct.pack(">QQ", 1 << 63 | 2 * cluster, 0)
    compressed = 1 << 62 | (len(stream) // 512) << 61 | 4 * cluster
    l2 = struct.pack(">QQQ", 1 << 63 | 3 * cluster, int(version == 3), compressed)
    parts = [head, l1, l2, b"data" * 128, stream, b""]
    return b"".join(part.ljust(cluster, b"\0") for part in parts)


def seeds(directory: Path) -> Path:
    """Inputs to begin with. The provider takes numbers from an input's end: the mode is the last byte."""
    for version in (2, 3):
        (directory / f"qcow2-{version}").write_bytes(small_qcow2(version) + b"\3")
    header = Header(4096, 2, 1, 0, 0, 0, 4096, 3 << 20).encode()
    for victim in range(8):
        (directory / f"header-{victim}").write_bytes(header + bytes([1, victim, 2]))
        for number in range(4):
            words = bytes((37 * number + 11 * index + victim) % 256 for index in range(12 * (number + 1)))
            (directory / f"words-{victim}-{number}").write_bytes(words + bytes([3, number % 2, victim, 0]))
    return directory


def main(arguments: list[str]) -> None:
    options = [word for word in arguments if word.startswith("-")]
    paths = [word for word in arguments if not word.startswith("-")]
    with tempfile.TemporaryDirectory(prefix="qedfuse-fuzz-") as scratch:
        start = [] if any(os.path.isfile(path) for path in paths) else [str(seeds(Path(scratch)))]
        if start and not paths:
            paths = [tempfile.mkdtemp(prefix="corpus-", dir=scratch)]
        defaults = [f"-max_len={MAX_INPUT}", f"-timeout={TIMEOUT}", "-rss_limit_mb=1024"]
        atheris.Setup([sys.argv[0], *defaults, *options, *paths, *start], Target())
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
