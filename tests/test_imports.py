"""The package's order: imports go one way, the pure layer does no I/O, FUSE stays at the edge.

`ORDER` is the one place that says which module may import which.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qedfuse"

#: A module may import what stands on an earlier line; modules of one line know nothing of each other.
ORDER = """
    errors sizes rangelock hosts blocks limits signals compaction runs
    text geometry offload
    blocking mounts
    header allocator pages complaints launch logs unmount
    memory_limit mount_table threads connection
    rendezvous
    walk
    qcow2_header
    probe peek
    storage filelock
    file_storage extents chunks
    remote_file
    background
    layer backing scan
    raw qcow2_entries mapping mount_options clustermap resolve
    config seek
    qcow2 tables attributes changes reserve qcow2_refcounts dirty_limit
    growth
    commit repair
    clusters release
    check timer
    tail
    image recovery
    chain holes pagecache replaced rootclock fallocate output
    opening create info handover
    mounted sources
    tree
    oversize
    fastpath library
    operations control kernel_mount
    control_server target closing report
    daemon convert
    cli
    cli.params cli.progress
    cli.mount cli.umount cli.create cli.info cli.map cli.check cli.convert
    cli.status
    cli.main
    __main__
"""

RANK = {name: rank for rank, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}

#: No I/O, no event loop; all that these know of the machine is text.
PURE = ["errors", "sizes", "text", "runs", "geometry", "header", "probe", "qcow2_header", "qcow2_entries"]
PURE += ["blocks", "compaction"]
PURE_OS_NAMES = {"PathLike", "fspath", "fsencode", "fsdecode", "strerror"}
IMPURE = {"asyncio", "ctypes", "fcntl", "io", "mmap", "pathlib", "pyfuse3", "shutil", "signal", "socket", "subprocess"}
IMPURE |= {"tempfile", "threading", "trio"}

#: Calls that read or write an image file.
FILE_CALLS = {"pread", "preadv", "pwrite", "pwritev", "fdatasync", "ftruncate", "posix_fallocate"}

#: Where FUSE is spoken.
FUSE = {"operations", "kernel_mount", "daemon"}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
NAMES = {f"qedfuse.{module}" for module in MODULES}


def imports_of(module: str) -> set[str]:
    """Absolute names of all modules that a module imports, anywhere in it, and of ours that it names in a string."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("qedfuse")}
        elif isinstance(node, ast.Constant) and node.value in NAMES:
            found.add(str(node.value))
    return found


def names_from_package(module: str) -> set[str]:
    nodes = ast.walk(ast.parse(MODULES[module].read_text()))
    froms = (node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "qedfuse")
    return {alias.name for node in froms for alias in node.names}


def own_imports_of(module: str) -> set[str]:
    names = {name.removeprefix("qedfuse.") for name in imports_of(module) if name.startswith("qedfuse.")}
    return names & set(RANK)


def test_every_module_has_its_place() -> None:
    assert set(RANK) == set(MODULES) - {"__init__"}


@pytest.mark.parametrize("module", [name for name in MODULES if name in RANK])
def test_imports_go_one_way(module: str) -> None:
    upward = sorted(name for name in own_imports_of(module) if RANK[name] >= RANK[module])
    assert not upward, f"{module} must not import {', '.join(upward)}"


def test_the_package_itself_offers_the_library_and_not_the_edge() -> None:
    edge = [name for name in own_imports_of("__init__") if RANK[name] >= RANK["operations"]]
    assert own_imports_of("__init__")
    assert not edge


def test_what_is_taken_from_the_package_itself() -> None:
    """`from qedfuse import x` would lead around the order: these have a reason."""
    found = {module: names for module in MODULES if (names := names_from_package(module))}
    extensions = {"fastpath": {"_fastpath"}, "oversize": {"_outside"}, "rootclock": {"_outside"}}
    assert found == {"cli.main": {"__version__"}, **extensions}


@pytest.mark.parametrize("module", PURE)
def test_the_pure_layer_does_no_io(module: str) -> None:
    outside = {name.partition(".")[0] for name in imports_of(module)}
    assert not outside & IMPURE
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        assert not (isinstance(node, ast.Name) and node.id in ("open", "print", "input")), node.lineno
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr in PURE_OS_NAMES, f"os.{node.attr} in line {node.lineno}"


def test_the_pure_layer_is_closed() -> None:
    """What is pure imports nothing of ours that is not."""
    for module in PURE:
        assert own_imports_of(module) <= set(PURE), module


@pytest.mark.parametrize("module", MODULES)
def test_fuse_stays_at_the_edge(module: str) -> None:
    assert "pyfuse3" not in imports_of(module) or module in FUSE


@pytest.mark.parametrize("module", MODULES)
def test_image_data_goes_through_storage(module: str) -> None:
    """Tests replace `Storage` to inject faults and crashes: what goes past it is not tested."""
    allowed = {
        "file_storage": FILE_CALLS,
        "info": {"pread"},  # the header alone, so that `qedfuse info` starts without an event loop
        "peek": {"pread"},  # the same for a directory of images, most of which are never opened
        "offload": {"fdatasync"},  # to know it when it sees it
    }
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in FILE_CALLS - allowed.get(module, set()), node.lineno


def test_what_tests_share_stands_in_their_helpers() -> None:
    """A test that takes something from another one has that one's fixtures and marks, too."""
    for file in Path(__file__).parent.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) tests\.test_", file.read_text(), re.MULTILINE), file.name
