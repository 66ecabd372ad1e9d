"""What must be there after a crash, and what may be, by what the writers have announced and what was acknowledged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from tests.helpers.mounts import filing
from tests.helpers.mounts.acknowledging import SECTOR, content

_MIXTURE = -1


class Ledger:
    """Each sector's possible versions: the last one that is certain, and whatever was written since.

    `base` is what the file held before anybody wrote (version 0). A sector has one writer at a time, whose writes come
    in order, so that an acknowledged version rules out all before it.

    Stores into a map have no units: the kernel may write a page back in the middle of one, and a sector that was not
    acknowledged yet may then be a mixture, byte by byte. `mixed` is how many of these were found.
    """

    def __init__(self, seed: int, base: bytes) -> None:
        self.seed = seed
        self.acknowledged = 0  # writes
        self._base = base
        self._versions: dict[int, list[int]] = {}
        self._pending: defaultdict[int, list[tuple[int, int, int]]] = defaultdict(list)
        self._last = 0
        self._mapped: set[int] = set()  # sectors with a writer by map
        self._mixtures: dict[int, bytes] = {}
        self.mixed = 0

    @property
    def next_version(self) -> int:
        """An even version that is higher than any before."""
        return (self._last + 2) & ~1

    def listener(self, writer: int, *, mapped: bool) -> Callable[[str], None]:
        """Takes what a writer says. `mapped`: it writes into a map."""
        return lambda line: self._note(writer, mapped, line)

    def _note(self, writer: int, mapped: bool, line: str) -> None:
        word, *numbers = line.split()
        if word == "a":
            for write in self._pending.pop(writer, []):
                self._acknowledge(*write)
            return
        assert word == "w", line
        first, count, version = map(int, numbers)
        self._pending[writer].append((first, count, version))
        self._last = max(self._last, version)
        for sector in range(first, first + count):
            self._versions.setdefault(sector, [0]).append(version)
        if mapped:
            self._mapped.update(range(first, first + count))

    def _acknowledge(self, first: int, count: int, version: int) -> None:
        self.acknowledged += 1
        for sector in range(first, first + count):
            versions = self._versions[sector]
            del versions[: versions.index(version)]

    def settle(self, data: bytes) -> None:
        """After a crash: fails if any sector holds what it cannot; from now on each has what it was found with."""
        assert len(data) == len(self._base), (len(data), len(self._base))
        wrong = []
        self._pending.clear()
        for sector, versions in self._versions.items():
            found = data[sector * SECTOR : (sector + 1) * SECTOR]
            for version in reversed(versions):
                if found == self._content(sector, version):
                    self._versions[sector] = [version]
                    break
            else:
                if sector in self._mapped and self._is_mixture(sector, found, versions):
                    self.mixed += 1
                    self._mixtures[sector] = found
                    self._versions[sector] = [_MIXTURE]
                else:
                    wrong.append(f"sector {sector}: {self._describe(sector, found)}, not one of {versions}")
        wrong += self._strays(data)
        assert not wrong, f"{len(wrong)} sectors are wrong (seed {self.seed}):\n" + "\n".join(wrong[:20])

    def _strays(self, data: bytes) -> list[str]:
        """Sectors that nobody has written and that have changed all the same."""
        expected = bytearray(self._base)
        for sector in self._versions:
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            expected[place] = data[place]
        if expected == data:
            return []
        return [
            f"sector {place // SECTOR}: nobody wrote it, but it has changed"
            for place in range(0, len(data), SECTOR)
            if expected[place : place + SECTOR] != data[place : place + SECTOR]
        ]

    def _is_mixture(self, sector: int, found: bytes, versions: list[int]) -> bool:
        choice = [self._content(sector, version) for version in versions]
        return all(found[place] in {each[place] for each in choice} for place in range(SECTOR))

    def _content(self, sector: int, version: int) -> bytes:
        if version == _MIXTURE:
            return self._mixtures[sector]
        if version == 0:
            return self._base[sector * SECTOR : (sector + 1) * SECTOR]
        return content(self.seed, sector, version)

    def _describe(self, sector: int, found: bytes) -> str:
        if found == self._content(sector, 0):
            return "what was there before any write"
        if not any(found):
            return "zeroes"
        parts = []
        for version in range(2, self._last + 1, 2):
            wanted = content(self.seed, sector, version)
            if found == wanted:
                return f"version {version}"
            same = [place for place in range(SECTOR) if found[place] == wanted[place]]
            if len(same) > SECTOR // 16:
                parts.append(f"{len(same)} bytes of version {version} in {same[0]}..{same[-1]}")
        return ", ".join(parts) or f"garbage {found.hex()}"


class Files:
    """The files of `filing.py` processes: those that must be there, and those that may be."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.made: set[str] = set()
        self.gone: set[str] = set()
        self.count = 0  # acknowledged

    def hear(self, line: str) -> None:
        word, name = line.split()
        if word == "m":
            self.count += 1
            self.made.add(name)
        else:
            self.made.remove(name)
            self.gone.add(name)

    def settle(self, directory: Path) -> None:
        """After a crash: fails if a file is lost or damaged; from now on those that were found must stay."""
        found = {path.name for path in directory.iterdir()}
        assert self.made <= found, f"lost: {self.made - found}"
        for name in found:
            if name.startswith("new"):
                (directory / name).unlink()
            else:  # it got its name after its fsync: whole, or not there
                assert (directory / name).read_bytes() == filing.content(self.seed, name), f"{name} is damaged"
                self.made.add(name)
        for name in sorted(self.made)[20:]:
            (directory / name).unlink()
            self.made.remove(name)
