"""The command line as a frame: which command runs, what it prints when something goes wrong, and how fast it starts."""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import qedfuse as package
from qedfuse.cli.main import COMMANDS, _Entry, main
from qedfuse.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, InUseError, QedfuseError, UsageError
from qedfuse.text import printable
from tests.helpers.qemu.cli import Result, environment, one_line, qedfuse, qemu_img

#: Root may do anything; without these it has to ask, as everybody has.
UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()

calls: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
error_to_raise: BaseException = Exception()


@click.command()
@click.option("-o", "options", multiple=True)
@click.argument("words", nargs=-1)
def fake_mount(options: tuple[str, ...], words: tuple[str, ...]) -> int:
    calls.append((options, words))
    return 7


@click.command()
def failing() -> None:
    raise error_to_raise


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMANDS, "mount", _Entry(f"{__name__}:fake_mount", ""))
    qemu_img("create", "-q", "-f", "qed", "a.qed", "1M")
    calls.clear()
    return "a.qed"


def run_failing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: BaseException) -> Result:
    monkeypatch.setitem(COMMANDS, "failing", _Entry(f"{__name__}:failing", ""))
    monkeypatch.setattr(sys.modules[__name__], "error_to_raise", error)
    code = main(["failing"])
    return Result(code, *capfd.readouterr())


class TestDispatch:
    @pytest.mark.parametrize(
        ("args", "options"),
        [
            (["a.qed", "mnt"], ()),
            (["a.qed", "mnt", "-o", "ro"], ("ro",)),
            (["-o", "ro", "a.qed", "mnt"], ("ro",)),
            (["a.qed", "-o", "ro", "mnt"], ("ro",)),
            (["-oro", "a.qed", "mnt", "-o", "rw,uid=0"], ("ro", "rw,uid=0")),
            (["mount", "-o", "ro", "a.qed", "mnt"], ("ro",)),
            (["mount", "a.qed", "mnt", "-o", "ro"], ("ro",)),
            (["--", "a.qed", "mnt"], ()),
            (["-o", "info", "a.qed", "mnt"], ("info",)),
        ],
    )
    def test_mount(self, image: str, args: list[str], options: tuple[str, ...]) -> None:
        assert main(args) == 7
        assert calls == [(options, ("a.qed", "mnt"))]

    def test_image_named_as_a_command(self, image: str) -> None:
        os.rename(image, "info")
        assert main(["./info", "mnt"]) == 7
        assert main(["mount", "info", "mnt"]) == 7
        assert calls == [((), ("./info", "mnt")), ((), ("info", "mnt"))]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([], "missing command"),
            (["inof", "a.qed"], "no such command: 'inof'"),
            (["a.qed"], "no such command: 'a.qed'"),
            (["--frobnicate"], "no such option"),
            (["info"], "missing argument 'IMAGE'"),
            (["info", "a.qed", "b.qed"], "unexpected extra argument"),
            (["info", "--frobnicate", "a.qed"], "no such option"),
            (["info", "--output", "xml", "a.qed"], "'xml' is not one of"),
            (["map", "--start-offset", "-1", "a.qed"], "'-1' is no size"),
            (["map", "--max-length", "x", "a.qed"], "'x' is no size"),
            (["create", "a.qed", "lots"], "'lots' is no size"),
            (["convert", "-O", "qed", "-o", "backing_file=a.qed,backing_fmt=vmdk", "a", "b"], "'vmdk' is not one of"),
            (["convert", "-O", "qed", "-o", "backing_fmt=raw", "a", "b"], "it needs -B"),
        ],
    )
    def test_usage_errors(self, image: str, capfd: pytest.CaptureFixture[str], args: list[str], message: str) -> None:
        code = main(args)
        one_line(Result(code, *capfd.readouterr()), EXIT_USAGE, message, "--help'")
        assert not calls


class TestHelp:
    def test_help(self, capfd: pytest.CaptureFixture[str]) -> None:
        for option in ("-h", "--help"):
            assert main([option]) == 0
            out, err = capfd.readouterr()
            assert err == ""
            assert all(f"\n  {name} " in out for name in COMMANDS)
            assert "Exit codes: 0 done, 1 failed" in " ".join(out.split())
            assert "130 interrupted" in " ".join(out.split())

    @pytest.mark.parametrize("name", ["create", "info", "map"])
    def test_help_of_a_command(self, capfd: pytest.CaptureFixture[str], name: str) -> None:
        assert main([name, "--help"]) == 0
        assert f"Usage: qedfuse {name}" in capfd.readouterr().out

    @pytest.mark.parametrize("name", list(COMMANDS))
    def test_table_is_right(self, name: str) -> None:
        code = f"from qedfuse.cli.main import qedfuse; print(qedfuse.get_command(None, {name!r}).name)"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{name}\n"

    def test_version(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capfd.readouterr().out == f"qedfuse {package.__version__}\n"


class TestStart:
    """`info` must start in 0.2 s: it loads only what it needs."""

    @pytest.mark.parametrize("args", [["--help"], ["--version"], ["info", "a.qed"], ["info", "nothing"], ["nothing"]])
    def test_nothing_heavy_is_loaded(self, image: str, args: list[str]) -> None:
        code = "import sys; from qedfuse.cli.main import main; main(sys.argv[1:]); print(*sys.modules)"
        command = [sys.executable, "-c", code, *args]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        loaded = set(done.stdout.splitlines()[-1].split())
        assert "qedfuse.cli.main" in loaded
        assert not loaded & {"trio", "pyfuse3", "rich", "asyncio", "ctypes"}

    def test_info_starts_fast(self, image: str) -> None:
        # Processor time: what a person waits for on an idle machine, and the same on a busy one.
        times = []
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert qedfuse("info", image).code == 0
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(times) < 0.2

    def test_package_is_lazy(self) -> None:
        code = (
            "import sys, qedfuse; assert 'trio' not in sys.modules; qedfuse.open_image; qedfuse.Image;"
            "qedfuse.BackingPolicy; assert 'trio' in sys.modules; assert set(qedfuse.__all__) <= set(dir(qedfuse));"
            "print(all(hasattr(qedfuse, name) for name in qedfuse.__all__), hasattr(qedfuse, 'nothing'))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
        )
        assert done.stdout == "True False\n"


class TestErrors:
    """What a command raises becomes one line and an exit code."""

    @pytest.mark.parametrize(
        ("error", "code", "line"),
        [
            (QedfuseError("x.qed", "is wrong"), EXIT_FAILED, "qedfuse: x.qed: is wrong"),
            (UsageError("x.qed", "makes no sense"), EXIT_USAGE, "qedfuse: x.qed: makes no sense"),
            (FileNotFoundError(2, "x", "x.qed"), EXIT_FAILED, "qedfuse: x.qed: no such file or directory"),
            (OSError(28, "x", "x.qed"), EXIT_FAILED, "qedfuse: x.qed: no space left on device"),
            (OSError(32, "x", "x.qed"), EXIT_FAILED, "qedfuse: x.qed: broken pipe"),
            (click.ClickException("went wrong"), EXIT_FAILED, "qedfuse: went wrong"),
            (MemoryError(), EXIT_FAILED, "qedfuse: out of memory"),
            (QedfuseError("a\nb\x1b[1m", "bad"), EXIT_FAILED, "qedfuse: a\\nb\\x1b[1m: bad"),
            (ExceptionGroup("g", [InUseError("x", "in use")]), EXIT_FAILED, "qedfuse: x: in use"),
            (
                ExceptionGroup("g", [OSError(5, "io"), ExceptionGroup("h", [UsageError("x", "senseless")])]),
                EXIT_USAGE,
                "qedfuse: x: senseless",
            ),
            (
                ValueError("oops"),
                EXIT_FAILED,
                "qedfuse: internal error: ValueError: oops; this is a bug (QEDFUSE_DEBUG=1 shows where)",
            ),
            (
                ExceptionGroup("g", [InUseError("x", "in use"), KeyError("k")]),
                EXIT_FAILED,
                "qedfuse: internal error: KeyError: 'k'; this is a bug (QEDFUSE_DEBUG=1 shows where)",
            ),
        ],
    )
    def test_line(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        error: BaseException,
        code: int,
        line: str,
    ) -> None:
        monkeypatch.delenv("QEDFUSE_DEBUG", raising=False)
        assert run_failing(monkeypatch, capfd, error) == (code, "", line + "\n")

    @pytest.mark.parametrize(
        "error",
        [
            KeyboardInterrupt(),
            click.Abort(),
            BaseExceptionGroup("g", [KeyboardInterrupt(), InUseError("x", "in use")]),
        ],
    )
    def test_interrupt(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: BaseException
    ) -> None:
        assert run_failing(monkeypatch, capfd, error) == (EXIT_INTERRUPTED, "", "")

    def test_traceback_on_demand(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("QEDFUSE_DEBUG", "1")
        result = run_failing(monkeypatch, capfd, ValueError("oops"))
        assert "Traceback (most recent call last)" in result.err
        assert "raise error_to_raise" in result.err
        assert "this is a bug" in result.err.splitlines()[-1]

    def test_printable(self) -> None:
        assert printable("plain: ünïcødé 名, \udcff") == "plain: ünïcødé 名, \udcff"
        assert printable("\x00\t\r\n\x7f\u202e\x9b") == "\\x00\\t\\r\\n\\x7f\\u202e\\x9b"


def make_directory(path: Path) -> None:
    path.mkdir()


def make_text(path: Path) -> None:
    path.write_text("not an image, but long enough to be one " * 100)


def make_empty(path: Path) -> None:
    path.touch()


def make_short(path: Path) -> None:
    path.write_bytes(b"QED\0" + bytes(30))


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_cut_off(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qed", path, "1M")
    os.truncate(path, 70_000)


def make_unreadable(path: Path) -> None:
    qemu_img("create", "-q", "-f", "qed", path, "1M")
    path.chmod(0)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


def make_future(path: Path) -> None:
    """An image with a feature that nobody has thought of yet."""
    qemu_img("create", "-q", "-f", "qed", path, "1M")
    with path.open("r+b") as file:
        file.seek(16)
        file.write(struct.pack("<Q", 8))


FILES: list[tuple[Callable[[Path], None], str]] = [
    (lambda _path: None, "no such file or directory"),
    (make_directory, "is a directory"),
    (make_text, "not a qed image"),
    (make_empty, "not a qed image"),
    (make_short, "the header is cut off"),
    (make_fifo, "is not a regular file"),
    (make_cut_off, "the file is cut off"),
    (make_unreadable, "permission denied"),
    (make_loop, "too many levels of symbolic links"),
    (make_future, "unsupported qed feature bits 0x8"),
]


class TestFiles:
    @pytest.mark.parametrize("command", [["info"], ["info", "--backing-chain"], ["info", "--untrusted"], ["map"]])
    @pytest.mark.parametrize(("make", "message"), FILES, ids=[message.replace(" ", "-") for _, message in FILES])
    def test_image(self, tmp_path: Path, command: list[str], make: Callable[[Path], None], message: str) -> None:
        path = tmp_path / "disk image.qed"
        make(path)
        result = qedfuse(*command, path, wrapper=UNPRIVILEGED)
        one_line(result, EXIT_FAILED, f"qedfuse: {path}: ", message)
        assert result.out == ""

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (make_directory, "is a directory"),
            (make_fifo, "is not a regular file"),
            (make_unreadable, "permission denied"),
            (make_loop, "too many levels of symbolic links"),
        ],
    )
    def test_create(self, tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
        path = tmp_path / "a.qed"
        make(path)
        one_line(qedfuse("create", path, "1M", wrapper=UNPRIVILEGED), EXIT_FAILED, f"qedfuse: {path}: ", message)

    def test_create_in_no_directory(self, tmp_path: Path) -> None:
        path = tmp_path / "none" / "a.qed"
        one_line(qedfuse("create", path, "1M"), EXIT_FAILED, f"qedfuse: {path}: ", "no such file or directory")

    def test_create_in_a_directory_of_others(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o555)
        try:
            path = tmp_path / "a.qed"
            result = qedfuse("create", path, "1M", wrapper=UNPRIVILEGED)
        finally:
            tmp_path.chmod(0o755)
        one_line(result, EXIT_FAILED, f"qedfuse: {path}: ", "permission denied")


class TestOutput:
    @pytest.fixture
    def long_output(self, tmp_path: Path) -> Path:
        """An image whose map is some megabytes long."""
        path = tmp_path / "a.qed"
        assert main(["create", "-q", "-o", "cluster_size=4k,table_size=16", str(path), "64M"]) == 0
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(struct.pack("<2Q", 17 * 4096, 33 * 4096))
            file.seek(17 * 4096)
            file.write(struct.pack("<16384Q", *((49 + (number ^ 1)) * 4096 for number in range(16384))))
            file.truncate((49 + 16384) * 4096)
        return path

    def test_reader_goes_away(self, long_output: Path) -> None:
        command = [sys.executable, "-m", "qedfuse", "map", "--output=json", str(long_output)]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read(1) == b"["
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(30) == EXIT_FAILED

    @pytest.mark.parametrize("command", [["info"], ["map"], ["map", "--output=json"]])
    def test_disk_of_stdout_is_full(self, long_output: Path, command: list[str]) -> None:
        with open("/dev/full", "w") as full:
            words = [sys.executable, "-m", "qedfuse", *command, str(long_output)]
            done = subprocess.run(
                words, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
            )
        one_line(Result(done.returncode, "", done.stderr), EXIT_FAILED, "no space left on device")

    def test_closed_output(self, long_output: Path) -> None:
        for redirect, code in [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0)]:
            words = f'"$0" -m qedfuse info "$1" {redirect}'
            done = subprocess.run(
                ["sh", "-c", words, sys.executable, str(long_output)], env=environment(), check=False, timeout=60
            )
            assert done.returncode == code

    def test_interrupt(self, long_output: Path) -> None:
        """Ctrl-C while the command writes into a pipe that nobody empties."""
        command = [sys.executable, "-m", "qedfuse", "map", "--output=json", str(long_output)]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"["
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (EXIT_INTERRUPTED, b"")
