"""A process that makes files in a directory for ever and says which of them are durable.

    python filing.py DIRECTORY SEED NUMBER

On standard output, a line a time: `m NAME`, the file was made, fsynced and renamed to that name, and the directory was
fsynced; `r NAME`, it is about to be removed; `e ERRNO`, a call has failed, the last line. A name is never used twice.
Runs by itself, without the project.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys


def content(seed: int, name: str) -> bytes:
    """What is in the file of this name: up to 200 kB."""
    rnd = random.Random(f"{seed}/{name}")
    size = rnd.choice((1, 700, 4096, 30_000, 200_000))
    return hashlib.shake_128(b"%d/%s" % (seed, name.encode())).digest(size)


def make(directory: str, seed: int, number: int) -> None:
    rnd = random.Random(f"{seed}/{number}")
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    made: list[str] = []
    while True:
        name = f"{number}-{rnd.getrandbits(40):x}"
        temporary = os.open(f"new{number}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, dir_fd=handle)
        data = content(seed, name)
        done = 0
        while done < len(data):
            done += os.write(temporary, data[done : done + 50_000])
        os.fsync(temporary)
        os.close(temporary)
        os.rename(f"new{number}", name, src_dir_fd=handle, dst_dir_fd=handle)
        os.fsync(handle)
        say(f"m {name}")
        made.append(name)
        if len(made) > 60:
            victim = made.pop(rnd.randrange(len(made)))
            say(f"r {victim}")
            os.unlink(victim, dir_fd=handle)


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


def main() -> None:
    directory, seed, number = sys.argv[1:]
    try:
        make(directory, int(seed), int(number))
    except OSError as error:
        say(f"e {error.errno}")


if __name__ == "__main__":
    main()
