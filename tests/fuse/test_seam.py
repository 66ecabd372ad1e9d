"""The seam between the engine and the fast path: what each side relies on is checked. Where it does not hold, nothing
more goes to the image's file.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qedfuse.qed.allocator import Allocator
from qedfuse.qed.geometry import Geometry
from qedfuse.qed.image import Image
from qedfuse.qed.native_view import NativeView
from qedfuse.qed.range_lock import FOREVER
from qedfuse.sizes import HostOffset
from tests.helpers.images.images import TINY, Chain, assert_sound, contents, new_chain, open_chain
from tests.helpers.judges.expect import raises_errno
from tests.helpers.mounts.modes import NEEDS_NATIVE
from tests.helpers.mounts.mounts import is_mounted, need_fuse, wait_until
from tests.helpers.qemu.cli import ROOT, environment, is_free, qemu_img

CLUSTER = 4096
SIZE = 64 * CLUSTER


# -- what Python is told ----------------------------------------------------------------------------------------------


async def opened() -> tuple[Chain, Image, NativeView]:
    """There is a table, and its page is in memory: as when C writes into new clusters."""
    chain = await new_chain(SIZE, TINY)
    image = await open_chain(chain)
    await image.write(0, b"first")
    await image.flush()
    return chain, image, NativeView(image)


def take(image: Image, view: NativeView, clusters: int, first: int = 1) -> None:
    """As C does it: data, entries, and the word of it."""
    view.refresh()
    page = image.tables.l2.pages[0]
    for number in range(clusters):
        host = view.free + number * CLUSTER
        image.storage.write_nowait(host, b"new" + bytes([number]))
        page[first + number] = host
    note_taken(view, view.free, clusters)


def note_taken(view: NativeView, first: int, clusters: int = 1, pages: tuple[int, ...] = (0,)) -> None:
    view.note_taken(first=first, taken=clusters * CLUSTER, lost=0, filled=clusters * 4, pages=pages)


def test_what_was_offered_may_be_taken() -> None:
    async def main() -> None:
        chain, image, view = await opened()
        take(image, view, 3)
        take(image, view, 2, first=4)
        view.note_written()
        await image.write(10 * CLUSTER, b"python")
        assert image.failed is None
        await image.close()
        await assert_sound(chain.file)
        flat = await contents(chain)
        for number, byte in enumerate([0, 1, 2, 0, 1], start=1):
            assert flat[number * CLUSTER :][:4] == b"new" + bytes([byte])
        assert flat[10 * CLUSTER :][:6] == b"python"

    trio.run(main)


async def what_was_not_offered(image: Image, view: NativeView) -> None:
    async with image.locks.hold(0, 1, exclusive=False):
        view.refresh()
    note_taken(view, image.clusters.offer()[0])


async def what_was_offered_before(image: Image, view: NativeView) -> None:
    view.refresh()
    start = view.free
    async with image.locks.hold(0, 1, exclusive=False):
        view.refresh()
    note_taken(view, start)


async def not_from_the_front(image: Image, view: NativeView) -> None:
    view.refresh()
    note_taken(view, view.free + CLUSTER)


async def more_than_was_offered(image: Image, view: NativeView) -> None:
    view.refresh()
    note_taken(view, view.free, (view.free_end - view.free) // CLUSTER + 1)


async def more_in_all_than_was_offered(image: Image, view: NativeView) -> None:
    view.refresh()
    offered = (view.free_end - view.free) // CLUSTER
    note_taken(view, view.free)
    note_taken(view, view.free, offered)


async def what_python_has_taken_meanwhile(image: Image, view: NativeView) -> None:
    view.refresh()
    await image.write(20 * CLUSTER, b"python")
    note_taken(view, view.free)


async def while_a_range_is_locked(image: Image, view: NativeView) -> None:
    view.refresh()
    async with image.locks.hold(0, FOREVER, exclusive=False):
        note_taken(view, view.free)


async def a_page_that_is_not_there(image: Image, view: NativeView) -> None:
    view.refresh()
    note_taken(view, view.free, pages=(0, 5000))


BROKEN = [
    what_was_not_offered,
    what_was_offered_before,
    not_from_the_front,
    more_than_was_offered,
    more_in_all_than_was_offered,
    what_python_has_taken_meanwhile,
    while_a_range_is_locked,
    a_page_that_is_not_there,
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_where_a_rule_is_broken_nothing_more_goes_to_the_file(
    broken: Callable[[Image, NativeView], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        chain, image, view = await opened()
        tables = image.storage.file.pages.copy()  # type: ignore[attr-defined]
        await broken(image, view)
        assert image.failed is not None and image.failed.errno == errno.EIO
        view.refresh()
        assert (view.writable, view.free, view.free_end) == (False, 0, 0)
        for call in (image.flush(), image.write(0, b"x"), image.zero(0, 1), image.resize(SIZE // 2)):
            with raises_errno(errno.EIO):
                await call
        assert await image.read(0, 5) == b"first"
        with raises_errno(errno.EIO):
            await image.close()
        for index in range(1 + 2 * TINY.table_size):  # header and tables
            assert chain.file.pages.get(index) == tables.get(index)
        await assert_sound(chain.file, leaks=True)

    trio.run(main)
    (record,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert record.getMessage() == "image: the image is read-only from now on"
    assert record.exc_info


def test_clusters_are_taken_from_the_front() -> None:
    allocator = Allocator(Geometry(CLUSTER, 1), 10 * CLUSTER)
    allocator.take(HostOffset(10 * CLUSTER), CLUSTER)
    with pytest.raises(AssertionError, match="not the next free"):
        allocator.take(HostOffset(10 * CLUSTER), CLUSTER)
    allocator.take_back(HostOffset(2 * CLUSTER), 2 * CLUSTER)
    with pytest.raises(AssertionError, match="not the next free"):
        allocator.take(allocator.end, CLUSTER)
    allocator.take(HostOffset(2 * CLUSTER), 2 * CLUSTER)
    assert allocator.allocate(1) == (allocator.end - CLUSTER, CLUSTER)


# -- what C asks and tells --------------------------------------------------------------------------------------------

#: An extension of the real view.c, in which a rule can be broken.
SOURCE = r"""
#include "layer.c"
#include "page_index.c"
#include "view.c"

static PyObject *refresh(PyObject *Py_UNUSED(module), PyObject *args)
{
    Layer *layer;
    int dirty;
    if (!PyArg_ParseTuple(args, "O!p", &LayerType, &layer, &dirty))
        return NULL;
    layer->dirty = dirty;
    layer->taken = dirty ? 4096 : 0;
    return PyBool_FromLong(view_refresh(layer));
}

static PyObject *tell(PyObject *Py_UNUSED(module), PyObject *layer)
{
    view_tell((Layer *)layer);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"refresh", refresh, METH_VARARGS, NULL}, {"tell", tell, METH_O, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "seam", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit_seam(void);
PyMODINIT_FUNC PyInit_seam(void)
{
    if (!view_prepare() || PyType_Ready(&PageIndexType) < 0 || PyType_Ready(&LayerType) < 0)
        return NULL;
    PyObject *module = PyModule_Create(&definition);
    if (module && PyModule_AddObjectRef(module, "Layer", (PyObject *)&LayerType) < 0)
        Py_CLEAR(module);
    return module;
}
"""


@pytest.fixture(scope="module")
def seam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the extension `seam`."""
    directory = tmp_path_factory.mktemp("seam")
    (directory / "seam.c").write_text(SOURCE)
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    flags = ["-std=gnu11", "-O1", "-DNDEBUG", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    include = [f"-I{ROOT / 'qedfuse' / 'native' / 'fastpath'}", f"-I{sysconfig.get_path('include')}"]
    library = directory / "seam.so"
    subprocess.run([compiler, *flags, *include, str(directory / "seam.c"), "-o", str(library)], check=True)
    return directory


def run_seam(seam: Path, program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import seam\n{program}"]
    environ = environment({"PYTHONPATH": str(seam)})
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, preexec_fn=without_a_core)


def without_a_core() -> None:
    """A process that aborts leaves no file behind."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


#: What C knows of an image, by name.
VIEW = """
class View:
    cluster_bits, table_bits, data_start, l1_offset = 16, 15, 65536, 65536
    size, file_end, writable, free, free_end = 512, 0, True, 0, 0
    def __init__(self): self.calls = []
    def refresh(self): self.calls.append("refresh")
    def note_written(self): self.calls.append("written")
    def note_taken(self, first, taken, lost, filled, pages): self.calls.append((first, taken, lost, filled, pages))
view = View()
layer = seam.Layer(-1, 512, view=view)
"""


def test_the_numbers_are_not_asked_for_with_something_untold(seam: Path) -> None:
    done = run_seam(
        seam,
        VIEW
        + """
assert seam.refresh(layer, False) and len(view.calls) == 1
assert not seam.refresh(layer, True) and len(view.calls) == 1
seam.tell(layer)
assert seam.refresh(layer, False)
assert view.calls == ["refresh", (2**64 - 4096, 4096, 0, 0, ()), "refresh"]
seam.tell(layer)
assert view.calls[3:] == ["written"]
""",
    )
    assert done.returncode == 0, done.stderr
    assert "asked for before all writes were told of" in done.stderr


@pytest.mark.parametrize("broken", ["del View.free", "View.free = -1", "View.size = None", "View.refresh = None"])
def test_numbers_that_are_none_are_not_known(seam: Path, broken: str) -> None:
    done = run_seam(seam, f"{VIEW}\n{broken}\nassert not seam.refresh(layer, False)")
    assert done.returncode == 0, done.stderr
    assert "Exception ignored in" in done.stderr


@pytest.mark.parametrize("shape", ["cluster_bits = 27", "table_bits = 28", "l1_offset = -1", "data_start = 'x'"])
def test_a_shape_that_no_image_has_is_refused(seam: Path, shape: str) -> None:
    program = f"{VIEW}\nView.{shape}\ntry: seam.Layer(-1, 512, view=view)\nexcept Exception as error: print(error)"
    done = run_seam(seam, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("taken", [False, True])
def test_no_process_goes_on_that_could_not_tell_of_writes(seam: Path, taken: bool) -> None:
    done = run_seam(
        seam,
        f"""{VIEW}
def fail(self, **numbers):
    raise MemoryError("no memory")
View.note_{"taken" if taken else "written"} = fail
seam.refresh(layer, {taken})
print("still here", flush=True)
seam.tell(layer)
print("not here", flush=True)
""",
    )
    assert done.returncode == -signal.SIGABRT
    assert done.stdout == "still here\n"
    assert "Python could not be told of writes" in done.stderr


# -- a daemon in which a rule is broken -------------------------------------------------------------------------------

#: Runs the command line with an engine that breaks the rule NAME.
PROGRAM = """
import sys
import qedfuse.fuse.fastpath
from qedfuse.qed.native_view import NativeView
from qedfuse.cli.main import main

refresh, note_taken = NativeView.refresh, NativeView.note_taken

def shifted(self):
    refresh(self)
    if self.free:
        self.free += 1 << self.cluster_bits

def shifted_and_told(self, first, **told):
    self.free -= 1 << self.cluster_bits
    note_taken(self, first=first, **told)

def untold(self, **told):
    raise MemoryError("no memory")

name = sys.argv.pop(1)
if name == "shifted":
    NativeView.refresh, NativeView.note_taken = shifted, shifted_and_told
elif name == "untold":
    NativeView.note_taken = untold
sys.exit(main())
"""


def check(image: Path) -> None:
    """Nothing is corrupt; clusters may have leaked. The daemon may be about to let go of the file."""
    wait_until(lambda: is_free(image))
    assert subprocess.run(["qemu-img", "check", "-r", "all", str(image)], capture_output=True).returncode in (0, 3)


class TestDaemon:
    pytestmark = NEEDS_NATIVE

    @pytest.mark.parametrize("name", ["FALLOC_FL_KEEP_SIZE", "INLINE_WRITE_LIMIT"])
    def test_an_extension_that_knows_another_constant_is_not_used(self, name: str) -> None:
        """As if it had been left over from another release: the daemon goes on without it."""
        program = f"""
import qedfuse.host.file_storage
qedfuse.host.file_storage.{name} += 1
try: import qedfuse.fuse.fastpath
except ImportError as error: print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(" is another one in C\n")

    def mount(self, directory: Path, name: str) -> tuple[Path, Path, Path]:
        need_fuse()
        image, raw, log = directory / "disk.qed", directory / "disk.raw", directory / "log"
        qemu_img("create", "-q", "-f", "qed", image, "4M")
        raw.touch()
        words = ["mount", "-o", "direct_io", "--log-file", str(log), str(image), str(raw)]
        command = [sys.executable, "-c", PROGRAM, name, *words]
        done = subprocess.run(
            command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, preexec_fn=without_a_core
        )
        assert done.returncode == 0, done.stderr
        return image, raw, log

    def write(self, raw: Path) -> list[int]:
        """Write into new clusters. Returns the errnos."""
        errors = []
        fd = os.open(raw, os.O_RDWR)
        try:
            for number in range(20):
                try:
                    os.pwrite(fd, b"x" * 4096, number * (64 << 10))
                except OSError as error:
                    errors.append(error.errno or 0)
            os.fsync(fd)
        except OSError as error:
            errors.append(error.errno or 0)
        finally:
            try:
                os.close(fd)
            except OSError as error:
                errors.append(error.errno or 0)
        return errors

    def unmount(self, raw: Path) -> None:
        subprocess.run(["fusermount3", "-u", "-z", str(raw)], check=False)
        wait_until(lambda: not is_mounted(raw))

    def test_all_is_well_where_none_is_broken(self, tmp_path: Path) -> None:
        _image, raw, _log = self.mount(tmp_path, "none")
        try:
            assert self.write(raw) == []
        finally:
            self.unmount(raw)

    def test_clusters_that_are_not_the_next_ones(self, tmp_path: Path) -> None:
        image, raw, log = self.mount(tmp_path, "shifted")
        try:
            errors = self.write(raw)
        finally:
            self.unmount(raw)
        assert set(errors) == {errno.EIO}
        wait_until(lambda: "closing failed" in log.read_text())
        assert re.search(r"CRITICAL: .*disk.qed: the image is read-only from now on", log.read_text())
        assert "were taken, not offered" in log.read_text()
        check(image)

    def test_writes_that_cannot_be_told(self, tmp_path: Path) -> None:
        image, raw, log = self.mount(tmp_path, "untold")
        try:
            errors = self.write(raw)
        finally:
            self.unmount(raw)
        assert errors and set(errors) <= {errno.ECONNABORTED, errno.ENOTCONN}
        assert "MemoryError: no memory" in log.read_text()
        check(image)
