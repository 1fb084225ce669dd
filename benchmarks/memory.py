"""Does every contestant get memory of the same kind? Imports no torch.

A virtual machine may give free memory back to its host, and its first touch then costs five times as much: whether a
contestant meets such pages is luck. A machine that has been at work for a while has none, its free memory is page cache.
So before each run the cache is filled, from a file with holes that takes no disk.
"""

from __future__ import annotations

import os
from pathlib import Path

LEFT_FREE = 700 << 20
_STEP = 1 << 20


class FullCache:
    """The page cache, to be filled again and again. path: where the file with holes is made."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._bytes = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with self._path.open("wb") as file:
            file.truncate(self._bytes)

    def fill(self) -> None:
        """Until hardly anything is free, or for one round through the file: a container may not let us."""
        buffer = bytearray(_STEP)
        with self._path.open("rb", buffering=0) as file:
            for _ in range(0, self._bytes, 64 * _STEP):
                if _free() < LEFT_FREE:
                    return
                for _ in range(64):
                    os.preadv(file.fileno(), [buffer], self._at)
                    self._at = (self._at + _STEP) % self._bytes


def _free() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree"):
            return int(line.split()[1]) << 10
    return 0
