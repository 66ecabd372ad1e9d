"""Crafted images: a clear line or a right result, in bounded time and memory, and nothing opened but the image.

The corpus is in `helpers/images/corpus.py`; each case is run through the commands and the engine, and some through
a mount.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from qedfuse.chain.opening import open_image
from qedfuse.chain.unfinished import SUFFIX
from qedfuse.errors import CorruptError
from tests.helpers.images.check_images import contents, header_of
from tests.helpers.images.corpus import CASES
from tests.helpers.images.hostile import EXT4, Case
from tests.helpers.judges.check_tools import qemu_check, qemu_phantoms
from tests.helpers.qemu.zygote import CRASHED, Done, Zygote

#: Processor seconds and bytes that no command may exceed.
TIME = 10
MEMORY = 200 << 20
#: A command that takes hours by its nature is looked at for so long.
PATIENCE = 2

TIMED_OUT = -14
_PYTHON = (sys.prefix, sys.base_prefix, sys.exec_prefix)
_BIG = Path("/dev/shm")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as process:
        yield process


@pytest.fixture
def directory(case: Case, tmp_path: Path) -> Iterator[Path]:
    """Where files of the case's size can be made."""
    if case.size <= EXT4:
        yield tmp_path
        return
    big = Path(tempfile.mkdtemp(prefix="qedfuse-", dir=_BIG if _BIG.is_dir() else None))
    try:
        try:
            with (big / "probe").open("wb") as file:
                file.truncate(case.size)
        except OSError as error:
            pytest.skip(f"no file system here takes a file of 8 EiB: {error.strerror}")
        yield big
    finally:
        shutil.rmtree(big)


def of(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", CASES, ids=[f"{kind}: {case.name}" for case in CASES])


def bounded(done: Done, *, long: bool = False) -> Done:
    """No traceback, no hang, no memory."""
    assert "Traceback" not in done.err and "internal error" not in done.err, done.err
    assert done.memory < MEMORY, f"{done.memory >> 20} MiB"
    if done.code == TIMED_OUT and long:
        return done
    assert done.code >= 0 and done.code != CRASHED, done
    assert done.seconds < TIME, done
    return done


def expect(done: Done, code: int, text: str) -> None:
    """`code` and, if it failed, one plain line with `text` in it."""
    assert done.code == code, (done.code, done.out, done.err)
    if code in (1, 63):
        assert text in done.err, done.err
        assert done.err.startswith("qedfuse: ") and done.err.count("\n") == 1, done.err
        assert done.err[:-1].isprintable(), done.err
    else:
        assert done.err == "", done.err


def opened_only(done: Done, *names: str | Path) -> None:
    """Nothing was opened by name but these, and what Python opens for itself."""
    expected = {str(name) for name in names}
    foreign = [name for name in done.opened if name not in expected and not name.startswith(_PYTHON)]
    assert foreign == [], foreign


@of("look")
def test_a_look(case: Case, directory: Path, zygote: Zygote) -> None:
    """What reads the image alone."""
    image = case.build(directory)
    for words, code, text in (
        (["info"], 1 if case.info else 0, case.info),
        (["info", "--output=json"], 1 if case.info else 0, case.info),
        (["info", "--untrusted"], 1 if case.untrusted else 0, case.untrusted),
        (["check"], case.check, case.says),
    ):
        done = bounded(zygote.run(*words, image))
        expect(done, code, text)
        opened_only(done, image, *[] if "--untrusted" in words else [f"{image}{SUFFIX}"])


@of("repair")
def test_repair(case: Case, directory: Path, zygote: Zygote) -> None:
    """`check -r all` either refuses, or leaves an image that is consistent for QEMU, too."""
    image = case.build(directory)
    before = image.stat().st_size
    done = bounded(zygote.run("check", "-r", "all", image))
    expect(done, case.repaired, case.says)
    opened_only(done, image, f"{image}{SUFFIX}")
    if case.repaired:
        assert zygote.run("check", image).code == case.check, "a repair that failed has changed the image"
        return
    assert bounded(zygote.run("check", image)).code == 0
    assert image.stat().st_size <= before + (1 << 30)
    if not case.opens and not case.size and "giant" not in case.name:
        expect_qemu_agrees(image)


def expect_qemu_agrees(image: Path) -> None:
    _, found = qemu_check(image)
    assert (found.get("corruptions", 0), found.get("leaks", 0)) == (0, qemu_phantoms(image)), found


@of("map")
def test_map(case: Case, directory: Path, zygote: Zygote) -> None:
    image = case.build(directory)
    part = bounded(zygote.run("map", "--output=json", "-l", "1M", image))
    whole = bounded(zygote.run("map", image, limit=PATIENCE if case.long else 60), long=case.long)
    for done in (part, whole):
        if case.opens:
            expect(done, 1, case.opens)
        elif done.code == 1:
            assert case.check == 2 or "not closed" in case.name
            expect(done, 1, "corrupt")
    if part.code == 0:
        assert sum(entry["length"] for entry in json.loads(part.out)) <= 1 << 20


@of("read")
def test_read(case: Case, directory: Path, zygote: Zygote) -> None:
    image = case.build(directory)
    before = image.stat()
    survey(zygote, case, image, "read")
    after = image.stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


@of("write")
def test_write(case: Case, directory: Path, zygote: Zygote) -> None:
    """Whatever is done to the image, a repair makes it consistent, unless it could not before, or a table is used so
    often that the repair would have to copy too much: what is written into it is used as often."""
    image = case.build(directory)
    survey(zygote, case, image, "write")
    done = bounded(zygote.run("check", "-r", "all", image))
    if "times one table" in case.name and done.code:
        expect(done, 1, "too much is referenced more than once")
        return
    assert done.code in (0, case.repaired), (done.code, done.out, done.err)
    if done.code == 0 and not case.opens and not case.size and "giant" not in case.name:
        expect_qemu_agrees(image)


def survey(zygote: Zygote, case: Case, image: Path, function: str) -> None:
    done = bounded(zygote.run(image, function=f"tests.helpers.judges.hostile_survey:{function}"))
    assert done.code == 0, done.err
    report = json.loads(done.out)
    errors: dict[str, str] = report["errors"]
    refused = case.opens or (case.says if function == "write" and case.repaired and "not closed" in case.name else "")
    if refused or "open" in errors:
        assert list(errors) == ["open"] and refused in errors["open"], errors
        return
    assert report["done"] or errors or case.name == "image_size 0"
    if case.check in (0, 3) and case.size <= EXT4:
        bad = {name: line for name, line in errors.items() if not line.endswith(("bytes",))}
        assert not bad, bad


# What is read is what the tables say: against the plain reader of the check's tests.

READABLE = [case for case in CASES if not (case.opens or case.size or case.long or "giant" in case.name)]


@pytest.mark.parametrize("case", READABLE, ids=[case.name for case in READABLE])
def test_content(case: Case, tmp_path: Path) -> None:
    image = case.build(tmp_path)
    raw = image.read_bytes()
    lenient = "not closed" in case.name  # as a repair would make it: what cannot be right is not there
    expected = contents(raw)
    header = header_of(raw)

    async def read() -> None:
        async with open_image(image, read_only=True) as opened:
            for cluster in {0, 1, 2, 3, 512, 1023, 1024, *list(expected)[:100]}:
                at = cluster * header.cluster_size
                size = max(0, min(header.cluster_size, header.image_size - at))
                content = expected.get(cluster, b"")
                try:
                    found = await opened.read(at, header.cluster_size)
                except CorruptError:
                    assert content is None, f"cluster {cluster}"
                else:
                    assert content is not None or lenient, f"cluster {cluster}"
                    assert found == (content or b"").ljust(header.cluster_size, b"\0")[:size]

    trio.run(read)
