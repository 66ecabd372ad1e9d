"""Scripts of the write order: commands, and below each the calls that it makes and what a crash in it leaves.

A script is text that a person can review. Lines that are indented are output, made by running the script; the others
are commands, `#` begins a comment. Sizes and offsets may end in k or M; contents are letters, of which a whole range is
made, `.` stands for zeroes.

    new 256k [over B 64k]        an image with clusters of 4 KiB [over a raw file of 64 KiB of B]; must come first
                                 or [on 1M], a block device of 1 MiB with stale bytes behind the image
    write OFFSET SIZE a          also zero, discard OFFSET SIZE; resize SIZE
    rebase C 64k                 another backing file, of C; without words: none. (It should hold the same; here one
                                 sees where what is read comes from.)
    fsync                        also timer (a commit without sync), idle (what comes when nothing has happened), close
    map                          where everything is
    crash                        for each call of the command before: what a crash after it may leave
    crash nothing | everything   the power fails: of what was not synced, nothing or everything has reached the disk
    reopen                       by the next start, which repairs what it must

A crash's outcome is what each sector may read as once the image has been opened again, and what a check finds before
that. Where there are too many states, some are drawn, always the same. An L2 page's entries count from its start.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from itertools import groupby

from qedfuse.check.check import check_image
from qedfuse.layers.raw import RawLayer
from qedfuse.layers.runs import Kind
from qedfuse.qed.image import Image
from tests.helpers.doubles.crash import Change, CrashPoint, CrashStorage
from tests.helpers.doubles.ram import RamFile, RamStorage
from tests.helpers.images.images import Chain, backing_name, new_chain, on_device, open_chain, raw_file, read_header
from tests.helpers.judges.history import SECTOR, Clock

INDENT = "    "

#: So many states of a crash are judged all; of more, a sample.
_ALL = 200
_SAMPLE = 60


def number(text: str) -> int:
    return int(text.rstrip("kM")) << (20 if text.endswith("M") else 10 if text.endswith("k") else 0)


def size(value: int) -> str:
    for bits, unit in ((20, "M"), (10, "k")):
        if value and not value % (1 << bits):
            return f"{value >> bits}{unit}"
    return str(value)


def letters(data: bytes) -> list[str]:
    """What each sector holds: its letter, `.` for zeroes, `?` for anything else."""
    found = []
    for at in range(0, len(data), SECTOR):
        sector = data[at : at + SECTOR]
        plain = sector.count(sector[0]) == len(sector)
        found.append("?" if not plain else chr(sector[0]) if sector[0] else ".")
    return found


class Script:
    """Runs the commands of one script."""

    def __init__(self) -> None:
        self._chain: Chain
        self._storage: CrashStorage
        self._image: Image
        self._before = 0  # how long the log was before the last command

    async def run(self, text: str) -> str:
        """The script with its output as it is now."""
        lines: list[str] = []
        for line in text.splitlines():
            if line.startswith(INDENT):
                continue
            lines.append(line)
            words = line.partition("#")[0].split()
            if words:
                lines += [(INDENT + output).rstrip() for output in await self._do(*words)]
        return "\n".join(lines) + "\n"

    async def _do(self, command: str, *words: str) -> list[str]:
        if command == "crash" and not words:
            return await self._crashes()
        if command == "crash":
            point = self._storage.crash_point_now()
            self._chain.file = {"nothing": point.least, "everything": point.most}[words[0]]()
            return []
        if command == "map":
            return await self._map()
        if command == "new":
            below = [(raw_file(words[2].encode() * number(words[3])), "raw")] if "over" in words else []
            self._chain = await new_chain(number(words[0]), below=below)
            if "on" in words:
                self._chain.file = on_device(self._chain.file, number(words[2]))
        if command in ("new", "reopen"):
            self._storage = CrashStorage("image", self._chain.file.fork(), Clock())
            self._before = 0
            self._image = await open_chain(self._chain, self._storage)
        else:
            self._before = len(self._storage.log)
            await self._change(command, *words)
            self._chain.file = self._storage.file
        return list(self._calls())

    async def _change(self, command: str, *words: str) -> None:
        image = self._image
        numbers = [number(word) for word in words[:2] if word[0].isdigit()]
        match command:
            case "write":
                content = b"\0" if words[2] == "." else words[2].encode()
                await image.write(numbers[0], content * numbers[1])
            case "zero":
                await image.zero(*numbers)
            case "discard":
                await image.discard(*numbers)
            case "resize":
                await image.resize(*numbers)
            case "rebase" if words:
                name = f"other{len(self._chain.others)}"
                file = raw_file(words[0].encode() * number(words[1]))
                self._chain.others[name] = [(file, "raw")]
                await image.set_backing(RawLayer.open(RamStorage(name, file, writable=False)), name)
            case "rebase":
                self._chain.others[""] = []
                await image.set_backing(None)
            case "fsync":
                await image.flush()
            case "timer":
                await image.write_back()
            case "idle":
                await image.clean()
            case "close":
                await image.close()
            case _:
                raise ValueError(f"no command: {command}")

    # -- calls --------------------------------------------------------------------------------------------------------

    def _calls(self) -> Iterator[str]:
        """The calls of the last command, numbered."""
        file = self._storage.start.fork()
        for count, change in enumerate(self._storage.log):
            if count >= self._before:
                yield f"{count - self._before + 1:2} {self._call(change, file)}"
            change.apply(file)

    def _call(self, change: Change, file: RamFile) -> str:
        """`file` as it was before."""
        match change.kind:
            case "synced":
                return "sync"
            case "truncate":
                return f"truncate {size(change.size)}"
            case "punch":
                return f"punch    {change.offset:#x} {size(change.size)}"
        return f"write    {change.offset:#x} {size(len(change.data))}: {self._written(change, file)}"

    def _written(self, change: Change, file: RamFile) -> str:
        header = read_header(self._storage.file)
        if change.offset < header.header_bytes:
            after = file.fork()
            change.apply(after)
            return "header " + _describe(after)
        found = letters(change.data)
        if "?" not in found:
            return "data " + " ".join(f"{letter}*{size(len(list(run)) * SECTOR)}" for letter, run in groupby(found))
        first = change.offset - header.l1_table_offset
        is_l1 = 0 <= first < header.geometry.table_bytes
        first = first // 8 if is_l1 else 0
        old, new = (
            _words(file.read(change.offset, len(change.data)).ljust(len(change.data), b"\0")),
            _words(change.data),
        )
        changed = [(first + at, value) for at, value in enumerate(new) if value != old[at]]
        return f"{'L1' if is_l1 else 'L2'} " + (_entries(changed, header.cluster_size) or "as before")

    # -- outcomes -----------------------------------------------------------------------------------------------------

    async def _crashes(self) -> list[str]:
        """Calls after which a crash may leave the same stand together."""
        lines: list[str] = []
        points = list(self._storage.crash_points())[self._before :]
        outcomes = [(at, await self._outcome(point)) for at, point in enumerate(points)]
        for outcome, group in groupby(outcomes, key=lambda item: item[1]):
            first, *_, last = [at for at, _ in group] * 2
            at = str(first) if first == last else f"{first}-{last}"
            lines += [f"after {at}:", *(f"  {line}" for line in outcome)]
        return lines

    async def _outcome(self, point: CrashPoint) -> list[str]:
        outcome = _Outcome()
        seen = set()
        for state in _states(point):
            if (key := state.key()) in seen:
                continue
            seen.add(key)
            await outcome.add(self._chain.under(state))
        return list(outcome.lines())

    async def _map(self) -> list[str]:
        lines, offset = [], 0
        while offset < self._image.size:
            for kind, length, host in await self._image.map(offset, self._image.size - offset):
                place = f" {host:#x}" if kind is Kind.DATA else ""
                lines.append(f"{size(offset)}-{size(offset + length)} {kind.name.lower()}{place}")
                offset += length
        return lines


class _Outcome:
    """What the states of one crash have in common, and where they differ."""

    def __init__(self) -> None:
        self._sectors: list[set[str]] = []
        self._sizes: set[int] = set()
        self._flags: set[bool] = set()
        self._leaks: set[int] = set()
        self._corruptions: set[int] = set()

    async def add(self, chain: Chain) -> None:
        """Check a state, open it, which repairs it, and read it. The file is used up."""
        header = read_header(chain.file)
        result = await check_image(RamStorage("image", chain.file, writable=False), header)
        self._flags.add(header.needs_check)
        self._leaks.add(result.leaks)
        self._corruptions.add(result.corruptions)
        image = await open_chain(chain)
        self._sizes.add(image.size)
        found = letters(bytes(await image.read(0, image.size)))
        self._sectors += [set() for _ in found[len(self._sectors) :]]
        for sector, letter in zip(self._sectors, found, strict=False):
            sector.add(letter)

    def lines(self) -> Iterator[str]:
        parts, offset = [], 0
        for values, run in groupby("|".join(sorted(values)) for values in self._sectors):
            end = offset + len(list(run)) * SECTOR
            parts.append(f"{size(offset)}-{size(end)} {values}")
            offset = end
        yield "reads " + ", ".join(parts)
        if len(self._sizes) > 1:
            yield "size " + " or ".join(size(value) for value in sorted(self._sizes))
        if True in self._flags:
            yield "NEED_CHECK is on" if len(self._flags) == 1 else "NEED_CHECK is on or off"
        for name, counts in (("leaks", self._leaks), ("corruptions", self._corruptions)):
            if max(counts):
                yield f"{name} {min(counts)}" + (f" to {max(counts)}" if len(counts) > 1 else "")


def _states(point: CrashPoint) -> Iterator[RamFile]:
    if point.count <= _ALL:
        yield from point.every_state()
        return
    rnd = random.Random(1)
    yield point.least()
    yield point.most()
    for _ in range(_SAMPLE):
        yield point.some_state(rnd)


def _words(table: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(table) // 8}Q", table)


def _describe(file: RamFile) -> str:
    header, name = read_header(file), backing_name(file)
    parts = [f"size {size(header.image_size)}", "NEED_CHECK" if header.needs_check else "", name and f"over {name}"]
    return ", ".join(filter(None, parts))


def _entries(changed: list[tuple[int, int]], step: int) -> str:
    """Entries with their values; those that count up, clusters one behind the other, as one."""
    parts: list[list[tuple[int, int]]] = []
    for index, value in changed:
        if parts:
            last, before = parts[-1][-1]
            if index == last + 1 and (value == before + step if value > 1 else value == before):
                parts[-1].append((index, value))
                continue
        parts.append([(index, value)])
    texts = []
    for part in parts:
        (first, value), (last, end) = part[0], part[-1]
        indices = f"{first}" if first == last else f"{first}..{last}"
        texts.append(f"[{indices}] = {value:#x}" + (f"..{end:#x}" if value != end else ""))
    return ", ".join(texts)
