"""The words behind -o."""

from __future__ import annotations

import pytest

from qedfuse.chain.policy import BackingPolicy
from qedfuse.errors import EXIT_USAGE, UsageError
from qedfuse.fuse.options import MountOptions, parse_mount_options

FSTAB = (
    "defaults,noauto,nofail,user,users,_netdev,x-systemd.automount,X-mount.mkdir,comment=a b,dev,nodev,suid,nosuid,exec"
)


def test_nothing_said_is_the_default() -> None:
    assert parse_mount_options([]) == MountOptions()
    assert parse_mount_options(["", ",,"]) == MountOptions()


def test_every_option() -> None:
    text = (
        "ro,allow_other,default_permissions,direct_io,fixed_size,uid=0,gid=65534,umask=027,no_backing,backing_root=/a b"
    )
    assert parse_mount_options([text]) == MountOptions(
        read_only=True,
        allow_other=True,
        default_permissions=True,
        direct_io=True,
        fixed_size=True,
        uid=0,
        gid=65534,
        umask=0o27,
        no_backing=True,
        backing_root="/a b",
    )


def test_later_words_win() -> None:
    assert parse_mount_options(["ro,uid=1", "rw,uid=2"]) == MountOptions(uid=2)
    assert parse_mount_options(["ro", "gid=3,rw"]) == MountOptions(gid=3)


def test_fstabs_own_words_mean_nothing_here() -> None:
    assert parse_mount_options([FSTAB]) == MountOptions()


def test_the_kernels_words_are_passed_on() -> None:
    assert parse_mount_options(["noexec,noatime,sync"]).kernel == {"noexec", "noatime", "sync"}


@pytest.mark.parametrize(
    "word",
    [
        *("bogus", "uid", "uid=", "uid=root", "uid=-1", "uid=4294967295", "gid=0x1", "uid=\u0661", "umask=8"),
        *("umask=1000", "umask=0o7", "umask=-1", "ro=1", "direct_io=", "backing_root", "backing_root="),
        *("max_read=4096", "fsname=x"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_mount_options(["ro", word])
    assert "\n" not in str(caught.value)
    assert word.partition("=")[0] in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("text", "writeback", "checks"),
    [
        ("", True, False),
        ("ro", False, False),
        ("direct_io", False, False),
        ("fixed_size", False, False),
        ("allow_other", True, True),
        ("default_permissions", True, True),
    ],
)
def test_what_follows_from_them(text: str, writeback: bool, checks: bool) -> None:
    options = parse_mount_options([text])
    assert (options.writeback, options.checks_permissions) == (writeback, checks)


def test_the_policy_for_backing_files() -> None:
    assert parse_mount_options(["no_backing"]).policy == BackingPolicy(allowed=False)
    assert parse_mount_options(["backing_root=/x"]).policy == BackingPolicy(root="/x")
