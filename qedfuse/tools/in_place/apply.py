"""Carrying out a conversion in place, whatever formats it is between: the order of writes, and the way back.

The rulebook
============

    1 journal   the journal is written: formats, the old size, the old first sector; durable (file and directory)
    2 reserve   the file grows by exactly what the new image needs behind its end, and has the room for it
    3 tail      all of the new image but its first sector is written, where the old image has nothing; sync
    4 journal   gets the new first sector; durable
    5 switch    the first sector becomes the new one: one write of 512 bytes; sync
    6 journal   says that the old image is not needed any more; durable
    7 finish    what only the old image had is given back; sync
    8 done      the journal is removed, durably

What a crash leaves (any subset of what was written since the last completed sync, and sectors of 512 bytes whole):

    crash in    FILE is
    1           the old image, byte for byte
    2, 3, 4     the old image with a longer tail (and, if the conversion moves clusters within the old image, by that
                format's own rules, in another order)
    5           the old image with a longer tail, or the new one: one sector tells which
    6           the new one. The old one is still there but for its first sector
    7, 8        the new one, of which a part may not have been given back yet

With a journal that says TAIL (since 1), or SWITCH (since 4) over the old first sector, the conversion is taken back by
cutting the tail off; with SWITCH over the new one, by the old first sector and then the cut, unless another program has
used the new image meanwhile (`rehearsal.py`); with FINISH (since 6), not at all. To finish it, what is not switched is
taken back and begun anew, since another program may have written to the old image meanwhile; what is switched goes on
with 6. Taking back and finishing may crash and be repeated: each leaves a state of the table until its last step, which
removes the journal. Both write the first sector again whichever it is: after a sync that has failed, what is read need
not be what is on the disk.

If something fails or the caller is cancelled before 5, all is taken back at once. Nobody else may write meanwhile:
QEMU's locks are the caller's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import trio

from qedfuse.chain.unfinished import Step, Unfinished, UnfinishedError, changed_meanwhile
from qedfuse.host.storage import Storage, read
from qedfuse.progress import Report
from qedfuse.sizes import SECTOR_SIZE
from qedfuse.tools.in_place.plan import Conversion, Converter, Wanted

#: How the message of a failure ends, if something is left to do.
GO_ON_OR_BACK = "run the command again to finish, or with --undo to take it back"
GO_ON = "run the command again to finish"


class JournalStore(Protocol):
    """Where the journal is kept; see `unfinished.Journal`."""

    def read(self) -> Unfinished | None: ...

    def write(self, unfinished: Unfinished) -> None: ...

    def remove(self) -> None: ...


class InPlace:
    """The conversion of one file from the format `source` to `target`.

    `storage` is the file, which the caller has locked. `ending`: how the message of a failure, or of an interruption,
    is to end at this moment: with what is true of the file, or what to do.

    All calls raise OSError (QedfuseError for what is refused), and may be cancelled.
    """

    def __init__(self, storage: Storage, journal: JournalStore, converter: Converter, source: str, target: str) -> None:
        self._storage = storage
        self._journal = journal
        self._converter = converter
        self._source = source
        self._target = target
        self._unchanged = f"{storage.path} is unchanged"
        self.ending = self._unchanged

    async def begin(self, wanted: Wanted, progress: Report) -> None:
        """Convert a file with which nothing is under way."""
        storage = self._storage
        conversion = await self._converter.plan(storage, wanted, progress)
        old_first = await read(storage, 0, SECTOR_SIZE)
        grown_size = conversion.old_size + conversion.new_bytes
        unfinished = Unfinished(self._source, self._target, conversion.old_size, grown_size, old_first)
        try:
            await self._in_thread(self._journal.write, unfinished)
            await storage.reserve(conversion.old_size, conversion.new_bytes)
            new_first = await conversion.write_tail(storage, progress)
            await storage.sync()
            old_first = await read(storage, 0, SECTOR_SIZE)  # if it was altered it may be another one
            grown_size = storage.size()  # moves within the old image may have made it longer
            unfinished = replace(
                unfinished, grown_size=grown_size, old_first=old_first, new_first=new_first, step=Step.SWITCH
            )
            await self._in_thread(self._journal.write, unfinished)
        except BaseException:
            await self._retreat(conversion)
            raise
        self.ending = GO_ON_OR_BACK
        await self._put_first(new_first)
        await self._finish(conversion, unfinished, progress)

    async def go_on(self, found: Unfinished, wanted: Wanted, progress: Report) -> None:
        """Finish a conversion that has been interrupted, with what its journal says."""
        if await self._is_switched(found):
            conversion = await self._converter.resume(self._storage, found)
            if found.step is Step.SWITCH and found.new_first is not None:
                self.ending = GO_ON_OR_BACK
                await self._put_first(found.new_first)
            await self._finish(conversion, found, progress)
        else:
            await self.take_back(found)
            await self.begin(wanted, progress)

    async def take_back(self, found: Unfinished) -> None:
        """Make the file what it was before a conversion that has been interrupted."""
        storage = self._storage
        if found.step is Step.FINISH:
            raise self._too_late(f"{found} can be taken back no more")
        if await self._is_switched(found) and not await self._converter.is_unused(storage, found):
            raise self._too_late(f"was used since {found} was interrupted, which can be taken back no more")
        if found.step is Step.SWITCH:
            self.ending = GO_ON_OR_BACK
            await self._put_first(found.old_first)
        end = await self._converter.old_end(storage, found)
        self.ending = GO_ON_OR_BACK
        if storage.size() > end:
            await storage.truncate(end)
        await storage.sync()
        await self._in_thread(self._journal.remove)
        self.ending = self._unchanged

    def _too_late(self, message: str) -> UnfinishedError:
        self.ending = GO_ON
        return UnfinishedError(self._storage.path, f"{message}, only finished (without --undo)")

    async def _is_switched(self, found: Unfinished) -> bool:
        """Whether the file is the new image. Raises UnfinishedError if that cannot be told."""
        if found.step is not Step.SWITCH:
            return found.step is Step.FINISH
        first = await read(self._storage, 0, SECTOR_SIZE)
        if first not in (found.old_first, found.new_first):
            raise changed_meanwhile(found, self._storage.path)
        return first == found.new_first

    async def _put_first(self, sector: bytes) -> None:
        """Steps like 5, not to be cut short by a cancellation."""
        with trio.CancelScope(shield=True):
            await self._storage.write(0, [sector])
            await self._storage.sync()

    async def _finish(self, conversion: Conversion, unfinished: Unfinished, progress: Report) -> None:
        """Steps 6 to 8."""
        self.ending = GO_ON
        await self._in_thread(self._journal.write, replace(unfinished, step=Step.FINISH))
        await conversion.finish(self._storage, progress)
        await self._storage.sync()
        await self._in_thread(self._journal.remove)
        self.ending = f"{self._storage.path} is converted"

    async def _retreat(self, conversion: Conversion) -> None:
        """Take back at once what has failed before the switch. If that fails, too, or the old image was altered, it is
        left to the caller."""
        self.ending = GO_ON_OR_BACK
        if conversion.altered:
            return
        with trio.CancelScope(shield=True):
            try:
                await conversion.restore(self._storage)
                if self._storage.size() > conversion.old_size:
                    await self._storage.truncate(conversion.old_size)
                await self._storage.sync()
                if await trio.to_thread.run_sync(self._journal.read) is not None:
                    await self._in_thread(self._journal.remove)
            except OSError:
                return
        self.ending = self._unchanged

    async def _in_thread(self, function: Callable[..., None], *arguments: Unfinished) -> None:
        await trio.to_thread.run_sync(function, *arguments)
