"""The words behind `-o`: what qedfuse, the kernel and /etc/fstab each mean by them. Pure.

Source: mount(8) "FILESYSTEM-INDEPENDENT MOUNT OPTIONS", fuse(8), systemd.mount(5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from qedfuse.chain.policy import BackingPolicy
from qedfuse.errors import UsageError


@dataclass(frozen=True)
class MountOptions:
    """How a mount looks and behaves.

    `uid`, `gid` and `umask` (permission bits to take away) override what the image file says. `default_permissions`:
    the kernel enforces owner and mode; with `allow_other` it always does. `direct_io`: no page cache. `fixed_size`:
    the raw files neither grow nor shrink. `kernel`: words that go to the kernel as they are.
    """

    read_only: bool = False
    allow_other: bool = False
    default_permissions: bool = False
    direct_io: bool = False
    fixed_size: bool = False
    uid: int | None = None
    gid: int | None = None
    umask: int | None = None
    no_backing: bool = False
    backing_root: str | None = None
    kernel: frozenset[str] = frozenset()

    @property
    def checks_permissions(self) -> bool:
        return self.default_permissions or self.allow_other

    @property
    def writeback(self) -> bool:
        """Whether the kernel may gather writes in its page cache and send them later.

        Not with a fixed size: the kernel would let a file grow in its cache, and a process that writes past the end
        would hear of it too late, or never stop.
        """
        return not (self.read_only or self.direct_io or self.fixed_size)

    @property
    def policy(self) -> BackingPolicy:
        return BackingPolicy(allowed=not self.no_backing, root=self.backing_root)


#: What mount(8), systemd and /etc/fstab say to each other, or what a fuse mount has anyway.
_IGNORED = frozenset(
    (
        *("defaults", "auto", "noauto", "fail", "nofail", "user", "nouser", "users", "nousers", "owner", "noowner"),
        *("group", "nogroup", "_netdev", "dev", "nodev", "suid", "nosuid", "exec", "async"),
        *("atime", "relatime", "norelatime", "strictatime", "nostrictatime", "lazytime", "nolazytime", "diratime"),
        *("iversion", "noiversion", "mand", "nomand", "silent", "loud"),
    )
)
_IGNORED_PREFIXES = ("x-", "X-", "comment=")
_KERNEL = frozenset(("noexec", "noatime", "nodiratime", "sync", "dirsync"))

_FLAGS: dict[str, dict[str, bool]] = {
    "ro": {"read_only": True},
    "rw": {"read_only": False},
    "allow_other": {"allow_other": True},
    "default_permissions": {"default_permissions": True},
    "direct_io": {"direct_io": True},
    "fixed_size": {"fixed_size": True},
    "no_backing": {"no_backing": True},
}


def parse_mount_options(texts: Iterable[str]) -> MountOptions:
    """The options in the comma-separated `texts`; of two that contradict the later one counts.

    Raises UsageError for an unknown word, or a value that makes no sense.
    """
    options = MountOptions()
    for text in texts:
        for word in filter(None, (word.strip() for word in text.split(","))):
            options = _apply(options, word)
    return options


def _apply(options: MountOptions, word: str) -> MountOptions:
    name, equals, value = word.partition("=")
    if not equals and name in _FLAGS:
        changes: dict[str, Any] = dict(_FLAGS[name])
        return replace(options, **changes)
    if equals and name in _VALUES:
        changes = {name: _VALUES[name](name, value)}
        return replace(options, **changes)
    if word in _KERNEL:
        return replace(options, kernel=options.kernel | {word})
    if word in _IGNORED or word.startswith(_IGNORED_PREFIXES):
        return options
    if name in _VALUES:
        raise UsageError("", f"mount option {name!r} needs a value ({name}=...)")
    if name in _FLAGS:
        raise UsageError("", f"mount option {name!r} takes no value")
    raise UsageError("", f"unknown mount option {word!r} (known are {', '.join(sorted(_FLAGS))}, {_VALUE_NAMES})")


def _number(name: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal()) or int(value) >= 0xFFFFFFFF:
        raise UsageError("", f"mount option {name}={value}: {value!r} is not a numeric id")
    return int(value)


def _umask(name: str, value: str) -> int:
    try:
        mask = int(value, 8)
    except ValueError:
        mask = -1
    if not 0 <= mask <= 0o777 or not value.isdecimal():
        raise UsageError("", f"mount option {name}={value}: {value!r} is not an octal mask from 000 to 777")
    return mask


def _directory(name: str, value: str) -> str:
    if not value:
        raise UsageError("", f"mount option {name!r} needs a directory")
    return value


_VALUES: dict[str, Callable[[str, str], object]] = {
    "uid": _number,
    "gid": _number,
    "umask": _umask,
    "backing_root": _directory,
}
_VALUE_NAMES = ", ".join(f"{name}=" for name in _VALUES)
