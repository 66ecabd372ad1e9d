"""The package's order: rooms whose imports go one way, no cycle inside a room, FUSE at the edge, I/O in one place.

`ROOMS` is the one place that says which room may import which. What is in C is imported where `NATIVE` says.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "qedfuse"

#: A room's modules may import those of rooms on earlier lines, and each other.
ROOMS = """
    errors sizes text progress
    host
    layers
    qed
    check
    chain
    library
    tools
    jobs
    fuse
    daemon
    cli
    __main__
"""

RANK = {name: rank for rank, line in enumerate(ROOMS.strip().splitlines()) for name in line.split()}

#: Extension modules, and their only users.
NATIVE = {
    "native._fastpath": {"fuse.fastpath"},
    "native._clustermap": {"qed.cluster_map", "check.compaction"},
    "native._sidecar": {"fuse.oversize", "daemon.kernel_times"},
}

#: No I/O, no event loop; all that these know of the machine is text.
PURE = ["errors", "sizes", "text", "progress", "layers.runs", "qed.geometry", "qed.header", "chain.format_probe"]
PURE += [
    "tools.blocks",
    "layers.qcow2.header",
    "layers.qcow2.entries",
    "check.compaction",
    "check.result",
    "chain.policy",
]
PURE_OS_NAMES = {"PathLike", "fspath", "fsencode", "fsdecode", "strerror"}
IMPURE = {"asyncio", "ctypes", "fcntl", "io", "mmap", "pathlib", "pyfuse3", "shutil", "signal", "socket", "subprocess"}
IMPURE |= {"tempfile", "threading", "trio"}

#: Calls that read or write an image file.
FILE_CALLS = {"pread", "preadv", "pwrite", "pwritev", "fdatasync", "ftruncate", "posix_fallocate"}

#: Where FUSE is spoken.
FUSE = {"fuse.operations", "fuse.session"}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
NAMES = {f"qedfuse.{module}" for module in [*MODULES, *NATIVE]}


def room_of(module: str) -> str:
    return module.partition(".")[0]


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


def own_imports_of(module: str) -> set[str]:
    return {name.removeprefix("qedfuse.") for name in imports_of(module) & NAMES} - {"", "qedfuse"}


def inner_modules() -> list[str]:
    """All modules but the package itself."""
    return [name for name in MODULES if name != "__init__"]


def test_every_room_has_its_place() -> None:
    assert {room_of(name) for name in inner_modules()} == {*RANK, "native"}


@pytest.mark.parametrize("module", inner_modules())
def test_imports_go_one_way(module: str) -> None:
    own = own_imports_of(module)
    rank = RANK.get(room_of(module), -1)  # native imports nothing
    upward = {name for name in own if name not in NATIVE and room_of(name) != "native" and RANK[room_of(name)] > rank}
    assert not upward, f"{module} must not import {', '.join(sorted(upward))}"


@pytest.mark.parametrize("room", RANK)
def test_no_cycle_in_a_room(room: str) -> None:
    members = [name for name in inner_modules() if room_of(name) == room]
    graph = {name: {own for own in own_imports_of(name) if own in members and own != name} for name in members}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_what_is_in_c_has_few_users() -> None:
    users: dict[str, set[str]] = {name: set() for name in NATIVE}
    for module in inner_modules():
        for name in own_imports_of(module) & set(NATIVE):
            users[name].add(module)
    assert users == NATIVE


@pytest.mark.parametrize("room", [name for name, file in MODULES.items() if file.name == "__init__.py"][1:])
def test_a_room_itself_holds_nothing(room: str) -> None:
    """Importing one of its modules must not load the others: `umount` and `status` need neither trio nor pyfuse3."""
    [docstring] = ast.parse(MODULES[room].read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)


def test_the_package_itself_offers_the_library_and_not_the_edge() -> None:
    own = own_imports_of("__init__")
    assert own
    assert not [name for name in own if RANK[room_of(name)] > RANK["library"]]


def test_the_architecture_shows_the_rooms_in_this_order() -> None:
    text = (PACKAGE / "ARCHITECTURE.md").read_text()
    drawing = text.partition("## Rooms")[2].partition("\n## ")[0]
    shown = re.findall(r"^    (\w+)/ ", drawing, re.MULTILINE)
    assert shown == [*[room for room in RANK if (PACKAGE / room).is_dir()], "native"]


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
        own = {name for name in own_imports_of(module) if name not in NATIVE and MODULES[name].name != "__init__.py"}
        assert own <= set(PURE), module


@pytest.mark.parametrize("module", MODULES)
def test_fuse_stays_at_the_edge(module: str) -> None:
    assert ("pyfuse3" in imports_of(module)) == (module in FUSE)


@pytest.mark.parametrize("module", [name for name in inner_modules() if room_of(name) not in ("fuse", "native")])
def test_the_wire_format_of_fuse_is_known_at_the_edge_alone(module: str) -> None:
    assert not re.search(r"\bFUSE_[A-Z]+|\bfuse_(?:in|out|read|write|init)\w*", MODULES[module].read_text())


@pytest.mark.parametrize("module", MODULES)
def test_no_message_of_fuse_is_packed_in_python(module: str) -> None:
    """`native/fastpath/reply.c` does it, and pyfuse3."""
    assert room_of(module) != "fuse" or "struct" not in imports_of(module)


@pytest.mark.parametrize("module", MODULES)
def test_image_data_goes_through_storage(module: str) -> None:
    """Tests replace `Storage` to inject faults and crashes: what goes past it is not tested."""
    allowed = {
        "host.file_storage": FILE_CALLS,
    }
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in FILE_CALLS - allowed.get(module, set()), node.lineno


def test_what_tests_share_stands_in_their_helpers() -> None:
    """A test that takes something from another one has that one's fixtures and marks, too."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len(files) > 100
    for file in files:
        assert not re.search(r"^\s*(from|import) tests\.(\w+\.)*test_", file.read_text(), re.MULTILINE), file.name
