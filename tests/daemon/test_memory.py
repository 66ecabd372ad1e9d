"""Daemon and writer in one small memory cgroup: slower if need be, but it always finishes."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from qedfuse.daemon import dirty_limit, memory_limit
from qedfuse.daemon.dirty_limit import fit_options, set_dirty_limit
from qedfuse.fuse.options import MountOptions
from qedfuse.host import mountinfo as mounts
from tests.helpers.mounts.cgroups import memory_group
from tests.helpers.mounts.mounts import EXTRA_OPTIONS, aborted, mountpoint, need_fuse
from tests.helpers.qemu.cli import Result, qedfuse, qemu_img

MIB = 1 << 20
_CAP_SYS_RESOURCE = 24

# -- real mounts ------------------------------------------------------------------------------------------------------

WITHOUT = ("setpriv", "--bounding-set", "-sys_resource", "--inh-caps", "-sys_resource")


def _may_be_flusher() -> bool:
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) >> _CAP_SYS_RESOURCE & 1)


@pytest.mark.parametrize("capable", [False, True], ids=["no-capability", "flusher"])
@pytest.mark.parametrize("over", ["file", "directory"])
@pytest.mark.parametrize(("version", "limit"), [(1, 60), (1, 128), (2, 60), (2, 128)])
def test_writing_in_a_small_memory_cgroup_finishes(
    tmp_path: Path, version: int, limit: int, over: str, capable: bool
) -> None:
    need_fuse()
    if os.geteuid() != 0:
        pytest.skip("needs root to make a cgroup")
    if capable and not _may_be_flusher():
        pytest.skip("CAP_SYS_RESOURCE is missing here")
    size = (limit + 30) * MIB
    image, source = tmp_path / "disk.qed", tmp_path / "source"
    point, raw = mountpoint(tmp_path, over_file=over == "file")
    qemu_img("create", "-q", "-f", "qed", image, str(size))
    with source.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))

    with memory_group(version, limit * MIB) as group, ExitStack() as last, aborted(point):
        words = (*group.words, *(() if capable else WITHOUT))
        log = tmp_path / "log"
        assert qedfuse("mount", *EXTRA_OPTIONS, "--log-file", log, image, point, wrapper=words) == Result(0, "", "")
        command = [*group.words, "dd", f"if={source}", f"of={raw}", "bs=1M", "conv=notrunc"]
        writer = last.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE))  # waited for after the abort
        try:
            _out, complaints = writer.communicate(timeout=120)
        finally:
            writer.kill()
        assert writer.returncode == 0, (complaints, log.read_text())
        assert ("direct I/O" in qedfuse("status", point).out) is not capable
        assert qedfuse("umount", point) == Result(0, "", "")
        assert "WARNING" not in log.read_text() or not capable
    qemu_img("compare", "-f", "raw", "-F", "qed", source, image)


# -- what is chosen ---------------------------------------------------------------------------------------------------


def test_nothing_changes_where_memory_is_not_limited() -> None:
    for flusher in (False, True):
        assert fit_options(MountOptions(), None, flusher=flusher) == MountOptions()


def test_with_a_limit_only_a_flusher_has_a_page_cache() -> None:
    assert fit_options(MountOptions(), 60 * MIB, flusher=True) == MountOptions()
    assert fit_options(MountOptions(), 60 * MIB, flusher=False).direct_io
    assert fit_options(MountOptions(fixed_size=True), 60 * MIB, flusher=False).direct_io  # mmap(2) dirties pages, too
    assert not fit_options(MountOptions(read_only=True), 60 * MIB, flusher=False).direct_io


def test_a_device_that_is_not_there_has_no_limit_to_set() -> None:
    set_dirty_limit("0:0", None)
    set_dirty_limit("0:0", 60 * MIB)


def test_whether_it_is_a_flusher_is_known() -> None:
    script = "from qedfuse.daemon.dirty_limit import become_flusher; print(become_flusher())"
    env = {**os.environ, "PYTHONPATH": str(Path(dirty_limit.__file__).parents[2])}
    assert _printed(["python3", "-c", script], env) == str(_may_be_flusher())
    if os.geteuid() == 0:
        assert _printed([*WITHOUT, "python3", "-c", script], env) == "False"


def _printed(command: list[str], env: dict[str, str]) -> str:
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()


# -- the limit --------------------------------------------------------------------------------------------------------


class Machine:
    """A cgroup file system that is made up."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top = tmp_path / "cg"
        self.top.mkdir()
        self._cgroup, self._mountinfo = tmp_path / "cgroup", tmp_path / "mountinfo"
        monkeypatch.setattr(memory_limit, "_CGROUP", str(self._cgroup))
        monkeypatch.setattr(mounts, "_MOUNTINFO", str(self._mountinfo))

    def is_in(self, cgroup: str, mount: str) -> None:
        self._cgroup.write_text(cgroup)
        self._mountinfo.write_text(f"1 0 254:0 / / rw - ext4 /dev/root rw\n{mount}\n".replace("TOP", str(self.top)))

    def set(self, name: str, text: object) -> None:
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


V1 = "31 30 0:27 / TOP rw shared:9 - cgroup cgroup rw,memory"
V2 = "31 30 0:27 / TOP rw - cgroup2 cgroup2 rw,nsdelegate"


def test_the_limit_of_version_1_is_that_of_all_ancestors(machine: Machine) -> None:
    machine.is_in("5:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n", V1)
    machine.set("a/b/memory.stat", f"cache 5\nhierarchical_memory_limit {100 * MIB}\ntotal_cache 5")
    assert memory_limit.memory_limit() == 100 * MIB
    machine.set("a/b/memory.stat", "hierarchical_memory_limit 9223372036854771712")
    assert memory_limit.memory_limit() is None


def test_the_limit_of_version_2_is_the_smallest_on_the_way_up(machine: Machine) -> None:
    machine.is_in("0::/a/b\n", V2)
    machine.set("a/b/memory.max", "max")
    machine.set("a/memory.max", 300 * MIB)
    assert memory_limit.memory_limit() == 300 * MIB
    machine.set("a/b/memory.max", 200 * MIB)
    assert memory_limit.memory_limit() == 200 * MIB
    machine.set("a/memory.high", 150 * MIB)
    assert memory_limit.memory_limit() == 150 * MIB


def test_a_container_sees_a_part_of_the_hierarchy(machine: Machine) -> None:
    machine.is_in("4:memory:/docker/1/x\n", V1.replace(" / ", " /docker/1 ", 1))
    machine.set("x/memory.stat", f"hierarchical_memory_limit {100 * MIB}")
    assert memory_limit.memory_limit() == 100 * MIB
    machine.is_in("0::/\n", V2)
    machine.set("memory.max", 70 * MIB)
    assert memory_limit.memory_limit() == 70 * MIB


def test_names_that_mountinfo_escapes(machine: Machine) -> None:
    """systemd's own have backslashes."""
    machine.is_in("0::/a\\x2db/c\n", V2.replace(" / ", r" /a\134x2db ", 1))
    machine.set("c/memory.max", 80 * MIB)
    assert memory_limit.memory_limit() == 80 * MIB


def test_more_than_the_machine_has_is_no_limit(machine: Machine) -> None:
    machine.is_in("0::/a\n", V2)
    machine.set("a/memory.max", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    assert memory_limit.memory_limit() is None


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/not/there\n", "4:memory:/x\n0::/../y\n"])
def test_what_cannot_be_seen_is_no_limit(machine: Machine, text: str) -> None:
    machine.is_in(text, V2)
    assert memory_limit.memory_limit() is None
