"""What this kernel's FUSE can be trusted with."""

from __future__ import annotations

import re

#: The first of which it is known that a write past its page cache drops the pages that a reader has put there meanwhile
#: ("fuse: Invalidate the page cache after FOPEN_DIRECT_IO write", in 6.19 and in stable releases before).
_CACHE_IS_RIGHT = (6, 18, 44)


def cache_survives_direct_writes(release: str) -> bool:
    """Whether files may be open both past the page cache (FOPEN_DIRECT_IO) and by way of it, without stale pages.

    `release`: as of uname(2). Of what cannot be read it is not known.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    return found is not None and tuple(int(number or 0) for number in found.groups()) >= _CACHE_IS_RIGHT
