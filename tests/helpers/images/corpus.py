"""A corpus of crafted QED images: every field at its limits and beyond, tables that refer to what they must not.

Every case says what the commands make of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.helpers.images.hostile import (
    CLUSTERS,
    COVERAGE,
    DATA,
    ENTRIES,
    EXABYTES,
    GIANT,
    GOOD,
    L1,
    L2,
    TERABYTES,
    TOP,
    Build,
    C,
    Case,
    chain,
    entries,
    giant,
    good,
    linked_to_itself,
    over,
    patched,
    raw,
    wide,
    words,
)


def _refused(name: str, build: Build, text: str, check: int = 1) -> Case:
    """An image whose header says that it is none."""
    said = text if check == 1 else "not a qed image"
    return Case(name, build, text, text, text, check, check, said)


def _backed(name: str, build: Build, opens: str) -> Case:
    return Case(name, build, untrusted="another file", opens=opens)


def _corrupt(name: str, build: Build, **more: object) -> Case:
    return Case(name, build, untrusted="corrupt", check=2, **more)  # type: ignore[arg-type]


def _headers() -> Iterator[Case]:
    """Every field at its limits and beyond."""
    magic, cut, end = "no qed magic", "cut off", "past the end of the file"
    yield _refused("empty", raw(b""), magic, 63)
    yield _refused("zeroes", raw(bytes(1 << 16)), magic, 63)
    yield _refused("qcow2", raw(b"QFI\xfb" + bytes(5000)), magic, 63)
    yield _refused("other magic", patched(0, b"QEE"), magic, 63)
    yield _refused("8 bytes", raw(b"QED\0\0\0\1\0"), cut)
    yield _refused("63 bytes", raw(GOOD.encode()[:63]), cut)
    yield _refused("64 bytes", raw(GOOD.encode()), cut)
    for value in (0, 1, 512, 2048, 4095, 6144, 12288, 1 << 27, 1 << 31, (1 << 32) - 1):
        yield _refused(f"cluster_size {value}", good(cluster_size=value), f"cluster size {value} is not")
    for value in (0, 3, 15, 32, 1 << 31, (1 << 32) - 1):
        yield _refused(f"table_size {value}", good(table_size=value), f"table size {value} is not")
    for value in (0, (1 << 20) + 1, 1 << 31, (1 << 32) - 1):
        yield _refused(f"header_size {value}", good(header_size=value), "out of range")
    for value in (2, 1 << 20):
        yield _refused(f"header_size {value}", good(header_size=value), "inside the header")
    yield _refused("l1_offset 0", good(l1_table_offset=0), "inside the header")
    for value in (512, C - 1, TOP):
        yield _refused(f"l1_offset {value:#x}", good(l1_table_offset=value), "not cluster-aligned")
    for value in (8 * C, 9 * C, 1 << 40, 1 << 63, (1 << 64) - C):
        yield _refused(f"l1_offset {value:#x}", good(l1_table_offset=value), end)
    for value in (1, 511, TOP):
        yield _refused(f"image_size {value:#x}", good(image_size=value), "multiple of 512")
    for value in (ENTRIES * COVERAGE + 512, 1 << 63, (1 << 64) - 512):
        yield _refused(f"image_size {value:#x}", good(image_size=value), "over this geometry's")
    yield Case("image_size 0", good(image_size=0))
    yield Case("image_size 512", good(image_size=512))
    yield Case("largest image_size", good(image_size=ENTRIES * COVERAGE))
    for value in (8, 1 << 63, TOP):
        yield _refused(f"features {value:#x}", good(features=value), "feature bits")
    yield Case("all compat features", good(compat_features=TOP))
    yield Case("all autoclear features", good(autoclear_features=TOP))
    yield Case("no probe of nothing", good(features=4))
    yield Case("a name that is not used", good(backing_filename_offset=(1 << 32) - 1, backing_filename_size=TOP >> 32))
    yield Case("vdi, too", patched(0x40, b"\x7f\x10\xda\xbe"), untrusted="looks like a vdi image, too")
    yield Case("not closed", good(features=2), untrusted="not closed cleanly")
    yield Case("ends in a cluster", good(size=CLUSTERS * C + 100))
    yield _refused("ends in l1", good(size=L1 * C + 100), end)
    for name, size in (("in l2", L2 * C + 100), ("before data", DATA * C), ("in data", CLUSTERS * C - 700)):
        yield _corrupt(f"ends {name}", good(size=size))
        dirty = good(size=size, features=2)
        yield Case(f"not closed, ends {name}", dirty, untrusted="not closed cleanly", check=2)
    yield Case("ends in the last sector", good(size=CLUSTERS * C - 511))
    dirty = good(size=CLUSTERS * C - 1, features=2)
    yield Case("not closed, ends in the last sector", dirty, untrusted="not closed cleanly")


def _names() -> Iterator[Case]:
    """Backing files' names, and chains."""
    outside = "outside the header"
    for offset, size in (
        (63, 4),
        (C, 4),
        ((1 << 32) - 1, 4),
        (64, (1 << 32) - 1),
        ((1 << 32) - 16, 32),
        (C - 4, 5),
        (64, C),
    ):
        yield _refused(f"name of {size} at {offset}", over(b"back", offset=offset, size=size), outside)
    yield _refused("name of 0", over(b"", size=0), "has 0 bytes")
    yield _refused("name of 8000", over(b"x", size=8000, header_size=2, l1_table_offset=2 * C), "has 8000 bytes")
    for name in (b"\0", b"a\0b", b"image.qed\0"):
        yield Case(f"over {name!r}", over(name), "nul byte", "nul byte", "nul byte")
    for name, opens in (
        (b"gone", "no such file"),
        (b"/gone/" + b"../" * 50 + b"gone", "no such file"),
        (b"/dev/zero", "not a regular file"),
        (b"/dev/stdin", "not a regular file"),
        (b"/proc/self/fd/0", "not a regular file"),
        (b".", "it is a directory"),
        (b"..", "it is a directory"),
        (b"../../../../../../..", "it is a directory"),
        (b"x" * 3000, "name too long"),
        (b"x/" * 1500, "no such file"),
        (b"\xff\xfe\x80", "no such file"),
        (b"a/\nqedfuse: fine\x1b[31m\r\x07", "no such file"),
        (b"file:", "name is empty"),
        (b'json:{"driver":"file","filename":"/etc/passwd"}', "not json: names"),
        (b"nbd:localhost:1", "not nbd: names"),
        (b"nbd+unix:///x?socket=y", "not nbd+unix: names"),
        (b"fat:rw:/", "not fat: names"),
        (b"image.qed", "a loop"),
        (b"./image.qed", "a loop"),
        (b"file:image.qed", "a loop"),
    ):
        yield _backed(f"over {name[:30]!r}", over(name), opens)
    yield _backed("over itself as raw", over(b"image.qed", features=5), "a loop")
    yield _backed("over a link to itself", linked_to_itself, "a loop")
    yield _backed("not closed, over itself", over(b"image.qed", features=3), "a loop")
    yield _backed("a loop of 2", chain(2, loop=True), "a loop")
    yield _backed("a loop of 150", chain(150, loop=True), "a loop")
    yield _backed("a chain of 200", chain(200), "")
    yield _backed("a chain of 201", chain(201), "more than 200 images")
    yield _backed("a chain of 400", chain(400), "more than 200 images")


#: Where entries must not point, but for 1, which L2 entries may be.
_PLACES = {
    "1": 1,
    "header": 512,
    "between clusters": DATA * C + 8,
    "l1": L1 * C,
    "l2": L2 * C,
    "the middle of l2": (L2 + 1) * C,
    "data": DATA * C,
    "the last cluster": (CLUSTERS - 1) * C,
    "the end": CLUSTERS * C,
    "far out": 1 << 40,
    "2^63 - 4096": (1 << 63) - C,
    "2^63": 1 << 63,
    "2^64 - 4096": (1 << 64) - C,
    "2^64 - 1": TOP,
}


def _tables() -> Iterator[Case]:
    """Entries that point at the header, at tables, at each other, past the end."""
    for place, value in _PLACES.items():
        if place != "l2":
            yield _corrupt(f"l1[0] -> {place}", good(l1={0: value}))
        yield _corrupt(f"l1[1] -> {place}", good(l1={1: value}))
        yield _corrupt(f"l1 past the image -> {place}", good(l1={1000: value}))
        changes: list[dict[str, dict[int, int]]] = [{"l1": {1: value}}]
        if value != 1:
            yield _corrupt(f"l2[3] -> {place}", good(l2={3: value}))
            changes.append({"l2": {3: value}})
        for change in changes:
            name = f"not closed, {next(iter(change))} -> {place}"
            yield Case(name, good(features=2, **change), untrusted="not closed cleanly", check=2)  # type: ignore[arg-type]
    two = {C: b"name", 2 * C: entries({0: 5 * C, 1: C})}
    yield _corrupt("l1[1] -> the header's second cluster", good(more=two, header_size=2, l1_table_offset=2 * C))
    yield _corrupt(
        "every l1 entry -> one l2", good(dict.fromkeys(range(ENTRIES), L2 * C), image_size=ENTRIES * COVERAGE)
    )
    yield _corrupt("every l2 entry -> one cluster", good(l2=dict.fromkeys(range(ENTRIES), DATA * C)))
    yield _corrupt("every l2 entry -> its own table", good(l2=dict.fromkeys(range(ENTRIES), L2 * C)))
    yield _corrupt("every entry 2^64 - 1", good(dict.fromkeys(range(ENTRIES), TOP), dict.fromkeys(range(ENTRIES), TOP)))
    yield _corrupt("l1 -> tables that overlap", good({i: (L1 + i % 8) * C for i in range(ENTRIES)}))
    yield _corrupt("l2 tables that overlap", wide([(17 + i % 512) * C for i in range(8192)], [], clusters=600))


def _bombs() -> Iterator[Case]:
    """Little on the disk, much to do."""
    too_much = {"repaired": 1, "says": "too much is referenced more than once"}
    yield _corrupt("8192 times one table", wide([17 * C] * 8192, [0, 1] * 4096), long=True)
    yield _corrupt("8192 times one table of data", wide([17 * C] * 8192, [0, 34 * C] * 4096), long=True, **too_much)
    dirty = wide([17 * C] * 8192, [0, 34 * C] * 4096, features=2)
    why = "not closed cleanly"
    yield Case("not closed, 8192 times one table", dirty, "", why, "", 2, 1, str(too_much["says"]), long=True)

    absurd = {"untrusted": "it declares"}
    holes = giant([17 * GIANT] * 1024, clusters=33)
    sprinkled = {17 * GIANT + (number << 18): words(17 * GIANT) for number in range(4096)}
    yield Case("giant tables", giant([], clusters=17), **absurd)  # type: ignore[arg-type]
    yield Case("1024 times one giant table", holes, check=2, long=True, **absurd, **too_much)  # type: ignore[arg-type]
    for name, build in (
        ("a full giant l1 table", giant([17 * GIANT] * (1 << 17), clusters=33)),
        ("a sprinkled giant table", giant([17 * GIANT] * 1024, clusters=33, more=sprinkled)),
        ("not closed, a sprinkled giant table", giant([17 * GIANT] * 1024, clusters=33, more=sprinkled, features=2)),
    ):
        yield Case(name, build, check=2, long=True, **absurd, **too_much)  # type: ignore[arg-type]
    distinct = giant([(17 + 16 * number) * GIANT for number in range(1024)], clusters=17 + 16 * 1024)
    yield Case("1024 giant tables", distinct, long=True, **absurd)  # type: ignore[arg-type]

    memory = "bounded memory"
    scattered = {3 + i: (1 << 38) + i * (14 << 40) // 500 // C * C for i in range(500)}
    for features in (0, 2):
        build = good(size=TERABYTES, l2=scattered, features=features)
        why = "not closed cleanly" if features else memory
        yield Case(f"references all over, features {features}", build, "", why, "", 1, 1, memory, size=TERABYTES)
    yield Case("15 TiB for 4 clusters", good(size=TERABYTES, l2={5: TERABYTES - C}), check=3, size=TERABYTES)

    last = EXABYTES // C * C
    yield Case("8 EiB for 4 clusters", good(size=EXABYTES), check=3, size=EXABYTES)
    build = good(size=EXABYTES, features=2)
    yield Case("8 EiB, not closed", build, untrusted="not closed cleanly", check=3, size=EXABYTES)
    yield Case("8 EiB, the last cluster", good(size=EXABYTES, l2={5: last - C}), check=3, size=EXABYTES)
    yield _corrupt("8 EiB, past the last cluster", good(size=EXABYTES, l2={5: last}), size=EXABYTES)
    build = good(size=EXABYTES - 127, l2={5: last})
    yield _corrupt("8 EiB, a part of the last cluster", build, size=EXABYTES - 127)
    twice = {"repaired": 1, "says": "file too large", "size": EXABYTES}
    yield _corrupt("8 EiB, a cluster twice", good(size=EXABYTES, l2={5: DATA * C}), **twice)
    build = good(size=EXABYTES, l2={5: DATA * C}, features=2)
    yield Case("8 EiB, a cluster twice, not closed", build, untrusted="not closed cleanly", check=2, **twice)  # type: ignore[arg-type]
    scattered = {3 + i: (1 << 62) + i * (1 << 61) // 500 // C * C for i in range(500)}
    build = good(size=EXABYTES, l2=scattered)
    yield Case("8 EiB, references all over", build, "", memory, "", 1, 1, memory, size=EXABYTES)
    end = EXABYTES // GIANT
    build = giant([(end - 16) * GIANT], clusters=end)
    yield Case("8 EiB, a giant table at its end", build, check=3, long=True, size=EXABYTES, **absurd)  # type: ignore[arg-type]


CASES = [*_headers(), *_names(), *_tables(), *_bombs()]
